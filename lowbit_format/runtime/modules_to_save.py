"""A module that a task replaces whole, such as a classifier head: one copy for each task, and one for the base.

The module keeps its place and its parameter names; its class becomes a subclass with :class:`SwitchedModule` in front,
which sends each row of a batch to the copy of its task. Copies are not part of the ``state_dict``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import TaskError
from . import compiled_tasks
from .active_tasks import Name, RowTasks, TaskState
from .class_mixin import Mixin, mix_in, restore_class

_ATTRIBUTES = ("task_state", "task_path", "task_own", "task_copies", "task_now", "task_key")


class SwitchedModule(Mixin):
    """Mixin in front of the class of a module that tasks replace.

    Attributes:
        task_state: the active task of the model.
        task_path: path of the module in the model.
        task_own: the task whose parameters the module itself holds: the base, or the task in training.
        task_now: the copy that the model's own task uses; empty if that is the module itself.
        task_copies: the other tasks' modules, by name; under None the base's, while `task_own` is a task.
        task_key: by which operators of compiled graphs find this module.
    """

    task_state: TaskState
    task_path: str
    task_own: Name
    task_copies: dict[Name, nn.Module]
    task_now: tuple[nn.Module, ...]
    task_key: Tensor

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the class behind, with the parameters of each row's task.

        Not ``forward``: accelerate and others replace that.
        """
        if torch.compiler.is_compiling() and self.task_state.is_open:
            return self._run_at_run_time(args, kwargs)
        tasks = self.task_state.row_tasks()
        if tasks is None:
            return self._run(self.task_now, args, kwargs)
        if len(tasks.names) == 1:
            return self._run(self._copies_of(tasks.names[0]), args, kwargs)
        return self._run_mixed(tasks, args, kwargs)

    @property
    def state(self) -> TaskState:
        """As of a quantized module."""
        return self.task_state

    @property
    def path(self) -> str:
        """As of a quantized module."""
        return self.task_path

    def changes(self, names: Sequence[Name]) -> bool:
        """Whether these tasks have different modules."""
        return len({id(self.module_of(name)) for name in names}) > 1

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        self.task_key = compiled_tasks.new_key(self)

    def set_task(self, name: Name) -> None:
        """From now on compute with task `name` outside of ``use_tasks`` blocks."""
        self.__dict__["task_now"] = self._copies_of(name)

    def module_of(self, name: Name) -> nn.Module:
        """The module whose parameters task `name` uses: a copy, or this module."""
        owner = name if name == self.task_own or name in self.task_copies else None
        mine: Any = self
        return mine if owner == self.task_own else self.task_copies[owner]

    def forget(self, name: str) -> None:
        """Drop the task's copy; if the module itself holds the task's parameters, it gets the base's again."""
        if name == self.task_own:
            self._take_parameters_of(None)
        self.task_copies.pop(name, None)

    def become_plain(self, name: Name) -> None:
        """Take the parameters of task `name` for good, and the module's former class."""
        self._take_parameters_of(name)
        for attribute in _ATTRIBUTES:
            delattr(self, attribute)
        restore_class(self)

    def _take_parameters_of(self, name: Name) -> None:
        source: Any = self.module_of(name)
        if source is not self:
            self.load_state_dict(source.state_dict())  # type: ignore[attr-defined]
        self.requires_grad_(False)  # type: ignore[attr-defined]
        self.task_copies.pop(None, None)
        self.task_own = None
        self.set_task(self.task_state.active)

    def _copies_of(self, name: Name) -> tuple[nn.Module, ...]:
        """The copy that task `name` uses; empty if that is this module, which must not hold itself."""
        module: Any = self.module_of(name)
        return () if module is self else (module,)

    def _run(self, copies: tuple[nn.Module, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return copies[0](*args, **kwargs) if copies else super().__call__(*args, **kwargs)  # type: ignore[misc]

    def _run_at_run_time(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """In a graph that does not know the tasks: run every copy, and take each row from the one of its task."""
        x = next(t for t in pytree.tree_flatten((args, kwargs))[0] if isinstance(t, Tensor) and t.dim())
        numbers = compiled_tasks.task_numbers(x, self.task_key, len(x)).to(x.device)
        found = self._run(self._copies_of(None), args, kwargs)
        for name in [*self.task_copies, self.task_own]:
            if name is None:
                continue
            other = self._run(self._copies_of(name), args, kwargs)
            if not isinstance(other, Tensor) or other.shape != found.shape or len(other) != len(x):
                raise TaskError(
                    f"{self.task_path}: heads of different sizes or kinds cannot be compiled into one graph"
                )
            mine = (numbers == self.task_state.numbers[name]).reshape(-1, *[1] * (other.dim() - 1))
            found = torch.where(mine, other, found)
        return found

    def _run_mixed(self, tasks: RowTasks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the copy of each task on its rows, and put the results back in the order of the batch."""
        flat, spec = pytree.tree_flatten((args, kwargs))
        rows = next(len(t) for t in flat if isinstance(t, Tensor) and t.dim())
        tasks.check_axis(rows, self.task_path)
        parts, places = [], []
        for i, name in enumerate(tasks.names):
            device = next(t.device for t in flat if isinstance(t, Tensor))
            mine = (tasks.task_ids(rows, device, self.task_path) == i).nonzero().flatten()
            picked = [t[mine] if isinstance(t, Tensor) and t.dim() and len(t) == rows else t for t in flat]
            some_args, some_kwargs = pytree.tree_unflatten(picked, spec)
            parts.append(pytree.tree_flatten(self._run(self._copies_of(name), some_args, some_kwargs)))
            places.append(mine)
        order = torch.cat(places).argsort()
        leaves = zip(*(leaves for leaves, _ in parts), strict=True)
        return pytree.tree_unflatten([self._join(leaf, order) for leaf in leaves], parts[0][1])

    def _join(self, parts: Sequence[Any], order: Tensor) -> Any:
        if not isinstance(parts[0], Tensor):
            return parts[0]
        if len({t.shape[1:] for t in parts}) > 1:
            shapes = sorted({tuple(t.shape[1:]) for t in parts})
            raise TaskError(f"{self.task_path}: heads of different sizes {shapes} cannot answer in one batch")
        return torch.cat(list(parts))[order]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for module in self.task_copies.values():
            module._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return super()._apply(fn, recurse)  # type: ignore[misc]

    def train(self, mode: bool = True) -> Any:
        for module in self.task_copies.values():
            module.train(mode)
        return super().train(mode)  # type: ignore[misc]


def switched(module: nn.Module, path: str, state: TaskState) -> SwitchedModule:
    """Make `module` a :class:`SwitchedModule` unless it is one already."""
    if not isinstance(module, SwitchedModule):
        switching: Any = module  # all attributes first: another thread may be computing with the module
        switching.task_state, switching.task_path, switching.task_own, switching.task_copies = state, path, None, {}
        switching.task_now, switching.task_key = (), compiled_tasks.new_key(module)
        mix_in(SwitchedModule, module)
    return module  # type: ignore[return-value]


def plain_copy(module: nn.Module) -> nn.Module:
    """A copy of the module with its own parameters and its former class, without tasks."""
    if not isinstance(module, SwitchedModule):
        return copy.deepcopy(module)
    twin: Any = copy.deepcopy(
        module, {id(module.task_copies): {}, id(module.task_state): None, id(module.task_now): ()}
    )
    for attribute in _ATTRIBUTES:
        delattr(twin, attribute)
    restore_class(twin)
    return twin  # type: ignore[no-any-return]
