"""The modules that replace float ones, with tasks: ``LowbitLinear``, ``LowbitConv1D``, ``LowbitEmbedding``.

Storage and layout of their matrix are in :mod:`.plane_module`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformers.pytorch_utils import Conv1D

from ..errors import TaskError, UnsupportedOperationError
from ..kernels import operators
from ..kernels.batch import Factor
from ..kernels.matrix import PlaneMatrix, with_delta
from ..schema import Scheme
from . import compiled_tasks
from .active_tasks import Name, RowTasks, TaskState
from .deltas import Delta, TunedDelta, keeping_dtype, shifted, stack, stackable
from .known_modules import scaled
from .plane_module import PlaneModule
from .stored_tensors import TORCH_DTYPES

Result = TypeVar("Result")


class LowbitModule(PlaneModule):
    """A module whose weight is a quantized matrix that tasks change; arguments as in :class:`PlaneModule`.

    Attributes:
        state: the active task, shared with the model's other modules.
        deltas: of the loaded tasks, by name; tied modules share them. They are not part of the ``state_dict``.
        tuned: the delta in training, or None; its task has the name `tuned_name`.
        key: by which operators of compiled graphs find this module.
    """

    tuned: TunedDelta | None

    def __init__(self, scheme: Scheme, rows: int, cols: int, **kwargs: Any) -> None:
        super().__init__(scheme, rows, cols, **kwargs)
        self.state = TaskState()
        self.deltas: dict[str, Delta] = {}
        self.register_module("tuned", None)
        self.tuned_name: Name = None
        self._task: Name = None
        self.key = compiled_tasks.new_key(self)
        self._delta: Delta | None = None  # of _task, kept so that a compiled graph depends on tensors, not on names

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The decoded weight with the active task, oriented as in the float module (CFG-5)."""
        return self._dequantize(self._own_delta(), dtype)

    def _dequantize(self, delta: Delta | None, dtype: torch.dtype | None = None) -> Tensor:
        """The decoded weight with `delta`, oriented as in the float module."""
        self.refuse_shared_out()
        return self._with_delta(
            delta, lambda w, deltas: operators.dequantize(w, deltas, dtype=dtype or self.compute_dtype)
        )

    def reset_parameters(self) -> None:
        """Nothing: a model's own initialisation may call it, before or after the weights are loaded."""

    def _read_weight(self) -> Tensor:
        """The decoded weight with the active task.

        Raises TaskError inside of a ``use_tasks`` block whose tasks have several weights here.
        """
        tasks = self.state.row_tasks()
        if tasks is None:
            return self.dequantize()
        deltas = [self.delta_of(name) for name in tasks.names]
        if self.experts is None and all(delta is None for delta in deltas):
            return self._dequantize(None)
        if self.experts is not None or len(deltas) > 1:
            raise TaskError(
                f"{self.path}: its weight is read, and the {len(deltas)} tasks given to use_tasks have different "
                "ones; run the rows of each task in a separate batch"
            )
        return self._dequantize(deltas[0])

    def float_module(self, weight: nn.Parameter) -> nn.Module:
        """The float module that this one replaces, with `weight` (in that module's orientation)."""
        raise NotImplementedError

    # --- tasks ---

    def delta_of(self, name: Name) -> Delta | None:
        """What task `name` changes here; None if nothing."""
        if name is None:
            return None
        return self.tuned.delta() if self.tuned is not None and self._is_tuned(name) else self.deltas.get(name)

    def set_task(self, name: Name) -> None:
        """From now on compute with task `name` outside of ``use_tasks`` blocks."""
        self._task, self._delta = name, None if self._is_tuned(name) else self.delta_of(name)

    def parameters_with(self, delta: Delta) -> dict[str, Tensor]:
        """Scales and shift with `delta`, by role, as the task computes with them (TSK-8)."""
        self.refuse_shared_out()
        w = shifted(self.plane_matrix, delta)
        w = w if delta.scales is None else with_delta(w, delta.scales)
        values = {"scales": w.scales, "offsets": w.offsets, "zeros": w.zeros}
        return {role: v for role, v in values.items() if v is not None}

    def merged_parameters(self, delta: Delta, dtype: str | None) -> dict[str, Tensor]:
        """Scales and shift with `delta` merged in, by role, as `dtype` (``"F32"``; None: their present dtype).

        Raises TaskError if the dtype cannot hold them.
        """
        to = TORCH_DTYPES[dtype or self.scheme.scale_dtype]
        stored = {role: v.detach().to(to) for role, v in self.parameters_with(delta).items()}
        if not all(bool(torch.isfinite(v).all()) for v in stored.values()):
            raise TaskError(f"{self.path}: {to} cannot hold the scales of the task; merge it into float32")
        return stored

    def merge(self, values: dict[str, Tensor]) -> None:
        """Replace the parameters for good by the result of :meth:`merged_parameters`.

        Nested precisions are dropped: they have parameters of their own, which the task was not tuned for.
        """
        self.untile()
        for role in [r for r in self._parameters if "_k" in r]:
            del self._parameters[role]
        dtype = next(name for name, t in TORCH_DTYPES.items() if t == values["scales"].dtype)
        self.scheme = replace(self.scheme, scale_dtype=dtype, nested=())
        self._parameters.update({role: nn.Parameter(v, requires_grad=False) for role, v in values.items()})

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self.key = compiled_tasks.new_key(self)

    def tie_to(self, owner: PlaneModule) -> None:
        super().tie_to(owner)
        if isinstance(owner, LowbitModule):
            self.deltas = owner.deltas

    def _run(self, x: Tensor, kernel: Callable[[Tensor, PlaneMatrix, Tensor | None, Tensor | None], Tensor]) -> Tensor:
        """``kernel(x, plane_matrix, deltas, task_ids)`` with the active tasks."""
        if forward_ad._current_level >= 0 and _has_tangent(x):
            raise UnsupportedOperationError(
                f"{self.path}: forward-mode differentiation does not reach through bit-planes; use backward(), or call "
                "model.dequantize() for a float model"
            )
        if not self.is_tiled and not operators.is_watched():
            self.tile()
        if torch.compiler.is_compiling() and self.state.is_open and not self.deltas and self.tuned is None:
            return kernel(x, self.plane_matrix, None, None)  # no task changes it: the context variable is not traced
        tasks = self.state.row_tasks()
        deltas = self._active_deltas(tasks)
        if tasks is None or _are_one(deltas):
            return self._with_delta(deltas[0], lambda w, deltas: kernel(x, w, deltas, None))
        if x.dim() < (1 if self.kind == "embedding" else 2):
            raise TaskError(f"{self.path} gets one row without a batch, but several tasks")
        x = tasks.by_rows(x, self.path)
        ids = tasks.task_ids(len(x), x.device, self.path)
        if stackable(deltas):
            ids = ids.repeat_interleave(_flat_rows(x, self.kind) // len(x))
            return kernel(x, self.plane_matrix, self._stacked(tasks, deltas), ids)
        out: Tensor | None = None
        for i, delta in enumerate(deltas):
            mine = ids == i
            part = self._with_delta(delta, lambda w, d, rows=mine: kernel(x[rows], w, d, None))  # type: ignore[misc]
            out = part.new_empty(len(x), *part.shape[1:]) if out is None else out
            out = out.index_put((mine,), part)
        return out  # type: ignore[return-value]

    def _active_deltas(self, tasks: RowTasks | None) -> list[Delta | None]:
        """One for each of the `tasks` of a block; outside of one, that of the task that set_task chose."""
        return [self._own_delta()] if tasks is None else [self.delta_of(name) for name in tasks.names]

    def factor(self, rows: int) -> Factor | None:
        """What `rows` rows of x, one for each row of the batch, are multiplied with in one call, with the active tasks.

        None where there is no such call: in training, or where the tasks of a batch cannot be stacked. Planes are
        tiled.
        """
        if self._modules["tuned"] is not None:
            return None
        if not self.is_tiled:
            self.tile()
        tasks, bias = self.state.row_tasks(), self._parameters["bias"]
        deltas = self._active_deltas(tasks)
        if tasks is None or _are_one(deltas):
            return self._with_delta(deltas[0], lambda w, deltas: Factor(w, bias, deltas))
        if not stackable(deltas):
            return None
        ids = tasks.task_ids(rows, self.device, self.path)
        return Factor(self.plane_matrix, bias, self._stacked(tasks, deltas), ids)

    def changes(self, names: Sequence[Name]) -> bool:
        """Whether these tasks make a difference among each other here."""
        return not _are_one([self.delta_of(name) for name in names])

    def _asks_at_run_time(self) -> bool:
        """Whether a graph is being traced that shall ask for the tasks of a block whenever it runs.

        Not in training: deltas would get no gradients.
        """
        if not (torch.compiler.is_compiling() and self.state.is_open):
            return False
        return bool(self.deltas) if self.tuned is None else not torch.is_grad_enabled()

    def _is_tuned(self, name: Name) -> bool:
        return name is not None and name == self.tuned_name

    def _own_delta(self) -> Delta | None:
        """The delta of the task that set_task chose."""
        return self.tuned.delta() if self.tuned is not None and self._task == self.tuned_name else self._delta

    def _with_delta(self, delta: Delta | None, kernel: Callable[[PlaneMatrix, Tensor | None], Result]) -> Result:
        if delta is None:
            return kernel(self.plane_matrix, None)
        return kernel(shifted(self.plane_matrix, delta), None if delta.scales is None else delta.scales[None])

    def _stacked(self, tasks: RowTasks, deltas: list[Delta | None]) -> Tensor:
        """The deltas as one tensor, kept for the whole block: it is the same at every step."""
        if self.tuned_name in tasks.names:  # changes at every step, and needs a new autograd graph at each
            return self._stack(deltas)
        known, stacked = tasks.kept.get(id(self), ((), None))
        if stacked is None or len(known) != len(deltas) or any(a is not b for a, b in zip(known, deltas, strict=True)):
            stacked = self._stack(deltas)
            tasks.kept[id(self)] = (tuple(deltas), stacked)
        return stacked

    def _stack(self, deltas: list[Delta | None]) -> Tensor:
        return stack(deltas)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Deltas move with the module and stay float32."""
        keep = keeping_dtype(fn)
        for name, delta in self.deltas.items():
            self.deltas[name] = delta.map(keep)
        self.set_task(self._task)
        return super()._apply(fn, recurse)


def _are_one(deltas: Sequence[Delta | None]) -> bool:
    """Whether all rows of a batch have the same."""
    return len(deltas) == 1 or all(delta is None for delta in deltas)


class _Product(LowbitModule):
    """A product with the weight."""

    def __init__(self, scheme: Scheme, rows: int, cols: int, **kwargs: Any) -> None:
        super().__init__(scheme, rows, cols, **kwargs)
        self.in_features, self.out_features = cols, rows

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[..., in_features]`` to ``[..., out_features]``, in the dtype of `x` (or of autocast)."""
        if self._asks_at_run_time():
            return compiled_tasks.linear(x, self.plane_matrix, self.bias, self.key)
        out = self._run(x, lambda x, w, deltas, ids: operators.linear(x, w, self.bias, deltas, ids))
        # A kernel that is called without autograd may return a view. Adapters add to it in place, where they have
        # gradients and it has none: autograd forbids that for such a view.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not out.requires_grad and out._is_view():
            return out.detach()
        return out


class LowbitLinear(_Product, nn.Linear):  # type: ignore[misc]  # a bias may be missing
    """Replaces ``nn.Linear``, and is one: PEFT and others ask for that. Rows are output features."""

    kind = "linear"

    def __init__(
        self, scheme: Scheme, rows: int, cols: int, *, float_class: type[nn.Linear] = nn.Linear, **kwargs: Any
    ) -> None:
        super().__init__(scheme, rows, cols, **kwargs)
        self.float_class = float_class

    def float_module(self, weight: nn.Parameter) -> nn.Module:
        with torch.device("meta"):
            module = self.float_class(1, 1, self.bias is not None)
        module.in_features, module.out_features = self.cols, self.rows
        return _with_parameters(module, weight, self)


class LowbitConv1D(_Product, Conv1D):  # type: ignore[misc]
    """Replaces GPT-2's ``Conv1D``, and is one. Its weight is ``[in, out]``; the planes are ``[out, in]`` (CFG-5)."""

    kind = "conv1d"
    __repr__ = nn.Module.__repr__

    def __init__(self, scheme: Scheme, rows: int, cols: int, **kwargs: Any) -> None:
        super().__init__(scheme, rows, cols, **kwargs)
        self.nf, self.nx = rows, cols

    def _dequantize(self, delta: Delta | None, dtype: torch.dtype | None = None) -> Tensor:
        return super()._dequantize(delta, dtype).t().contiguous()

    def float_module(self, weight: nn.Parameter) -> nn.Module:
        with torch.device("meta"):
            return _with_parameters(Conv1D(self.rows, self.cols), weight, self)  # type: ignore[no-untyped-call]

    def _weight_shape(self) -> tuple[int, ...]:
        return self.cols, self.rows


class LowbitEmbedding(LowbitModule, nn.Embedding):
    """Replaces ``nn.Embedding`` with its default options, and is one: a row is a token's vector.

    With `scale` it replaces an embedding that multiplies its rows by it (see :class:`.known_modules.Known`), which has
    the class `float_class`.
    """

    kind = "embedding"
    max_norm, norm_type, scale_grad_by_freq, sparse = None, 2.0, False, False  # what nn.Embedding has

    def __init__(
        self,
        scheme: Scheme,
        rows: int,
        cols: int,
        *,
        padding_idx: int | None = None,
        scale: float | None = None,
        rounds_scale: bool = False,
        float_class: type[nn.Embedding] = nn.Embedding,
        **kwargs: Any,
    ) -> None:
        super().__init__(scheme, rows, cols, **kwargs)
        self.num_embeddings, self.embedding_dim, self.padding_idx = rows, cols, padding_idx
        self.scale, self.rounds_scale, self.float_class = scale, rounds_scale, float_class
        if scale is not None:
            self.embed_scale = scale  # PEFT multiplies what an adapter adds by it

    def float_module(self, weight: nn.Parameter) -> nn.Module:
        options: dict[str, Any] = {} if self.scale is None else {"embed_scale": self.scale}
        with torch.device(weight.device):  # of a scale that is a buffer
            module = self.float_class(1, 1, None, **options)
        module.num_embeddings, module.embedding_dim, module.padding_idx = self.rows, self.cols, self.padding_idx
        return _with_parameters(module, weight, self)

    def forward(self, ids: Tensor) -> Tensor:
        """``ids`` int ``[...]`` to ``[..., embedding_dim]`` in the compute dtype; only these rows are decoded."""
        if self._asks_at_run_time():
            rows = compiled_tasks.embedding(ids, self.plane_matrix, self.key, self.compute_dtype)
        else:
            rows = self._run(
                ids, lambda x, w, deltas, rows: operators.embedding(x, w, deltas, rows, dtype=self.compute_dtype)
            )
        return rows if self.scale is None else scaled(rows, self.scale, self.rounds_scale)


MODULES: dict[str, type[LowbitModule]] = {c.kind: c for c in (LowbitLinear, LowbitConv1D, LowbitEmbedding)}


def _has_tangent(x: Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]


def _flat_rows(x: Tensor, kind: str) -> int:
    """Rows of the flattened input: operators take one task id for each."""
    return x.numel() if kind == "embedding" else x.numel() // x.shape[-1]


def _with_parameters(module: nn.Module, weight: nn.Parameter, old: LowbitModule) -> nn.Module:
    module.register_parameter("weight", weight)
    if old.bias is not None:
        module.register_parameter("bias", nn.Parameter(old.bias.detach().to(weight.dtype)))
    return module.train(old.training)
