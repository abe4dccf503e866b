"""The operators over any decoder: decode the whole weight of each task, then multiply with torch.

The naive backend consists of these functions. The other backends use them, with their own decoders, for matrices that
their kernels do not support. Shapes are in :class:`.operators.Backend`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .batch import ParamGrads, Rows, check_linear, check_tasks, each_task, no_autocast, sum_over_tasks
from .matrix import PlaneMatrix, select_rows, with_delta

Decoder = Callable[[PlaneMatrix], Tensor]  # gives the weight, float32 [rows, cols] (DEC-1 to DEC-4)
RowSelector = Callable[[PlaneMatrix, Tensor], PlaneMatrix]  # gives the matrix of some rows, int64 [n]
RowGrads = Callable[[int, int], Tensor]  # gives the gradient of weight rows start to stop, float [stop - start, cols]
DecoderGrads = Callable[[PlaneMatrix, RowGrads, int | None], tuple[Tensor, Tensor | None]]  # of scales and shift


def dequantize(w: PlaneMatrix, deltas: Tensor | None, dtype: torch.dtype, *, decode: Decoder) -> Tensor:
    """The weight ``[rows, cols]``, rounded once to `dtype` (DEC-5); with `deltas`, that of task 0."""
    check_tasks(w, deltas, None, 0)
    return decode(w if deltas is None else with_delta(w, deltas[0])).to(dtype).contiguous()


def dequantize_param_grads(
    grad: Tensor, w: PlaneMatrix, deltas: Tensor | None, *, decode_grads: DecoderGrads
) -> ParamGrads:
    """Gradients of the parameters from that of the weight, ``[rows, cols]``."""
    grad = grad.to(w.work_dtype)
    return sum_over_tasks(lambda _: lambda start, stop: grad[start:stop], w, deltas, None, decode_grads)


def linear(
    x: Tensor,
    w: PlaneMatrix,
    bias: Tensor | None,
    deltas: Tensor | None,
    task_ids: Tensor | None,
    *,
    decode: Decoder,
) -> Tensor:
    """``x @ weight.T + bias`` with the weight in the dtype of `x`: ``[..., cols]`` to ``[..., rows]``."""
    check_linear(x, w, bias, deltas, task_ids)
    flat, bias = x.reshape(-1, w.cols), None if bias is None else bias.to(x.dtype)
    out = x.new_empty(flat.shape[0], w.rows)
    with no_autocast(x):
        for rows, mine in each_task(w, deltas, task_ids):
            out[rows] = F.linear(flat[rows], decode(mine).to(x.dtype), bias)
    return out.reshape(*x.shape[:-1], out.shape[1])


def linear_input_grad(
    grad: Tensor, w: PlaneMatrix, deltas: Tensor | None, task_ids: Tensor | None, *, decode: Decoder
) -> Tensor:
    """Gradient of `x` in :func:`linear`, ``[..., cols]``, from that of its result, ``[..., rows]``."""
    flat = grad.reshape(-1, grad.shape[-1])
    out = grad.new_empty(flat.shape[0], w.cols)
    with no_autocast(grad):
        for rows, mine in each_task(w, deltas, task_ids):
            out[rows] = flat[rows] @ decode(mine).to(grad.dtype)
    return out.reshape(*grad.shape[:-1], w.cols)


def linear_param_grads(
    grad: Tensor,
    x: Tensor,
    w: PlaneMatrix,
    deltas: Tensor | None,
    task_ids: Tensor | None,
    deltas_only: bool = False,
    *,
    decode_grads: DecoderGrads,
) -> ParamGrads:
    """Gradients of the parameters in :func:`linear`, summed in float32 whatever the dtype of `x`."""
    work = w.work_dtype
    flat_grad, flat_x = grad.reshape(-1, grad.shape[-1]).to(work), x.reshape(-1, w.cols).to(work)

    def weight_grad(rows: Rows) -> RowGrads:
        left, right = flat_grad[rows].T, flat_x[rows]
        return lambda start, stop: left[start:stop] @ right

    with no_autocast(x):
        return sum_over_tasks(weight_grad, w, deltas, task_ids, decode_grads, deltas_only)


def embedding(
    ids: Tensor,
    w: PlaneMatrix,
    deltas: Tensor | None,
    task_ids: Tensor | None,
    dtype: torch.dtype,
    *,
    decode: Decoder,
    select: RowSelector = select_rows,
) -> Tensor:
    """Rows `ids` (integers ``[...]``) of the weight in `dtype`, ``[..., cols]``; no other row is decoded."""
    check_tasks(w, deltas, task_ids, ids.numel())
    flat = ids.reshape(-1).long()
    out = torch.empty(flat.shape[0], w.cols, dtype=dtype, device=ids.device)
    for rows, mine in each_task(w, deltas, task_ids):
        out[rows] = decode(select(mine, flat[rows])).to(dtype)
    return out.reshape(*ids.shape, w.cols)


def embedding_param_grads(
    grad: Tensor,
    ids: Tensor,
    w: PlaneMatrix,
    deltas: Tensor | None,
    task_ids: Tensor | None,
    *,
    decode_grads: DecoderGrads,
) -> ParamGrads:
    """Gradients of the parameters in :func:`embedding`, from that of its result, ``[..., cols]``."""
    flat_grad, flat = grad.reshape(-1, w.cols).to(w.work_dtype), ids.reshape(-1).long()

    def weight_grad(rows: Rows) -> RowGrads:
        out = flat_grad.new_zeros(w.rows, w.cols)
        out.index_add_(0, flat[rows], flat_grad[rows])
        return lambda start, stop: out[start:stop]

    return sum_over_tasks(weight_grad, w, deltas, task_ids, decode_grads)
