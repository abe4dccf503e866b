"""The tasks of ``use_tasks`` in compiled graphs.

Which tasks are active stands in a context variable, and no compiler can guard on one: a graph that had read it while it
was traced would compute with those tasks for ever. So graphs are traced without knowing them. The operator
``lowbit::task_numbers`` reads the variable whenever the graph runs, in the thread and the asyncio task that run it, and
gives the task of each row as data. ``lowbit::linear_by_task`` and ``lowbit::embedding_by_task`` look up what these
tasks change in the module. A graph is therefore the same for all tasks; only whether there are blocks at all is guarded
on (``TaskState.is_open``).

A module is known to the operators by a number (its *key*), which they get as a tensor: a constant in the graph would
compile each layer anew. ``task_numbers`` is declared to be random, since that tells compilers what is true of it: the
same arguments may give other results; and to be unfit for CUDA graphs, which would replay the tasks of the recording.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import TaskError
from ..kernels import operators
from ..kernels.batch import is_capturing
from ..kernels.matrix import SCHEME, TENSORS, PlaneMatrix
from .active_tasks import ModelCall, Name, TaskState, traced
from .deltas import Delta, shifted, stack, stackable


class Owner(Protocol):
    """A module that tasks change."""

    state: TaskState
    path: str

    def changes(self, names: Sequence[Name]) -> bool:
        """Whether these tasks make a difference among each other here."""
        ...


_owners: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_next_key = itertools.count()


def new_key(owner: Any) -> Tensor:
    """A number by which operators find `owner` again, as a tensor; a copy of `owner` needs one of its own."""
    key = next(_next_key)
    _owners[key] = owner
    return torch.tensor(key, device="cpu")


def task_numbers(x: Tensor, key: Tensor, rows: int) -> Tensor:
    """The number (:attr:`.TaskState.numbers`) of the task of each of `rows` rows of the flattened `x`; int64, on a CPU.

    Outside of a block that is the model's own task. Checked as without a compiler, by TaskError.
    """
    call = traced.call or ModelCall()
    batch, exactly = (-1 if n is None else n for n in (call.rows, call.batch))
    found: Tensor = torch.ops.lowbit.task_numbers(
        x, key, rows, traced.call is not None, batch, exactly, call.exact, call.apart
    )
    return found


def linear(x: Tensor, w: PlaneMatrix, bias: Tensor | None, key: Tensor) -> Tensor:
    """As :func:`.operators.linear`, with the tasks that are active when the graph runs."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    numbers = task_numbers(x, key, x.numel() // w.cols)
    out: Tensor = torch.ops.lowbit.linear_by_task(x, *w[:TENSORS], bias, numbers, key, *w[TENSORS:])
    return out


def embedding(ids: Tensor, w: PlaneMatrix, key: Tensor, dtype: torch.dtype) -> Tensor:
    """As :func:`.operators.embedding`, with the tasks that are active when the graph runs."""
    numbers = task_numbers(ids, key, ids.numel())
    out: Tensor = torch.ops.lowbit.embedding_by_task(ids, *w[:TENSORS], numbers, key, dtype, *w[TENSORS:])
    return out


def _owner(key: Tensor) -> Any:
    owner = _owners.get(int(key))
    if owner is None:
        raise TaskError("a compiled graph computes with a module that is gone; compile the model anew")
    return owner


# --- which task ------------------------------------------------------------------------------------


@torch.library.custom_op(
    "lowbit::task_numbers",
    mutates_args=(),
    schema="(Tensor x, Tensor key, SymInt rows, bool known, SymInt batch, SymInt exactly, bool exact, str? apart) -> "
    "Tensor",
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.cudagraph_unsafe),
)
def _task_numbers(
    x: Tensor, key: Tensor, rows: int, known: bool, batch: int, exactly: int, exact: bool, apart: str | None
) -> Tensor:
    _refuse_recording(x)
    owner = _owner(key)
    state: TaskState = owner.state
    tasks = state.row_tasks()
    if tasks is None and torch._C._current_graph_task_id() != -1:
        raise TaskError(
            f"{owner.path} is computed anew in the backward pass (checkpointing), which has no use_tasks block; choose "
            "the task with set_task, and run the rows of each task in a separate batch"
        )
    call = ModelCall(None if batch < 0 else batch, exact, apart, None if exactly < 0 else exactly) if known else None
    if tasks is not None and call is not None:
        tasks.check_call(call)
    if tasks is None or len(tasks.names) == 1 or not owner.changes(tasks.names):
        number = state.number_of(state.active if tasks is None else tasks.names[0])
        return torch.full((rows,), number, dtype=torch.int64, device="cpu")
    ids = tasks.ids_of_input(x, owner.path, call)
    if rows == 0 or rows % len(ids):
        raise TaskError(f"{owner.path} gets one row without a batch, but several tasks")
    numbers = torch.tensor([state.number_of(name) for name in tasks.names], device="cpu")
    return numbers[ids].repeat_interleave(rows // len(ids))


@_task_numbers.register_fake
def _(x: Tensor, key: Tensor, rows: int, *call: Any) -> Tensor:
    return torch.empty(rows, dtype=torch.int64, device="cpu")


# --- what it changes -------------------------------------------------------------------------------

_MATRIX, _SCHEME = operators.MATRIX_SCHEMA, operators.SCHEME_SCHEMA


def _in_parts(
    numbers: Tensor,
    key: Tensor,
    w: PlaneMatrix,
    kernel: Callable[[PlaneMatrix, Tensor | None, Tensor | None, Tensor | slice], Tensor],
) -> Tensor:
    """``kernel(matrix, deltas, task ids, rows)`` for the tasks of a batch, in one call where that can be.

    Args:
        numbers: of the task of each row, int64 ``[n]``.
        key: of the module.
        w: its matrix.
        kernel: computes rows of the result.
    """
    _refuse_recording(w.planes)
    module = _owner(key)
    if module.plane_matrix.planes.data_ptr() != w.planes.data_ptr():
        raise TaskError(f"{module.path}: a compiled graph has other planes than the module; compile the model anew")
    different = torch.unique(numbers)
    deltas: list[Delta | None] = [module.delta_of(module.state.name_of(n)) for n in different.tolist()]
    if len(deltas) == 1 or all(delta is None for delta in deltas):
        return kernel(*_with(w, deltas[0] if deltas else None), None, slice(None))
    ids = torch.searchsorted(different, numbers).to(w.planes.device)
    if stackable(deltas):
        return kernel(w, _stacked(module, deltas), ids, slice(None))
    out: Tensor | None = None
    for i, delta in enumerate(deltas):
        mine = (ids == i).nonzero().flatten()
        part = kernel(*_with(w, delta), None, mine)
        out = part.new_empty(len(ids), part.shape[-1]) if out is None else out
        out[mine] = part
    return out  # type: ignore[return-value]


def _refuse_recording(x: Tensor) -> None:
    if is_capturing(x.device):
        raise TaskError("a CUDA graph would replay the tasks that it is recorded with: record it outside of use_tasks")


def _with(w: PlaneMatrix, delta: Delta | None) -> tuple[PlaneMatrix, Tensor | None]:
    if delta is None:
        return w, None
    return shifted(w, delta), None if delta.scales is None else delta.scales.detach()[None]


def forget_stacks() -> None:
    """Give back the memory of stacked deltas, when a task is unloaded."""
    _stacks.clear()


_stacks: weakref.WeakKeyDictionary[Any, tuple[tuple[Delta | None, ...], Tensor]] = weakref.WeakKeyDictionary()


def _stacked(module: Any, deltas: list[Delta | None]) -> Tensor:
    """The deltas as one tensor, kept while the same are asked for; those in training change, and are not kept."""
    if any(d is not None and d.scales is not None and d.scales.requires_grad for d in deltas):
        return stack(deltas).detach()
    known = _stacks.get(module)
    if known is None or len(known[0]) != len(deltas) or any(a is not b for a, b in zip(known[0], deltas, strict=True)):
        known = _stacks[module] = (tuple(deltas), stack(deltas))
    return known[1]


@torch.library.custom_op(
    "lowbit::linear_by_task",
    mutates_args=(),
    schema=f"(Tensor x, {_MATRIX}, Tensor? bias, Tensor numbers, Tensor key, {_SCHEME}) -> Tensor",
    tags=torch.Tag.cudagraph_unsafe,
)
def _linear(x: Tensor, *args: Any) -> Tensor:
    w, (bias, numbers, key) = operators.split(args)
    flat, backend = x.reshape(-1, w.cols), operators.backend_of(w)
    out = _in_parts(numbers, key, w, lambda w, deltas, ids, rows: backend.linear(flat[rows], w, bias, deltas, ids))
    return operators.no_view(out.reshape(*x.shape[:-1], w.rows))


@_linear.register_fake
def _(x: Tensor, *args: Any) -> Tensor:
    w, _ = operators.split(args)
    return x.new_empty(*x.shape[:-1], w.rows)


@torch.library.custom_op(
    "lowbit::linear_by_task_input_grad",
    mutates_args=(),
    schema=f"(Tensor grad, {_MATRIX}, Tensor numbers, Tensor key, {_SCHEME}) -> Tensor",
    tags=torch.Tag.cudagraph_unsafe,
)
def _linear_input_grad(grad: Tensor, *args: Any) -> Tensor:
    w, (numbers, key) = operators.split(args)
    flat, backend = grad.reshape(-1, w.rows), operators.backend_of(w)
    out = _in_parts(numbers, key, w, lambda w, deltas, ids, rows: backend.linear_input_grad(flat[rows], w, deltas, ids))
    return operators.no_view(out.reshape(*grad.shape[:-1], w.cols))


@_linear_input_grad.register_fake
def _(grad: Tensor, *args: Any) -> Tensor:
    w, _ = operators.split(args)
    return grad.new_empty(*grad.shape[:-1], w.cols)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _refuse_training(ctx.needs_input_grad[1:7])
    ctx.save_for_backward(*inputs[1:7], *inputs[8:10])  # the matrix; numbers, key
    ctx.scheme = inputs[-SCHEME:]


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    found: dict[int, Tensor] = {}
    if ctx.needs_input_grad[0]:
        found[0] = torch.ops.lowbit.linear_by_task_input_grad(grad, *ctx.saved_tensors, *ctx.scheme)
    if ctx.needs_input_grad[7]:
        found[7] = grad.reshape(-1, grad.shape[-1]).sum(0)
    return tuple(found.get(i) for i in range(len(ctx.needs_input_grad)))


_linear.register_autograd(_linear_backward, setup_context=_linear_setup)


@torch.library.custom_op(
    "lowbit::embedding_by_task",
    mutates_args=(),
    schema=f"(Tensor ids, {_MATRIX}, Tensor numbers, Tensor key, ScalarType dtype, {_SCHEME}) -> Tensor",
    tags=torch.Tag.cudagraph_unsafe,
)
def _embedding(ids: Tensor, *args: Any) -> Tensor:
    w, (numbers, key, dtype) = operators.split(args)
    flat, backend = ids.reshape(-1), operators.backend_of(w)
    out = _in_parts(
        numbers, key, w, lambda w, deltas, tasks, rows: backend.embedding(flat[rows], w, deltas, tasks, dtype)
    )
    return operators.no_view(out.reshape(*ids.shape, w.cols))


@_embedding.register_fake
def _(ids: Tensor, *args: Any) -> Tensor:
    w, (_, _, dtype) = operators.split(args)
    return w.scales.new_empty(*ids.shape, w.cols, dtype=dtype)


def _embedding_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _refuse_training(ctx.needs_input_grad[1:7])


_embedding.register_autograd(lambda ctx, grad: (None,) * len(ctx.needs_input_grad), setup_context=_embedding_setup)


def _refuse_training(needed: Sequence[bool]) -> None:
    if any(needed):
        raise TaskError("inside of use_tasks a compiled model cannot train scales: train it uncompiled")
