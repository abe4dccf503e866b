"""Weights from the tiled layout: of the base, with the same bits as the reference decoder (DEC-1 to DEC-4, DEC-7), and
of several tasks at once.

Tasks share all of the decoding but the last step. Where a task multiplies a scale by ``1 + delta``, its weight is that
of the base plus or minus ``scale * delta``, by the bit of that plane. What one plane adds to the weight of the base,
plus or minus ``scale``, is made the same way.
"""

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
    BFLOAT16,
    CODEBOOK,
    CODEC_NUMBERS,
    DTYPE_NUMBERS,
    FLOAT32,
    UNIFORM,
    VECTOR,
    add_signed_and_round,
    decode_half,
    floats_at,
    longs_at,
    read_parameters,
)
from .parallel import Job, job, kernel, take
from .tiles import MOST_PLANES, WORD

HALF = WORD // 2  # columns that are decoded at a time

BASE = -1  # in the place of a task: the weight of the base
PLANE = -2  # what plane 0 adds to it; PLANE - p: what plane p adds

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
    out: int  # float32 [rows, cols]; with several weights [weights, rows, words * 32] of `out_dtype`
    # several weights, one for each of these tasks
    weights: int  # number of them; 0: that of the base alone
    out_dtype: int  # FLOAT32 or BFLOAT16
    out_row: int  # bytes of a row
    out_weight: int  # bytes of a weight
    task_ids: int  # address, int64 [weights]; BASE, or PLANE and below
    factors: int  # address, float32 [tasks, tuned, all rows]: deltas that multiply scales
    tuned: int  # planes that tasks change
    matrix_rows: int  # of the whole matrix


def decode_rows(w: PlaneMatrix, first: int, stop: int, threads: int, out: Tensor | None = None) -> Tensor:
    """Rows `first` to `stop` of the weight, float32 ``[stop - first, cols]``.

    Args:
        w: in the tiled layout, not ragged.
        first: a multiple of 16.
        threads: how many may work on it.
        out: contiguous memory to write to.
    """
    out = torch.empty(stop - first, w.cols, dtype=torch.float32, device="cpu") if out is None else out
    work = job_for(w, first, stop, out)
    _decode(work, 1 if out.numel() < ONE_THREAD_BELOW else threads)
    return out


def decode_for_tasks(
    w: PlaneMatrix, first: int, stop: int, threads: int, deltas: Tensor | None, tasks: Tensor, out: Tensor
) -> None:
    """Rows `first` to `stop` of the weights of several tasks.

    They differ from those that the reference decodes with a task's scales by the order of sums, and are rounded once.

    Args:
        w, first, threads: as in :func:`decode_rows`; bcq where there are deltas.
        deltas: float32 ``[tasks, p, rows]``, factors ``1 + delta`` of the first p planes' scales.
        tasks: int64 ``[weights]``: a task, :data:`BASE`, or what one of the first p planes adds (:data:`PLANE`).
        out: to fill, float32 or bfloat16 ``[weights, stop - first, columns padded to whole words]``, contiguous.
    """
    work = job_for(w, first, stop, out)
    work.weights, work.out_dtype = len(tasks), DTYPE_NUMBERS[out.dtype]
    work.out_row, work.out_weight = (stride * out.element_size() for stride in (out.stride(1), out.stride(0)))
    tasks = tasks.contiguous()
    work.task_ids, work.matrix_rows = tasks.data_ptr(), w.rows
    if deltas is not None:
        deltas = deltas.detach().float().contiguous()
        work.factors, work.tuned = deltas.data_ptr(), deltas.shape[1]
    _decode(work, 1 if out[0].numel() < ONE_THREAD_BELOW else threads)


def job_for(w: PlaneMatrix, first: int, stop: int, out: Tensor) -> DecodeJob:
    """The job that decodes rows `first` to `stop` to `out`; arguments as in :func:`decode_rows`."""
    scales, shift, codebook = group_major(w.scales), w.shift, w.codebook
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
    if codebook is not None:
        codebook = codebook.contiguous()
        work.codebook = codebook.data_ptr()
    work.alive = scales, shift, codebook  # the fields know only their addresses
    return work


@kernel(DecodeJob)
def _decode(job):
    """Decode one tile after another of `job`, half word by half word."""
    bits, groups, codec = job.bits, job.groups, job.codec
    cols, rows, words, whole, padded = job.cols, job.rows, job.words, job.group_words, job.padded_rows
    signed = np.zeros((MOST_PLANES, LANES), np.float32)
    start, scale, shift = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    if codec == AFFINE:
        shift[:] = np.float32(-0.0)  # without offsets: what changes nothing
    block = np.empty((LANES, HALF), np.float32)  # weights that are not written as they are
    nothing = np.zeros((LANES, HALF), np.float32)
    weights, tuned = job.weights, max(1, job.tuned)
    steps = np.zeros((max(1, weights), tuned, LANES), np.float32)  # what tasks add for a bit that is 1; base: nothing
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
            if job.tuned > 0:
                _set_steps(job, steps, signed, tile, tile_rows)
            first = g // job.groups_in_word * whole  # word of the group
            here = min(whole, words - first)  # words of this group
            group = job.planes + (tile * words + first) * bits * VECTOR
            begin = g % job.groups_in_word
            for j in range(begin, begin + 2 * here // job.groups_in_word):
                column = first * WORD + j * HALF
                if column >= cols:
                    break
                inside = weights == 0 and tile_rows == LANES and column + HALF <= cols
                to, to_stride = block.ctypes.data, 4 * HALF
                if inside:
                    to, to_stride = out + column * 4, cols * 4
                _decode_half(
                    group + j // 2 * VECTOR, signed, start, scale, shift, job.codebook, to,
                    bits, here * VECTOR, to_stride, j % 2, codec,
                )  # fmt: skip
                if inside:
                    continue
                if weights > 0:
                    word = group + j // 2 * VECTOR + j % 2 * (HALF // 8)
                    for t in range(weights):
                        start_at = nothing if longs_at(job.task_ids)[t] <= PLANE else block
                        _add_and_round(job, word, steps, t, start_at, here, tile_rows, piece, column)
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
def _set_steps(job, steps, signed, tile, tile_rows):
    """What each task adds to weights of one group of a tile where the bit of a plane is 1: ``scale * delta``."""
    task_ids = longs_at(job.task_ids)
    for t in range(job.weights):
        task = task_ids[t]
        if task <= PLANE:
            for lane in range(LANES):
                steps[t, PLANE - task, lane] = -signed[PLANE - task, lane]
        if task < 0:
            continue
        for p in range(job.tuned):
            factors = floats_at(job.factors + 4 * ((task * job.tuned + p) * job.matrix_rows + tile * LANES))
            for lane in range(tile_rows):
                steps[t, p, lane] = -signed[p, lane] * factors[lane]


@numba.njit
def _add_and_round(job, words, steps, t, block, here, tile_rows, piece, column):
    """Write half a word's columns of weight `t`; `block` has what its steps are added to."""
    out = job.out + t * job.out_weight + piece * LANES * job.out_row
    step, planes = steps[t].ctypes.data, steps.shape[1]
    if job.out_dtype == BFLOAT16:
        to = out + column * 2
        add_signed_and_round(
            words, step, block.ctypes.data, to, tile_rows, planes, here * VECTOR, job.out_row, BFLOAT16
        )
    else:
        to = out + column * 4
        add_signed_and_round(words, step, block.ctypes.data, to, tile_rows, planes, here * VECTOR, job.out_row, FLOAT32)


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
