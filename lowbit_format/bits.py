"""Bit-planes: codes to planes and back (spec/FORMAT.md sections 5 and 7).

Numpy only. This is the plain form of the layout; the quantizers pack with compiled code of their own and
the tests hold the two against each other.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]


def row_bytes(cols: int) -> int:
    """Bytes of one row of one plane: whole 64-bit words (spec section 4)."""
    return 8 * -(-cols // 64)


def pack_codes(codes: U8, bits: int) -> U8:
    """Planes of a matrix of codes (BIT-1 to BIT-3).

    Args:
        codes: uint8 ``[rows, cols]``, each below ``2**bits``.
        bits: planes, 1 to 8.

    Returns:
        uint8 ``[bits, rows, row_bytes(cols)]``, padding bits 0.
    """
    rows, cols = codes.shape
    planes = np.zeros((bits, rows, row_bytes(cols)), np.uint8)
    for p in range(bits):
        packed = np.packbits((codes >> (bits - 1 - p)) & 1, axis=1, bitorder="little")
        planes[p, :, : packed.shape[1]] = packed
    return planes


def unpack_codes(planes: U8, cols: int) -> U8:
    """Codes of planes: uint8 ``[n, rows, bytes]`` to uint8 ``[rows, cols]`` (BIT-1, BIT-2)."""
    codes: U8 = np.zeros((planes.shape[1], cols), np.uint8)
    for plane in planes:
        codes = (codes << np.uint8(1)) | np.unpackbits(plane, axis=1, count=cols, bitorder="little")
    return codes


def plane_rows(row_bits: U8, bits: int) -> NDArray[np.int64]:
    """Where each row of each plane lies in ragged planes (MIX-2).

    Args:
        row_bits: uint8 ``[rows]``.
        bits: planes of the scheme.

    Returns:
        int64 ``[bits, rows]``: first index into the ragged tensor, or -1 where the row has no such plane.
    """
    present = row_bits[None, :] > np.arange(bits, dtype=np.uint8)[:, None]
    index = np.cumsum(present.ravel(), dtype=np.int64).reshape(present.shape) - 1
    return np.where(present, index, -1)


def to_ragged(planes: U8, row_bits: U8) -> U8:
    """Ragged planes ``[sum of row_bits, bytes]`` from full ones ``[bits, rows, bytes]`` (MIX-2).

    Row r's code lies in its first ``row_bits[r]`` planes; the rest is dropped.
    """
    present = row_bits[None, :] > np.arange(planes.shape[0], dtype=np.uint8)[:, None]
    return np.ascontiguousarray(planes[present])


def padding_is_zero(planes: U8, cols: int) -> bool:
    """Whether all bits at columns `cols` and beyond are 0 (BIT-3); planes are ``[..., bytes]``."""
    full, rest = divmod(cols, 8)
    if rest and np.any(planes[..., full] >> rest):
        return False
    return not np.any(planes[..., full + (rest > 0) :])
