"""Sixteen groups side by side: the loops that all solvers share.

A *block* holds `LANES` groups, one in each lane: ``x[c, l]`` is column `c` of group `l`. Every operation
is then the same in all lanes, so that it runs in vector registers, needs no horizontal sums, and gives the
same bits on every machine whatever the width of its registers.

The two innermost loops are LLVM vector code emitted through Numba intrinsics, since Numba keeps no array in
registers: :func:`sums_above` (statistics of an assignment) and :func:`codes_of` (the assignment). The code names
no instruction set; LLVM lowers ``<16 x float>`` to what the machine has.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ..bits import U8
from ..machine.llvm import I8, I64, LANES, VECTOR_F32, VECTOR_I8, loop
from ..machine.threads import parallel_rows

_TOGETHER = 4  # thresholds held in registers at a time: 8 accumulators


def _load(builder: Any, pointer: Any, index: Any, align: int = 4) -> Any:
    value = builder.load(builder.gep(pointer, [index]))
    value.align = align
    return value


@intrinsic
def _sums_above(typingctx, x, w, wx, cols, mids, quads, weights, sums):
    """See :func:`sums_above`; arguments are addresses, `quads` counts thresholds in fours."""
    signature = types.void(*[types.uint64] * 3, types.int64, types.uint64, types.int64, *[types.uint64] * 2)

    def codegen(context, builder, signature, args):
        px, pw, pwx, pm, pout_w, pout_s = (
            builder.inttoptr(args[i], VECTOR_F32.as_pointer()) for i in (0, 1, 2, 4, 6, 7)
        )
        zero = ir.Constant(VECTOR_F32, [0.0] * LANES)

        def four(q: Any, _: list[Any]) -> list[Any]:
            base = builder.mul(q, I64(_TOGETHER))
            at = [builder.add(base, I64(t)) for t in range(_TOGETHER)]
            mid = [_load(builder, pm, a) for a in at]

            def column(c: Any, acc: list[Any]) -> list[Any]:
                vx, vw, vwx = (_load(builder, p, c) for p in (px, pw, pwx))
                out = []
                for t in range(_TOGETHER):
                    above = builder.fcmp_ordered(">=", vx, mid[t])
                    out.append(builder.fadd(acc[2 * t], builder.select(above, vw, zero)))
                    out.append(builder.fadd(acc[2 * t + 1], builder.select(above, vwx, zero)))
                return out

            acc = loop(builder, args[3], column, [zero] * (2 * _TOGETHER))
            for t in range(_TOGETHER):
                builder.store(acc[2 * t], builder.gep(pout_w, [at[t]])).align = 4
                builder.store(acc[2 * t + 1], builder.gep(pout_s, [at[t]])).align = 4
            return []

        loop(builder, args[5], four, [])
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def _codes_of(typingctx, x, cols, mids, steps, codes, out):
    """See :func:`codes_of`; arguments are addresses, `steps` counts thresholds."""
    signature = types.void(types.uint64, types.int64, types.uint64, types.int64, types.uint64, types.uint64)

    def codegen(context, builder, signature, args):
        px, pm = (builder.inttoptr(args[i], VECTOR_F32.as_pointer()) for i in (0, 2))
        pc, pout = (builder.inttoptr(args[i], VECTOR_I8.as_pointer()) for i in (4, 5))
        first = _load(builder, pc, I64(0), 1)

        def column(c: Any, _: list[Any]) -> list[Any]:
            vx = _load(builder, px, c)

            def step(i: Any, code: list[Any]) -> list[Any]:
                above = builder.fcmp_ordered(">=", vx, _load(builder, pm, i))
                following = _load(builder, pc, builder.add(i, I64(1)), 1)
                return [builder.select(above, following, code[0])]

            (code,) = loop(builder, args[3], step, [first])
            builder.store(code, builder.gep(pout, [c])).align = 1
            return []

        loop(builder, args[1], column, [])
        return context.get_dummy_value()

    return signature, codegen


def _row(context: Any, builder: Any, signature: Any, args: Any, i: int, vector: Any) -> Any:
    """Vector pointer to the data of array argument `i`, a row of LANES elements."""
    array = context.make_array(signature.args[i])(context, builder, args[i])
    return builder.bitcast(array.data, vector.as_pointer())


def _get(builder: Any, pointer: Any, align: int = 4) -> Any:
    value = builder.load(pointer)
    value.align = align
    return value


@intrinsic
def add_product(typingctx, out, a, b):
    """``out += a * b`` over one row of lanes: three float32 ``[LANES]`` arrays.

    A loop over the lanes would do, but the compiler then guards it against overlapping arrays, which costs more than
    the work.
    """

    def codegen(context, builder, signature, args):
        po, pa, pb = (_row(context, builder, signature, args, i, VECTOR_F32) for i in range(3))
        total = builder.fadd(_get(builder, po), builder.fmul(_get(builder, pa), _get(builder, pb)))
        builder.store(total, po).align = 4
        return context.get_dummy_value()

    return types.void(out, a, b), codegen


@intrinsic
def set_product(typingctx, out, a, b):
    """``out = a * b`` over one row of lanes."""

    def codegen(context, builder, signature, args):
        po, pa, pb = (_row(context, builder, signature, args, i, VECTOR_F32) for i in range(3))
        builder.store(builder.fmul(_get(builder, pa), _get(builder, pb)), po).align = 4
        return context.get_dummy_value()

    return types.void(out, a, b), codegen


@intrinsic
def set_signs(typingctx, out, code, mask):
    """``out = 1 where code & mask, else -1`` over one row of lanes: float32, uint8 ``[LANES]``, and a uint8."""

    def codegen(context, builder, signature, args):
        po = _row(context, builder, signature, args, 0, VECTOR_F32)
        codes = _get(builder, _row(context, builder, signature, args, 1, VECTOR_I8), 1)
        mask_value = builder.trunc(args[2], I8) if args[2].type.width > 8 else args[2]
        masks = ir.Constant(VECTOR_I8, ir.Undefined)
        for lane in range(LANES):
            masks = builder.insert_element(masks, mask_value, ir.IntType(32)(lane))
        bit = builder.icmp_unsigned("!=", builder.and_(codes, masks), ir.Constant(VECTOR_I8, [0] * LANES))
        signs = builder.select(bit, ir.Constant(VECTOR_F32, [1.0] * LANES), ir.Constant(VECTOR_F32, [-1.0] * LANES))
        builder.store(signs, po).align = 4
        return context.get_dummy_value()

    return types.void(out, code, mask), codegen


@intrinsic
def order(typingctx, level_a, level_b, code_a, code_b):
    """Exchange two rows of lanes where they are not in ascending order; equal levels: by code (ENC-1).

    Levels are float32, codes uint8, all ``[LANES]``.
    """

    def codegen(context, builder, signature, args):
        pla, plb = (_row(context, builder, signature, args, i, VECTOR_F32) for i in (0, 1))
        pca, pcb = (_row(context, builder, signature, args, i, VECTOR_I8) for i in (2, 3))
        la, lb, ca, cb = _get(builder, pla), _get(builder, plb), _get(builder, pca, 1), _get(builder, pcb, 1)
        tie = builder.and_(builder.fcmp_ordered("==", la, lb), builder.icmp_unsigned(">", ca, cb))
        swap = builder.or_(builder.fcmp_ordered(">", la, lb), tie)
        builder.store(builder.select(swap, lb, la), pla).align = 4
        builder.store(builder.select(swap, la, lb), plb).align = 4
        builder.store(builder.select(swap, cb, ca), pca).align = 1
        builder.store(builder.select(swap, ca, cb), pcb).align = 1
        return context.get_dummy_value()

    return types.void(level_a, level_b, code_a, code_b), codegen


@numba.njit(nogil=True, cache=True)
def sums_above(x, w, wx, mids, weights, sums):
    """Sums over the columns above each threshold, for every lane.

    ``weights[t]`` is the sum of w, ``sums[t]`` that of wx, over columns with ``x >= mids[t]``.

    x, w, wx are float32 ``[cols, LANES]``; mids, weights, sums are float32 ``[T, LANES]``, T a multiple of 4 (pad
    with inf).
    """
    _sums_above(
        np.uint64(x.ctypes.data), np.uint64(w.ctypes.data), np.uint64(wx.ctypes.data), np.int64(x.shape[0]),
        np.uint64(mids.ctypes.data), np.int64(mids.shape[0] // 4), np.uint64(weights.ctypes.data),
        np.uint64(sums.ctypes.data),
    )  # fmt: skip


@numba.njit(nogil=True, cache=True)
def codes_of(x, mids, codes, steps, out):
    """Code of the nearest level: ``out[c] = codes[number of the first `steps` mids that are <= x[c]]`` in every lane.

    x float32 ``[cols, LANES]``; mids float32 ``[>= steps, LANES]`` ascending; codes uint8 ``[steps + 1, LANES]`` in
    the order of
    their levels; out uint8 ``[cols, LANES]``. A weight on a midpoint gets the larger level (ENC-1).
    """
    _codes_of(
        np.uint64(x.ctypes.data), np.int64(x.shape[0]), np.uint64(mids.ctypes.data), np.int64(steps),
        np.uint64(codes.ctypes.data), np.uint64(out.ctypes.data),
    )  # fmt: skip


@numba.njit(nogil=True, cache=True)
def load_block(weight, importance, first, last, groups, size, x, w, wx):
    """Fill a block with groups `first` to `last` of `weight`, scaled by a power of two; returns nothing.

    Group ``i`` is columns ``size * (i % groups)`` and on of row ``i // groups``. Lanes past `last` repeat the last
    group; columns past the end of a short group weigh nothing.

    Args:
        weight: float32 ``[rows, cols]``.
        importance: float32 ``[cols]`` weight of each column in the error, or ``[0]`` for all alike.
        x, w, wx: float32 ``[size, LANES]``, filled with values, weights and their products.
    """
    cols = weight.shape[1]
    for lane in range(LANES):
        i = min(first + lane, last - 1)
        row, begin = weight[i // groups], size * (i % groups)
        have = min(size, cols - begin)
        source = row[begin : begin + have]
        for c in range(have):
            x[c, lane] = source[c]
            w[c, lane] = np.float32(1.0)
        if importance.shape[0] > 0:
            part = importance[begin : begin + have]
            total = np.float32(0.0)
            for c in range(have):
                total += part[c]
            if total > 0:  # where nothing matters, all columns matter alike
                for c in range(have):
                    w[c, lane] = part[c] * np.float32(have) / total
        for c in range(have, size):
            x[c, lane] = source[0]
            w[c, lane] = np.float32(0.0)
    for c in range(size):
        for lane in range(LANES):
            wx[c, lane] = w[c, lane] * x[c, lane]


@numba.njit(nogil=True, cache=True)
def store_codes(codes, first, last, groups, size, cols, out):
    """Scatter a block's codes, uint8 ``[size, LANES]``, into the code matrix ``out`` uint8 ``[rows, >= cols]``."""
    for lane in range(last - first):
        i = first + lane
        begin = size * (i % groups)
        row = out[i // groups]
        for c in range(min(size, cols - begin)):
            row[begin + c] = codes[c, lane]


@numba.njit(nogil=True, cache=True)
def pack_rows(start, stop, codes, planes):
    """Planes of the code rows start to stop (BIT-1, BIT-2); a kernel for `parallel_rows`.

    codes uint8 ``[rows, 8 * bytes]``, zero behind the last column; planes uint8 ``[bits, rows, bytes]``.
    Bit p of eight codes is gathered by one multiplication: each 0/1 byte lands on its own bit of the top byte.
    """
    bits, width = planes.shape[0], planes.shape[2]
    for r in range(start, stop):
        words = codes[r].view(np.uint64)
        for p in range(bits):
            shift = np.uint64(bits - 1 - p)
            for k in range(width):
                ones = (words[k] >> shift) & np.uint64(0x0101010101010101)
                planes[p, r, k] = np.uint8((ones * np.uint64(0x0102040810204080)) >> np.uint64(56))


def pack(codes: U8, bits: int) -> U8:
    """Planes of a code matrix uint8 ``[rows, 8 * row_bytes]`` that is zero behind the last column."""
    planes = np.empty((bits, codes.shape[0], codes.shape[1] // 8), np.uint8)
    parallel_rows(pack_rows, codes.shape[0], codes, planes)
    return planes
