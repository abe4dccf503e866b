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
        loaded: what is known of each task that may be chosen, by name.
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
        kept: what modules keep for the time of the block, by their id: deltas stacked once serve every step.
    """

    def __init__(self, rows: Sequence[Name]) -> None:
        self.names: tuple[Name, ...] = tuple(dict.fromkeys(rows))
        self.kept: dict[int, Tensor] = {}
        self._rows = torch.tensor([self.names.index(name) for name in rows])
        self._ids: dict[tuple[int, torch.device], Tensor] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def ids(self, rows: int, device: torch.device, path: str) -> Tensor:
        """Index into ``names`` of each of `rows` rows, int64: beams, tokens and such stand together row by row.

        Raises TaskError if `rows` is not a multiple of the batch.
        """
        if rows % len(self):
            raise TaskError(
                f"{path} gets {rows} rows, which is no multiple of the {len(self)} tasks given to use_tasks: give one "
                "task for each row of the batch"
            )
        key = (rows, device)
        if key not in self._ids:
            self._ids[key] = self._rows.repeat_interleave(rows // len(self)).to(device)
        return self._ids[key]


_chosen: ContextVar[Mapping[int, Selection]] = ContextVar("lowbit_tasks", default={})  # noqa: B039, never changed
