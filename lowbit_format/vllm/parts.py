"""One of the file's matrices in a layer of vLLM: loading it, and products with it.

A layer of vLLM may be made of several matrices of the file (``qkv_proj`` of three, ``gate_up_proj`` of two), each with
a scheme of its own, or kept in full precision. So a layer holds a list of parts, and its result is theirs, one behind
the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..codecs import CODECS
from ..errors import BundleError, LoadError
from ..kernels import operators
from ..kernels.matrix import with_delta
from ..runtime.deltas import Delta
from ..runtime.plane_module import PlaneModule
from ..runtime.stored_tensors import TORCH_DTYPES
from ..tensors import tensor_specs
from .slices import Cut, Slice
from .task_table import ROWS, TaskTable, table_delta


class Member:
    """One of the file's matrices in a :class:`PlanePart`.

    Attributes:
        cut: takes out what this process holds.
        first: its first row in the part.
        arrived: tensors that have been loaded, by role, until the part is complete.
    """

    def __init__(self, cut: Cut, first: int) -> None:
        self.entry, self.cut, self.first = cut.entry, cut, first
        self.arrived = dict[str, Tensor]()

    @property
    def rows(self) -> slice:
        """Its rows in the part."""
        return slice(self.first, self.first + self.cut.slice.height)


class PlanePart(PlaneModule):
    """A quantized matrix, or the slice of it that this process holds; or several with one scheme, as one matrix.

    Its tensors are complete when :meth:`load` got the last one. Then they are cut, checked, moved to the device and
    brought into the layout of its kernels, before those of the next part are read.

    Args:
        cuts: the file's matrices, and what this process holds of them; their rows come one behind the other. Several
            have to be such that :func:`can_join` says so.
        bits: precision to read at; None is the file's.
        device: where the kernels run.

    Attributes:
        tasks: what tasks change here; None where no tasks are served.
    """

    kind = "linear"

    def __init__(self, cuts: Sequence[Cut], *, bits: int | None, device: torch.device) -> None:
        heights = [cut.slice.height for cut in cuts]
        scheme, rows, cols = cuts[0].scheme, sum(heights), cuts[0].slice.width
        ragged = rows if scheme.row_bits else None  # known when row_bits are loaded
        super().__init__(scheme, rows, cols, bits=bits, plane_rows=ragged, device="meta")
        self.members = [
            Member(c, first) for c, first in zip(cuts, itertools.accumulate(heights, initial=0), strict=False)
        ]
        self.path, self.target = " and ".join(cut.entry.path for cut in cuts), device
        self.tasks: TaskTable | None = None
        self.wanted = frozenset(self.matrix_parameters())
        self.complete = False

    @property
    def roles(self) -> dict[str, torch.dtype]:
        """Roles of the tensors that the file has of a matrix, also those of other precisions, with their dtypes."""
        return {spec.role: TORCH_DTYPES[spec.dtype] for spec in tensor_specs(self.members[0].entry)}

    @property
    def missing(self) -> list[str]:
        """Names of tensors that have not been loaded."""
        if self.complete:
            return []
        return [m.entry.tensor(role) for m in self.members for role in sorted(self.wanted - m.arrived.keys())]

    def load(self, role: str, tensor: Tensor, number: int = 0) -> None:
        """Take one tensor of the matrix with this number.

        Raises LoadError if its shape is another than config.json says, and what :meth:`PlaneModule.finish_loading`
        raises, when it is the last.
        """
        if role not in self.wanted:
            return
        member = self.members[number]
        name, found = member.entry.tensor(role), tuple(tensor.shape)
        expected = next(spec.shape for spec in tensor_specs(member.entry) if spec.role == role)
        if len(found) != len(expected) or any(e not in (-1, f) for e, f in zip(expected, found, strict=True)):
            raise LoadError(f"{name!r} has the shape {list(found)}, config.json says {list(expected)}")
        if self.complete:
            raise LoadError(f"{name!r} is loaded a second time, which this plugin cannot do yet")
        member.arrived[role] = tensor
        if not self.missing:
            with torch.inference_mode(False):  # kernels cannot index parameters that were made in it
                self._finish()
            self.complete = True
            for one in self.members:
                one.arrived.clear()

    def _finish(self) -> None:
        if self.scheme.row_bits:
            kept = torch.cat([m.cut.rows(m.arrived["row_bits"], 0) for m in self.members])
            self._plane_rows = int((kept if self.precision is None else kept.clamp(max=self.precision)).sum())
        for role in self.wanted:
            pieces = [m.cut.of(role, m.arrived) for m in self.members]
            mine = pieces[0] if len(pieces) == 1 else torch.cat(pieces, -2)  # rows, in planes and parameters alike
            mine = mine.to("cpu", copy=True, memory_format=torch.contiguous_format)  # not the file's pages
            self.register_parameter(role, nn.Parameter(mine, requires_grad=False))
        self.finish_loading(self.path)
        self.to(self.target)
        self.tile()

    def table_delta(self, deltas: Mapping[str, Delta], kind: str) -> Tensor | None:
        """What a task changes here, as a table of this kind holds it, float32 ``[planes, rows(, groups)]`` on the CPU.

        Args:
            deltas: of the file's matrices, by path.
            kind: of the table.

        Returns:
            None where that is nothing.

        Raises:
            TaskError: the table cannot hold it. BundleError: it makes a scale infinite (MAT-6).
        """
        w, found = self.plane_matrix, dict[int, Tensor]()
        for member in self.members:
            delta = deltas.get(member.entry.path)
            if delta is None:
                continue
            mine, rows = member.cut.delta(delta), w._replace(scales=w.scales[:, member.rows])
            found[member.first] = table_delta(mine, rows, kind, member.entry.path)
            scales = with_delta(rows, found[member.first].to(self.device)).scales
            if not bool(torch.isfinite(scales).all()):
                raise BundleError("MAT-6", "the deltas make a scale infinite", tensor=member.entry.path)
        if not found:
            return None
        planes = max(len(delta) for delta in found.values())
        shape = (planes, w.rows) if kind == ROWS else (planes, w.rows, w.groups)
        joint = torch.full(shape, -0.0)  # keeps every scale, also the sign of a zero
        for first, values in found.items():
            joint[: len(values), first : first + values.shape[1]] = values
        return joint

    def product(self, x: Tensor, bias: Tensor | None, *, sampled: bool) -> Tensor:
        """``x @ weight.T + bias``, each row of `x` with its task.

        Args:
            x: ``[..., cols]``; its rows are the tokens of the running batch, or with `sampled` those of them for which
                the next token is wanted.
            bias: ``[rows]``.
        """
        w, rows = self.plane_matrix, x.numel() // self.cols
        if self.tasks is None:
            return operators.linear(x, w, bias)
        deltas, ids = self.tasks.of_batch(rows, sampled)
        return operators.linear(x, w, bias, deltas, ids)

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

    def load(self, role: str, tensor: Tensor, number: int = 0) -> None:
        """Take the weight."""
        rows = torch.cat([tensor[start:stop] for start, stop in self.slice.rows])
        self.weight.data.copy_(rows[:, slice(*self.slice.cols)])
        self.loaded = True

    def product(self, x: Tensor, bias: Tensor | None, *, sampled: bool) -> Tensor:
        """``x @ weight.T + bias``."""
        return F.linear(x, self.weight, bias)


Part = PlanePart | FloatPart


def can_join(one: Cut, other: Cut) -> bool:
    """Whether two matrices can be one part: one product, with one scheme for all rows."""
    scheme = one.scheme
    return scheme == other.scheme and not scheme.row_bits and not CODECS[scheme.codec].codebook


def product(parts: Sequence[Part], x: Tensor, bias: Tensor | None, *, sampled: bool = False) -> Tensor:
    """The products with all parts, one behind the other: ``[..., rows of all parts]``; arguments as of a part's."""
    if len(parts) == 1:
        return parts[0].product(x, bias, sampled=sampled)
    rows = [part.rows for part in parts]
    biases = [None] * len(parts) if bias is None else torch.split(bias, rows)
    return torch.cat([p.product(x, b, sampled=sampled) for p, b in zip(parts, biases, strict=True)], -1)
