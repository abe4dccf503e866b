"""Weights in float32 from the packed form, bit for bit as the reference gives them (DEC-1 to DEC-4), rows by rows."""

from __future__ import annotations

import numba
import numpy as np
import torch
from numba import carray  # type: ignore[attr-defined]
from torch import Tensor

from ...machine.llvm import LANES
from ..matrix import PlaneMatrix
from ..parameter_order import group_major
from . import tiles
from .intrinsics import F16_KIND, F32_KIND, address_of, decode_word, floats_at, take, widen
from .jobs import BCQ, CODEBOOK, CODECS, KINDS, UNIFORM
from .parallel import Kernel

ALONE = 1 << 16  # weights below which one thread decodes

(
    _PIECES, _FIRST, _ROWS, _ALL, _COLS, _BITS, _WORDS, _WHOLE, _GROUPS, _CODEC,
    _PLANES, _SCALES, _SCALES_KIND, _SHIFT, _SHIFT_KIND, _CODEBOOK, _OUT,
) = range(1, 18)  # fmt: skip


def decode_rows(w: PlaneMatrix, first: int, stop: int, threads: int, out: Tensor | None = None) -> Tensor:
    """Rows `first` to `stop` of the weight, float32 ``[stop - first, cols]``.

    Args:
        w: in the packed form, not ragged.
        first: a multiple of 16.
        out: contiguous memory to write to.
    """
    rows, groups = w.rows, w.groups
    out = torch.empty(stop - first, w.cols) if out is None else out
    scales, shift = group_major(w.scales), w.shift
    shift = None if shift is None else group_major(shift)
    codebook = None if w.codebook is None else w.codebook.contiguous()
    job = np.array([
        0, -(-(stop - first) // LANES), first // LANES, stop - first, rows, w.cols, w.bits, tiles.words(w),
        tiles.group_words(w), groups, CODECS[w.codec], w.planes.data_ptr(),
        scales.data_ptr(), KINDS[scales.dtype],
        0 if shift is None else shift.data_ptr(), 0 if shift is None else KINDS[shift.dtype],
        0 if codebook is None else codebook.data_ptr(), out.data_ptr(),
    ], np.int64)  # fmt: skip
    _decode(job, 1 if out.numel() < ALONE else threads)
    return out


@Kernel
def _decode(pointer):
    """One tile after another of a job (see :func:`decode_rows`)."""
    job = carray(pointer, 18)
    bits, words, whole, groups, codec = job[_BITS], job[_WORDS], job[_WHOLE], job[_GROUPS], job[_CODEC]
    cols, rows, padded = job[_COLS], job[_ROWS], (job[_ALL] + 15) // 16 * 16
    signed = np.zeros((8, 16), np.float32)
    start, scale, shift = np.zeros(16, np.float32), np.zeros(16, np.float32), np.zeros(16, np.float32)
    block = np.empty((16, 32), np.float32)
    if codec != BCQ:
        start[:] = np.float32((1 << bits) - 1) * np.float32(0.5)
        for p in range(bits):
            signed[p] = np.float32(-0.5) * np.float32(1 << (bits - 1 - p))
    while True:
        piece: int = take(address_of(pointer))
        if piece >= job[_PIECES]:
            return
        tile = job[_FIRST] + piece
        here_rows = min(16, rows - piece * 16)
        out = job[_OUT] + piece * 16 * cols * 4
        for g in range(groups):
            index = g * padded + tile * 16
            if codec == BCQ:
                _parameters(job[_SCALES], job[_SCALES_KIND], index, groups * padded, bits, signed)
                for p in range(bits):
                    for lane in range(16):
                        signed[p, lane] = -signed[p, lane]
                if job[_SHIFT] != 0:
                    _parameters(job[_SHIFT], job[_SHIFT_KIND], index, 0, 1, start)
            else:
                _parameters(job[_SCALES], job[_SCALES_KIND], index, 0, 1, scale)
                if job[_SHIFT] != 0:
                    _parameters(job[_SHIFT], job[_SHIFT_KIND], index, 0, 1, shift)
            here = min(whole, words - g * whole)
            at = job[_PLANES] + (tile * words + g * whole) * bits * 64
            for j in range(here):
                column = (g * whole + j) * 32
                if column >= cols:
                    break
                if here_rows == 16 and column + 32 <= cols:
                    _word(codec, at + j * 64, here * 64, bits, signed, start, scale, shift, job[_CODEBOOK],
                          out + column * 4, cols * 4)  # fmt: skip
                    continue
                _word(codec, at + j * 64, here * 64, bits, signed, start, scale, shift, job[_CODEBOOK],
                      block.ctypes.data, 128)  # fmt: skip
                for row in range(here_rows):
                    line = carray(floats_at(out + (row * cols + column) * 4), 32)
                    for c in range(min(32, cols - column)):
                        line[c] = block[row, c]


@numba.njit
def _parameters(address, kind, index, stride, count, out):
    """Parameters of one tile for `count` planes, `stride` numbers apart, in float32."""
    if kind == F32_KIND:
        widen(address + 4 * index, 4 * stride, count, 0, out.ctypes.data, 1, 0)
    elif kind == F16_KIND:
        widen(address + 2 * index, 2 * stride, count, 0, out.ctypes.data, 1, 1)
    else:
        widen(address + 2 * index, 2 * stride, count, 0, out.ctypes.data, 1, 2)


@numba.njit
def _word(codec, words, plane_stride, bits, signed, start, scale, shift, codebook, out, stride):
    a, b, c, d = signed.ctypes.data, start.ctypes.data, scale.ctypes.data, shift.ctypes.data
    if codec == BCQ:
        decode_word(words, plane_stride, bits, a, b, c, d, codebook, out, stride, 0)
    elif codec == UNIFORM:
        decode_word(words, plane_stride, bits, a, b, c, d, codebook, out, stride, 1)
    elif codec == CODEBOOK:
        decode_word(words, plane_stride, bits, a, b, c, d, codebook, out, stride, 2)
