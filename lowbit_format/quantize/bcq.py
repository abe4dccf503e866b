"""BCQ: a weight as an offset plus or minus scales, fitted by alternating least squares.

A round has two exact steps, and neither can raise the error (Xu et al. 2018, "Alternating Multi-bit Quantization",
arXiv:1802.00150): the best scales and offset for the present codes (least squares), and the best codes for the present
scales (nearest level). The rounds end in a local optimum that depends on the start. Every group therefore starts twice:
greedily (each scale is the mean magnitude of the residual of the planes before it), and from a uniform grid over its
range; the better result gets the last rounds. At 4 bits on normal weights in groups of 128 the relative error of plain
least squares is 0.090; the greedy start alone gives 0.100 after the same number of rounds.

From 4 bits on, and where no importance of columns is given, the squared error of a weight counts ``1 + w^2 / mean w^2``
of its group. Plain least squares takes the ends of a group in, since few weights are there: the largest hundredth comes
out 3 to 6% too small, all in the same direction. In SmolLM2-135M at 4 bits these factors lower the divergence from the
float model by 2, 11 and 25% in groups of 120, 128 and 136 (0.34 to 0.29 nats on average), for a weight error that is 1%
larger; the embeddings of all-MiniLM-L6-v2 stay as good as they are. With 8 levels or fewer the many small weights need
them all: at 3 bits MiniLM's embeddings lose a third (1 - cosine 0.12 to 0.16). The uniform codec loses on MiniLM, and
NF4, whose levels reach the ends by themselves, neither loses nor gains: they have plain least squares.

The steps read each weight as rarely as possible: with sorted levels, an assignment is a set of thresholds, and least
squares needs only the number and the sum of the weights above each threshold (:func:`.group_lanes.sums_above`).
"""

from __future__ import annotations

import math

import numba
import numpy as np

from ..machine.llvm import LANES
from .group_lanes import (
    add_product,
    codes_of,
    load_block,
    order,
    set_product,
    set_signs,
    store_codes,
    sums_above,
)

ROUNDS = 4  # from each start, and again from the better result: 12 in all
# Fraction of the group's range that the grid covers, by bits: few levels fit better without the ends, many need them.
GRID_RANGE = (0.9, 0.9, 0.9, 0.9, 0.97, 1.0, 1.0, 1.0)
_GRID_RANGE = np.array(GRID_RANGE, np.float32)
SIZED_BITS = 4  # with as many or more, errors count by the size of their weights
RIDGE = np.float32(1e-6)  # times the sum of importances: keeps the system solvable where planes coincide


@numba.njit(nogil=True, cache=True)
def fit(start, stop, weight, importance, scales, offsets, with_offset, size, rounds):
    """Fit blocks start to stop of LANES groups; a kernel for `parallel_rows`.

    Args:
        weight: float32 ``[rows, cols]``.
        importance: float32 ``[cols]``, or ``[0]`` if none is given.
        scales: float32 ``[bits, rows * groups]``, output: descending and >= 0 (ENC-2).
        offsets: float32 ``[rows * groups]``, output (0 without offset).
        with_offset: fit an offset for each group.
        size: columns of a full group.
        rounds: of least squares and assignment, from each start and again from the better result.
    """
    bits, total = scales.shape
    groups = total // weight.shape[0]
    levels = 1 << bits
    x, w, wx = np.empty((3, size, LANES), np.float32)
    stats = np.empty((4, max(levels, 4), LANES), np.float32)
    code = np.empty((levels, LANES), np.uint8)
    s, other = np.empty((2, bits + 1, LANES), np.float32)  # scales, then the offset
    unit, total_w, total_s, gain, other_gain = np.empty((5, LANES), np.float32)
    spread = np.empty(LANES, np.bool_)
    unknowns = bits + 1 if with_offset else bits
    for block in range(start, stop):
        first, last = block * LANES, min(total, (block + 1) * LANES)
        load_block(weight, importance, first, last, groups, size, x, w, wx)
        _normalise(x, wx, unit)
        if importance.shape[0] == 0 and bits >= SIZED_BITS:
            _weigh_by_size(x, w, wx)
        _totals(x, w, wx, total_w, total_s, spread)
        _greedy_start(x, w, total_w, s, with_offset, spread)
        _grid_start(x, other, with_offset)
        _alternate(x, w, wx, total_w, total_s, spread, stats, code, unknowns, rounds, s, gain)
        _alternate(x, w, wx, total_w, total_s, spread, stats, code, unknowns, rounds, other, other_gain)
        for p in range(bits + 1):
            for lane in range(LANES):  # lanes without spread keep the greedy start, which is exact
                s[p, lane] = other[p, lane] if spread[lane] and other_gain[lane] > gain[lane] else s[p, lane]
        _alternate(x, w, wx, total_w, total_s, spread, stats, code, unknowns, rounds, s, gain)
        for lane in range(last - first):
            for p in range(bits):
                scales[p, first + lane] = s[p, lane] * unit[lane]
            offsets[first + lane] = s[bits, lane] * unit[lane]


@numba.njit(nogil=True, cache=True)
def _alternate(x, w, wx, total_w, total_s, spread, stats, code, unknowns, rounds, s, gain):
    """Improve the scales and offset `s` by rounds of assignment and least squares.

    `gain` is set to the part of the weighted sum of squares that the last fit explains: the larger, the smaller the
    error. Lanes without spread keep their `s`, which is exact already.
    """
    level, mids, above_w, above_s = stats
    bits = s.shape[0] - 1
    gram = np.empty((bits + 1, bits + 1, LANES), np.float32)
    rhs, solution = np.empty((2, bits + 1, LANES), np.float32)
    for _ in range(rounds):
        _sorted_levels(s, level, code)
        _midpoints(level, code.shape[0], mids)
        sums_above(x, w, wx, mids, above_w, above_s)
        _normal_equations(total_w, total_s, above_w, above_s, code, gram, rhs)
        solution[:] = rhs
        _solve(gram, solution, unknowns)
        gain[:] = 0
        for p in range(unknowns):
            for lane in range(LANES):
                gain[lane] += rhs[p, lane] * solution[p, lane]
                s[p, lane] = solution[p, lane] if spread[lane] else s[p, lane]
        _canonical(s, bits)


@numba.njit(nogil=True, cache=True)
def assign(start, stop, weight, scales, offsets, size, codes):
    """Nearest codes for given parameters, blocks start to stop; a kernel for `parallel_rows`.

    Args:
        weight: float32 ``[rows, cols]``.
        scales: float32 ``[bits, rows * groups]``.
        offsets: float32 ``[rows * groups]``.
        size: columns of a full group.
        codes: uint8 ``[rows, >= cols]``, output.
    """
    bits, total = scales.shape
    groups = total // weight.shape[0]
    levels = 1 << bits
    x, w, wx = np.empty((3, size, LANES), np.float32)
    level, mids = np.empty((2, max(levels, 4), LANES), np.float32)
    code = np.empty((levels, LANES), np.uint8)
    s = np.empty((bits + 1, LANES), np.float32)
    out = np.empty((size, LANES), np.uint8)
    no_importance = np.empty(0, np.float32)
    for block in range(start, stop):
        first, last = block * LANES, min(total, (block + 1) * LANES)
        load_block(weight, no_importance, first, last, groups, size, x, w, wx)
        for lane in range(LANES):
            i = min(first + lane, last - 1)
            for p in range(bits):
                s[p, lane] = scales[p, i]
            s[bits, lane] = offsets[i]
        _sorted_levels(s, level, code)
        _midpoints(level, levels, mids)
        codes_of(x, mids, code, levels - 1, out)
        store_codes(out, first, last, groups, size, weight.shape[1], codes)


@numba.njit(nogil=True, cache=True)
def refit(start, stop, weight, codes, scales, offsets, with_offset, size, bits):
    """Least-squares parameters for the first k planes of given codes (NST-1), rows start to stop; a kernel.

    Args:
        weight: float32 ``[rows, cols]``.
        codes: uint8 ``[rows, >= cols]``, of `bits` planes.
        scales: float32 ``[k, rows, groups]``, output.
        offsets: float32 ``[rows, groups]``, output (0 without offset).
        with_offset: fit an offset for each group.
        size: columns of a full group.
        bits: planes of the codes.
    """
    k, _, groups = scales.shape
    gram, rhs = np.zeros((k + 1, k + 1, LANES), np.float32), np.zeros((k + 1, LANES), np.float32)
    sign = np.ones(k + 1, np.float64)
    g64, r64 = np.empty((k + 1, k + 1), np.float64), np.empty(k + 1, np.float64)
    for r in range(start, stop):
        for g in range(groups):
            begin, end = g * size, min(weight.shape[1], (g + 1) * size)
            g64[:] = 0
            r64[:] = 0
            largest = np.float32(0.0)
            for c in range(begin, end):
                largest = max(largest, abs(weight[r, c]))
            unit = np.float64(largest) if largest > 0 else 1.0
            for c in range(begin, end):
                for p in range(k):
                    sign[p] = 1.0 if (codes[r, c] >> (bits - 1 - p)) & 1 else -1.0
                for p in range(k + 1):
                    r64[p] += sign[p] * (weight[r, c] / unit)
                    for q in range(p + 1):
                        g64[p, q] += sign[p] * sign[q]
            for p in range(k + 1):
                rhs[p, 0] = r64[p]
                for q in range(p):
                    gram[p, q, 0] = g64[p, q]
                gram[p, p, 0] = g64[p, p] * (1.0 + RIDGE)
            _solve(gram, rhs, k + 1 if with_offset else k)
            for p in range(k):
                scales[p, r, g] = rhs[p, 0] * unit
            offsets[r, g] = rhs[k, 0] * unit if with_offset else np.float32(0.0)


@numba.njit(nogil=True, cache=True)
def _normalise(x, wx, unit):
    """Scale each lane by a power of two to magnitudes of at most 1: this is exact, and no sum can overflow."""
    largest = np.zeros(LANES, np.float32)
    factor = np.empty(LANES, np.float32)
    for c in range(x.shape[0]):
        for lane in range(LANES):
            largest[lane] = max(largest[lane], abs(x[c, lane]))
    for lane in range(LANES):
        exponent = min(max(math.frexp(largest[lane])[1], -125), 126)
        unit[lane] = np.float32(math.ldexp(1.0, exponent))
        factor[lane] = np.float32(math.ldexp(1.0, -exponent))
    for c in range(x.shape[0]):
        for lane in range(LANES):
            x[c, lane] *= factor[lane]
            wx[c, lane] *= factor[lane]


@numba.njit(nogil=True, cache=True)
def _weigh_by_size(x, w, wx):
    """Count errors by the size of their weights: multiply `w` and `wx` by ``1 + x^2 / mean x^2`` of the lane's group.

    The lanes are normalised, so that no square overflows.
    """
    count, squares, share = np.zeros((3, LANES), np.float32)
    for c in range(x.shape[0]):
        for lane in range(LANES):
            count[lane] += w[c, lane]
            squares[lane] += w[c, lane] * x[c, lane] * x[c, lane]
    for lane in range(LANES):
        share[lane] = count[lane] / squares[lane] if squares[lane] > 0 else np.float32(0.0)
    for c in range(x.shape[0]):
        for lane in range(LANES):
            w[c, lane] *= np.float32(1.0) + x[c, lane] * x[c, lane] * share[lane]
            wx[c, lane] = w[c, lane] * x[c, lane]


@numba.njit(nogil=True, cache=True)
def _totals(x, w, wx, total_w, total_s, spread):
    """Sums of importances and of weighted values of each lane, and whether the lane has two different values."""
    total_w[:] = 0
    total_s[:] = 0
    farthest = np.zeros(LANES, np.float32)
    for c in range(w.shape[0]):
        for lane in range(LANES):
            total_w[lane] += w[c, lane]
            total_s[lane] += wx[c, lane]
            farthest[lane] = max(farthest[lane], abs(x[c, lane] - x[0, lane]))
    for lane in range(LANES):
        spread[lane] = farthest[lane] > 0


@numba.njit(nogil=True, cache=True)
def _greedy_start(x, w, total_w, s, with_offset, spread):
    """First start: the mean of the group as offset, then mean magnitudes of the residual as scales."""
    size, bits = x.shape[0], s.shape[0] - 1
    rest = np.empty_like(x)
    mean = np.zeros(LANES, np.float32)
    for c in range(size):
        for lane in range(LANES):
            mean[lane] += w[c, lane] * (x[c, lane] - x[0, lane])  # differences: exact where the group is constant
    for lane in range(LANES):
        s[bits, lane] = x[0, lane] + mean[lane] / total_w[lane] if with_offset else np.float32(0.0)
    mean[:] = 0
    for c in range(size):
        for lane in range(LANES):
            rest[c, lane] = abs(x[c, lane] - s[bits, lane])
            mean[lane] += w[c, lane] * rest[c, lane]
    for p in range(bits):
        for lane in range(LANES):
            s[p, lane] = mean[lane] / total_w[lane] if spread[lane] else rest[0, lane]
        mean[:] = 0
        scale = s[p]
        for c in range(size):  # only magnitudes are needed: | |r| - s | is the residual's
            for lane in range(LANES):
                left = abs(rest[c, lane] - scale[lane])
                rest[c, lane] = left
                mean[lane] += w[c, lane] * left


@numba.njit(nogil=True, cache=True)
def _grid_start(x, s, with_offset):
    """Second start: a uniform grid over most of the range, around its middle (around 0 without offset)."""
    bits = s.shape[0] - 1
    low, high = x[0].copy(), x[0].copy()
    for c in range(x.shape[0]):
        for lane in range(LANES):
            low[lane] = min(low[lane], x[c, lane])
            high[lane] = max(high[lane], x[c, lane])
    if not with_offset:
        for lane in range(LANES):
            high[lane] = max(high[lane], -low[lane])
            low[lane] = -high[lane]
    for lane in range(LANES):
        s[bits, lane] = np.float32(0.5) * (low[lane] + high[lane])
    for p in range(bits):
        share = np.float32(0.5) * _GRID_RANGE[bits - 1] * np.float32((1 << (bits - 1 - p)) / ((1 << bits) - 1))
        for lane in range(LANES):
            s[p, lane] = (high[lane] - low[lane]) * share


@numba.njit(nogil=True, cache=True)
def _sorted_levels(s, level, code):
    """All levels of each lane in ascending order with their codes.

    `s` is float32 ``[bits + 1, LANES]``, the offset last. The levels of a code and of its complement have the same
    distance from the offset, one on each side. Only the upper half (codes with the top bit set) is computed and sorted.
    """
    bits = s.shape[0] - 1
    half = 1 << (bits - 1)
    upper, upper_code = level[half : 2 * half], code[half : 2 * half]
    plus, minus = np.full(LANES, 1.0, np.float32), np.full(LANES, -1.0, np.float32)
    for k in range(half):
        for lane in range(LANES):
            upper[k, lane] = s[0, lane]
        for p in range(1, bits):
            sign = plus if (k >> (bits - 1 - p)) & 1 else minus
            add_product(upper[k], sign, s[p])
        for lane in range(LANES):  # a level below the offset: its complement is above
            upper_code[k, lane] = half + k if upper[k, lane] >= 0 else half - 1 - k
            upper[k, lane] = abs(upper[k, lane])
    # Batcher's bitonic network: the same comparisons in every lane.
    k = 2
    while k <= half:
        j = k >> 1
        while j > 0:
            for a in range(half):
                b = a ^ j
                if b > a:
                    if a & k:
                        order(upper[b], upper[a], upper_code[b], upper_code[a])
                    else:
                        order(upper[a], upper[b], upper_code[a], upper_code[b])
            j >>= 1
        k <<= 1
    for k in range(half):
        for lane in range(LANES):
            level[half - 1 - k, lane] = s[bits, lane] - upper[k, lane]
            code[half - 1 - k, lane] = 2 * half - 1 - upper_code[k, lane]
            upper[k, lane] += s[bits, lane]


@numba.njit(nogil=True, cache=True)
def _midpoints(level, levels, mids):
    """Thresholds between neighbouring levels; infinity after the last."""
    for k in range(mids.shape[0]):
        for lane in range(LANES):
            if k < levels - 1:
                mids[k, lane] = np.float32(0.5) * level[k, lane] + np.float32(0.5) * level[k + 1, lane]
            else:
                mids[k, lane] = np.float32(np.inf)


@numba.njit(nogil=True, cache=True)
def _normal_equations(total_w, total_s, above_w, above_s, code, gram, rhs):
    """Normal equations of scales and offset: ``gram = D'WD + ridge``, ``rhs = D'Wx``, D the signs and a column of ones.

    Levels k and 2^bits - 1 - k have opposite signs, so only their sums and differences matter.
    """
    levels = code.shape[0]
    bits = rhs.shape[0] - 1
    gram[:] = 0
    rhs[:] = 0
    both, skew, amount, product = np.empty((4, LANES), np.float32)
    sign = np.empty((bits, LANES), np.float32)
    for k in range(levels // 2, levels):
        m = levels - 1 - k  # the mirror of k; above_[m] starts after it
        for lane in range(LANES):
            upper_w = above_w[k - 1, lane] - (above_w[k, lane] if k < levels - 1 else np.float32(0.0))
            upper_s = above_s[k - 1, lane] - (above_s[k, lane] if k < levels - 1 else np.float32(0.0))
            lower_w = (above_w[m - 1, lane] if m > 0 else total_w[lane]) - above_w[m, lane]
            lower_s = (above_s[m - 1, lane] if m > 0 else total_s[lane]) - above_s[m, lane]
            both[lane] = upper_w + lower_w
            skew[lane] = upper_w - lower_w
            amount[lane] = upper_s - lower_s
        for p in range(bits):
            set_signs(sign[p], code[k], np.uint8(1 << (bits - 1 - p)))
            add_product(rhs[p], amount, sign[p])
            add_product(gram[bits, p], skew, sign[p])
            set_product(product, both, sign[p])
            for q in range(p):
                add_product(gram[p, q], product, sign[q])
    for lane in range(LANES):
        rhs[bits, lane] = total_s[lane]
    for p in range(bits + 1):
        for lane in range(LANES):
            gram[p, p, lane] = total_w[lane] * (np.float32(1.0) + RIDGE)  # signs squared are 1


@numba.njit(nogil=True, cache=True)
def _solve(gram, rhs, n):
    """Solve the first n equations by LDL' factors, in place: `gram` is overwritten, `rhs` becomes the solution."""
    for j in range(n):
        for k in range(j):
            for lane in range(LANES):
                gram[j, j, lane] -= gram[j, k, lane] * gram[j, k, lane] * gram[k, k, lane]
        for lane in range(LANES):
            # Rounding can make the pivot of a plane that repeats another zero or negative; it is at least the ridge.
            gram[j, j, lane] = max(gram[j, j, lane], RIDGE)
        for i in range(j + 1, n):
            for k in range(j):
                for lane in range(LANES):
                    gram[i, j, lane] -= gram[i, k, lane] * gram[j, k, lane] * gram[k, k, lane]
            for lane in range(LANES):
                gram[i, j, lane] /= gram[j, j, lane]
    for i in range(n):
        for k in range(i):
            for lane in range(LANES):
                rhs[i, lane] -= gram[i, k, lane] * rhs[k, lane]
    for i in range(n):
        for lane in range(LANES):
            rhs[i, lane] /= gram[i, i, lane]
    for i in range(n - 2, -1, -1):
        for k in range(i + 1, n):
            for lane in range(LANES):
                rhs[i, lane] -= gram[k, i, lane] * rhs[k, lane]


@numba.njit(nogil=True, cache=True)
def _canonical(s, bits):
    """Make the scales >= 0 and descending (ENC-2); the next assignment computes codes for them."""
    for p in range(bits):
        for lane in range(LANES):
            s[p, lane] = abs(s[p, lane])
    for p in range(1, bits):
        for q in range(p, 0, -1):
            for lane in range(LANES):
                a, b = s[q - 1, lane], s[q, lane]
                s[q - 1, lane] = max(a, b)
                s[q, lane] = min(a, b)
