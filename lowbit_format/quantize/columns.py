"""The innermost loops of :mod:`.calibrated`: codes of columns in turn, each chosen after those before it.

Both have a compiled form for a CPU, in which every row goes its way alone, and a form in torch for other devices, in
which all rows go together.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from ..machine.threads import parallel_rows


def feed_back(weight: Tensor, upper: Tensor, level: Tensor, order: Tensor, decoded: Tensor, codes: Tensor) -> Tensor:
    """Choose the codes of a block of columns; the error of each column is made up for by the later ones (GPTQ).

    Args:
        weight: float32 ``[rows, columns]``; is changed.
        upper: float32 ``[columns, columns]``: the block of the inverse Hessian's upper Cholesky factor.
        level: float32 ``[rows, levels]``, ascending.
        order: int64 ``[rows, levels]``: their codes.
        decoded, codes: float32 and int64 ``[rows, columns]``, to fill.

    Returns:
        The errors that later blocks have to make up for, float32 ``[rows, columns]``.
    """
    mids = ((level[:, 1:] + level[:, :-1]) / 2).contiguous()
    errors = torch.empty_like(weight, memory_format=torch.contiguous_format)
    if weight.device.type == "cpu":
        arrays = [t.numpy() for t in (weight, upper, level, order, mids, decoded, codes, errors)]
        parallel_rows(_feed_back, len(weight), *arrays)
        return errors
    _feed_back_together(weight, upper, level, order, mids, decoded, codes, errors)
    return errors


def descend(hessian: Tensor, levels: Tensor, shares: Tensor, gradient: Tensor, decoded: Tensor, codes: Tensor) -> None:
    """Give each column of a block in turn the best code while all others stay.

    Several precisions may share the codes; then the sum of their errors falls, each times its share.

    Args:
        hessian: float32 ``[columns, columns]``: the block of the Hessian.
        levels: float32 ``[precisions, rows, codes]``: of each code.
        shares: float32 ``[precisions]``.
        gradient: float32 ``[precisions, rows, columns]``: half the gradient of the error; is changed.
        decoded: float32 ``[precisions, rows, columns]``; is changed.
        codes: int64 ``[rows, columns]``; is changed.
    """
    if codes.device.type == "cpu":
        arrays = [t.numpy() for t in (hessian, levels, shares, gradient, decoded, codes)]
        parallel_rows(_descend, len(codes), *arrays)
        return
    _descend_together(hessian, levels, shares, gradient, decoded, codes)


def _feed_back_together(weight, upper, level, order, mids, decoded, codes, errors):
    """All rows at once, column by column."""
    for j in range(weight.shape[1]):
        x = weight[:, j : j + 1].contiguous()
        nearest = torch.searchsorted(mids, x, right=True)  # of two as near, the larger level (ENC-1)
        decoded[:, j] = level.gather(1, nearest)[:, 0]
        codes[:, j] = order.gather(1, nearest)[:, 0]
        errors[:, j] = (x[:, 0] - decoded[:, j]) / upper[j, j]
        weight[:, j + 1 :].addr_(errors[:, j], upper[j, j + 1 :], alpha=-1)


def _descend_together(hessian, levels, shares, gradient, decoded, codes):
    """All rows at once, column by column."""
    for j in range(codes.shape[1]):
        best = decoded[:, :, j] - gradient[:, :, j] / hessian[j, j]  # where the gradient would be 0
        cost = ((levels - best[..., None]).square() * shares[:, None, None]).sum(0)
        present, code = codes[:, j : j + 1], cost.argmin(1, keepdim=True)
        code = torch.where(cost.gather(1, code) < cost.gather(1, present), code, present)
        codes[:, j] = code[:, 0]
        value = levels.gather(2, code.expand(len(levels), -1, 1))[..., 0]
        gradient.add_((value - decoded[:, :, j])[..., None] * hessian[j])
        decoded[:, :, j] = value


@numba.njit(nogil=True, cache=True, fastmath={"contract"})
def _feed_back(start, stop, weight, upper, level, order, mids, decoded, codes, errors):
    columns = weight.shape[1]
    for r in range(start, stop):
        for j in range(columns):
            x, nearest = weight[r, j], 0
            for i in range(mids.shape[1]):
                nearest += mids[r, i] <= x
            decoded[r, j] = level[r, nearest]
            codes[r, j] = order[r, nearest]
            error = (x - level[r, nearest]) / upper[j, j]
            errors[r, j] = error
            for c in range(j + 1, columns):
                weight[r, c] -= error * upper[j, c]


@numba.njit(nogil=True, cache=True, fastmath={"contract"})
def _descend(start, stop, hessian, levels, shares, gradient, decoded, codes):
    precisions, _, count = levels.shape
    columns = codes.shape[1]
    cost = np.empty(count, np.float32)
    for r in range(start, stop):
        for j in range(columns):
            cost[:] = 0
            for p in range(precisions):
                best = decoded[p, r, j] - gradient[p, r, j] / hessian[j, j]
                for i in range(count):
                    away = levels[p, r, i] - best
                    cost[i] += shares[p] * away * away
            present = codes[r, j]
            code = present
            for i in range(count):
                if cost[i] < cost[code]:
                    code = i
            if code == present:
                continue
            codes[r, j] = code
            for p in range(precisions):
                change = levels[p, r, code] - decoded[p, r, j]
                decoded[p, r, j] = levels[p, r, code]
                for c in range(columns):
                    gradient[p, r, c] += change * hessian[j, c]
