"""The operators on a GPU: the same functions as :mod:`..naive`, over plain planes and over the packed form alike.

Few rows of x are multiplied straight from the packed form (:mod:`.products`); for many, the weight is decoded a tile at
a time (:mod:`.decoding`) for the library's own product, and let go. What the packed form does not hold (groups that are
no multiple of 32 columns, rows with different bits, float64) goes the naive way, on the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import decode_then_matmul, naive
from ..batch import ParamGrads, check_bias, check_tasks, grads_of_sums, is_capturing, no_autocast, sum_over_tasks
from ..matrix import PlaneMatrix, with_delta
from . import decoding, gradients, launch, products, tiles
from .activations import SLICES

TILE = 1 << 27  # weights decoded at a time for the library's product: 256 MiB in half precision
Function = TypeVar("Function", bound=Callable[..., Any])

can_tile = tiles.can_tile


def tile(w: PlaneMatrix) -> PlaneMatrix:
    """`w` in its packed form."""
    return w if w.is_tiled else tiles.tile(w)


untile = tiles.untile


def _on_its_device(function: Function) -> Function:
    """Launch on the device of the tensors, whichever is the current one."""

    @functools.wraps(function)
    def on_device(*args: Any) -> Any:
        with device_of(args[0] if isinstance(args[0], Tensor) else args[0].planes), torch.no_grad():
            return function(*args)

    return on_device  # type: ignore[return-value]


def device_of(t: Tensor) -> AbstractContextManager[Any]:
    if not t.is_cuda or t.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(t.device)


def _served(w: PlaneMatrix, *dtypes: torch.dtype) -> PlaneMatrix | None:
    """`w` in packed form, if it has one and all dtypes are such as kernels take."""
    if not all(dtype in SLICES for dtype in dtypes):
        return None
    if w.is_tiled:
        return w
    return tiles.tile(w) if tiles.can_tile(w) else None


def _check_tasks(w: PlaneMatrix, deltas: Tensor | None, task_ids: Tensor | None, batch: int) -> None:
    if deltas is not None:
        planes, rows, groups = w.scales.shape
        check_tasks((planes, rows, groups), deltas, task_ids, batch)


@_on_its_device
def dequantize(w: PlaneMatrix, deltas: Tensor | None, dtype: torch.dtype) -> Tensor:
    """As :func:`..naive.dequantize`."""
    packed = _served(w, dtype)
    if packed is None:
        return naive.dequantize(untile(w), deltas, dtype)
    return decoding.decode(packed if deltas is None else with_delta(packed, deltas[0]), dtype)


@_on_its_device
def dequantize_param_grads(grad: Tensor, w: PlaneMatrix, deltas: Tensor | None) -> ParamGrads:
    """As :func:`..naive.dequantize_param_grads`."""
    packed = _served(w, grad.dtype)
    if packed is None:
        return naive.dequantize_param_grads(grad, untile(w), deltas)
    rows = torch.arange(len(grad), device=grad.device)
    return sum_over_tasks(lambda _: (grad, rows), packed, deltas, None, _grads_of_rows)


@_on_its_device
def linear(x: Tensor, w: PlaneMatrix, bias: Tensor | None, deltas: Tensor | None, task_ids: Tensor | None) -> Tensor:
    """As :func:`..naive.linear`; summed in float32, with weights that are not rounded where they come from planes.

    A row of a task that is not there is NaN: to refuse it would take a wait for the device.
    """
    packed = _served(w, x.dtype)
    if packed is None:
        return naive.linear(x, untile(w), bias, deltas, task_ids)
    flat = x.reshape(-1, w.cols)
    check_bias(w.rows, bias)
    _check_tasks(packed, deltas, task_ids, len(flat))
    if not len(flat):
        return x.new_empty(*x.shape[:-1], w.rows)
    config = launch.choose(packed)
    few = len(flat) <= config.most_rows
    if task_ids is not None and is_capturing(x.device):
        few = (
            config.most_rows > 0
        )  # decode_then_matmul asks the device which tasks there are, if their deltas are of groups
    if few and products.has_product_kernel(packed):
        out = products.multiply(flat, packed, bias, deltas, task_ids, config)
    else:
        out = decoded_linear(flat, packed, deltas, task_ids)
        out = out if bias is None else out.add_(bias)
    return out.reshape(*x.shape[:-1], out.shape[1])


def decoded_linear(x: Tensor, w: PlaneMatrix, deltas: Tensor | None, task_ids: Tensor | None) -> Tensor:
    """The library's product of x ``[n, cols]`` with the weight, decoded a tile at a time from packed `w`."""
    with no_autocast(x):
        return decode_then_matmul.linear(x, w, deltas, task_ids, _weight_tiles)


@_on_its_device
def linear_input_grad(grad: Tensor, w: PlaneMatrix, deltas: Tensor | None, task_ids: Tensor | None) -> Tensor:
    """As :func:`..naive.linear_input_grad`."""
    packed = _served(w, grad.dtype)
    if packed is None:
        return naive.linear_input_grad(grad, untile(w), deltas, task_ids)
    with no_autocast(grad):
        out = decode_then_matmul.input_grad(grad.reshape(-1, grad.shape[-1]), packed, deltas, task_ids, _weight_tiles)
    return out.reshape(*grad.shape[:-1], w.cols)


def _weight_tiles(w: PlaneMatrix, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    rows = w.rows
    step = max(tiles.ROWS, TILE // w.cols // tiles.ROWS * tiles.ROWS)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        yield start, stop, decoding.decode(w, dtype, start, stop)


@_on_its_device
def linear_param_grads(
    grad: Tensor, x: Tensor, w: PlaneMatrix, deltas: Tensor | None, task_ids: Tensor | None
) -> ParamGrads:
    """As :func:`..naive.linear_param_grads`; the gradient of the weight is never in memory."""
    packed = _served(w, grad.dtype, x.dtype)
    if packed is None:
        return naive.linear_param_grads(grad, x, untile(w), deltas, task_ids)
    dtype = torch.promote_types(grad.dtype, x.dtype)
    flat_grad, flat_x = grad.reshape(-1, grad.shape[-1]).to(dtype), x.reshape(-1, w.cols).to(dtype)
    return sum_over_tasks(
        lambda rows: (flat_grad[rows], flat_x[rows]),
        packed,
        deltas,
        task_ids,
        lambda w, given: grads_of_sums(w, *gradients.of_product(*given, w)),
    )


@_on_its_device
def embedding(
    ids: Tensor, w: PlaneMatrix, deltas: Tensor | None, task_ids: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """As :func:`..naive.embedding`, but what has no row, or a task that is not there, is NaN instead of an error."""
    packed = _served(w, dtype)
    if packed is None:
        return naive.embedding(ids, untile(w), deltas, task_ids, dtype)
    _check_tasks(packed, deltas, task_ids, ids.numel())
    out = decoding.decode_chosen(packed, ids.reshape(-1).long(), deltas, task_ids, dtype)
    return out.reshape(*ids.shape, w.cols)


@_on_its_device
def embedding_param_grads(
    grad: Tensor, ids: Tensor, w: PlaneMatrix, deltas: Tensor | None, task_ids: Tensor | None
) -> ParamGrads:
    """As :func:`..naive.embedding_param_grads`."""
    packed = _served(w, grad.dtype)
    if packed is None:
        return naive.embedding_param_grads(grad, ids, untile(w), deltas, task_ids)
    flat_grad, flat = grad.reshape(-1, w.cols), ids.reshape(-1).long()
    return sum_over_tasks(lambda rows: (flat_grad[rows], flat[rows]), packed, deltas, task_ids, _grads_of_rows)


def _grads_of_rows(w: PlaneMatrix, given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Gradients of the parameters from those of some rows of the weight, and which they are; a row may repeat."""
    grad, rows = given
    signed, total = gradients.of_rows(grad, w, rows)
    every = w.rows
    rows = torch.where((rows >= 0) & (rows < every), rows, 0)  # rows that are not there have gradients of zero
    # index_put_ with accumulate sorts: unlike index_add_, it has the same bits every time on a GPU
    signed = torch.stack([s.new_zeros(every, s.shape[1]).index_put_((rows,), s, accumulate=True) for s in signed])
    total = total.new_zeros(every, total.shape[1]).index_put_((rows,), total, accumulate=True)
    return grads_of_sums(w, signed, total)
