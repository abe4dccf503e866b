"""Dtypes of a safetensors file: their sizes, how numpy and torch see them, and floats rounded from one to another."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Dtype:
    """A dtype of HDR-4.

    Attributes:
        name: in the header of a file.
        nbytes: of one element.
        numpy: little-endian numpy dtype of the bytes; an unsigned integer where numpy has no such type.
        torch: torch's name, which ``config.json`` uses too; None for dtypes that this package leaves as bytes.
    """

    name: str
    nbytes: int
    numpy: str
    torch: str | None = None


DTYPES = {
    dtype.name: dtype
    for dtype in (
        Dtype("BOOL", 1, "|b1", "bool"),
        Dtype("U8", 1, "|u1", "uint8"),
        Dtype("I8", 1, "|i1", "int8"),
        Dtype("F8_E4M3", 1, "|u1"),
        Dtype("F8_E5M2", 1, "|u1"),
        Dtype("F8_E8M0", 1, "|u1"),
        Dtype("F8_E4M3FNUZ", 1, "|u1"),
        Dtype("F8_E5M2FNUZ", 1, "|u1"),
        Dtype("I16", 2, "<i2", "int16"),
        Dtype("U16", 2, "<u2"),
        Dtype("F16", 2, "<f2", "float16"),
        Dtype("BF16", 2, "<u2", "bfloat16"),
        Dtype("I32", 4, "<i4", "int32"),
        Dtype("U32", 4, "<u4"),
        Dtype("F32", 4, "<f4", "float32"),
        Dtype("C64", 8, "<c8"),
        Dtype("F64", 8, "<f8", "float64"),
        Dtype("I64", 8, "<i8", "int64"),
        Dtype("U64", 8, "<u8"),
    )
}
FLOATS = ("F16", "BF16", "F32")  # what parameters and deltas are stored in (CFG-2, TSK-6)
BY_NAME = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # torch's name -> ours, for options of commands


def stored(raw: NDArray[np.uint8], dtype: str, shape: tuple[int, ...]) -> NDArray[np.generic]:
    """View bytes as an array of the file's dtype; BF16 is seen as uint16. No copy, no alignment needed."""
    array: NDArray[np.generic] = np.ndarray(shape, np.dtype(DTYPES[dtype].numpy), buffer=raw.data)
    return array


def to_float32(values: NDArray[np.generic], dtype: str, *, copy: bool = True) -> NDArray[np.float32]:
    """Float32 values of an array that :func:`stored` gave; exact but for F64, whose values are rounded.

    With `copy` False an F32 array is returned as it is.
    """
    if dtype == "BF16":
        wide = values.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return values.astype(np.float32, copy=copy)


def from_float32(values: NDArray[np.float32], dtype: str) -> NDArray[np.generic]:
    """Array of the file's dtype, rounded to nearest even; BF16 as uint16. Overflow gives infinity."""
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype("<f2")
    if dtype == "BF16":
        word = np.ascontiguousarray(values, np.float32).view(np.uint32)
        # Adding half of the last place, less one if the result would be odd, rounds to nearest even.
        return ((word + 0x7FFF + ((word >> 16) & 1)) >> 16).astype("<u2")
    return values.astype("<f4")


def round_to(values: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    """`values` rounded to `dtype`, as float32."""
    return to_float32(from_float32(values, dtype), dtype)
