"""Which rows and columns of one of the file's matrices a process holds, and cutting tensors accordingly.

Tensor parallelism gives each process some rows of a matrix, or some columns. Rows have parameters of their own. Columns
share them in groups: a cut inside of a group is exact where the group falls into smaller ones that kernels can read,
each with the same parameters; else it is refused.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bits import row_bytes
from ..errors import LoadError
from ..kernels.matrix import PlaneMatrix, full_planes, present_rows
from ..runtime.deltas import Delta
from ..schema import ModuleEntry, Scheme

WORD = 32  # columns of the smallest group that kernels read without decoding the matrix


@dataclass(frozen=True)
class Slice:
    """Some rows and consecutive columns of a matrix.

    Attributes:
        rows: ranges ``(start, stop)`` in the order in which the process holds them.
        cols: one such range.
    """

    rows: tuple[tuple[int, int], ...]
    cols: tuple[int, int]

    @classmethod
    def whole(cls, entry: ModuleEntry) -> Slice:
        """All of a matrix."""
        return cls(((0, entry.rows),), (0, entry.cols))

    @property
    def height(self) -> int:
        """Number of rows."""
        return sum(stop - start for start, stop in self.rows)

    @property
    def width(self) -> int:
        """Number of columns."""
        return self.cols[1] - self.cols[0]


class Shard(NamedTuple):
    """One of the matrices that a fused layer is made of.

    Attributes:
        full: its rows in the file.
        start: first row of this process.
        size: number of rows of this process.
    """

    full: int
    start: int
    size: int


def shards_of(entry: ModuleEntry | None, shards: Sequence[Shard], others: int) -> int:
    """How many of the remaining shards a matrix of the file is made of; `others` matrices come behind it."""
    if not others:
        return len(shards)
    sums = itertools.accumulate(shard.full for shard in shards)
    return 1 + next((n for n, rows in enumerate(sums) if entry is not None and rows == entry.rows), 0)


def ranges(shards: Sequence[Shard]) -> tuple[tuple[int, int], ...]:
    """Rows of this process in a matrix of the file that has these shards one behind the other."""
    offsets = itertools.accumulate((shard.full for shard in shards), initial=0)
    begins = [(offset + shard.start, shard.size) for offset, shard in zip(offsets, shards, strict=False)]
    ranges = [(begin, begin + size) for begin, size in begins]
    joined = ranges[:1]
    for begin, end in ranges[1:]:
        if begin == joined[-1][1]:
            joined[-1] = joined[-1][0], end
        else:
            joined.append((begin, end))
    return tuple(joined)


class Cut:
    """Takes a :class:`Slice` out of the tensors of one module entry.

    Raises LoadError, which names the module, for a slice that the file's groups do not allow.

    Attributes:
        scheme: of the slice; its groups may be smaller than the file's.
    """

    def __init__(self, entry: ModuleEntry, piece: Slice) -> None:
        self.entry, self.slice = entry, piece
        self.all_rows = piece.rows == ((0, entry.rows),)
        self.all_cols = piece.cols == (0, entry.cols)
        self.scheme = entry.scheme if self.all_cols else _with_groups(entry, *piece.cols)

    def planes(self, planes: Tensor, row_bits: Tensor | None) -> Tensor:
        """uint8 ``[bits, rows, bytes]``, or ragged ``[sum of row_bits, bytes]``, of the file to those of the slice."""
        if self.all_rows and self.all_cols:
            return planes
        if row_bits is None:
            return self._columns_of_planes(self.rows(planes, 1))
        scheme = self.entry.scheme
        some = torch.empty(1, self.entry.rows, 1)
        w = PlaneMatrix(planes, some, None, None, None, row_bits, scheme.codec, scheme.bits, 0, self.entry.cols)
        present = present_rows(w)
        full = self._columns_of_planes(self.rows(full_planes(w), 1))
        return full if present is None else full[self.rows(present, 1)]

    def rows(self, tensor: Tensor, axis: int) -> Tensor:
        """`tensor`, which has the file's rows along `axis`, with those of the slice."""
        if self.all_rows:
            return tensor
        parts = [tensor.narrow(axis, start, stop - start) for start, stop in self.slice.rows]
        return parts[0] if len(parts) == 1 else torch.cat(parts, axis)

    def groups(self, tensor: Tensor) -> Tensor:
        """`tensor`, which has the file's groups along its last axis, with those of the slice."""
        old, new = self.entry.scheme, self.scheme
        if self.all_cols or old.groups(self.entry.cols) == 1:
            return tensor
        size = new.group_size
        tensor = tensor.repeat_interleave(old.group_size // size, -1)
        first = self.slice.cols[0] // size
        return tensor[..., first : first + new.groups(self.slice.width)]

    def of(self, role: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """The tensor of this role in the slice, of the file's tensors by role."""
        tensor = tensors[role]
        if role == "planes":
            return self.planes(tensor, tensors.get("row_bits"))
        if role == "codebook":
            return tensor
        if role == "row_bits":
            return self.rows(tensor, 0)
        return self.groups(self.rows(tensor, tensor.dim() - 2))

    def delta(self, delta: Delta) -> Delta:
        """Of what a task changes in the file's matrix, that in the slice."""
        scales, shift = delta
        if scales is not None:
            scales = self.rows(scales, 1)
            scales = scales if scales.dim() == 2 else self.groups(scales)
        return Delta(scales, None if shift is None else self.groups(self.rows(shift, 0)))

    def _columns_of_planes(self, planes: Tensor) -> Tensor:
        if self.all_cols:
            return planes
        start, stop = self.slice.cols
        part = planes[..., start // 8 : -(-stop // 8)]
        return F.pad(part, (0, row_bytes(stop - start) - part.shape[-1]))


def _with_groups(entry: ModuleEntry, start: int, stop: int) -> Scheme:
    """The scheme of the columns from `start` to `stop`."""
    scheme = entry.scheme
    inner = [edge for edge in (start, stop) if 0 < edge < entry.cols]
    if scheme.groups(entry.cols) == 1:
        if all(edge % 8 == 0 for edge in inner):
            return replace(scheme, group_size=0)
        size = 0
    else:
        size = math.gcd(scheme.group_size, *inner)
        if size == scheme.group_size or size % WORD == 0:
            return replace(scheme, group_size=size)
    raise LoadError(
        f"{entry.path}: tensor parallelism cuts its {entry.cols} columns at {inner[0]}, inside of a group of "
        f"{scheme.group_columns(entry.cols)} columns, which would leave pieces of {size or inner[0] % 8} columns; "
        f"kernels read pieces of {WORD}. Serve it with another --tensor-parallel-size, or convert it with a "
        "--group-size that divides the columns of a process, or with --group-size 0"
    )
