"""Tensors with given or random content, and the bytes of safetensors and JSON files that hold them.

Random content comes from SHAKE-256 of a label, so it is the same on every machine and with every version of numpy.
"""

from __future__ import annotations

import hashlib
import json
import struct
from math import ceil, prod
from typing import Any

import numpy as np

from .reader import Json, Tensor, Tensors

Files = dict[str, bytes]  # path below some directory -> content


def hexed(dtype: str, shape: tuple[int, ...], text: str) -> Tensor:
    return Tensor(dtype, shape, bytes.fromhex(text))


def bytes_tensor(values: np.ndarray) -> Tensor:
    return Tensor("U8", values.shape, values.astype(np.uint8).tobytes())


def floats(values: Any, dtype: str = "F32") -> Tensor:
    """Values that `dtype` holds exactly."""
    array = np.asarray(values, dtype=np.float32)
    if dtype == "BF16":
        tensor = Tensor(dtype, array.shape, (array.view(np.uint32) >> 16).astype("<u2").tobytes())
    else:
        tensor = Tensor(dtype, array.shape, array.astype({"F16": "<f2", "F32": "<f4"}[dtype]).tobytes())
    assert np.array_equal(tensor.f32().view(np.uint32), array.view(np.uint32)), "the dtype does not hold these values"
    return tensor


def with_bytes(tensor: Tensor, at: int, text: str) -> Tensor:
    """The same tensor with the bytes from `at` on replaced by hexadecimal `text`."""
    new = bytes.fromhex(text)
    return Tensor(tensor.dtype, tensor.shape, tensor.data[:at] + new + tensor.data[at + len(new) :])


def replaced(content: bytes, old: str, new: str) -> bytes:
    """The text with the first occurrence of `old` replaced."""
    assert old.encode() in content, old
    return content.replace(old.encode(), new.encode(), 1)


def compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def pretty(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()


def header_of(tensors: Tensors, metadata: dict[str, str] | None = None) -> Json:
    header: Json = {} if metadata is None else {"__metadata__": metadata}
    begin = 0
    for name, tensor in tensors.items():
        end = begin + len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    return header


def data_of(tensors: Tensors) -> bytes:
    return b"".join(tensor.data for tensor in tensors.values())


def file_of(header: str | bytes, data: bytes) -> bytes:
    raw = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(raw)) + raw + data


def padded(header: str) -> str:
    """The header with spaces to a multiple of 8 bytes, as most writers do; HDR-8 does not ask for it."""
    return header + " " * (-len(header.encode()) % 8)


def safetensors(tensors: Tensors, metadata: dict[str, str] | None = None) -> bytes:
    return file_of(padded(compact(header_of(tensors, metadata))), data_of(tensors))


def digests_of(tensors: Tensors) -> dict[str, str]:
    return {name: tensor.sha256() for name, tensor in tensors.items()}


def digest_metadata(digests: Json) -> dict[str, str]:
    return {"format": "pt", "lowbit.digests": compact(digests)}


# -------------------------------------------------------------------------------------------------- random values


def random_bytes(label: str, count: int) -> bytes:
    return hashlib.shake_256(label.encode()).digest(count)


def random_planes(label: str, lead: tuple[int, ...], cols: int) -> Tensor:
    """Random bits of `cols` columns in rows of B bytes; the bits behind the columns are 0 (BIT-3)."""
    width = 8 * ceil(cols / 64)
    mask = np.packbits(np.arange(8 * width) < cols, bitorder="little")
    raw = np.frombuffer(random_bytes(label, prod(lead) * width), np.uint8).reshape(*lead, width)
    return bytes_tensor(raw & mask)


FLOAT_FORMATS = {"F16": (10, 15, "<u2", 15), "BF16": (7, 127, "<u2", 15), "F32": (23, 127, "<u4", 31)}


def random_floats(label: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """Random finite values of both signs. One in eight has the exponent field 0: a subnormal."""
    mantissa_bits, bias, word, sign_at = FLOAT_FORMATS[dtype]
    raw = np.frombuffer(random_bytes(label, 8 * prod(shape)), "<u8")
    exponents = np.array([0, bias - 5, bias - 3, bias - 2, bias - 1, bias, bias + 2, bias + 5], np.uint64)
    exponent = exponents[(raw >> np.uint64(40)) & np.uint64(7)]
    sign = (raw >> np.uint64(48)) & np.uint64(1)
    mantissa = raw & np.uint64(2**mantissa_bits - 1)
    bits = (sign << np.uint64(sign_at)) | (exponent << np.uint64(mantissa_bits)) | mantissa
    return Tensor(dtype, shape, bits.astype(word).tobytes())
