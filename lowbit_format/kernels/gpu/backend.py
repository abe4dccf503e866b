"""The operators on a GPU: the functions of :class:`..operators.Backend`, for the file's layout and the tiled one.

Few rows of x are multiplied straight from the planes (:mod:`.products`). For many, the weight is decoded one chunk of
rows at a time (:mod:`.decoding`) for the library's matrix product. Matrices that have no tiled layout (groups that are
not a multiple of 32 columns, rows with different bits, float64) take the naive code path, on the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import decode_then_matmul, naive
from ..batch import (
    ParamGrads,
    check_linear,
    check_tasks,
    factor_by_factor,
    grads_of_sums,
    is_capturing,
    no_autocast,
    one_by_one,
    sum_over_tasks,
)
from ..matrix import PlaneMatrix, with_delta
from ..parameter_order import TILE_ROWS
from . import decoding, gradients, launch, products, tiles
from .activations import SLICES

CHUNK = 1 << 27  # weights decoded at a time for the library's matrix product: 256 MiB in half precision
Function = TypeVar("Function", bound=Callable[..., Any])

can_tile = tiles.can_tile


def tile(w: PlaneMatrix) -> PlaneMatrix:
    """`w` in the tiled layout."""
    return w if w.is_tiled else tiles.tile(w)


untile = tiles.untile


def _on_its_device(function: Function) -> Function:
    """Decorator: launches go to the device of the first argument, whichever device is current; without gradients."""

    @functools.wraps(function)
    def on_device(*args: Any) -> Any:
        with device_of(args[0] if isinstance(args[0], Tensor) else args[0].planes), torch.no_grad():
            return function(*args)

    return on_device  # type: ignore[return-value]


def device_of(t: Tensor) -> AbstractContextManager[Any]:
    """A context in which the device of `t` is the current one."""
    if not t.is_cuda or t.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(t.device)


def _supported(w: PlaneMatrix, *dtypes: torch.dtype) -> PlaneMatrix | None:
    """`w` in the tiled layout, or None if there is none for `w`, or kernels do not take one of the dtypes."""
    if not all(dtype in SLICES for dtype in dtypes):
        return None
    if w.is_tiled:
        return w
    return tiles.tile(w) if tiles.can_tile(w) else None


@_on_its_device
def dequantize(w: PlaneMatrix, deltas: Tensor | None, dtype: torch.dtype) -> Tensor:
    """As :func:`..naive.dequantize`."""
    tiled = _supported(w, dtype)
    if tiled is None:
        return naive.dequantize(untile(w), deltas, dtype)
    check_tasks(w, deltas, None, 0)
    return decoding.decode(tiled if deltas is None else with_delta(tiled, deltas[0]), dtype)


@_on_its_device
def dequantize_param_grads(grad: Tensor, w: PlaneMatrix, deltas: Tensor | None) -> ParamGrads:
    """As :func:`..naive.dequantize_param_grads`."""
    tiled = _supported(w, grad.dtype)
    if tiled is None:
        return naive.dequantize_param_grads(grad, untile(w), deltas)
    rows = torch.arange(len(grad), device=grad.device)
    return sum_over_tasks(lambda _: (grad, rows), tiled, deltas, None, _grads_of_rows)


@_on_its_device
def linear(x: Tensor, w: PlaneMatrix, bias: Tensor | None, deltas: Tensor | None, task_ids: Tensor | None) -> Tensor:
    """As :func:`..naive.linear`; summed in float32, and straight from planes the weights are not rounded.

    A row whose task does not exist is NaN: a check would have to wait for the device.
    """
    tiled = _supported(w, x.dtype)
    if tiled is None:
        return naive.linear(x, untile(w), bias, deltas, task_ids)
    check_linear(x, w, bias, deltas, task_ids)
    flat = x.reshape(-1, w.cols)
    if not len(flat):
        return x.new_empty(*x.shape[:-1], w.rows)
    config = launch.choose(tiled)
    from_planes = len(flat) <= config.most_rows
    if task_ids is not None and is_capturing(x.device):
        # For deltas of groups, decode_then_matmul would ask the device which tasks there are.
        from_planes = config.most_rows > 0
    if from_planes and products.has_product_kernel(tiled):
        out = products.multiply(flat, tiled, bias, deltas, task_ids, config)
    else:
        out = decoded_linear(flat, tiled, deltas, task_ids)
        out = out if bias is None else out.add_(bias)
    return out.reshape(*x.shape[:-1], out.shape[1])


linear_each = functools.partial(one_by_one, linear=linear)
linear_together = functools.partial(factor_by_factor, linear=linear)


def decoded_linear(x: Tensor, w: PlaneMatrix, deltas: Tensor | None, task_ids: Tensor | None) -> Tensor:
    """``torch.mm`` of x ``[n, cols]`` with the weight, decoded one chunk at a time from tiled `w`."""
    with no_autocast(x):
        return decode_then_matmul.linear(x, w, deltas, task_ids, _decoded_chunks)


@_on_its_device
def linear_input_grad(grad: Tensor, w: PlaneMatrix, deltas: Tensor | None, task_ids: Tensor | None) -> Tensor:
    """As :func:`..naive.linear_input_grad`."""
    tiled = _supported(w, grad.dtype)
    if tiled is None:
        return naive.linear_input_grad(grad, untile(w), deltas, task_ids)
    with no_autocast(grad):
        out = decode_then_matmul.input_grad(grad.reshape(-1, grad.shape[-1]), tiled, deltas, task_ids, _decoded_chunks)
    return out.reshape(*grad.shape[:-1], w.cols)


def _decoded_chunks(w: PlaneMatrix, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """The weight in chunks of whole tiles: rows from, to, and the weight ``[to - from, cols]``."""
    rows = w.rows
    step = max(TILE_ROWS, CHUNK // w.cols // TILE_ROWS * TILE_ROWS)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        yield start, stop, decoding.decode(w, dtype, start, stop)


@_on_its_device
def linear_param_grads(
    grad: Tensor,
    x: Tensor,
    w: PlaneMatrix,
    deltas: Tensor | None,
    task_ids: Tensor | None,
    deltas_only: bool = False,
) -> ParamGrads:
    """As :func:`..naive.linear_param_grads`; the gradient of the weight is never in memory."""
    tiled = _supported(w, grad.dtype, x.dtype)
    if tiled is None:
        return naive.linear_param_grads(grad, x, untile(w), deltas, task_ids, deltas_only)
    dtype = torch.promote_types(grad.dtype, x.dtype)
    flat_grad, flat_x = grad.reshape(-1, grad.shape[-1]).to(dtype), x.reshape(-1, w.cols).to(dtype)
    return sum_over_tasks(
        lambda rows: (flat_grad[rows], flat_x[rows]),
        tiled,
        deltas,
        task_ids,
        lambda w, given, planes: grads_of_sums(w, *gradients.of_product(*given, w, planes)),
        deltas_only,
    )


@_on_its_device
def embedding(
    ids: Tensor, w: PlaneMatrix, deltas: Tensor | None, task_ids: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """As :func:`..naive.embedding`, but a row or a task that does not exist is NaN instead of an error."""
    tiled = _supported(w, dtype)
    if tiled is None:
        return naive.embedding(ids, untile(w), deltas, task_ids, dtype)
    check_tasks(w, deltas, task_ids, ids.numel())
    out = decoding.decode_chosen(tiled, ids.reshape(-1).long(), deltas, task_ids, dtype)
    return out.reshape(*ids.shape, w.cols)


@_on_its_device
def embedding_param_grads(
    grad: Tensor, ids: Tensor, w: PlaneMatrix, deltas: Tensor | None, task_ids: Tensor | None
) -> ParamGrads:
    """As :func:`..naive.embedding_param_grads`."""
    tiled = _supported(w, grad.dtype)
    if tiled is None:
        return naive.embedding_param_grads(grad, ids, untile(w), deltas, task_ids)
    flat_grad, flat = grad.reshape(-1, w.cols), ids.reshape(-1).long()
    return sum_over_tasks(lambda rows: (flat_grad[rows], flat[rows]), tiled, deltas, task_ids, _grads_of_rows)


def _grads_of_rows(
    w: PlaneMatrix, given: tuple[Tensor, Tensor], planes: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the parameters, as :func:`..batch.grads_of_sums`.

    `given` are the gradients of some rows of the weight ``[n, cols]``, and which rows these are, int64 ``[n]``; a row
    may repeat.
    """
    grad, rows = given
    signed, total = gradients.of_rows(grad, w, rows)
    every = w.rows
    rows = torch.where((rows >= 0) & (rows < every), rows, 0)  # rows that do not exist have gradients of zero
    # index_put_ with accumulate sorts: unlike index_add_, it gives the same bits every time on a GPU.
    signed = torch.stack([s.new_zeros(every, s.shape[1]).index_put_((rows,), s, accumulate=True) for s in signed])
    total = total.new_zeros(every, total.shape[1]).index_put_((rows,), total, accumulate=True)
    return grads_of_sums(w, signed, total)
