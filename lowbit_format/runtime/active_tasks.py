"""Which task is active, in a model and in a thread.

There are two ways to choose, and the second wins: a model's own task (``set_task``), kept in its modules, and the tasks
of a block (``use_tasks``), kept in a context variable, which each thread and each asyncio task has for itself.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import TaskError

Name = str | None  # of a task; None is the base


@dataclass(eq=False)
class TaskState:
    """The tasks of one model, shared by all its modules.

    Attributes:
        active: the model's own task.
        loaded: the facts about each loaded task, by name.
        numbers: of each loaded task, from 1 on; none is given twice, also where a name is. The base is 0.
        blocks: number of open ``use_tasks`` blocks in all threads.
        is_open: whether there is one. While there is none the context variable is not read: ``torch.compile`` cannot
            trace it, and guards on this instead (:mod:`.compiled_tasks`).
    """

    active: Name = None
    loaded: dict[str, Any] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    blocks: int = 0
    is_open: bool = False
    _lock: Any = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        for name in self.loaded:
            self.numbers.setdefault(name, next(_numbers))

    def row_tasks(self) -> RowTasks | None:
        """The tasks of the ``use_tasks`` block around this call, or None outside of one.

        Raises TaskError if one of them has been unloaded since the block began.
        """
        tasks = _row_tasks.get().get(id(self)) if self.blocks else None
        if tasks is not None:
            self.check(tasks.names)
        return tasks

    def add(self, name: str, facts: Any) -> None:
        """A task is loaded from here on."""
        self.numbers[name] = next(_numbers)
        self.loaded[name] = facts

    def remove(self, name: str) -> None:
        """Undo :meth:`add`."""
        del self.loaded[name]
        self.numbers.pop(name, None)

    def number_of(self, name: Name) -> int:
        """The number of a task, 0 for the base. Raises TaskError if it is not loaded."""
        number = 0 if name is None else self.numbers.get(name)
        if number is None:
            self.check([name])
            raise TaskError(f"the task {name!r} has been unloaded while a compiled model computed with it")
        return number

    def name_of(self, number: int) -> Name:
        """The task with that number. Raises TaskError if it has been unloaded."""
        if number == 0:
            return None
        for name, mine in list(self.numbers.items()):
            if mine == number:
                return name
        raise TaskError("a task has been unloaded while a compiled model computed with it")

    def check(self, names: Iterable[Name]) -> None:
        """Raise TaskError for a task that is not loaded."""
        for name in names:
            if name is not None and name not in self.loaded:
                known = ", ".join(map(repr, sorted(self.loaded))) or "none"
                raise TaskError(f"no task {name!r} is loaded (loaded: {known}); load it with load_task")

    @contextlib.contextmanager
    def choose(self, names: Sequence[Name]) -> Iterator[None]:
        """Use tasks `names`, one for each row of a batch, inside the block."""
        token = _row_tasks.set({**_row_tasks.get(), id(self): RowTasks(names)})
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)
            _row_tasks.reset(token)

    def _count(self, more: int) -> None:
        with self._lock:
            self.blocks += more
            self.is_open = self.blocks > 0

    def __deepcopy__(self, memo: dict[int, Any]) -> TaskState:
        twin = TaskState(self.active, dict(self.loaded), dict(self.numbers))
        memo[id(self)] = twin
        return twin

    def __reduce__(self) -> Any:
        """Numbers are new: those of another process would be given a second time in this one."""
        return TaskState, (self.active, self.loaded)


class RowTasks:
    """The task of each row of a batch.

    Args:
        rows: the task of each row.

    Attributes:
        names: the different tasks, in the order of their first rows.
        kept: by the id of a module, its deltas and the tensor that stacks them; kept until the block ends, so that
            they are not stacked again at every step.
        repeats: how many rows ``generate`` makes of each that it is given, for beams and several answers.
    """

    repeats = 1

    def __init__(self, rows: Sequence[Name]) -> None:
        self.names: tuple[Name, ...] = tuple(dict.fromkeys(rows))
        self.kept: dict[int, tuple[Any, Tensor]] = {}
        self._rows = torch.tensor([self.names.index(name) for name in rows])
        self._ids: dict[tuple[int, torch.device], Tensor] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def task_ids(self, rows: int, device: torch.device, path: str) -> Tensor:
        """For each of `rows` rows the index of its task in ``names``: int64 ``[rows]``.

        Where `rows` is a multiple of the batch, as with beams, the rows of one batch row are consecutive.
        Raises TaskError for any other number.
        """
        self.check_rows(rows, path)
        key = (rows, device)
        if key not in self._ids:
            self._ids[key] = self._rows.repeat_interleave(rows // len(self)).to(device)
        return self._ids[key]

    def ids_of_tokens(self, tokens: int, device: torch.device, path: str) -> Tensor:
        """As :meth:`task_ids` for `tokens` tokens that lie one row of the batch after the other, as a router gets them.

        Raises TaskError where they do not tell to which rows of the batch they belong.
        """
        call = current_call()
        rows = call.rows
        self.check_call(call)
        if call.apart or (rows is not None and tokens % rows):
            raise TaskError(
                f"{path} gets {tokens} tokens in a batch of {rows} rows, and they do not tell to which rows they "
                f"belong: tasks that change it {_APART}"
            )
        return self.task_ids(tokens, device, path)

    def check_rows(self, rows: int, what: str) -> None:
        """Raise TaskError unless `rows` is a multiple (1, or the number of beams) of the number of tasks."""
        if rows == 0 or rows % len(self):
            raise TaskError(
                f"{what} gets {rows} rows, which is no multiple of the {len(self)} tasks given to use_tasks: give one "
                "task for each row of the batch"
            )

    def check_batch(self, rows: int, what: str) -> None:
        """Raise TaskError unless a model's batch has one row for each task, or as many as ``generate`` makes of one."""
        if rows not in (len(self), len(self) * self.repeats):
            raise TaskError(
                f"{what} gets {rows} rows, and use_tasks has {len(self)} tasks: give one task for each row of "
                "the batch (of what generate is given: it repeats rows for beams and num_return_sequences by itself)"
            )

    def ids_of_input(self, x: Tensor, path: str, call: ModelCall | None) -> Tensor:
        """As :meth:`task_ids` for axis 0 of `x`, on a CPU; `call` is the model's call, by default what goes on.

        Raises TaskError as :meth:`by_rows`, and for a single row that the whole batch shares.
        """
        rows = len(self.by_rows(x, path, call)) if x.dim() else 0
        if x.dim() and rows != len(x):
            raise TaskError(
                f"{path} gets one row for a batch of {rows}, so tasks that change it {_APART}, or run the model "
                "uncompiled"
            )
        return self.task_ids(rows, torch.device("cpu"), path)

    def check_call(self, call: ModelCall) -> None:
        """What an uncompiled model checks when it is called; a graph leaves it to the modules."""
        if call.batch is not None and len(self.names) > 1:
            self.check_batch(call.batch, "the model")

    def by_rows(self, x: Tensor, path: str, call: ModelCall | None = None) -> Tensor:
        """`x` with the rows of the batch as axis 0; a single row that the whole batch shares is repeated.

        Raises TaskError where axis 0 may be something else: a tensor alone does not tell which axis is the batch.
        """
        call = call or current_call()
        rows, first = call.rows, len(x)
        self.check_call(call)
        if any(part in _NOT_BY_ROW for part in path.split(".")):
            raise TaskError(f"{path} does not work row by row: tasks that change it {_APART}")
        self.check_axis(first, path, call)
        if rows is None:
            self.check_rows(first, path)
            return x
        if first == 1 < rows:
            return x.expand(rows, *x.shape[1:])
        if first % rows or (x.dim() > 2 and first != rows and x.shape[1] == rows):
            raise TaskError(
                f"{path} gets {list(x.shape)} in a batch of {rows} rows: its first axis is not the batch, so "
                f"tasks that change it {_APART}"
            )
        return x

    def check_axis(self, first: int, path: str, call: ModelCall | None = None) -> None:
        """Raise TaskError where `first` things that module `path` gets are not the rows of the batch, in their order.

        Those are the patches or images of a vision tower: rows may have different numbers of them.
        """
        call = call or current_call()
        if call.apart or (call.exact and first not in (1, call.rows)):
            part = re.split(r"\.\d+\.", path)[0]
            what = call.apart or "the model"
            raise TaskError(
                f"{path} gets {first} patches, images or other pieces in a batch of {call.rows} rows (in {what}), and "
                f"they do not tell to which rows they belong: tasks that change it {_APART}; or tune them without this "
                f"part of the model: prepare_scale_tuning(..., exclude=['{part}.*'])"
            )


@dataclass(frozen=True)
class ModelCall:
    """The call of a model that is going on.

    Attributes:
        rows: of the batch; None if unknown.
        exact: only tensors with that many rows are the batch: others may be images and the like, in other numbers.
        apart: name of the called part of the model, if what that gets is no batch; else None.
        batch: in a compiled graph, the rows that the outermost call got, where each must have its task; else None.
    """

    rows: int | None = None
    exact: bool = False
    apart: str | None = None
    batch: int | None = None

    def inner(self, rows: int | None, exact: bool, part: str | None) -> ModelCall:
        """The call of a model inside of this one; arguments as in :func:`model_call`."""
        if rows is None or self.apart:
            return self
        if part is not None and self.rows not in (None, rows):
            return ModelCall(self.rows, apart=part, batch=self.batch)
        return ModelCall(rows, exact, batch=self.batch)


def current_call() -> ModelCall:
    """The call of a model that is going on here: of the innermost :func:`model_call`, or of the compiled model of which
    this is a part that the compiler left out (a graph break).
    """
    call = _call.get()
    return call if call.rows is not None or traced.call is None else traced.call


def batch_rows() -> int | None:
    """Rows of the batch of the call that is going on; None if unknown."""
    return current_call().rows


@contextlib.contextmanager
def model_call(rows: int | None, *, exact: bool = False, part: str | None = None) -> Iterator[None]:
    """Inside the block a model is called with a batch of `rows` rows; None (unknown) keeps the outer call's number.

    Args:
        rows: of what the model is called with.
        exact: see :class:`ModelCall`.
        part: the model's name, if it is a part whose input is a batch only where it has the outer call's rows.
    """
    token = _call.set(current_call().inner(rows, exact, part))
    try:
        yield
    finally:
        _call.reset(token)


class _Traced(threading.local):
    """The call of a model that is being traced into a graph, or None: what a context variable cannot be there.

    Where a graph breaks off, the compiler sets it for what runs in between.
    """

    def __init__(self) -> None:
        self.call: ModelCall | None = None


traced = _Traced()
_numbers = itertools.count(1)
_APART = "cannot share a batch; run the rows of each task in a separate batch"
_NOT_BY_ROW = ("experts", "relative_attention_bias")  # tokens picked by a router; tokens by tokens
_call: ContextVar[ModelCall] = ContextVar("lowbit_model_call", default=ModelCall())  # noqa: B039, frozen
_row_tasks: ContextVar[Mapping[int, RowTasks]] = ContextVar("lowbit_tasks", default={})  # noqa: B039, never changed
