"""Codebook codes: ``table[code] * scale``, for FP4, NF4, ternary and user tables."""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from ..machine.llvm import LANES
from ..matrix import F32
from .group_lanes import codes_of, load_block, store_codes, sums_above

ROUNDS = 8  # of scale fit and assignment


def minifloat(exponent_bits: int, mantissa_bits: int) -> list[float]:
    """Values of a sign, exponent and mantissa format without infinities, in the order of its codes.

    The bias is 2^(e-1) - 1; exponent 0 is subnormal. Without mantissa (E3M0), code 0 is zero and the other positive
    values are powers of two.
    """
    bias, positive = 2 ** (exponent_bits - 1) - 1, []
    for code in range(2 ** (exponent_bits + mantissa_bits)):
        e, m = code >> mantissa_bits, code & (2**mantissa_bits - 1)
        fraction = m / 2**mantissa_bits
        positive.append(fraction * 2.0 ** (1 - bias) if e == 0 else (1 + fraction) * 2.0 ** (e - bias))
    return positive + [-v for v in positive]


# NF4: Dettmers et al. 2023, "QLoRA", arXiv:2305.14314, appendix E.
_NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip

TABLES: dict[str, list[float]] = {
    "fp4-e2m1": minifloat(2, 1),  # OCP Microscaling Formats v1.0, section 5.3.3
    "fp4-e3m0": minifloat(3, 0),
    "fp4-e1m2": minifloat(1, 2),
    "nf4": _NF4,
    "ternary": [-1.0, 0.0, 1.0, 0.0],  # the fourth code is never used
}


def table_bits(table: list[float] | F32) -> int:
    """Bits of a code: the length of the table rounded up to a power of two."""
    return max(1, (len(table) - 1).bit_length())


def padded(table: list[float] | F32) -> F32:
    """The table as float32 ``[2**bits]``; a shorter table is filled up with its first value."""
    values = list(map(float, table))
    return np.array(values + [values[0]] * (2 ** table_bits(values) - len(values)), np.float32)


def sorted_table(table: F32) -> tuple[F32, NDArray[np.uint8]]:
    """Distinct values of the table, ascending, and the first code of each: float32 ``[n]`` and uint8 ``[n]``."""
    values, first = np.unique(table + np.float32(0.0), return_index=True)  # adding 0 joins -0.0 and 0.0
    return values.astype(np.float32), first.astype(np.uint8)


@numba.njit(nogil=True, cache=True)
def fit(start, stop, weight, importance, scales, table, size, rounds):
    """Scales of blocks start to stop of LANES groups; a kernel for `parallel_rows`.

    The first scale maps the largest magnitude to the end of the table. Each round then takes the nearest codes and
    their least-squares scale; ``rounds = 0`` keeps the first scale.

    Args:
        weight: float32 ``[rows, cols]``.
        importance: float32 ``[cols]``, or ``[0]``.
        scales: float32 ``[rows * groups]``, output.
        table: float32 ``[n]``, distinct and ascending.
        size: columns of a full group.
        rounds: of assignment and least squares.
    """
    total = scales.shape[0]
    groups = total // weight.shape[0]
    values = table.shape[0]
    padded = -(-values // 4) * 4
    x, w, wx = np.empty((3, size, LANES), np.float32)
    mids, above_w, above_s = np.empty((3, padded, LANES), np.float32)
    scale, largest, top, bottom = np.empty((4, LANES), np.float32)
    reach = max(abs(table[0]), abs(table[values - 1]))
    for block in range(start, stop):
        first, last = block * LANES, min(total, (block + 1) * LANES)
        load_block(weight, importance, first, last, groups, size, x, w, wx)
        largest[:] = 0
        for c in range(size):
            for lane in range(LANES):
                largest[lane] = max(largest[lane], abs(x[c, lane]))
        for lane in range(LANES):
            scale[lane] = largest[lane] / reach
        for _ in range(rounds):
            _table_midpoints(table, scale, mids)
            sums_above(x, w, wx, mids, above_w, above_s)
            total_w = w.sum(axis=0)
            total_s = wx.sum(axis=0)
            top[:] = 0
            bottom[:] = 0
            for k in range(values):
                for lane in range(LANES):
                    below_w = total_w[lane] if k == 0 else above_w[k - 1, lane]
                    below_s = total_s[lane] if k == 0 else above_s[k - 1, lane]
                    here_w = below_w - (above_w[k, lane] if k < values - 1 else np.float32(0.0))
                    here_s = below_s - (above_s[k, lane] if k < values - 1 else np.float32(0.0))
                    top[lane] += table[k] * here_s
                    bottom[lane] += table[k] * table[k] * here_w
            for lane in range(LANES):
                if bottom[lane] > 0 and top[lane] > 0:
                    scale[lane] = top[lane] / bottom[lane]
        for lane in range(last - first):
            scales[first + lane] = scale[lane]


@numba.njit(nogil=True, cache=True)
def assign(start, stop, weight, scales, table, table_codes, size, codes):
    """Nearest codes for given scales, blocks start to stop; a kernel for `parallel_rows`.

    Args:
        weight: float32 ``[rows, cols]``.
        scales: float32 ``[rows * groups]``.
        table, table_codes: float32 ``[n]``, ascending, and the code of each value, uint8 ``[n]``.
        size: columns of a full group.
        codes: uint8 ``[rows, >= cols]``, output.
    """
    total = scales.shape[0]
    groups = total // weight.shape[0]
    values = table.shape[0]
    x, w, wx = np.empty((3, size, LANES), np.float32)
    mids = np.empty((max(values, 4), LANES), np.float32)
    scale = np.empty(LANES, np.float32)
    lane_codes = np.empty((values, LANES), np.uint8)
    for k in range(values):
        lane_codes[k] = table_codes[k]
    out = np.empty((size, LANES), np.uint8)
    no_importance = np.empty(0, np.float32)
    for block in range(start, stop):
        first, last = block * LANES, min(total, (block + 1) * LANES)
        load_block(weight, no_importance, first, last, groups, size, x, w, wx)
        for lane in range(LANES):
            scale[lane] = scales[min(first + lane, last - 1)]
        _table_midpoints(table, scale, mids)
        codes_of(x, mids, lane_codes, values - 1, out)
        store_codes(out, first, last, groups, size, weight.shape[1], codes)


@numba.njit(nogil=True, cache=True)
def _table_midpoints(table, scale, mids):
    """Thresholds between neighbouring levels ``table * scale``; infinity after the last."""
    for k in range(mids.shape[0]):
        for lane in range(LANES):
            if k < table.shape[0] - 1:
                mids[k, lane] = (np.float32(0.5) * table[k] + np.float32(0.5) * table[k + 1]) * scale[lane]
            else:
                mids[k, lane] = np.float32(np.inf)
