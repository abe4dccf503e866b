"""Bit-planes: codes to planes and back (spec/FORMAT.md sections 5 and 7).

Plain numpy, easy to check. The quantizers use compiled code (:func:`.group_lanes.pack`); tests hold both equal.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]


def row_bytes(cols: int) -> int:
    """Bytes of one row of one plane: whole 64-bit words (spec section 4)."""
    return 8 * -(-cols // 64)


def pack_codes(codes: U8, bits: int) -> U8:
    """The planes of a matrix of codes (BIT-1 to BIT-3).

    Args:
        codes: uint8 ``[rows, cols]``, each below ``2**bits``.
        bits: number of planes, 1 to 8.

    Returns:
        uint8 ``[bits, rows, row_bytes(cols)]``; padding bits are 0.
    """
    rows, cols = codes.shape
    planes = np.zeros((bits, rows, row_bytes(cols)), np.uint8)
    for p in range(bits):
        plane = np.packbits((codes >> (bits - 1 - p)) & 1, axis=1, bitorder="little")
        planes[p, :, : plane.shape[1]] = plane
    return planes


def unpack_codes(planes: U8, cols: int) -> U8:
    """The codes in planes: uint8 ``[n, rows, bytes]`` to uint8 ``[rows, cols]`` (BIT-1, BIT-2)."""
    codes: U8 = np.zeros((planes.shape[1], cols), np.uint8)
    for plane in planes:
        codes = (codes << np.uint8(1)) | np.unpackbits(plane, axis=1, count=cols, bitorder="little")
    return codes


def plane_rows(row_bits: U8, bits: int) -> NDArray[np.int64]:
    """Where each row of each plane lies in ragged planes (MIX-2).

    Args:
        row_bits: uint8 ``[rows]``.
        bits: number of planes of the scheme.

    Returns:
        int64 ``[bits, rows]``: first index into the ragged tensor, or -1 where the row has no such plane.
    """
    present = row_bits[None, :] > np.arange(bits, dtype=np.uint8)[:, None]
    index = np.cumsum(present.ravel(), dtype=np.int64).reshape(present.shape) - 1
    return np.where(present, index, -1)


def to_ragged(planes: U8, row_bits: U8) -> U8:
    """Ragged planes ``[sum of row_bits, bytes]`` from full ones ``[bits, rows, bytes]`` (MIX-2).

    The codes of row r are in its first ``row_bits[r]`` planes; the others are dropped.
    """
    present = row_bits[None, :] > np.arange(planes.shape[0], dtype=np.uint8)[:, None]
    return np.ascontiguousarray(planes[present])


def padding_is_zero(planes: U8, cols: int) -> bool:
    """Whether all bits at columns `cols` and above are 0 (BIT-3); planes are uint8 ``[..., bytes]``."""
    full, rest = divmod(cols, 8)
    if rest and np.any(planes[..., full] >> rest):
        return False
    return not np.any(planes[..., full + (rest > 0) :])
