"""Sixteen groups side by side: the loops that all solvers share.

A *block* holds `LANES` groups, one in each lane: ``x[c, l]`` is column `c` of group `l`. Every operation is the same in
all lanes. So it runs in SIMD registers, needs no sums across lanes, and gives the same bits on every machine, however
wide its registers are.

The innermost loops are Numba intrinsics made with :mod:`..machine.llvm`: :func:`sums_above` (statistics of an
assignment), :func:`codes_of` (the assignment), and products, signs and exchanges of single rows of lanes.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ..bits import U8
from ..machine.llvm import I8, I64, LANES, VECTOR_F32, VECTOR_I8, ZERO, array_address, at, load, loop, splat, store
from ..machine.threads import parallel_rows

ROW_F32, ROW_I8 = 4 * LANES, LANES  # bytes of a row of lanes
_TOGETHER = 4  # thresholds held in registers at a time: 8 accumulators


@intrinsic
def _sums_above(typingctx, x, w, wx, mids, weights, sums):
    """See :func:`sums_above`."""

    def codegen(context, builder, signature, args):
        px, pw, pwx, pmids, pweights, psums = _addresses(context, builder, signature, args)
        cols, fours = _length(context, builder, signature, args, 0), _length(context, builder, signature, args, 3)
        fours = builder.sdiv(fours, I64(_TOGETHER))

        def four(q: Any, _: list[Any]) -> list[Any]:
            offset = builder.mul(q, I64(_TOGETHER * ROW_F32))
            mid = [load(builder, at(builder, pmids, (1, offset), (t, ROW_F32)), VECTOR_F32) for t in range(_TOGETHER)]

            def column(c: Any, acc: list[Any]) -> list[Any]:
                vx, vw, vwx = (load(builder, at(builder, p, (c, ROW_F32)), VECTOR_F32) for p in (px, pw, pwx))
                out = []
                for t in range(_TOGETHER):
                    above = builder.fcmp_ordered(">=", vx, mid[t])
                    out.append(builder.fadd(acc[2 * t], builder.select(above, vw, ZERO)))
                    out.append(builder.fadd(acc[2 * t + 1], builder.select(above, vwx, ZERO)))
                return out

            acc = loop(builder, cols, column, [ZERO] * (2 * _TOGETHER))
            for t in range(_TOGETHER):
                store(builder, acc[2 * t], at(builder, pweights, (1, offset), (t, ROW_F32)))
                store(builder, acc[2 * t + 1], at(builder, psums, (1, offset), (t, ROW_F32)))
            return []

        loop(builder, fours, four, [])
        return context.get_dummy_value()

    return types.void(x, w, wx, mids, weights, sums), codegen


@intrinsic
def _codes_of(typingctx, x, mids, codes, steps, out):
    """See :func:`codes_of`; `steps` is an int64."""

    def codegen(context, builder, signature, args):
        px, pmids, pcodes, pout = (_address(context, builder, signature, args, i) for i in (0, 1, 2, 4))
        cols, steps = _length(context, builder, signature, args, 0), args[3]
        first = load(builder, pcodes, VECTOR_I8, 1)

        def column(c: Any, _: list[Any]) -> list[Any]:
            vx = load(builder, at(builder, px, (c, ROW_F32)), VECTOR_F32)

            def step(i: Any, code: list[Any]) -> list[Any]:
                above = builder.fcmp_ordered(">=", vx, load(builder, at(builder, pmids, (i, ROW_F32)), VECTOR_F32))
                following = load(builder, at(builder, pcodes, (i, ROW_I8), (1, ROW_I8)), VECTOR_I8, 1)
                return [builder.select(above, following, code[0])]

            (code,) = loop(builder, steps, step, [first])
            store(builder, code, at(builder, pout, (c, ROW_I8)), 1)
            return []

        loop(builder, cols, column, [])
        return context.get_dummy_value()

    return types.void(x, mids, codes, types.int64, out), codegen


@intrinsic
def add_product(typingctx, out, a, b):
    """``out += a * b`` over one row of lanes: three float32 ``[LANES]`` arrays.

    A loop over the lanes would do, but the compiler then guards it against overlapping arrays, which costs more than
    the work.
    """

    def codegen(context, builder, signature, args):
        pout, pa, pb = _addresses(context, builder, signature, args)
        vout, va, vb = (load(builder, p, VECTOR_F32) for p in (pout, pa, pb))
        store(builder, builder.fadd(vout, builder.fmul(va, vb)), pout)
        return context.get_dummy_value()

    return types.void(out, a, b), codegen


@intrinsic
def set_product(typingctx, out, a, b):
    """``out = a * b`` over one row of lanes: three float32 ``[LANES]`` arrays."""

    def codegen(context, builder, signature, args):
        pout, pa, pb = _addresses(context, builder, signature, args)
        store(builder, builder.fmul(load(builder, pa, VECTOR_F32), load(builder, pb, VECTOR_F32)), pout)
        return context.get_dummy_value()

    return types.void(out, a, b), codegen


@intrinsic
def set_signs(typingctx, out, code, mask):
    """``out = 1 where code & mask, else -1`` over one row of lanes: float32, uint8 ``[LANES]``, and a uint8."""

    def codegen(context, builder, signature, args):
        pout, pcode = (_address(context, builder, signature, args, i) for i in (0, 1))
        mask_value = builder.trunc(args[2], I8) if args[2].type.width > 8 else args[2]
        masked = builder.and_(load(builder, pcode, VECTOR_I8, 1), splat(builder, mask_value))
        bit = builder.icmp_unsigned("!=", masked, ir.Constant(VECTOR_I8, [0] * LANES))
        one, minus_one = (ir.Constant(VECTOR_F32, [sign] * LANES) for sign in (1.0, -1.0))
        store(builder, builder.select(bit, one, minus_one), pout)
        return context.get_dummy_value()

    return types.void(out, code, mask), codegen


@intrinsic
def order(typingctx, level_a, level_b, code_a, code_b):
    """Exchange two rows of lanes where they are not in ascending order; equal levels: by code (ENC-1).

    Levels are float32, codes uint8, all ``[LANES]``.
    """

    def codegen(context, builder, signature, args):
        pla, plb, pca, pcb = _addresses(context, builder, signature, args)
        la, lb = (load(builder, p, VECTOR_F32) for p in (pla, plb))
        ca, cb = (load(builder, p, VECTOR_I8, 1) for p in (pca, pcb))
        tie = builder.and_(builder.fcmp_ordered("==", la, lb), builder.icmp_unsigned(">", ca, cb))
        swap = builder.or_(builder.fcmp_ordered(">", la, lb), tie)
        store(builder, builder.select(swap, lb, la), pla)
        store(builder, builder.select(swap, la, lb), plb)
        store(builder, builder.select(swap, cb, ca), pca, 1)
        store(builder, builder.select(swap, ca, cb), pcb, 1)
        return context.get_dummy_value()

    return types.void(level_a, level_b, code_a, code_b), codegen


def _address(context: Any, builder: Any, signature: Any, args: Any, i: int) -> Any:
    """Address of the first element of array argument `i`."""
    return array_address(context, builder, signature.args[i], args[i])


def _addresses(context: Any, builder: Any, signature: Any, args: Any) -> list[Any]:
    """Address of the first element of each argument; all are arrays."""
    return [_address(context, builder, signature, args, i) for i in range(len(args))]


def _length(context: Any, builder: Any, signature: Any, args: Any, i: int) -> Any:
    """First dimension of array argument `i`, an int64."""
    array = context.make_array(signature.args[i])(context, builder, args[i])
    return builder.extract_value(array.shape, 0)


@numba.njit(nogil=True, cache=True)
def sums_above(x, w, wx, mids, weights, sums):
    """Sums over the columns above each threshold, for every lane.

    ``weights[t]`` is the sum of `w`, ``sums[t]`` that of `wx`, over columns with ``x >= mids[t]``.

    Args:
        x, w, wx: float32 ``[cols, LANES]``.
        mids: float32 ``[T, LANES]``; T is a multiple of 4, pad with inf.
        weights, sums: float32 ``[T, LANES]``, written.
    """
    _sums_above(x, w, wx, mids, weights, sums)


@numba.njit(nogil=True, cache=True)
def codes_of(x, mids, codes, steps, out):
    """Code of the nearest level: ``out[c] = codes[number of the first `steps` mids that are <= x[c]]`` in every lane.

    A weight on a midpoint gets the larger level (ENC-1).

    Args:
        x: float32 ``[cols, LANES]``.
        mids: float32 ``[>= steps, LANES]``, ascending.
        codes: uint8 ``[steps + 1, LANES]``, in the order of their levels.
        steps: number of thresholds.
        out: uint8 ``[cols, LANES]``, written.
    """
    _codes_of(x, mids, codes, steps, out)


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
