"""What a decoder layer computes between its products, for the few rows of a decoding step.

Each function is one pass over its numbers, where the operations of torch would be several calls, each of which takes
longer to begin than to compute. All are float32 and contiguous; shapes are checked by the callers.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from .intrinsics import floats_at

_SUMS = {"contract", "reassoc"}  # what a compiler may do with a sum: so it becomes one of vectors


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """``weight * x / sqrt(mean(x**2) + epsilon)`` over the last axis (Zhang and Sennrich 2019, arXiv:1910.07467).

    Args:
        x: float32 ``[..., cols]``, contiguous.
        weight: float ``[cols]``.
    """
    if weight.dtype != torch.float32 or not weight.is_contiguous():
        weight = weight.float().contiguous()
    out, cols = torch.empty_like(x), x.shape[-1]
    _rms_norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // cols, cols, epsilon)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> None:
    """Rotary position embedding in place (Su et al. 2021, arXiv:2104.09864): column i turns with i + dim / 2.

    Args:
        x: float32 ``[rows, heads * dim]``, contiguous, to change.
        cos, sin: float32 ``[1 or rows, dim]``, contiguous.
    """
    rows, dim = len(x), cos.shape[-1]
    step = 0 if len(cos) == 1 else dim
    _rotate(x.data_ptr(), cos.data_ptr(), sin.data_ptr(), rows, heads, dim, step)


@numba.njit(nogil=True, cache=True, fastmath=_SUMS)
def _rms_norm(x, weight, out, rows, cols, epsilon):
    by = floats_at(weight)
    for r in range(rows):
        row, to = floats_at(x + 4 * r * cols), floats_at(out + 4 * r * cols)
        total = np.float32(0.0)
        for c in range(cols):
            total += row[c] * row[c]
        factor = np.float32(1.0) / np.sqrt(total / np.float32(cols) + np.float32(epsilon))
        for c in range(cols):
            to[c] = by[c] * (row[c] * factor)


@numba.njit(nogil=True, cache=True)
def _rotate(x, cos, sin, rows, heads, dim, step):
    half = dim // 2
    for r in range(rows):
        c, s = floats_at(cos + 4 * r * step), floats_at(sin + 4 * r * step)
        for h in range(heads):
            low = floats_at(x + 4 * (r * heads + h) * dim)
            high = floats_at(x + 4 * ((r * heads + h) * dim + half))
            for i in range(half):
                a, b = low[i], high[i]
                low[i] = a * c[i] - b * s[i]
                high[i] = b * c[half + i] + a * s[half + i]
