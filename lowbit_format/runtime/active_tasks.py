"""Which task is on, in a model and in a thread.

Two ways to choose, of which the second wins: a model's own task (``set_task``), kept in its modules, and the tasks of
a block (``use_tasks``), kept in a context variable, so that threads and asyncio tasks do not see each other's.
"""

from __future__ import annotations

import contextlib
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
    """What all modules of one model share.

    Attributes:
        active: the model's own task.
        loaded: the tasks that may be chosen, by name; what is known of each is for the tasks package to say.
        blocks: number of ``use_tasks`` blocks that are open now, in whatever thread. While it is 0 nothing looks
            at the context variable, which ``torch.compile`` cannot trace.
    """

    active: Name = None
    loaded: dict[str, Any] = field(default_factory=dict)
    blocks: int = 0
    _lock: Any = field(default_factory=threading.Lock, repr=False)

    def chosen(self) -> Selection | None:
        """The tasks of the block that this thread is in, if it is in one; TaskError if one was unloaded meanwhile."""
        chosen = _chosen.get().get(id(self)) if self.blocks else None
        if chosen is not None:
            self.check(chosen.names)
        return chosen

    def check(self, names: Iterable[Name]) -> None:
        """Raise TaskError for a task that is not loaded."""
        for name in names:
            if name is not None and name not in self.loaded:
                known = ", ".join(map(repr, sorted(self.loaded))) or "none"
                raise TaskError(f"no task {name!r} is loaded (loaded: {known}); load it with load_task")

    @contextlib.contextmanager
    def choose(self, names: Sequence[Name]) -> Iterator[None]:
        """Use tasks `names`, one for each row of a batch, inside the block."""
        token = _chosen.set({**_chosen.get(), id(self): Selection(names)})
        with self._lock:
            self.blocks += 1
        try:
            yield
        finally:
            with self._lock:
                self.blocks -= 1
            _chosen.reset(token)

    def __deepcopy__(self, memo: dict[int, Any]) -> TaskState:
        twin = TaskState(self.active, dict(self.loaded))
        memo[id(self)] = twin
        return twin

    def __reduce__(self) -> Any:
        return TaskState, (self.active, self.loaded)


class Selection:
    """Tasks of the rows of one batch.

    Attributes:
        names: the different tasks, in the order of their first rows.
        kept: what modules keep for the time of the block, by their id: deltas, and these stacked, for every step.
    """

    def __init__(self, rows: Sequence[Name]) -> None:
        self.names: tuple[Name, ...] = tuple(dict.fromkeys(rows))
        self.kept: dict[int, tuple[Any, Tensor]] = {}
        self._rows = torch.tensor([self.names.index(name) for name in rows])
        self._ids: dict[tuple[int, torch.device], Tensor] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def ids(self, rows: int, device: torch.device, path: str) -> Tensor:
        """Index into ``names`` of each of `rows` rows, int64: beams, tokens and such stand together row by row.

        Raises TaskError if `rows` is not a multiple of the tasks.
        """
        self.check_rows(rows, path)
        key = (rows, device)
        if key not in self._ids:
            self._ids[key] = self._rows.repeat_interleave(rows // len(self)).to(device)
        return self._ids[key]

    def check_rows(self, rows: int, what: str) -> None:
        """Raise TaskError if `rows` rows cannot be those of the tasks: each one, or several times each (beams)."""
        if rows == 0 or rows % len(self):
            raise TaskError(
                f"{what} gets {rows} rows, which is no multiple of the {len(self)} tasks given to use_tasks: give one "
                "task for each row of the batch"
            )

    def fits(self, x: Tensor, path: str) -> Tensor:
        """`x` with axis 0 going over the rows of the batch; a single row that all share is repeated.

        Which axis is the batch cannot be seen from a tensor alone, so what is doubtful is refused with a TaskError.
        """
        rows, first = batch_rows(), len(x)
        if any(part in _NOT_BY_ROW for part in path.split(".")):
            raise TaskError(f"{path} does not work row by row, so that tasks which change it {_APART}")
        if rows is None:
            self.check_rows(first, path)
            return x
        if first == 1 < rows:
            return x.expand(rows, *x.shape[1:])
        if first % rows or (x.dim() > 2 and first != rows and x.shape[1] == rows):
            raise TaskError(
                f"{path} gets {list(x.shape)} in a batch of {rows} rows: its first axis is not the batch, so that "
                f"tasks which change it {_APART}"
            )
        return x


def batch_rows() -> int | None:
    """Rows of the batch that the innermost model call is about; None outside of one."""
    return _rows.get()


@contextlib.contextmanager
def batch(rows: int | None) -> Iterator[None]:
    """Inside the block a model is called with `rows` rows; None leaves it at what is known."""
    token = _rows.set(batch_rows() if rows is None else rows)
    try:
        yield
    finally:
        _rows.reset(token)


_APART = "cannot share a batch: run the rows of each task in a batch of their own"
_NOT_BY_ROW = ("experts", "relative_attention_bias")  # tokens picked by a router; tokens by tokens
_rows: ContextVar[int | None] = ContextVar("lowbit_batch_rows", default=None)
_chosen: ContextVar[Mapping[int, Selection]] = ContextVar("lowbit_tasks", default={})  # noqa: B039, never changed
