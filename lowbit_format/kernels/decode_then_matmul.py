"""Products of many rows of x: the weight is decoded one chunk of rows at a time, for ``torch.mm``.

A backend decides how to decode and how large a chunk is. It passes a function `chunks`, which yields the first row of
each chunk, the row after its last, and its weight ``[rows of the chunk, cols]`` in a dtype. The next chunk may reuse
the memory of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from .batch import each_task
from .matrix import PlaneMatrix
from .parameter_order import group_major

Chunks = Callable[[PlaneMatrix, torch.dtype], Iterable[tuple[int, int, Tensor]]]


def linear(x: Tensor, w: PlaneMatrix, deltas: Tensor | None, task_ids: Tensor | None, chunks: Chunks) -> Tensor:
    """As :meth:`.operators.Backend.linear`, for `x` ``[n, cols]`` and without the bias.

    With deltas of groups, every task in the batch takes a product with its own weight. With deltas of rows, products
    with the base's planes are shared by all tasks: where ``z[p] = x @ (scale[p] * sign[p]).T`` is what plane p adds to
    the result, a factor ``1 + delta[p]`` on its scales adds ``delta[p] * z[p]``. With one scale for the whole code,
    ``z`` is the result itself (of affine: without its offsets). If there are no more tasks than shared products, a CPU
    computes a product per task after all. A GPU never does: to find out which tasks are in a batch, it would have to
    wait for the device.
    """
    out = x.new_empty(len(x), w.rows)
    shared = 1 + (0 if deltas is None or not w.has_offsets else deltas.shape[1])
    few = deltas is not None and len(deltas) <= shared and not x.is_cuda
    if deltas is None or task_ids is None or deltas.dim() == 4 or few:
        for rows, mine in each_task(w, deltas, task_ids):
            part = out if isinstance(rows, slice) else x.new_empty(int(rows.sum()), out.shape[1])
            for start, stop, weight in chunks(mine, x.dtype):
                torch.mm(x[rows], weight.t(), out=part[:, start:stop])
            if part is not out:
                out[rows] = part
        return out
    with_base = F.pad(deltas, (0, 0, 0, 0, 0, 1))  # zeros last, where the base's -1 points
    for start, stop, weight in chunks(w, x.dtype):
        torch.mm(x, weight.t(), out=out[:, start:stop])
    base = out if w.has_offsets else out.clone()
    for p in range(deltas.shape[1]):
        factor = with_base[task_ids.clamp(-1, len(deltas) - 1), p]
        factor = torch.where((task_ids < len(deltas))[:, None], factor, float("nan"))  # of a task that does not exist
        for start, stop, weight in chunks(_plane(w, p), x.dtype) if w.has_offsets else ():
            out[:, start:stop].addcmul_(factor[:, start:stop].to(x.dtype), x @ weight.t())
        if not w.has_offsets:
            out.addcmul_(factor.to(x.dtype), base)
    return out


def _plane(w: PlaneMatrix, p: int) -> PlaneMatrix:
    """`w` without what the scales of plane `p` do not change: the other scales are zero, and there is no offset."""
    scales = torch.zeros_like(w.scales)
    scales[p] = w.scales[p]
    return w._replace(scales=group_major(scales), offsets=None)


def input_grad(grad: Tensor, w: PlaneMatrix, deltas: Tensor | None, task_ids: Tensor | None, chunks: Chunks) -> Tensor:
    """As :meth:`.operators.Backend.linear_input_grad`, for `grad` ``[n, rows]``; chunks are summed in float32."""
    out = grad.new_empty(0)
    for rows, mine in each_task(w, deltas, task_ids):
        given, part = grad[rows], grad.new_empty(0)
        for start, stop, weight in chunks(mine, grad.dtype):
            if start == 0:
                part = given[:, :stop] @ weight
                part = part if stop == w.rows else part.float()
            elif grad.dtype == torch.float32:
                part.addmm_(given[:, start:stop], weight)
            else:
                part += given[:, start:stop] @ weight
        if isinstance(rows, slice):
            return part.to(grad.dtype)
        out = out if len(out) else grad.new_empty(len(grad), w.cols)
        out[rows] = part.to(grad.dtype)
    return out.reshape(len(grad), w.cols)
