"""What a decoder layer computes between its products, for the few rows of a decoding step.

Each kernel is one pass over its numbers, where the operations of torch would be several calls, each of which takes
longer to begin than to compute. Pieces are rows. Numbers are float32, addresses and strides as in :mod:`.products`.
"""

from __future__ import annotations

import math

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ...machine.llvm import F32, I32, call
from .intrinsics import floats_at
from .parallel import Job, job, kernel, take

_SUMS = {"contract", "reassoc"}  # what a compiler may do with a sum: so it becomes one of vectors


@job
class NormJob(Job):
    """``out = weight * sum / sqrt(mean(sum**2) + epsilon)``, ``sum = x + added``, over each row.

    That is the root mean square norm of a sum (Zhang and Sennrich 2019, arXiv:1910.07467).
    """

    rows: int
    columns: int
    x: int  # address [rows, columns]
    added: int  # address [rows, columns]; 0: nothing is
    sum: int  # address [rows, columns]; not needed if nothing is added
    weight: int  # address [columns]
    epsilon: int  # address [1]
    out: int  # address [rows (stride), columns]; may be `x`
    stride: int


@kernel(NormJob)
def norm(job):
    """Take one row after another."""
    cols = job.columns
    weight, epsilon = floats_at(job.weight), floats_at(job.epsilon)[0]
    while True:
        r: int = take(job)
        if r >= job.rows:
            break
        x = job.x + 4 * r * cols
        if job.added != 0:
            x = _add(x, job.added + 4 * r * cols, job.sum + 4 * r * cols, cols)
        _norm(floats_at(x), weight, epsilon, floats_at(job.out + r * job.stride), cols)


@numba.njit(fastmath=_SUMS)
def _norm(x, weight, epsilon, out, cols):
    total = np.float32(0.0)
    for c in range(cols):
        total += x[c] * x[c]
    factor = np.float32(1.0) / np.sqrt(total / np.float32(cols) + epsilon)
    for c in range(cols):
        out[c] = weight[c] * (x[c] * factor)


@numba.njit
def _add(x, y, out, count):
    """``out = x + y``; the address of `out`."""
    a, b, to = floats_at(x), floats_at(y), floats_at(out)
    for i in range(count):
        to[i] = a[i] + b[i]
    return out


@job
class AdditionJob(Job):
    """``x += y``."""

    rows: int
    columns: int
    x: int  # address [rows, columns]
    y: int  # address [rows, columns]


@kernel(AdditionJob)
def add(job):
    """Take one row after another."""
    while True:
        r: int = take(job)
        if r >= job.rows:
            break
        place = 4 * r * job.columns
        _add(job.x + place, job.y + place, job.x + place, job.columns)


@job
class RotationJob(Job):
    """Rotary position embedding of two tensors in place (Su et al. 2021, arXiv:2104.09864): column i of a head turns
    with i + dim / 2.
    """

    rows: int
    dim: int  # columns of a head
    x: int  # address [rows, x_heads * dim]
    x_heads: int
    y: int  # address [rows, y_heads * dim]
    y_heads: int
    cos: int  # address [rows (stride), dim]
    sin: int  # likewise
    stride: int  # 0: the same for all rows


@kernel(RotationJob)
def rotate(job):
    """Take one row after another."""
    while True:
        r: int = take(job)
        if r >= job.rows:
            break
        cos, sin = job.cos + r * job.stride, job.sin + r * job.stride
        _rotate(job.x + 4 * r * job.x_heads * job.dim, cos, sin, job.x_heads, job.dim)
        _rotate(job.y + 4 * r * job.y_heads * job.dim, cos, sin, job.y_heads, job.dim)


@numba.njit
def _rotate(x, cos, sin, heads, dim):
    half, c, s = dim // 2, floats_at(cos), floats_at(sin)
    for h in range(heads):
        low, high = floats_at(x + 4 * h * dim), floats_at(x + 4 * (h * dim + half))
        for i in range(half):
            a, b = low[i], high[i]
            low[i] = a * c[i] - b * s[i]
            high[i] = b * c[half + i] + a * s[half + i]


@job
class GateJob(Job):
    """``out = gate / (1 + exp(-gate)) * up``: SiLU times a factor (Shazeer 2020, arXiv:2002.05202)."""

    rows: int
    columns: int
    gate: int  # address [rows, columns]
    up: int  # address [rows, columns]
    out: int  # address [rows (stride), columns]
    stride: int


@kernel(GateJob)
def gate(job):
    """Take one row after another."""
    while True:
        r: int = take(job)
        if r >= job.rows:
            break
        place = 4 * r * job.columns
        _gate(floats_at(job.gate + place), floats_at(job.up + place), floats_at(job.out + r * job.stride), job.columns)


@numba.njit
def _gate(gate, up, out, count):
    one = np.float32(1.0)
    for i in range(count):
        out[i] = gate[i] / (one + _exp(-gate[i])) * up[i]


@intrinsic
def _exp(typingctx, x):
    """``exp(x)``, float32, to 2e-7 of it; without a call, so that a loop with it becomes one of vectors.

    With n, the integer nearest to ``x / ln 2``, it is ``2**n * exp(x - n * ln 2)``, the latter by its series. Beyond
    what float32 can hold, x counts as the last that it can.
    """

    def codegen(context, builder, signature, args):
        def constant(value):
            return ir.Constant(F32, value)

        def fma(a, b, c):
            return call(builder, "llvm.fmuladd.f32", F32, a, b, c)

        x = call(builder, "llvm.minnum.f32", F32, args[0], constant(88.0))
        x = call(builder, "llvm.maxnum.f32", F32, x, constant(-87.0))
        n = call(builder, "llvm.rint.f32", F32, builder.fmul(x, constant(1 / math.log(2))))
        high = 0.693359375  # ln 2 in two parts, of which n times this one is exact
        x = fma(n, constant(-high), x)
        x = fma(n, constant(high - math.log(2)), x)
        series = constant(1 / math.factorial(7))
        for k in range(6, -1, -1):
            series = fma(series, x, constant(1 / math.factorial(k)))
        power = builder.shl(builder.add(builder.fptosi(n, I32), I32(127)), I32(23))
        return builder.fmul(series, builder.bitcast(power, F32))

    return types.float32(types.float32), codegen
