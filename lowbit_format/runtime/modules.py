"""Modules that hold a packed matrix instead of a weight: ``LowbitLinear``, ``LowbitConv1D``, ``LowbitEmbedding``.

Their parameters are the tensors of spec section 4 under the same names, so that a ``state_dict`` *is* the file.
Scales, offsets, zeros and the codebook keep the dtype that the file declares, whatever the model is cast to.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import LoadError, TaskError, TensorError, UnsupportedOperationError
from ..kernels import operators
from ..kernels.batch import is_capturing
from ..kernels.matrix import FILE, TILED, PlaneMatrix, with_delta
from ..schema import ModuleEntry, Scheme
from ..tensors import tensor_specs
from .active_tasks import Name, Selection, TaskState
from .deltas import Delta, TunedDelta, keeping_dtype, shifted, stack, stackable
from .placeholder import WeightPlaceholder
from .stored_tensors import TORCH_DTYPES


class Layout:
    """What the modules of one matrix compute with now.

    Attributes:
        planes: the packed form, which their parameter holds too; None while that is plain. Who computes takes it from
            here, once: the parameter may change its form meanwhile, for another thread.
    """

    planes: Tensor | None = None


_changing_layout = threading.RLock()


class LowbitModule(nn.Module):
    """A module whose weight is packed.

    Args:
        scheme: how the matrix is stored in the file.
        rows, cols: its logical shape.
        bits: precision to read at; None, or not below the scheme's own, is full precision (NST-1, NST-3).
        plane_rows: first dimension of ragged planes (MIX-2); only for schemes with ``row_bits``.
        bias: a bias ``[rows]`` exists.
        dtype: compute dtype: that of the bias, and of what an embedding returns.
        device: where to make the (uninitialised) parameters.

    Attributes:
        planes: uint8, never trained; the file's bytes, whatever form they are computed with (see :meth:`pack`).
        scales, offsets, zeros, codebook, row_bits: as in the file; None where the scheme has none.
        scales_k{k}, …: parameters of the nested precisions, at full precision only.
        compute_dtype: changed by ``.to(dtype)``.
        form: what it computes with now, shared by tied modules.
        path: where the module stands in its model, for messages.
        state: which task is on, shared with the model's other modules.
        deltas: of the loaded tasks, by name; what a tied module has too. They are no part of the ``state_dict``.
        tuned: the delta that is being trained, if one is; its task has the name `tuned_name`.
    """

    kind: ClassVar[str]
    scales: nn.Parameter
    offsets: nn.Parameter | None
    zeros: nn.Parameter | None
    codebook: nn.Parameter | None
    row_bits: nn.Parameter | None
    bias: nn.Parameter | None
    tuned: TunedDelta | None
    form: Layout

    def __init__(
        self,
        scheme: Scheme,
        rows: int,
        cols: int,
        *,
        bits: int | None = None,
        plane_rows: int | None = None,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if (plane_rows is not None) != scheme.row_bits:
            raise ValueError("plane_rows belongs to schemes with row_bits, and to them only")
        self.scheme, self.rows, self.cols, self.compute_dtype = scheme, rows, cols, dtype
        self.precision = None if bits is None or bits >= scheme.bits else bits
        specs = {s.role: s for s in tensor_specs(ModuleEntry("", scheme, self.kind, (rows, cols)))}
        self._leading = plane_rows if plane_rows is not None else (self.precision or scheme.bits)
        for role in ("planes", "scales", "offsets", "zeros", "codebook", "row_bits"):
            self.register_parameter(role, None)
        for role, spec in specs.items():
            if role != "planes" and self.precision is not None and not self._has_precision(role):
                continue
            shape = (self._leading, *spec.shape[1:]) if role == "planes" else spec.shape
            empty = torch.empty(shape, dtype=TORCH_DTYPES[spec.dtype], device=device)
            self.register_parameter(role, nn.Parameter(empty, requires_grad=False))
        self.register_parameter("bias", nn.Parameter(torch.empty(rows, dtype=dtype, device=device)) if bias else None)
        self.path, self.state = type(self).__name__, TaskState()
        self.deltas: dict[str, Delta] = {}
        self.register_module("tuned", None)
        self.tuned_name: Name = None
        self._task: Name = None
        self._delta: Delta | None = None  # of _task, kept so that a compiled graph depends on tensors, not on names

    # --- the packed matrix ---

    @property
    def plane_matrix(self) -> PlaneMatrix:
        """The tensors and the scheme, as the operators take them: in the form they are in now."""
        s = self.scheme
        own: dict[str, Any] = self._parameters
        tiled = self.layout.planes
        return PlaneMatrix(
            own["planes"].detach() if tiled is None else tiled,
            own["scales"], own["offsets"], own["zeros"], own["codebook"], own["row_bits"],
            s.codec, s.bits, s.group_size, self.cols, FILE if tiled is None else TILED,
        )  # fmt: skip

    def matrix_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the packed matrix by role, in the form they are in now: all but the bias."""
        return {name: p for name, p in self._parameters.items() if name != "bias" and p is not None}

    @property
    def matrix_id(self) -> int:
        """A number that tied modules share and others do not (TIE-1)."""
        return id(self._parameters["planes"])

    @property
    def device(self) -> torch.device:
        """Where the packed matrix is."""
        planes: Any = self._parameters["planes"]
        device: torch.device = planes.device
        return device

    @property
    def planes(self) -> nn.Parameter:
        """The planes as the file has them; a module that computes with another form gives that up for it."""
        planes = self._parameters.get("planes")
        if planes is None:
            raise AttributeError(f"{type(self).__name__} has no planes")
        self.untile()
        return planes

    def tile(self) -> None:
        """Put planes and parameters into the form that this device's kernels compute with, if they have one.

        The same tensors hold it, in place of the plain form: nothing is in memory twice. Whatever reads or moves them
        (``planes``, ``state_dict``, ``to``, pickling) has the plain form back, and the next call packs again.
        """
        if not operators.can_tile(self.plane_matrix) or _is_offloaded(self) or is_capturing(self.device):
            return
        with _changing_layout, torch.inference_mode(False):  # parameters made in that mode could never be trained
            if self.layout.planes is None:
                packed = operators.tile(self.plane_matrix)
                self._take(packed)
                self.layout.planes = packed.planes

    def untile(self) -> None:
        """Undo :meth:`pack`, exactly."""
        if self.layout.planes is None:
            return
        with _changing_layout, torch.inference_mode(False):
            if self.layout.planes is not None:
                plain = operators.untile(self.plane_matrix)
                self.layout.planes = None
                self._take(plain)

    def _take(self, w: PlaneMatrix) -> None:
        for role in ("planes", "scales", "offsets", "zeros"):
            tensor: Tensor | None = getattr(w, role)
            if tensor is not None:
                self._parameters[role].data = tensor.detach()  # type: ignore[union-attr]

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The decoded weight with the task that is on, oriented as in the module that this one stands for (CFG-5)."""
        return self._with_delta(
            self._own_delta(), lambda w, deltas: operators.dequantize(w, deltas, dtype=dtype or self.compute_dtype)
        )

    # --- tasks ---

    def delta_of(self, name: Name) -> Delta | None:
        """What task `name` changes here; None if nothing."""
        if name is None:
            return None
        return self.tuned.delta() if self.tuned is not None and self._is_tuned(name) else self.deltas.get(name)

    def set_task(self, name: Name) -> None:
        """From here on compute with task `name` wherever no block says otherwise."""
        self._task, self._delta = name, None if self._is_tuned(name) else self.delta_of(name)

    def folded(self, delta: Delta, dtype: str | None) -> dict[str, Tensor]:
        """Scales and shift with `delta` in them, by role, as `dtype` (``"F32"``; None is the dtype of now).

        Raises TaskError if the dtype cannot hold them.
        """
        w, to = shifted(self.plane_matrix, delta), TORCH_DTYPES[dtype or self.scheme.scale_dtype]
        scales = w.scales if delta.scales is None else with_delta(w, delta.scales).scales
        values = {"scales": scales, "offsets": w.offsets, "zeros": w.zeros}
        stored = {role: v.detach().to(to) for role, v in values.items() if v is not None}
        if not all(bool(torch.isfinite(v).all()) for v in stored.values()):
            raise TaskError(f"{self.path}: {to} cannot hold the scales of the task; merge it into float32")
        return stored

    def fold(self, values: dict[str, Tensor]) -> None:
        """Make what :func:`folded` gave this module's own for good.

        Nested precisions go: they have parameters of their own, which the task was not tuned for.
        """
        self.untile()
        for role in [r for r in self._parameters if "_k" in r]:
            del self._parameters[role]
        dtype = next(name for name, t in TORCH_DTYPES.items() if t == values["scales"].dtype)
        self.scheme = replace(self.scheme, scale_dtype=dtype, nested=())
        self._parameters.update({role: nn.Parameter(v, requires_grad=False) for role, v in values.items()})

    def _run(self, x: Tensor, kernel: Callable[[Tensor, PlaneMatrix, Tensor | None, Tensor | None], Tensor]) -> Tensor:
        """``kernel(x, packed, deltas, task_ids)`` with the tasks that are on."""
        if self.layout.planes is None and not operators.is_watched():
            self.tile()
        chosen = self.state.chosen()
        if chosen is None:
            return self._with_delta(self._own_delta(), lambda w, deltas: kernel(x, w, deltas, None))
        deltas = [self.delta_of(name) for name in chosen.names]
        if len(deltas) == 1 or all(d is None for d in deltas):
            return self._with_delta(deltas[0], lambda w, deltas: kernel(x, w, deltas, None))
        if x.dim() < (1 if self.kind == "embedding" else 2):
            raise TaskError(f"{self.path} gets one row without a batch, but several tasks")
        x = chosen.fits(x, self.path)
        ids = chosen.ids(len(x), x.device, self.path)
        if stackable(deltas):
            ids = ids.repeat_interleave(_flat_rows(x, self.kind) // len(x))
            return kernel(x, self.plane_matrix, self._stacked(chosen, deltas), ids)
        out: Tensor | None = None
        for i, delta in enumerate(deltas):
            mine = ids == i
            part = self._with_delta(delta, lambda w, d, rows=mine: kernel(x[rows], w, d, None))  # type: ignore[misc]
            out = part.new_empty(len(x), *part.shape[1:]) if out is None else out
            out = out.index_put((mine,), part)
        return out  # type: ignore[return-value]

    def _is_tuned(self, name: Name) -> bool:
        return name is not None and name == self.tuned_name

    def _own_delta(self) -> Delta | None:
        """Of the task that set_task chose."""
        return self.tuned.delta() if self.tuned is not None and self._task == self.tuned_name else self._delta

    def _with_delta(self, delta: Delta | None, kernel: Callable[[PlaneMatrix, Tensor | None], Tensor]) -> Tensor:
        if delta is None:
            return kernel(self.plane_matrix, None)
        return kernel(shifted(self.plane_matrix, delta), None if delta.scales is None else delta.scales[None])

    def _stacked(self, chosen: Selection, deltas: list[Delta | None]) -> Tensor:
        if self.tuned_name in chosen.names:  # changes with every step, and has a graph of its own in each
            return stack(deltas)
        known, stacked = chosen.kept.get(id(self), ((), None))
        if stacked is None or len(known) != len(deltas) or any(a is not b for a, b in zip(known, deltas, strict=True)):
            stacked = stack(deltas)
            chosen.kept[id(self)] = (tuple(deltas), stacked)
        return stacked

    # --- loading ---

    def settle(self, path: str) -> None:
        """Finish loading the module at `path`: declared dtypes, nothing trainable, values checked, precision applied.

        Raises TensorError for values that the spec forbids (TEN-3, MIX-1), LoadError for a lower precision that is
        offloaded: what brings the tensors back knows them by the names they are about to lose.
        """
        for spec in tensor_specs(ModuleEntry("", self.scheme, self.kind, (self.rows, self.cols))):
            param = self._parameters.get(spec.role)
            if param is None:
                continue
            if param.dtype != TORCH_DTYPES[spec.dtype]:  # transformers keeps some modules in float32: undone, exactly
                self._parameters[spec.role] = param = nn.Parameter(
                    param.detach().to(TORCH_DTYPES[spec.dtype]), requires_grad=False
                )
            param.requires_grad_(False)
            if param.is_meta and self.precision is not None:
                raise LoadError(f"{path}: a lower precision cannot be offloaded; load all bits, or on one device")
            if param.is_meta:
                continue
            if spec.dtype != "U8" and not bool(torch.isfinite(param).all()):
                raise TensorError("TEN-3", "holds NaN or an infinity", tensor=f"{path}.{spec.role}")
            if spec.role == "row_bits" and not bool(((param >= 1) & (param <= self.scheme.bits)).all()):
                raise TensorError("MIX-1", f"expected 1 to {self.scheme.bits}", tensor=f"{path}.{spec.role}")
        if self.precision is not None:
            self._become_precision(self.precision)

    def share(self, owner: LowbitModule) -> None:
        """Use the packed matrix of `owner` (TIE-1); the bias stays this module's own."""
        for name in self.matrix_parameters():
            self._parameters[name] = None
        self._parameters.update(owner.matrix_parameters())
        self.scheme, self.precision, self.deltas, self.layout = (
            owner.scheme,
            owner.precision,
            owner.deltas,
            owner.layout,
        )

    def float_module(self, weight: nn.Parameter) -> nn.Module:
        """The module that this one stands for, with `weight` (in that module's orientation)."""
        raise NotImplementedError

    def _has_precision(self, role: str) -> bool:
        return role in ("codebook", "row_bits") or role.endswith(f"_k{self.precision}")

    def _become_precision(self, k: int) -> None:
        """From here on the module is one of `k` bits, with the parameters of ``_k{k}`` as its own (NST-1, NST-2)."""
        for role in list(self.matrix_parameters()):
            if role.endswith(f"_k{k}"):
                self._parameters[role.removesuffix(f"_k{k}")] = self._parameters.pop(role)
        if self.row_bits is not None:
            self._parameters["row_bits"] = nn.Parameter(self.row_bits.clamp(max=k), requires_grad=False)
        self.scheme, self.precision = replace(self.scheme, bits=k, nested=()), None

    # --- what nn.Module asks ---

    @property
    def weight(self) -> Tensor:
        """A stand-in with shape, dtype and device of the weight, and no data (see :class:`WeightPlaceholder`)."""
        return WeightPlaceholder.of(self._weight_shape(), self.compute_dtype, self.device)

    @weight.setter
    def weight(self, value: object) -> None:
        raise _no_weight(self)

    def _weight_shape(self) -> tuple[int, int]:
        return self.rows, self.cols

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight":
            raise _no_weight(self)
        if name == "planes":
            self.layout = Layout()
        if name == "planes" and param is not None and param.shape[0] > self._leading:
            # The loader hands over the file's whole tensor; a lower precision is its prefix (BIT-4).
            prefix = nn.Parameter(param.detach()[: self._leading].clone(), requires_grad=False)
            prefix.__dict__.update(param.__dict__)
            param = prefix
        super().register_parameter(name, param)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves reach every tensor; changes of dtype reach the bias and the compute dtype only."""
        was_packed = self.layout.planes is not None
        self.untile()
        declared = {id(t) for p in self.matrix_parameters().values() for t in (p, p.grad) if t is not None}

        keep = keeping_dtype(fn)

        def move(tensor: Tensor) -> Tensor:
            return keep(tensor) if id(tensor) in declared else fn(tensor)

        for name, delta in self.deltas.items():
            self.deltas[name] = delta.map(keep)
        self.set_task(self._task)
        probe = torch.empty(0, dtype=self.compute_dtype, device=self.device)
        self.compute_dtype = fn(probe).dtype
        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        if was_packed:  # at once: a compiled model has no other time for it
            self.tile()
        return self

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with _changing_layout:
            self.untile()
            super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with _changing_layout:
            self.untile()
            super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> Any:
        self.untile()
        return self.__dict__

    def extra_repr(self) -> str:
        s = self.scheme
        text = f"rows={self.rows}, cols={self.cols}, codec={s.codec}, bits={s.bits}, group_size={s.group_size}"
        return text + f", bias={self.bias is not None}, dtype={self.compute_dtype}"


class LowbitLinear(LowbitModule):
    """Stands for ``nn.Linear``: rows are output features."""

    kind = "linear"

    def __init__(self, scheme: Scheme, rows: int, cols: int, **kwargs: Any) -> None:
        super().__init__(scheme, rows, cols, **kwargs)
        self.in_features, self.out_features = cols, rows

    def float_module(self, weight: nn.Parameter) -> nn.Module:
        return _with_parameters(nn.Linear(self.cols, self.rows, self.bias is not None, device="meta"), weight, self)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[..., in_features]`` to ``[..., out_features]``, in the dtype of `x` (or of autocast)."""
        return self._run(x, lambda x, w, deltas, ids: operators.linear(x, w, self.bias, deltas, ids))


class LowbitConv1D(LowbitLinear):
    """Stands for GPT-2's ``Conv1D``, whose weight is ``[in, out]``; the planes are ``[out, in]`` (CFG-5)."""

    kind = "conv1d"

    def __init__(self, scheme: Scheme, rows: int, cols: int, **kwargs: Any) -> None:
        super().__init__(scheme, rows, cols, **kwargs)
        self.nf, self.nx = rows, cols

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        return super().dequantize(dtype).t()

    def float_module(self, weight: nn.Parameter) -> nn.Module:
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            return _with_parameters(Conv1D(self.rows, self.cols), weight, self)  # type: ignore[no-untyped-call]

    def _weight_shape(self) -> tuple[int, int]:
        return self.cols, self.rows


class LowbitEmbedding(LowbitModule):
    """Stands for ``nn.Embedding`` with its default options: a row is a word."""

    kind = "embedding"
    max_norm, norm_type, scale_grad_by_freq, sparse = None, 2.0, False, False  # what nn.Embedding has, read by PEFT

    def __init__(self, scheme: Scheme, rows: int, cols: int, *, padding_idx: int | None = None, **kwargs: Any) -> None:
        super().__init__(scheme, rows, cols, **kwargs)
        self.num_embeddings, self.embedding_dim, self.padding_idx = rows, cols, padding_idx

    def float_module(self, weight: nn.Parameter) -> nn.Module:
        empty = nn.Embedding(self.rows, self.cols, self.padding_idx, device="meta")
        return _with_parameters(empty, weight, self)

    def forward(self, ids: Tensor) -> Tensor:
        """``ids`` int ``[...]`` to ``[..., embedding_dim]`` in the compute dtype; only these rows are decoded."""
        return self._run(
            ids, lambda x, w, deltas, rows: operators.embedding(x, w, deltas, rows, dtype=self.compute_dtype)
        )


MODULES: dict[str, type[LowbitModule]] = {c.kind: c for c in (LowbitLinear, LowbitConv1D, LowbitEmbedding)}


def _is_offloaded(module: nn.Module) -> bool:
    """Whether a hook of accelerate brings tensors from elsewhere for every call, by their names and shapes."""
    hook: Any = getattr(module, "_hf_hook", None)
    return any(getattr(h, "offload", False) for h in getattr(hook, "hooks", (hook,)))


def _flat_rows(x: Tensor, kind: str) -> int:
    """Rows of the flattened input, which operators take a task for each."""
    return x.numel() if kind == "embedding" else x.numel() // x.shape[-1]


def _with_parameters(module: nn.Module, weight: nn.Parameter, old: LowbitModule) -> nn.Module:
    module.register_parameter("weight", weight)
    if old.bias is not None:
        module.register_parameter("bias", nn.Parameter(old.bias.detach().to(weight.dtype)))
    return module.train(old.training)


def _no_weight(module: nn.Module) -> UnsupportedOperationError:
    return UnsupportedOperationError(
        f"{type(module).__name__} has no weight to assign: it holds bit-planes. Call model.dequantize() for a "
        "float model, or convert with this module kept in full precision"
    )
