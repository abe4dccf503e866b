"""Float dtypes of the file as numpy sees them: bytes to float32 and back, with one rounding."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FLOATS = ("F16", "BF16", "F32")
BY_NAME = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # as people write them -> in a file
_STORED = {"U8": "<u1", "F16": "<f2", "BF16": "<u2", "F32": "<f4"}


def stored(raw: NDArray[np.uint8], dtype: str, shape: tuple[int, ...]) -> NDArray[np.generic]:
    """View bytes as an array of the file's dtype; BF16 is seen as uint16. No copy, no alignment needed."""
    array: NDArray[np.generic] = np.ndarray(shape, np.dtype(_STORED[dtype]), buffer=raw.data)
    return array


def to_float32(values: NDArray[np.generic], dtype: str) -> NDArray[np.float32]:
    """Exact float32 values of an array that :func:`stored` gave."""
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


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
