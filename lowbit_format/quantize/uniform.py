"""Uniform codes: ``(code - zero) * scale``, by range or by least error.

Three solvers choose scale and zero point of a group:

- ``minmax``: the range of the group, ends included (round-to-nearest, asymmetric); the zero point is a float.
- ``symmetric``: the largest magnitude is the highest level, and 0.0 is a level.
- ``mse``: from several clipped ranges, alternate nearest codes with the least-squares line through (code, weight).
  PEQA starts from this (Kim et al. 2023, arXiv:2305.14152: step sizes of least Frobenius error).
"""

from __future__ import annotations

import numba
import numpy as np

from ..machine.llvm import LANES
from .group_lanes import load_block

SOLVERS = {"minmax": 0, "symmetric": 1, "mse": 2}
ROUNDS = 6  # of line fit and assignment, from each clipped range
CLIPS = (1.0, 0.9, 0.8, 0.7)  # fractions of the range that `mse` starts from
_CLIPS = np.array(CLIPS, np.float32)
_TINY = np.float32(2.0**-100)  # smaller scales are multiplied by 2^64 first: the inverse of a subnormal is infinite
_TINY_UNIT = np.float32(2.0**64)


@numba.njit(nogil=True, cache=True)
def fit(start, stop, weight, importance, scales, zeros, bits, size, solver, rounds):
    """Scales and zero points of blocks start to stop of LANES groups; a kernel for `parallel_rows`.

    Args:
        weight: float32 ``[rows, cols]``.
        importance: float32 ``[cols]``, or ``[0]``; only ``mse`` uses it.
        scales, zeros: float32 ``[rows * groups]``, output.
        bits: of a code.
        size: columns of a full group.
        solver: a value of SOLVERS.
        rounds: see ROUNDS.
    """
    total = scales.shape[0]
    groups = total // weight.shape[0]
    x, w, wx = np.empty((3, size, LANES), np.float32)
    low, high, scale, zero = np.empty((4, LANES), np.float32)
    for block in range(start, stop):
        first, last = block * LANES, min(total, (block + 1) * LANES)
        load_block(weight, importance, first, last, groups, size, x, w, wx)
        low[:] = x[0]
        high[:] = x[0]
        for c in range(size):
            for lane in range(LANES):
                low[lane] = min(low[lane], x[c, lane])
                high[lane] = max(high[lane], x[c, lane])
        if solver == 1:
            _symmetric(low, high, bits, scale, zero)
        else:
            _from_range(low, high, np.float32(1.0), bits, scale, zero)
        if solver == 2:
            _least_error(x, w, low, high, bits, rounds, scale, zero)
        for lane in range(last - first):
            scales[first + lane] = scale[lane]
            zeros[first + lane] = zero[lane]


@numba.njit(nogil=True, cache=True)
def assign(start, stop, weight, scales, zeros, bits, size, codes):
    """Nearest codes for given parameters, blocks start to stop; a kernel for `parallel_rows`.

    A weight halfway between two levels gets the higher code (ENC-1).

    Args:
        weight: float32 ``[rows, cols]``.
        scales, zeros: float32 ``[rows * groups]``.
        bits: of a code.
        size: columns of a full group.
        codes: uint8 ``[rows, >= cols]``, output.
    """
    cols, groups = weight.shape[1], scales.shape[0] // weight.shape[0]
    top = np.float32((1 << bits) - 1)
    for block in range(start, stop):
        for i in range(block * LANES, min(scales.shape[0], (block + 1) * LANES)):
            row, begin = i // groups, size * (i % groups)
            end = min(cols, begin + size)
            source, target = weight[row, begin:end], codes[row, begin:end]
            unit = _TINY_UNIT if scales[i] < _TINY else np.float32(1.0)
            inverse = np.float32(1.0) / (scales[i] * unit) if scales[i] > 0 else np.float32(0.0)
            shift = zeros[i] + np.float32(0.5)
            for c in range(end - begin):
                code = (source[c] * unit) * inverse + shift
                target[c] = np.uint8(min(max(code, np.float32(0.0)), top))


@numba.njit(nogil=True, cache=True)
def refit(start, stop, weight, codes, scales, zeros, size, drop):
    """Least-squares parameters for codes without their last `drop` bits (NST-1), rows start to stop; a kernel.

    Args:
        weight: float32 ``[rows, cols]``.
        codes: uint8 ``[rows, >= cols]``.
        scales, zeros: float32 ``[rows, groups]``, output.
        size: columns of a full group.
        drop: number of bits.
    """
    for r in range(start, stop):
        for g in range(scales.shape[1]):
            begin, end = g * size, min(weight.shape[1], (g + 1) * size)
            n, sq, sx, sqq, sqx = np.float64(end - begin), 0.0, 0.0, 0.0, 0.0
            for c in range(begin, end):
                q, x = np.float64(codes[r, c] >> drop), np.float64(weight[r, c])
                sq += q
                sx += x
                sqq += q * q
                sqx += q * x
            spread = n * sqq - sq * sq
            slope = (n * sqx - sq * sx) / spread if spread > 0 else 0.0
            if slope != 0:
                scales[r, g] = slope
                zeros[r, g] = (sq - sx / slope) / n
            else:  # one code for all weights: its level is their mean
                scales[r, g] = sx / n
                zeros[r, g] = sq / n - 1.0


@numba.njit(nogil=True, cache=True)
def _from_range(low, high, part, bits, scale, zero):
    """Levels spread evenly over the fraction `part` of the range, around its middle.

    A constant group gets its value's magnitude as scale, and a zero point that makes the value a level.
    """
    steps = np.float32((1 << bits) - 1)
    for lane in range(LANES):
        middle = np.float32(0.5) * low[lane] + np.float32(0.5) * high[lane]
        reach = part * (np.float32(0.5) * high[lane] - np.float32(0.5) * low[lane])
        if reach > 0:
            scale[lane] = reach / (np.float32(0.5) * steps)
            zero[lane] = np.float32(0.5) * steps - middle / scale[lane]
        else:
            scale[lane] = abs(middle)
            zero[lane] = np.float32(1.0) if middle < 0 else np.float32(0.0)


@numba.njit(nogil=True, cache=True)
def _symmetric(low, high, bits, scale, zero):
    """The largest magnitude is the highest level, and 0.0 is a level; with one bit the levels are plus and minus it."""
    for lane in range(LANES):
        largest = max(-low[lane], high[lane])
        if bits == 1:
            scale[lane] = np.float32(2.0) * largest
            zero[lane] = np.float32(0.5)
        else:
            scale[lane] = largest / np.float32((1 << (bits - 1)) - 1)
            zero[lane] = np.float32(1 << (bits - 1))


@numba.njit(nogil=True, cache=True)
def _least_error(x, w, low, high, bits, rounds, scale, zero):
    """The best of several clipped ranges, each improved by rounds of codes and weighted line fits."""
    size = x.shape[0]
    top = np.float32((1 << bits) - 1)
    a, z, best, inverse = np.empty((4, LANES), np.float32)
    n, sx, sq, sqq, sqx, sxx = np.empty((6, LANES), np.float32)
    best[:] = np.inf
    for part in _CLIPS:
        _from_range(low, high, part, bits, a, z)
        for step in range(rounds + 1):
            n[:] = 0
            sx[:] = 0
            sq[:] = 0
            sqq[:] = 0
            sqx[:] = 0
            sxx[:] = 0
            for lane in range(LANES):
                inverse[lane] = np.float32(1.0) / a[lane] if a[lane] > 0 else np.float32(0.0)
            for c in range(size):
                for lane in range(LANES):
                    # In units of the scale and relative to the zero point: small numbers keep the sums accurate.
                    v = x[c, lane] * inverse[lane] + z[lane]
                    q = min(max(np.floor(v + np.float32(0.5)), np.float32(0.0)), top)
                    weight = w[c, lane]
                    n[lane] += weight
                    sq[lane] += weight * q
                    sx[lane] += weight * v
                    sqq[lane] += weight * q * q
                    sqx[lane] += weight * q * v
                    sxx[lane] += weight * (q - v) * (q - v)
            for lane in range(LANES):
                error = sxx[lane] * a[lane] * a[lane]
                if error < best[lane]:
                    best[lane], scale[lane], zero[lane] = error, a[lane], z[lane]
                determinant = n[lane] * sqq[lane] - sq[lane] * sq[lane]
                slope = (
                    (n[lane] * sqx[lane] - sq[lane] * sx[lane]) / determinant if determinant > 0 else np.float32(1.0)
                )
                if slope > 0 and step < rounds and low[lane] < high[lane]:
                    middle = (sx[lane] - slope * sq[lane]) / n[lane]  # v = slope * q + middle
                    z[lane] = (z[lane] - middle) / slope
                    a[lane] *= slope
