"""Weights in float32 from the tiled layout, with the same bits as the reference decoder (DEC-1 to DEC-4, DEC-7)."""

from __future__ import annotations

import numba
import numpy as np
import torch
from numba import literally  # type: ignore[attr-defined]
from torch import Tensor

from ...machine.llvm import LANES
from ..matrix import PlaneMatrix
from ..parameter_order import group_major
from . import tiles
from .intrinsics import (
    AFFINE,
    BCQ,
    CODEBOOK,
    CODEC_NUMBERS,
    DTYPE_NUMBERS,
    UNIFORM,
    VECTOR,
    decode_half,
    floats_at,
    read_parameters,
)
from .parallel import Job, job, kernel, take
from .tiles import MOST_PLANES, WORD

HALF = WORD // 2  # columns that are decoded at a time

ONE_THREAD_BELOW = 1 << 16  # weights: to decode fewer takes less time than to wake other threads


@job
class DecodeJob(Job):
    """Decoding some rows of a matrix, tile by tile. Addresses are 0 where there is no such tensor."""

    # what to decode
    first_tile: int
    tiles: int  # number of tiles: the pieces of this job
    rows: int  # number of rows
    # the matrix
    padded_rows: int  # of the whole matrix, rounded up to whole tiles
    cols: int
    bits: int  # planes to read
    words: int  # in a row of a plane
    group_words: int  # in a whole group, or the one that groups share
    groups: int  # in a row
    groups_in_word: int  # 1, or 2 where two groups share each word
    codec: int  # BCQ, UNIFORM, AFFINE or CODEBOOK
    # addresses
    planes: int  # uint32 [tiles, words * bits, LANES]: the tiled layout
    scales: int  # [bits or 1, groups, padded_rows]
    scales_dtype: int  # one of DTYPE_NUMBERS
    shift: int  # [groups, padded_rows]
    shift_dtype: int  # one of DTYPE_NUMBERS
    codebook: int  # float32 [2**bits]
    out: int  # float32 [rows, cols]


def decode_rows(w: PlaneMatrix, first: int, stop: int, threads: int, out: Tensor | None = None) -> Tensor:
    """Rows `first` to `stop` of the weight, float32 ``[stop - first, cols]``.

    Args:
        w: in the tiled layout, not ragged.
        first: a multiple of 16.
        threads: how many may work on it.
        out: contiguous memory to write to.
    """
    out = torch.empty(stop - first, w.cols, dtype=torch.float32, device="cpu") if out is None else out
    scales, shift = group_major(w.scales), w.shift
    work = DecodeJob(
        first_tile=first // LANES,
        tiles=-(-(stop - first) // LANES),
        rows=stop - first,
        padded_rows=-(-w.rows // LANES) * LANES,
        cols=w.cols,
        bits=w.bits,
        words=tiles.words(w),
        group_words=tiles.group_words(w),
        groups=w.groups,
        groups_in_word=tiles.groups_in_word(w),
        codec=CODEC_NUMBERS[w.codec],
        planes=w.planes.data_ptr(),
        scales=scales.data_ptr(),
        scales_dtype=DTYPE_NUMBERS[scales.dtype],
        out=out.data_ptr(),
    )
    if shift is not None:
        shift = group_major(shift)
        work.shift, work.shift_dtype = shift.data_ptr(), DTYPE_NUMBERS[shift.dtype]
    if w.codebook is not None:
        codebook = w.codebook.contiguous()
        work.codebook = codebook.data_ptr()
    _decode(work, 1 if out.numel() < ONE_THREAD_BELOW else threads)
    return out


@kernel(DecodeJob)
def _decode(job):
    """Decode one tile after another of `job`, half word by half word."""
    bits, groups, codec = job.bits, job.groups, job.codec
    cols, rows, words, whole, padded = job.cols, job.rows, job.words, job.group_words, job.padded_rows
    signed = np.zeros((MOST_PLANES, LANES), np.float32)
    start, scale, shift = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    if codec == AFFINE:
        shift[:] = np.float32(-0.0)  # without offsets: what changes nothing
    block = np.empty((LANES, HALF), np.float32)  # weights of which not all are wanted
    if codec != BCQ:  # the sum is the code: (2**n - 1) / 2 plus or minus half of what each bit counts
        start[:] = np.float32((1 << bits) - 1) * np.float32(0.5)
        for p in range(bits):
            signed[p] = np.float32(-0.5) * np.float32(1 << (bits - 1 - p))
    while True:
        piece: int = take(job)
        if piece >= job.tiles:
            return
        tile = job.first_tile + piece
        tile_rows = min(LANES, rows - piece * LANES)
        out = job.out + piece * LANES * cols * 4
        for g in range(groups):
            index = g * padded + tile * LANES
            if codec == BCQ:
                _read_tile(job.scales, signed, bits, index, groups * padded, job.scales_dtype)
                for p in range(bits):
                    for lane in range(LANES):
                        signed[p, lane] = -signed[p, lane]
                if job.shift != 0:
                    _read_tile(job.shift, start, 1, index, 0, job.shift_dtype)
            else:
                _read_tile(job.scales, scale, 1, index, 0, job.scales_dtype)
                if job.shift != 0:
                    _read_tile(job.shift, shift, 1, index, 0, job.shift_dtype)
            first = g // job.groups_in_word * whole  # word of the group
            here = min(whole, words - first)  # words of this group
            group = job.planes + (tile * words + first) * bits * VECTOR
            begin = g % job.groups_in_word
            for j in range(begin, begin + 2 * here // job.groups_in_word):
                column = first * WORD + j * HALF
                if column >= cols:
                    break
                inside = tile_rows == LANES and column + HALF <= cols
                to, to_stride = block.ctypes.data, 4 * HALF
                if inside:
                    to, to_stride = out + column * 4, cols * 4
                _decode_half(
                    group + j // 2 * VECTOR, signed, start, scale, shift, job.codebook, to,
                    bits, here * VECTOR, to_stride, j % 2, codec,
                )  # fmt: skip
                if inside:
                    continue
                for row in range(tile_rows):
                    line = floats_at(out + (row * cols + column) * 4)
                    for c in range(min(HALF, cols - column)):
                        line[c] = block[row, c]


@numba.njit
def _read_tile(source, target, count, index, stride, dtype):
    """Parameters of one tile for `count` planes, see :func:`.intrinsics.read_parameters`."""
    read_parameters(source, target.ctypes.data, count, index, stride, 0, dtype, 1)


@numba.njit
def _decode_half(words, signed, start, scale, shift, codebook, out, planes, plane_stride, out_stride, half, codec):
    """:func:`.intrinsics.decode_half` with the code of `half` and `codec`."""
    a, b, c, d = signed.ctypes.data, start.ctypes.data, scale.ctypes.data, shift.ctypes.data
    if half == 0:
        _decode_codec(words, a, b, c, d, codebook, out, planes, plane_stride, out_stride, 0, codec)
    else:
        _decode_codec(words, a, b, c, d, codebook, out, planes, plane_stride, out_stride, 1, codec)


@numba.njit(forceinline=True)
def _decode_codec(words, signed, start, scale, shift, codebook, out, planes, plane_stride, out_stride, HALF, codec):
    literally(HALF)
    if codec == BCQ:
        decode_half(words, signed, start, scale, shift, codebook, out, planes, plane_stride, out_stride, HALF, BCQ)
    elif codec == UNIFORM:
        decode_half(words, signed, start, scale, shift, codebook, out, planes, plane_stride, out_stride, HALF, UNIFORM)
    elif codec == AFFINE:
        decode_half(words, signed, start, scale, shift, codebook, out, planes, plane_stride, out_stride, HALF, AFFINE)
    elif codec == CODEBOOK:
        decode_half(words, signed, start, scale, shift, codebook, out, planes, plane_stride, out_stride, HALF, CODEBOOK)
