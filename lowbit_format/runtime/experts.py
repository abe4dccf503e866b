"""The stacked matrices of experts: ``LowbitExperts``, which stands where the float module has one parameter.

It is a module inside of the module of experts, at the parameter's path. Its tensors have the names of the file
(EXP-1), which have an underscore where torch puts a dot: :class:`.expert_forward.ExpertForward` answers to them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TaskError, UnsupportedOperationError
from ..kernels import operators
from ..kernels.batch import Share
from ..kernels.matrix import FILE, TILED, PlaneMatrix, with_delta
from ..kernels.parameter_order import group_major
from ..schema import Scheme
from .active_tasks import RowTasks
from .deltas import Delta, shifted, stack, stackable
from .modules import LowbitModule

Segment = tuple[int, int, int]  # expert, and the first row and the end of the rows that are for it


class LowbitExperts(LowbitModule):
    """Replaces a parameter ``[experts, rows, cols]``: rows are output features.

    Args:
        experts: their number.

    For other arguments see :class:`.plane_module.PlaneModule`. Deltas have the axis of experts in front (TSK-7).
    """

    kind = "experts"
    experts: int
    _is_hf_initialized = True  # transformers would initialise the parameter that it takes this for

    def __init__(self, scheme: Scheme, rows: int, cols: int, *, experts: int, **kwargs: Any) -> None:
        super().__init__(scheme, rows, cols, experts=experts, **kwargs)

    # --- matrices ---

    def matrix_of(self, expert: int) -> PlaneMatrix:
        """The matrix of one expert, as views, in the present layout."""
        return self._matrices()(expert)

    def _matrices(self) -> Callable[[int], PlaneMatrix]:
        made, planes, own = self.tiled.experts, self.tiled.planes, self._parameters
        if made is not None and not any(t is not None and t.requires_grad for t in map(own.get, _TRAINABLE)):
            return made.__getitem__
        return functools.partial(self._view, tiled=planes)

    @property
    def plane_matrix(self) -> PlaneMatrix:
        """The first expert's matrix: what it tells of shape, scheme and layout holds for all."""
        return self.matrix_of(0)

    def _view(self, expert: int, tiled: Tensor | None) -> PlaneMatrix:
        own: dict[str, Any] = self._parameters
        s = self.scheme
        planes = own["planes"].detach() if tiled is None else tiled
        offsets, zeros = (None if own[role] is None else own[role][expert] for role in _TRAINABLE[1:])
        return PlaneMatrix(
            planes[expert], own["scales"][expert], offsets, zeros, own["codebook"], None,
            s.codec, s.bits, s.group_size, self.cols, FILE if tiled is None else TILED, self.activations,
        )  # fmt: skip

    def set_activations(self, activations: str) -> None:
        super().set_activations(activations)
        if self.tiled.experts is not None:
            self.tiled.experts = tuple(w._replace(activations=activations) for w in self.tiled.experts)

    # --- layout ---

    def _tile(self) -> None:
        first, own = operators.tile(self.matrix_of(0)), self._parameters
        size = first.planes.numel()
        room = first.planes.new_empty(self.experts * size + 64)  # kernels may read a little behind the last word
        for expert in range(self.experts):
            one = first if expert == 0 else operators.tile(self.matrix_of(expert))
            room[expert * size : (expert + 1) * size] = one.planes.flatten()
        tiled = room[: self.experts * size].view(self.experts, *first.planes.shape)
        for role in _TRAINABLE:
            if (param := own[role]) is not None:
                param.data = group_major(param.detach())
        own["planes"].data = tiled  # type: ignore[union-attr]
        # One object for each expert and as long as the layout lasts: kernels keep with it what they know of it.
        self.tiled.experts = tuple(self._view(expert, tiled) for expert in range(self.experts))
        self.tiled.planes = tiled

    def _untile(self) -> None:
        restored = [operators.untile(self.matrix_of(expert)).planes for expert in range(self.experts)]
        self.tiled.planes = self.tiled.experts = None
        self._parameters["planes"].data = torch.stack(restored)  # type: ignore[union-attr]
        for role in _TRAINABLE:
            if (param := self._parameters[role]) is not None:
                param.data = param.detach().clone(memory_format=torch.contiguous_format)

    # --- loading ---

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, _in_file(prefix), keep_vars)

    def load_own(self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, errors: Any) -> None:
        """Load this module's tensors; `prefix` is that of its own path, with the dot."""
        super()._load_from_state_dict(state_dict, _in_file(prefix), metadata, strict, missing, [], errors)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: torch gives a module the names behind its path and a dot alone; see :meth:`load_own`."""

    def _weight_shape(self) -> tuple[int, ...]:
        return self.shape

    # --- computing ---

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The decoded weights with the active task, ``[experts, rows, cols]``."""
        self.refuse_shared_out()
        dtype, delta = dtype or self.compute_dtype, self._own_delta()
        out: Tensor | None = None
        for expert in range(self.experts):
            w, factors = self._with_delta_of(expert, None if delta is None else _of_expert(delta, expert))
            one = operators.dequantize(w, factors, dtype=dtype)
            out = one.new_empty(self.shape) if out is None else out
            out[expert] = one.detach()
        return out  # type: ignore[return-value]

    def float_parameter(self, dtype: torch.dtype | None = None) -> nn.Parameter:
        """The parameter that this module replaces."""
        return nn.Parameter(self.dequantize(dtype).contiguous())

    def products(self, x: Tensor, segments: Sequence[Segment], tokens: Tensor | None = None, count: int = 0) -> Tensor:
        """``x @ weight.T`` with each row's expert: ``[n, cols]`` to ``[n, rows]``, in the dtype of `x`.

        No other expert's planes are read than those in `segments`.

        Args:
            x: rows in the order of `segments`, which cover them.
            segments: which rows are for which expert; at least one.
            tokens: int64 ``[n]``: which of the `count` tokens each row of `x` is; None if that is unknown.
            count: tokens that the router got, those of one row of the batch after the other.

        Raises TaskError if several tasks are active and the tokens do not tell to which rows of the batch they belong.
        """
        if not self.is_tiled and not operators.is_watched():
            self.tile()
        tasks = self.state.row_tasks()
        deltas = [self._own_delta()] if tasks is None else [self.delta_of(name) for name in tasks.names]
        if tasks is not None and len(deltas) > 1 and any(d is not None for d in deltas):
            if tokens is None:
                raise TaskError(
                    f"{self.path} gets rows sorted by expert, and they do not tell whose they are in the batch: "
                    "tasks that change it cannot share a batch; run the rows of each task in a separate batch"
                )
            return self._mixed(x, segments, tasks, deltas, tasks.ids_of_tokens(count, x.device, self.path)[tokens])
        if deltas[0] is None:
            matrices = self._matrices()
            return operators.linear_each(x, [Share(matrices(e), i, j) for e, i, j in segments])
        delta, shares = _by_expert(deltas[0]), []
        for e, i, j in segments:
            w, factors = self._with_delta_of(e, delta(e))
            shares.append(Share(w, i, j, factors))
        return operators.linear_each(x, shares)

    def _mixed(
        self, x: Tensor, segments: Sequence[Segment], tasks: RowTasks, deltas: list[Delta | None], ids: Tensor
    ) -> Tensor:
        """As :meth:`products`, with the delta ``deltas[ids[i]]`` for row i."""
        if stackable(deltas):
            stacked, matrices = self._stacked(tasks, deltas).unbind(0), self._matrices()
            return operators.linear_each(x, [Share(matrices(e), i, j, stacked[e]) for e, i, j in segments], ids)
        parts: list[Tensor] = []
        for e, i, j in segments:
            out: Tensor | None = None
            for task, delta in enumerate(deltas):
                rows = ids[i:j] == task
                if not bool(rows.any()):
                    continue
                w, factors = self._with_delta_of(e, None if delta is None else _of_expert(delta, e))
                part = operators.linear(x[i:j][rows], w, None, factors)
                out = part.new_empty(j - i, self.rows) if out is None else out
                out = out.index_put((rows,), part)
            parts += [out] if out is not None else []
        return torch.cat(parts)

    def _stack(self, deltas: list[Delta | None]) -> Tensor:
        """As for one matrix, for each expert: ``[experts, tasks, p, rows(, groups)]``."""
        planes_first = [None if d is None else d.map(lambda t: t.movedim(1, 0)) for d in deltas]
        return stack(planes_first).movedim(2, 0).contiguous()

    def _with_delta_of(self, expert: int, delta: Delta | None) -> tuple[PlaneMatrix, Tensor | None]:
        """Matrix and deltas of one expert, as operators take them, from what a task changes in it."""
        w = self.matrix_of(expert)
        if delta is None:
            return w, None
        return shifted(w, delta), None if delta.scales is None else delta.scales[None]

    def parameters_with(self, delta: Delta) -> dict[str, Tensor]:
        self.refuse_shared_out()
        found: dict[str, list[Tensor]] = {}
        for expert in range(self.experts):
            mine = _of_expert(delta, expert)
            w = shifted(self.matrix_of(expert), mine)
            w = w if mine.scales is None else with_delta(w, mine.scales)
            for role in _TRAINABLE:
                if (values := getattr(w, role)) is not None:
                    found.setdefault(role, []).append(values)
        return {role: torch.stack(values) for role, values in found.items()}

    def float_module(self, weight: nn.Parameter) -> nn.Module:
        raise UnsupportedOperationError(f"{self.path}: stacked experts are a parameter; see float_parameter")


class LowbitExpertsTransposed(LowbitExperts):
    """Replaces a parameter ``[experts, in, out]``; the planes are ``[out, in]`` (CFG-5)."""

    kind = "experts_transposed"

    def float_parameter(self, dtype: torch.dtype | None = None) -> nn.Parameter:
        return nn.Parameter(self.dequantize(dtype).transpose(1, 2).contiguous())

    def _weight_shape(self) -> tuple[int, ...]:
        return self.experts, self.cols, self.rows


_TRAINABLE = ("scales", "offsets", "zeros")
EXPERTS: dict[str, type[LowbitExperts]] = {c.kind: c for c in (LowbitExperts, LowbitExpertsTransposed)}


def _of_expert(delta: Delta, expert: int) -> Delta:
    return delta.map(lambda t: t[expert])


def _by_expert(delta: Delta) -> Any:
    """A function that gives the delta of an expert. In training all are cut at once: one gradient, not one for each."""
    if not any(t is not None and t.requires_grad for t in delta):
        return lambda expert: _of_expert(delta, expert)
    cut = delta._asdict()
    parts = {name: None if t is None else t.unbind(0) for name, t in cut.items()}
    return lambda expert: Delta(**{name: None if t is None else t[expert] for name, t in parts.items()})


def _in_file(prefix: str) -> str:
    """``…experts.gate_up_proj.`` with the file's underscore (EXP-1)."""
    return f"{prefix.removesuffix('.')}_"
