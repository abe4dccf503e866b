"""The reference decoder: planes to float32, bit for bit the same on every machine (spec/FORMAT.md section 6).

:func:`decode` is compiled with Numba. :func:`decode_numpy` does the same operations in numpy; tests compare every
other decoder with it. Neither uses fused multiply-add: Numba contracts operations only under ``fastmath``, which is
off here (DEC-1).
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from .bits import U8, plane_rows, unpack_codes
from .machine.threads import parallel_rows
from .matrix import F32, StoredMatrix

_NO_INDEX: NDArray[np.int64] = np.empty((0, 0), np.int64)
_NO_SHIFT: F32 = np.empty((0, 0), np.float32)


def decode(matrix: StoredMatrix, bits: int | None = None, out: F32 | None = None) -> F32:
    """The weights of `matrix` in float32 (DEC-1 to DEC-4, DEC-7).

    Args:
        matrix: the matrix to decode.
        bits: precision to read at; None is full precision (NST-1).
        out: float32 ``[rows, cols]``, C-contiguous, to write into.

    Returns:
        float32 ``[rows, cols]``.

    Raises:
        PrecisionError: the matrix has no parameters for `bits`.
    """
    params, n = matrix.at(bits)
    if out is None:
        out = np.empty((matrix.rows, matrix.cols), np.float32)
    decode_arrays(
        out,
        matrix.planes,
        params.scales,
        params.shift,
        matrix.codebook,
        matrix.row_bits,
        codec=matrix.scheme.codec,
        bits=n,
        group_columns=matrix.scheme.group_columns(matrix.cols),
    )
    return out


def decode_arrays(
    out: F32,
    planes: U8,
    scales: F32,
    shift: F32 | None,
    codebook: F32 | None,
    row_bits: U8 | None,
    *,
    codec: str,
    bits: int,
    group_columns: int,
) -> None:
    """The same for a matrix given as arrays (spec/FORMAT.md section 4).

    Args:
        out: float32 ``[rows, cols]``, C-contiguous, to write into.
        planes: uint8 ``[>= bits, rows, bytes]``, or ragged ``[>= sum of the planes to read, bytes]`` (MIX-2).
        scales: float32 ``[>= bits, rows, groups]`` (bcq) or ``[1, rows, groups]``.
        shift: float32 ``[rows, groups]``: offsets (bcq, affine) or zeros (uniform), or None.
        codebook: float32 ``[2**bits]`` (codebook), or None.
        row_bits: uint8 ``[rows]`` if the planes are ragged, or None.
        codec: id of the codec.
        bits: planes to read.
        group_columns: columns of a whole group.
    """
    rows = len(out)
    flat = np.ascontiguousarray(planes).reshape(-1, planes.shape[-1])
    index = _NO_INDEX if row_bits is None else plane_rows(row_bits, bits)
    shift = _NO_SHIFT if shift is None else shift
    if codec == "bcq":
        parallel_rows(_decode_bcq, rows, out, flat, index, scales, shift, bits, group_columns)
    elif codec == "affine":
        parallel_rows(_decode_affine, rows, out, flat, index, scales[0], shift, bits, group_columns)
    else:
        table = np.arange(2**bits, dtype=np.float32) if codebook is None else codebook
        parallel_rows(_decode_levels, rows, out, flat, index, scales[0], shift, table, bits, group_columns)


def decode_numpy(matrix: StoredMatrix, bits: int | None = None) -> F32:
    """As :func:`decode`, in numpy."""
    params, n = matrix.at(bits)
    group_of = np.arange(matrix.cols) // matrix.scheme.group_columns(matrix.cols)
    own_bits = np.full(matrix.rows, n) if matrix.row_bits is None else np.minimum(matrix.row_bits, n)
    planes = _full_planes(matrix)
    out = np.empty((matrix.rows, matrix.cols), np.float32)
    for b in np.unique(own_bits):
        rows = own_bits == b
        mine = planes[:b, rows]
        scales = params.scales[:, rows][..., group_of]
        shift = None if params.shift is None else params.shift[rows][:, group_of]
        if matrix.scheme.codec == "bcq":
            acc = np.zeros(scales.shape[1:], np.float32) if shift is None else shift
            for p in range(b):
                bit = unpack_codes(mine[p : p + 1], matrix.cols)
                acc = np.where(bit == 1, acc + scales[p], acc - scales[p])
            out[rows] = acc
            continue
        code = unpack_codes(mine, matrix.cols)
        level = code.astype(np.float32) if matrix.codebook is None else matrix.codebook[code]
        if matrix.scheme.codec == "affine":
            level = level * scales[0]
            out[rows] = level if shift is None else level + shift
            continue
        if shift is not None:
            level = level - shift
        out[rows] = level * scales[0]
    return out


def _full_planes(matrix: StoredMatrix) -> U8:
    """Planes as ``[bits, rows, bytes]``, with zeros where ragged planes have no row."""
    if matrix.row_bits is None:
        return matrix.planes
    index = plane_rows(matrix.row_bits, matrix.scheme.bits)
    full = np.zeros((*index.shape, matrix.planes.shape[-1]), np.uint8)
    full[index >= 0] = matrix.planes
    return full


@numba.njit(nogil=True, cache=True)
def _plane_row(index, p, r, rows):
    """Row of the flat planes that holds plane `p` of row `r`; -1 where ragged planes have none."""
    return index[p, r] if index.shape[0] > 0 else p * rows + r


@numba.njit(nogil=True, cache=True)
def _row_codes(codes, planes, index, r, rows, n):
    """Write the codes of row `r`, from its first `n` planes, into `codes` (BIT-1, BIT-2).

    Returns how many of these planes the row has.
    """
    codes[:] = 0
    for p in range(n):
        at = _plane_row(index, p, r, rows)
        if at < 0:
            return p
        plane = planes[at]
        for k in range(plane.shape[0]):
            byte = np.uint32(plane[k])
            for j in range(8):
                bit = (byte >> np.uint32(j)) & np.uint32(1)
                codes[8 * k + j] = np.uint8((np.uint32(codes[8 * k + j]) << np.uint32(1)) | bit)
    return n


@numba.njit(nogil=True, cache=True)
def _decode_bcq(start, stop, out, planes, index, scales, offsets, n, group):
    """DEC-2 for rows start to stop. ``a - s`` equals ``a + (-s)`` exactly, so a bit only chooses the sign."""
    rows, cols = out.shape
    codes = np.empty(planes.shape[1] * 8, np.uint8)
    for r in range(start, stop):
        have = _row_codes(codes, planes, index, r, rows, n)
        for g in range(scales.shape[2]):
            acc = out[r, g * group : min(cols, (g + 1) * group)]
            code = codes[g * group : min(cols, (g + 1) * group)]
            acc[:] = offsets[r, g] if offsets.shape[0] > 0 else np.float32(0.0)
            for p in range(have):
                scale, bit = scales[p, r, g], np.uint8(1 << (have - 1 - p))
                for c in range(acc.shape[0]):
                    acc[c] += scale if code[c] & bit else -scale


@numba.njit(nogil=True, cache=True)
def _decode_levels(start, stop, out, planes, index, scales, zeros, table, n, group):
    """DEC-3 and DEC-4 for rows start to stop: ``(table[code] - zero) * scale``."""
    rows, cols = out.shape
    codes = np.empty(planes.shape[1] * 8, np.uint8)
    for r in range(start, stop):
        _row_codes(codes, planes, index, r, rows, n)
        for g in range(scales.shape[1]):
            scale = scales[r, g]
            if zeros.shape[0] > 0:
                zero = zeros[r, g]
                for c in range(g * group, min(cols, (g + 1) * group)):
                    out[r, c] = (table[codes[c]] - zero) * scale
            else:
                for c in range(g * group, min(cols, (g + 1) * group)):
                    out[r, c] = table[codes[c]] * scale


@numba.njit(nogil=True, cache=True)
def _decode_affine(start, stop, out, planes, index, scales, offsets, n, group):
    """DEC-7 for rows start to stop: ``code * scale + offset``, rounded twice."""
    rows, cols = out.shape
    codes = np.empty(planes.shape[1] * 8, np.uint8)
    for r in range(start, stop):
        _row_codes(codes, planes, index, r, rows, n)
        for g in range(scales.shape[1]):
            scale = scales[r, g]
            offset = offsets[r, g] if offsets.shape[0] > 0 else np.float32(-0.0)  # which changes nothing
            for c in range(g * group, min(cols, (g + 1) * group)):
                out[r, c] = np.float32(codes[c]) * scale + offset
