"""One of the file's matrices in a layer of vLLM: loading it, and products with it.

A layer of vLLM may be made of several matrices of the file (``qkv_proj`` of three, ``gate_up_proj`` of two), each with
a scheme of its own, or kept in full precision. So a layer holds a list of parts, and its result is theirs, one behind
the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import LoadError
from ..kernels import operators
from ..runtime.deltas import Delta
from ..runtime.plane_module import PlaneModule
from ..runtime.stored_tensors import TORCH_DTYPES
from ..schema import ModuleEntry
from ..tensors import tensor_specs
from .slices import Cut, Slice
from .task_table import TaskTable


class PlanePart(PlaneModule):
    """A quantized matrix, or the slice of it that this process holds.

    Its tensors are complete when :meth:`load` got the last one. Then they are cut, checked, moved to the device and
    brought into the layout of its kernels, before those of the next part are read.

    Args:
        entry: the file's matrix.
        piece: what this process holds of it.
        bits: precision to read at; None is the file's.
        device: where the kernels run.

    Attributes:
        tasks: what tasks change here; None where no tasks are served.
    """

    kind = "linear"

    def __init__(self, entry: ModuleEntry, piece: Slice, *, bits: int | None, device: torch.device) -> None:
        self.cut = Cut(entry, piece)
        ragged = piece.height if entry.scheme.row_bits else None  # known when row_bits are loaded
        super().__init__(self.cut.scheme, piece.height, piece.width, bits=bits, plane_rows=ragged, device="meta")
        self.entry, self.path, self.target = entry, entry.path, device
        self.tasks: TaskTable | None = None
        self.wanted = frozenset(self.matrix_parameters())
        self.arrived: dict[str, Tensor] | None = {}  # until all are there

    @property
    def roles(self) -> dict[str, torch.dtype]:
        """Roles of the tensors that the file has of this matrix, also those of other precisions, with their dtypes."""
        return {spec.role: TORCH_DTYPES[spec.dtype] for spec in tensor_specs(self.entry)}

    @property
    def missing(self) -> list[str]:
        """Names of tensors that have not been loaded."""
        if self.arrived is None:
            return []
        return [self.entry.tensor(role) for role in sorted(self.wanted - self.arrived.keys())]

    def load(self, role: str, tensor: Tensor) -> None:
        """Take one tensor of the file.

        Raises LoadError if its shape is another than config.json says, and what :meth:`PlaneModule.finish_loading`
        raises, when it is the last.
        """
        if role not in self.wanted:
            return
        expected = next(spec.shape for spec in tensor_specs(self.entry) if spec.role == role)
        found = tuple(tensor.shape)
        if len(found) != len(expected) or any(e not in (-1, f) for e, f in zip(expected, found, strict=True)):
            name = self.entry.tensor(role)
            raise LoadError(f"{name!r} has the shape {list(found)}, config.json says {list(expected)}")
        if self.arrived is None:
            raise LoadError(f"{self.entry.tensor(role)!r} is loaded a second time, which this plugin cannot do yet")
        self.arrived[role] = tensor
        if self.arrived.keys() >= self.wanted:
            with torch.inference_mode(False):  # kernels cannot index parameters that were made in it
                self._finish(self.arrived)
            self.arrived = None

    def _finish(self, tensors: dict[str, Tensor]) -> None:
        row_bits = tensors.get("row_bits")
        if row_bits is not None:
            kept = self.cut.rows(row_bits, 0)
            kept = kept if self.precision is None else kept.clamp(max=self.precision)
            self._plane_rows = int(kept.sum())
        for role, tensor in tensors.items():
            mine = self.cut.planes(tensor, row_bits) if role == "planes" else self.cut.of(role)(tensor)
            mine = mine.to("cpu", copy=True, memory_format=torch.contiguous_format)  # not the file's pages
            self.register_parameter(role, nn.Parameter(mine, requires_grad=False))
        self.finish_loading(self.entry.path)
        self.to(self.target)
        self.tile()

    def cut_delta(self, delta: Delta) -> Delta:
        """Of what a task changes in the file's matrix, that in the slice."""
        scales, shift = delta
        if scales is not None:
            scales = self.cut.rows(scales, 1)
            scales = scales if scales.dim() == 2 else self.cut.groups(scales)
        return Delta(scales, None if shift is None else self.cut.groups(self.cut.rows(shift, 0)))

    def product(self, x: Tensor, bias: Tensor | None, *, sampled: bool) -> Tensor:
        """``x @ weight.T + bias``, each row of `x` with its task.

        Args:
            x: ``[..., cols]``; its rows are the tokens of the running batch, or with `sampled` those of them for which
                the next token is wanted.
            bias: ``[rows]``.
        """
        deltas, ids = (None, None) if self.tasks is None else self.tasks.of_batch(x.numel() // self.cols, sampled)
        return operators.linear(x, self.plane_matrix, bias, deltas, ids)

    def lookup(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows `ids` of the weight, integers ``[...]`` to ``[..., cols]``, each for the task of its token."""
        deltas, tasks = (None, None) if self.tasks is None else self.tasks.of_batch(ids.numel(), False)
        return operators.embedding(ids, self.plane_matrix, deltas, tasks, dtype=dtype)


class FloatPart(nn.Module):
    """A matrix that the file keeps in full precision, beside quantized ones in the same layer.

    Args:
        path: of the module in the file.
        piece: what this process holds of it.
        dtype, device: of its weight.
    """

    tasks: TaskTable | None = None

    def __init__(self, path: str, piece: Slice, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.path, self.slice, self.rows = path, piece, piece.height
        self.weight = nn.Parameter(torch.empty(self.rows, piece.width, dtype=dtype, device=device), requires_grad=False)
        self.loaded = False

    @property
    def roles(self) -> dict[str, torch.dtype]:
        """As in :class:`PlanePart`."""
        return {"weight": self.weight.dtype}

    @property
    def missing(self) -> list[str]:
        """As in :class:`PlanePart`."""
        return [] if self.loaded else [f"{self.path}.weight"]

    def load(self, role: str, tensor: Tensor) -> None:
        """Take the weight."""
        rows = torch.cat([tensor[start:stop] for start, stop in self.slice.rows])
        self.weight.data.copy_(rows[:, slice(*self.slice.cols)])
        self.loaded = True

    def product(self, x: Tensor, bias: Tensor | None, *, sampled: bool) -> Tensor:
        """``x @ weight.T + bias``."""
        return F.linear(x, self.weight, bias)


Part = PlanePart | FloatPart


def product(parts: Sequence[Part], x: Tensor, bias: Tensor | None, *, sampled: bool = False) -> Tensor:
    """The products with all parts, one behind the other: ``[..., rows of all parts]``; arguments as of a part's."""
    if len(parts) == 1:
        return parts[0].product(x, bias, sampled=sampled)
    rows = [part.rows for part in parts]
    biases = [None] * len(parts) if bias is None else torch.split(bias, rows)
    return torch.cat([p.product(x, b, sampled=sampled) for p, b in zip(parts, biases, strict=True)], -1)
