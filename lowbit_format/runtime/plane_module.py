"""A module that holds one quantized matrix: its parameters, the layout of its planes, and loading.

The parameters are the tensors of spec section 4 under the same names, so that a ``state_dict`` *is* the file.
Scales, offsets, zeros and the codebook keep the dtype that the file declares, whatever the model is cast to.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import LoadError, TensorError, UnsupportedOperationError
from ..kernels import operators
from ..kernels.batch import is_capturing
from ..kernels.matrix import EXACT, FILE, TILED, PlaneMatrix
from ..schema import ModuleEntry, Scheme
from ..tensors import tensor_specs
from .deltas import keeping_dtype
from .placeholder import WeightPlaceholder
from .stored_tensors import TORCH_DTYPES


class TiledPlanes:
    """The planes of one matrix in the tiled layout: one object that all its tied modules share.

    Attributes:
        planes: what their parameter holds too; None while the parameter has the file's layout. Read this once per
            call: another thread may switch the layout.
        experts: of stacked matrices, each as a view of `planes`.
    """

    planes: Tensor | None = None
    experts: tuple[PlaneMatrix, ...] | None = None


_changing_layout = threading.RLock()


_layouts: Any = WeakIdKeyDictionary()  # the parameters ``planes`` of all modules -> TiledPlanes


class PlaneModule(nn.Module):
    """A module whose weight is a quantized matrix ``[rows, cols]``.

    Args:
        scheme: how the matrix is stored in the file.
        rows, cols: its logical shape.
        bits: precision to read at; None, or not below the scheme's own, is full precision (NST-1, NST-3).
        plane_rows: first dimension of ragged planes (MIX-2); only for schemes with ``row_bits``.
        bias: a bias ``[rows]`` exists.
        dtype: compute dtype: that of the bias, and of what an embedding returns.
        experts: number of stacked matrices, for expert kinds; None for one matrix.
        device: where to make the (uninitialised) parameters.

    Attributes:
        planes: uint8, never trained: the file's bytes, whatever layout the kernels use (see :meth:`tile`).
        scales, offsets, zeros, codebook, row_bits: as in the file; None where the scheme has none.
        scales_k{k}, …: parameters of the nested precisions, at full precision only.
        compute_dtype: changed by ``.to(dtype)``.
        tiled: the planes in the tiled layout, shared by tied modules.
        path: of the module in its model, for messages.
        activations: what products may do with x (:mod:`.activations`).
    """

    kind: ClassVar[str]
    scales: nn.Parameter
    offsets: nn.Parameter | None
    zeros: nn.Parameter | None
    codebook: nn.Parameter | None
    row_bits: nn.Parameter | None
    bias: nn.Parameter | None
    tiled: TiledPlanes
    activations: str = EXACT

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
        experts: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not that of nn.Linear and the like, behind this class: it would allocate a weight
        if (plane_rows is not None) != scheme.row_bits:
            raise ValueError("plane_rows belongs to schemes with row_bits, and to them only")
        self.scheme, self.rows, self.cols, self.compute_dtype = scheme, rows, cols, dtype
        self.shape = (rows, cols) if experts is None else (experts, rows, cols)
        self.experts = experts
        self.precision = None if bits is None or bits >= scheme.bits else bits
        specs = {s.role: s for s in tensor_specs(ModuleEntry("", scheme, self.kind, self.shape))}
        self._plane_rows = plane_rows if plane_rows is not None else (self.precision or scheme.bits)
        # The bias comes first: models ask the first parameter of a part for the dtype that they compute in.
        self.register_parameter("bias", nn.Parameter(torch.empty(rows, dtype=dtype, device=device)) if bias else None)
        for role in ("planes", "scales", "offsets", "zeros", "codebook", "row_bits"):
            self.register_parameter(role, None)
        for role, spec in specs.items():
            if role != "planes" and self.precision is not None and not self._belongs_to_precision(role):
                continue
            shape = spec.shape
            if role == "planes":
                shape = (*shape[: self._plane_axis], self._plane_rows, *shape[self._plane_axis + 1 :])
            empty = torch.empty(shape, dtype=TORCH_DTYPES[spec.dtype], device=device)
            self.register_parameter(role, nn.Parameter(empty, requires_grad=False))
        self.path = type(self).__name__

    # --- the matrix ---

    @property
    def plane_matrix(self) -> PlaneMatrix:
        """The tensors and the scheme as the operators take them, in their present layout."""
        s = self.scheme
        own: dict[str, Any] = self._parameters
        tiled = self.tiled.planes
        return PlaneMatrix(
            own["planes"].detach() if tiled is None else tiled,
            own["scales"], own["offsets"], own["zeros"], own["codebook"], own["row_bits"],
            s.codec, s.bits, s.group_size, self.cols, FILE if tiled is None else TILED, self.activations,
        )  # fmt: skip

    def set_activations(self, activations: str) -> None:
        """See :func:`.activations.set_activations`."""
        self.activations = activations

    def matrix_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the matrix by role, in their present layout: all but the bias."""
        return {name: p for name, p in self._parameters.items() if name != "bias" and p is not None}

    @property
    def matrix_id(self) -> int:
        """A number that tied modules share and others do not (TIE-1)."""
        return id(self._parameters["planes"])

    @property
    def device(self) -> torch.device:
        """The device of the matrix."""
        planes: Any = self._parameters["planes"]
        device: torch.device = planes.device
        return device

    @property
    def is_shared_out(self) -> bool:
        """Whether processes have a part each of the tensors now (``fully_shard``; not while the module computes)."""
        return hasattr(self._parameters["planes"], "full_tensor")  # a DTensor has it

    def refuse_shared_out(self) -> None:
        """Raise UnsupportedOperationError where the whole matrix is wanted and processes have a part each."""
        if self.is_shared_out:
            raise UnsupportedOperationError(
                f"{_name_of(self)}: fully_shard gave each process a part of its tensors, and the whole is needed here; "
                "call load_task, merge_task, dequantize and save_pretrained before fully_shard"
            )

    # --- layout ---

    @property
    def planes(self) -> nn.Parameter:
        """The planes in the file's layout; reading them undoes :meth:`tile`."""
        planes = self._parameters.get("planes")
        if planes is None:
            raise AttributeError(f"{type(self).__name__} has no planes")
        self.untile()
        return planes

    @property
    def is_tiled(self) -> bool:
        """Whether the parameters are in the tiled layout."""
        return self.tiled.planes is not None

    def tile(self) -> None:
        """Put planes and parameters into the layout that this device's kernels read, if it has one.

        The same tensors hold it, in place of the file's layout: nothing is in memory twice. Reading or moving them
        (``planes``, ``state_dict``, ``to``, pickling) restores the file's layout, and the next call tiles again.
        """
        if _comes_for_each_call(self) or not operators.can_tile(self.plane_matrix) or is_capturing(self.device):
            return
        with _changing_layout, torch.inference_mode(False):  # parameters made in that mode could never be trained
            if not self.is_tiled:
                self._tile()

    def untile(self) -> None:
        """Undo :meth:`tile`, exactly."""
        if not self.is_tiled:
            return
        with _changing_layout, torch.inference_mode(False):
            if self.is_tiled:
                self._untile()

    def _tile(self) -> None:
        tiled = operators.tile(self.plane_matrix)
        self._set_data(tiled)
        self.tiled.planes = tiled.planes

    def _untile(self) -> None:
        restored = operators.untile(self.plane_matrix)
        self.tiled.planes = None
        self._set_data(restored)

    def _set_data(self, w: PlaneMatrix) -> None:
        """Give the parameters the tensors of `w`; the parameters themselves stay, since others refer to them."""
        for role in ("planes", "scales", "offsets", "zeros"):
            tensor: Tensor | None = getattr(w, role)
            if tensor is not None:
                self._parameters[role].data = tensor.detach()  # type: ignore[union-attr]

    # --- loading ---

    def finish_loading(self, path: str) -> None:
        """Finish loading the module at `path`: declared dtypes, nothing trainable, values checked, precision applied.

        Raises:
            TensorError: a value that the spec forbids (TEN-3, MIX-1).
            LoadError: a lower precision is offloaded: what brings the tensors back knows them by names that this
                method changes.
        """
        for spec in tensor_specs(ModuleEntry("", self.scheme, self.kind, self.shape)):
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
            self._reduce_to_precision(self.precision)

    def tie_to(self, owner: PlaneModule) -> None:
        """Use the matrix of `owner` (TIE-1); the bias stays this module's own."""
        for name in self.matrix_parameters():
            self._parameters[name] = None
        self._parameters.update(owner.matrix_parameters())
        self.scheme, self.precision, self.tiled = owner.scheme, owner.precision, owner.tiled

    @property
    def _plane_axis(self) -> int:
        """The axis of the parameter ``planes`` along which a lower precision has fewer."""
        return 0 if self.experts is None else 1

    def _belongs_to_precision(self, role: str) -> bool:
        return role in ("codebook", "row_bits") or role.endswith(f"_k{self.precision}")

    def _reduce_to_precision(self, k: int) -> None:
        """Become a module of `k` bits whose parameters are those of ``_k{k}`` (NST-1, NST-2).

        Its planes are the first k already: see :meth:`_prefix_of_planes`.
        """
        for role in list(self.matrix_parameters()):
            if role.endswith(f"_k{k}"):
                self._parameters[role.removesuffix(f"_k{k}")] = self._parameters.pop(role)
        if self.row_bits is not None:
            self._parameters["row_bits"] = nn.Parameter(self.row_bits.clamp(max=k), requires_grad=False)
        self.scheme, self.precision = replace(self.scheme, bits=k, nested=()), None

    def _prefix_of_planes(self, planes: nn.Parameter) -> nn.Parameter:
        """The planes of this module's precision: a prefix of the file's (BIT-4).

        A loader assigns the file's whole tensor. The prefix is copied at once, not in :meth:`finish_loading`: the
        full planes of all modules would otherwise be in memory together.
        """
        axis = self._plane_axis
        if planes.shape[axis] <= self._plane_rows:
            return planes
        first = planes.detach().narrow(axis, 0, self._plane_rows).clone()
        prefix = nn.Parameter(first, requires_grad=False)
        prefix.__dict__.update(planes.__dict__)
        return prefix

    # --- what nn.Module asks ---

    @property
    def weight(self) -> Tensor:
        """A tensor that has the weight's shape, dtype and device, and is decoded when its values are read.

        See :class:`WeightPlaceholder`. A compiled graph cannot hold it: there it is decoded, and where no values are
        read the compiler drops that again.
        """
        if torch.compiler.is_compiling():
            return self._read_weight()
        return WeightPlaceholder.of(
            self._weight_shape(), self.compute_dtype, self.device, _name_of(self), self._read_weight
        )

    @weight.setter
    def weight(self, value: object) -> None:
        raise _no_weight(self)

    def _weight_shape(self) -> tuple[int, ...]:
        return self.rows, self.cols

    def _read_weight(self) -> Tensor:
        """The decoded weight, for :attr:`weight`."""
        raise NotImplementedError

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight":
            raise _no_weight(self)
        if name == "planes":
            param = None if param is None else self._prefix_of_planes(param)
            # New planes have the file's layout. Those of another module, which transformers ties to this one, have its.
            self.tiled = TiledPlanes() if param is None else _layouts.setdefault(param, TiledPlanes())
        super().register_parameter(name, param)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        """As in ``nn.Module``, in the file's layout: who asks this module itself may take its parameters over.

        ``fully_shard`` of torch does. Parameters of a whole model are listed without a call to this.
        """
        self.untile()
        return super().named_parameters(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves reach every tensor; changes of dtype reach the bias and the compute dtype only."""
        was_tiled = self.is_tiled
        self.untile()
        declared = {id(t) for p in self.matrix_parameters().values() for t in (p, p.grad) if t is not None}
        keep = keeping_dtype(fn)

        def move(tensor: Tensor) -> Tensor:
            return keep(tensor) if id(tensor) in declared else fn(tensor)

        probe = torch.empty(0, dtype=self.compute_dtype, device=self.device)
        self.compute_dtype = fn(probe).dtype
        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        if was_tiled:  # at once: a compiled model has no other time for it
            self.tile()
        return self

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with _changing_layout:
            self.untile()
            self._restore_dtypes()
            super()._save_to_state_dict(*args, **kwargs)

    def _restore_dtypes(self) -> None:
        """Give frozen parameters the dtypes that the file declares, where code from outside has cast them.

        That is exact: they have the file's values, and such code casts to float32, as PEFT's
        ``prepare_model_for_kbit_training`` does. Those that someone trains stay as they are.
        """
        for spec in tensor_specs(ModuleEntry("", self.scheme, self.kind, self.shape)):
            param = self._parameters.get(spec.role)
            if param is not None and not param.requires_grad and param.dtype != TORCH_DTYPES[spec.dtype]:
                param.data = param.detach().to(TORCH_DTYPES[spec.dtype])

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with _changing_layout:
            self.untile()
            super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> Any:
        self.untile()
        return self.__dict__

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self._parameters["planes"] is not None:
            _layouts[self._parameters["planes"]] = self.tiled

    def extra_repr(self) -> str:
        s = self.scheme
        text = f"rows={self.rows}, cols={self.cols}, codec={s.codec}, bits={s.bits}, group_size={s.group_size}"
        return text + f", bias={self.bias is not None}, dtype={self.compute_dtype}"


def _comes_for_each_call(module: nn.Module) -> bool:
    """Whether the tensors lie elsewhere and are brought for every call, by their names and shapes.

    By a hook of accelerate, from memory or disk; or by ``fully_shard``, from other processes.
    """
    hook: Any = getattr(module, "_hf_hook", None)
    offloaded = any(getattr(h, "offload", False) for h in getattr(hook, "hooks", (hook,)))
    return offloaded or getattr(module, "_is_fsdp_managed_module", False)


def _no_weight(module: nn.Module) -> UnsupportedOperationError:
    return UnsupportedOperationError(
        f"{_name_of(module)} has no weight to assign: it holds bit-planes. Call model.dequantize() for a "
        "float model, which keeps its adapters, or convert with this module kept in full precision (--keep)"
    )


def _name_of(module: nn.Module) -> str:
    """Path and class, for messages; the class alone while the module has no place in a model."""
    kind = type(module).__name__
    path = getattr(module, "path", kind)
    return kind if path == kind else f"{path} ({kind})"
