"""Weights in bfloat16 from the tiled layout, for products of many rows: looked up by their codes.

All weights of one row in one group have one of ``2**bits`` values, its *levels*. They are computed once, by the
operations that decode a weight (DEC-2 to DEC-4, DEC-7), rounded, and kept in a register. The bits of a word's 32
columns in one plane are a mask of 32 lanes; a masked addition for each plane makes codes of them, and one permutation
gives 32 weights. So a weight costs no arithmetic of its own, and has the same bits as one that is decoded and rounded.

For up to 5 bits, the 32 entries of such a permutation (``vpermw`` of AVX-512 BW), and groups of whole words.
"""

from __future__ import annotations

import functools

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import literally, types  # type: ignore[attr-defined]
from numba.extending import intrinsic
from torch import Tensor

from ...machine.llvm import (
    F32,
    I1,
    I16,
    I32,
    LANES,
    VECTOR_F32,
    at,
    call,
    features,
    float_to_bfloat,
    fma,
    load,
    loop,
    splat,
    store,
)
from ..matrix import PlaneMatrix
from . import decoding, tiles
from .decoding import ONE_THREAD_BELOW, DecodeJob
from .intrinsics import AFFINE, BCQ, CODEBOOK, UNIFORM, VECTOR, read_parameters
from .parallel import kernel, take
from .tiles import WORD

MOST_BITS = 5
LEVELS = 1 << MOST_BITS

_WORD_I16 = ir.VectorType(I16, WORD)


@functools.cache
def _has_lookup() -> bool:
    return "avx512bw" in features()


def can_look_up(w: PlaneMatrix) -> bool:
    """Whether :func:`decode` can decode tiled `w`, whose rows are not ragged, on this machine."""
    return w.bits <= MOST_BITS and tiles.groups_in_word(w) == 1 and _has_lookup()


def decode(w: PlaneMatrix, first: int, stop: int, threads: int, out: Tensor) -> None:
    """Rows `first` to `stop` of the weight.

    Args:
        w: for which :func:`can_look_up`.
        first: a multiple of 16.
        threads: how many may work on it.
        out: to fill, bfloat16 ``[stop - first, columns padded to whole words]``, contiguous.
    """
    work = decoding.job_for(w, first, stop, out)
    work.out_row = 2 * out.shape[1]
    if w.codebook is not None:
        levels = torch.zeros(LEVELS, dtype=torch.float32, device="cpu")
        levels[: len(w.codebook)] = w.codebook
        work.codebook = levels.data_ptr()
        work.alive = work.alive, levels
    _decode_levels(work, 1 if out.numel() < ONE_THREAD_BELOW else threads)


@kernel(DecodeJob)
def _decode_levels(job):
    """Decode one tile after another of `job`."""
    bits, groups, words, whole, padded = job.bits, job.groups, job.words, job.group_words, job.padded_rows
    x_words = (job.cols + WORD - 1) // WORD
    scales, shift = np.zeros((MOST_BITS, LANES), np.float32), np.zeros(LANES, np.float32)
    if job.codec == AFFINE:
        shift[:] = np.float32(-0.0)  # without offsets: what changes nothing
    while True:
        piece: int = take(job)
        if piece >= job.tiles:
            return
        tile = job.first_tile + piece
        rows = min(LANES, job.rows - piece * LANES)
        out = job.out + piece * LANES * job.out_row
        for g in range(groups):
            index = g * padded + tile * LANES
            planes = bits if job.codec == BCQ else 1
            read_parameters(job.scales, scales.ctypes.data, planes, index, groups * padded, 0, job.scales_dtype, 1)
            if job.shift != 0:
                read_parameters(job.shift, shift.ctypes.data, 1, index, 0, 0, job.shift_dtype, 1)
            first = g * whole
            stored = min(whole, words - first)
            source = job.planes + (tile * words + first) * bits * VECTOR
            _look_up_group(
                job, source, scales.ctypes.data, shift.ctypes.data, out + first * WORD * 2,
                rows, min(stored, x_words - first), stored * VECTOR,
            )  # fmt: skip


@numba.njit(forceinline=True)
def _look_up_group(job, source, scales, shift, out, rows, count, plane_stride):
    if job.bits == 1:
        _look_up_bits(job, source, scales, shift, out, rows, count, plane_stride, 1)
    elif job.bits == 2:
        _look_up_bits(job, source, scales, shift, out, rows, count, plane_stride, 2)
    elif job.bits == 3:
        _look_up_bits(job, source, scales, shift, out, rows, count, plane_stride, 3)
    elif job.bits == 4:
        _look_up_bits(job, source, scales, shift, out, rows, count, plane_stride, 4)
    else:
        _look_up_bits(job, source, scales, shift, out, rows, count, plane_stride, 5)


@numba.njit(forceinline=True)
def _look_up_bits(job, source, scales, shift, out, rows, count, plane_stride, BITS):
    literally(BITS)
    if job.codec == BCQ:
        look_up(source, scales, shift, job.codebook, out, rows, count, plane_stride, job.out_row, BITS, BCQ)
    elif job.codec == UNIFORM:
        look_up(source, scales, shift, job.codebook, out, rows, count, plane_stride, job.out_row, BITS, UNIFORM)
    elif job.codec == AFFINE:
        look_up(source, scales, shift, job.codebook, out, rows, count, plane_stride, job.out_row, BITS, AFFINE)
    else:
        look_up(source, scales, shift, job.codebook, out, rows, count, plane_stride, job.out_row, BITS, CODEBOOK)


@intrinsic(prefer_literal=True)
def look_up(
    typingctx,
    # addresses
    words,
    scales,
    shift,
    codebook,
    out,
    # sizes
    rows,
    count,
    # strides
    plane_stride,
    out_stride,
    # constants
    BITS,
    CODEC,
):
    """The weights of one group of a tile; only for machines with AVX-512 BW.

    Args:
        words: int32 ``[BITS (plane_stride), count, LANES]``.
        scales: float32 ``[BITS or 1, LANES]``.
        shift: float32 ``[LANES]``: offsets or zeros, or what changes nothing.
        codebook: float32 ``[LEVELS]``, padded.
        out: bfloat16 ``[rows (out_stride), count * 32]``.
        rows: of the tile, at least 1.
        count: words of a row, at least 1.
        BITS: number of planes, up to MOST_BITS.
        CODEC: BCQ, UNIFORM, AFFINE or CODEBOOK.
    """
    bits, codec = BITS.literal_value, CODEC.literal_value
    signature = types.void(*[types.int64] * 9, BITS, CODEC)

    def codegen(context, builder, signature, args):
        words, scales, shift, codebook, out, rows, count, plane_stride, out_stride = args[:9]
        machine = features(context)
        if "avx512bw" not in machine:
            return context.get_dummy_value()
        native = "avx512bf16" in machine

        def row(r, _):
            def parameter(address, plane=0):
                return splat(builder, load(builder, at(builder, address, (plane, VECTOR), (r, 4)), F32))

            halves = []
            for half in range(2 if bits == MOST_BITS else 1):
                codes = [half * LANES + i for i in range(LANES)]
                if codec == BCQ:
                    level = parameter(shift)
                    for p in range(bits):
                        signs = [1.0 if c >> (bits - 1 - p) & 1 else -1.0 for c in codes]
                        level = fma(builder, parameter(scales, p), ir.Constant(VECTOR_F32, signs), level)
                else:
                    level = ir.Constant(VECTOR_F32, [float(c) for c in codes])
                    if codec == CODEBOOK:
                        level = load(builder, at(builder, codebook, (half, VECTOR)), VECTOR_F32)
                    if codec == UNIFORM:
                        level = builder.fsub(level, parameter(shift))
                    level = builder.fmul(level, parameter(scales))
                    if codec == AFFINE:
                        level = builder.fadd(level, parameter(shift))
                halves.append(float_to_bfloat(builder, level, native))
            both = ir.Constant(ir.VectorType(I32, WORD), list(range(WORD)))
            table = builder.shuffle_vector(halves[0], halves[-1], both)
            line = at(builder, out, (out_stride, r))

            def word(j, _):
                index = ir.Constant(_WORD_I16, [0] * WORD)
                for p in range(bits):
                    place = at(builder, words, (plane_stride, p), (j, VECTOR), (r, 4))
                    mask = builder.bitcast(load(builder, place, I32), ir.VectorType(I1, WORD))
                    counts = ir.Constant(_WORD_I16, [1 << (bits - 1 - p)] * WORD)
                    index = builder.select(mask, builder.add(index, counts), index)
                found = call(builder, "llvm.x86.avx512.permvar.hi.512", _WORD_I16, table, index)
                store(builder, found, at(builder, line, (j, 2 * WORD)), align=2)
                return []

            loop(builder, count, word, [])
            return []

        loop(builder, rows, row, [])
        return context.get_dummy_value()

    return signature, codegen
