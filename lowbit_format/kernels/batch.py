"""Shared by all backends: the rows of a batch by task, sums of gradients over tasks, and checks of arguments.

Shapes of matrices, deltas and task ids are in :class:`.operators.Backend`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..errors import ShapeError
from .matrix import PlaneMatrix, with_delta

WeightGrad = TypeVar("WeightGrad")  # the gradient of a weight, in whatever type a backend's decoder takes it
Rows = Tensor | slice  # rows of a flattened input: a bool mask ``[n]``, or all
ParamGrads = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # of scales, offsets, zeros, deltas


class Share(NamedTuple):
    """The rows of x that one of several matrices multiplies (:meth:`.operators.Backend.linear_each`)."""

    w: PlaneMatrix
    begin: int  # the first row
    end: int  # one behind the last row
    deltas: Tensor | None = None  # as in a product with `w` alone


class Factor(NamedTuple):
    """One of several matrices that the same rows of x are multiplied with, see :func:`.operators.linear_together`."""

    w: PlaneMatrix
    bias: Tensor | None = None  # float [rows]
    deltas: Tensor | None = None  # as in a product with `w` alone
    task_ids: Tensor | None = None


def each_task(w: PlaneMatrix, deltas: Tensor | None, task_ids: Tensor | None) -> Iterator[tuple[Rows, PlaneMatrix]]:
    """For each task of a batch: its rows, and the matrix with its scales."""
    for rows, task in _tasks(deltas, task_ids):
        yield rows, w if deltas is None or task < 0 else with_delta(w, deltas[task])


def _tasks(deltas: Tensor | None, task_ids: Tensor | None) -> Iterator[tuple[Rows, int]]:
    """The rows of each task and its id, -1 for the base."""
    if deltas is None or task_ids is None:
        yield slice(None), -1 if deltas is None else 0
        return
    for task in torch.unique(task_ids).tolist():
        yield task_ids == task, task


def sum_over_tasks(
    weight_grad: Callable[[Rows], WeightGrad],
    w: PlaneMatrix,
    deltas: Tensor | None,
    task_ids: Tensor | None,
    decode_grads: Callable[[PlaneMatrix, WeightGrad, int | None], tuple[Tensor, Tensor | None]],
    deltas_only: bool = False,
) -> ParamGrads:
    """Gradients of all parameters, summed over the tasks of a batch.

    Args:
        weight_grad: gives the gradient of the weight that some rows of the input contribute.
        w, deltas, task_ids: as in the forward pass.
        decode_grads: gives the gradients of scales and shift from that of the weight, as :func:`.naive.decode_grads`.
        deltas_only: the others are None, and planes that have no delta take no time.

    Returns:
        Float tensors of :attr:`PlaneMatrix.work_dtype`, contiguous.
    """
    # Contiguous, whatever strides the parameters have: the operators' fake implementations promise it.
    zeros = functools.partial(torch.zeros_like, dtype=w.work_dtype, memory_format=torch.contiguous_format)
    deltas_grad = None if deltas is None else zeros(deltas)
    if deltas is not None and deltas_grad is not None and deltas_only:
        for rows, task in _tasks(deltas, task_ids):
            if task >= 0:
                tuned, p = with_delta(w, deltas[task]), deltas.shape[1]
                deltas_grad[task] = _delta_grad(w, deltas[task], decode_grads(tuned, weight_grad(rows), p)[0])
        return None, None, None, deltas_grad
    shift = w.shift
    scales_grad, shift_grad = zeros(w.scales), None if shift is None else zeros(shift)
    for rows, task in _tasks(deltas, task_ids):
        tuned = w if deltas is None or task < 0 else with_delta(w, deltas[task])
        grad, task_shift_grad = decode_grads(tuned, weight_grad(rows), None)
        if shift_grad is not None and task_shift_grad is not None:
            shift_grad += task_shift_grad
        if deltas is not None and deltas_grad is not None and task >= 0:
            deltas_grad[task] = _delta_grad(w, deltas[task], grad)
            if deltas.dim() == 3:
                grad[: deltas.shape[1]] *= (1 + deltas[task].to(grad.dtype))[..., None]
        scales_grad += grad
    offsets_grad, zeros_grad = (shift_grad, None) if w.has_offsets else (None, shift_grad)
    return scales_grad, offsets_grad, zeros_grad, deltas_grad


def _delta_grad(w: PlaneMatrix, delta: Tensor, grad: Tensor) -> Tensor:
    """The gradient of a task's `delta` from that of its scales, whose first planes are those of the delta."""
    p = len(delta)
    return (grad[:p] * w.scales[:p].to(grad.dtype)).sum(-1) if delta.dim() == 2 else grad[:p]


def grads_of_sums(w: PlaneMatrix, signed: Tensor, total: Tensor) -> tuple[Tensor, Tensor | None]:
    """Gradients of scales and shift, as :func:`.naive.decode_grads`, from sums over each group.

    Args:
        w: the matrix; its planes are not ragged.
        signed: float32 ``[bits, rows, groups]``, of bcq perhaps of the first planes alone: for each plane the sum of
            the weight's gradient times the sign, +1 for bit 1 and -1 for bit 0. For a codebook ``[1, rows, groups]``:
            the sum of gradient times level. Overwritten.
        total: float32 ``[rows, groups]``: the sum of the weight's gradient.

    Returns:
        Gradient of the scales, float32 with the shape of ``w.scales``; of the shift, float32 ``[rows, groups]``, or
        None.
    """
    if w.codec == "bcq":
        return signed, None if w.offsets is None else total
    if w.codebook is not None:
        return signed, None
    weights = 2.0 ** torch.arange(w.bits - 1, -1, -1, device=signed.device)  # BIT-1
    code = (signed.add_(total).div_(2) * weights[:, None, None]).sum(0)  # a bit is (its sign + 1) / 2
    if w.has_offsets:
        return code[None], None if w.offsets is None else total
    zero = 0 if w.zeros is None else w.zeros.float()
    return (code - zero * total)[None], None if w.zeros is None else -total * w.scales[0].float()


def check_linear(
    x: Tensor, w: PlaneMatrix, bias: Tensor | None, deltas: Tensor | None, task_ids: Tensor | None
) -> None:
    """Check the shapes of a product's arguments (:meth:`.operators.Backend.linear`); kernels check no bounds.

    Raises:
        ShapeError: `x` or the bias does not fit the matrix, or as :func:`check_tasks`.
    """
    if x.shape[-1] != w.cols:
        raise ShapeError(f"expected an input of {w.cols} columns for this matrix, found {list(x.shape)}")
    if bias is not None and bias.shape != (w.rows,):
        raise ShapeError(f"expected a bias of {w.rows} numbers for this matrix, found {list(bias.shape)}")
    if deltas is not None:
        check_tasks(w, deltas, task_ids, x.numel() // w.cols)


def one_by_one(x: Tensor, shares: Sequence[Share], task_ids: Tensor | None, *, linear: Callable[..., Tensor]) -> Tensor:
    """:meth:`.operators.Backend.linear_each` by a `linear` for each share."""
    check_shares(x, shares)
    found = [linear(x[s.begin : s.end], s.w, None, s.deltas, ids_of(s, task_ids)) for s in shares]
    return found[0] if len(found) == 1 else torch.cat(found)


def factor_by_factor(x: Tensor, factors: Sequence[Factor], *, linear: Callable[..., Tensor]) -> list[Tensor]:
    """:meth:`.operators.Backend.linear_together` by a `linear` for each matrix."""
    return [linear(x, *factor) for factor in factors]


def ids_of(share: Share, task_ids: Tensor | None) -> Tensor | None:
    """The task ids of the rows of a share; None for a share without deltas."""
    return None if task_ids is None or share.deltas is None else task_ids[share.begin : share.end]


def check_shares(x: Tensor, shares: Sequence[Share]) -> None:
    """Raise ShapeError if shares do not cover the rows of `x` in their order, or matrices differ in their rows."""
    end, rows = 0, {share.w.rows for share in shares}
    if len(rows) != 1:
        raise ShapeError(f"expected matrices of one shape, found some of {sorted(rows)} rows")
    for share in shares:
        if share.begin != end or share.end < end:
            raise ShapeError(f"expected rows from {end} on for the next matrix, found {share.begin} to {share.end}")
        end = share.end
    if x.dim() != 2 or len(x) != end:
        raise ShapeError(f"expected an input [{end}, columns] for these shares, found {list(x.shape)}")


def check_tasks(w: PlaneMatrix, deltas: Tensor | None, task_ids: Tensor | None, batch: int) -> None:
    """Check the shapes of deltas and task ids; kernels check no bounds.

    Args:
        batch: rows of the flattened input.

    Raises:
        ShapeError: deltas do not fit the scales of `w`, or task ids the batch.
    """
    if deltas is None:
        return
    planes, rows, groups = w.scales.shape
    found = deltas.shape
    if not 3 <= len(found) <= 4 or found[1] > planes or found[2:] != (rows, groups)[: len(found) - 2]:
        raise ShapeError(
            f"expected deltas [tasks, up to {planes}, {rows}] or [tasks, up to {planes}, {rows}, {groups}] for this "
            f"matrix, found {list(found)}"
        )
    if task_ids is not None and task_ids.shape != (batch,):
        raise ShapeError(f"expected a task for each of {batch} rows, found {list(task_ids.shape)}")


def check_task_ids(deltas: Tensor, task_ids: Tensor) -> None:
    """Raise IndexError for a task without deltas. It reads a value: on a GPU that would wait for the device."""
    if task_ids.numel() and int(task_ids.max()) >= len(deltas):
        raise IndexError(f"task {int(task_ids.max())} of {len(deltas)}")


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured: kernels are recorded, not run, so that no value can be read back."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def no_autocast(x: Tensor) -> torch.autocast:
    """Turns autocast off inside an operator, whose dtypes are decided."""
    return torch.autocast(x.device.type, enabled=False)
