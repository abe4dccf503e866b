"""Matrices whose rows have different numbers of bits (MIX-1), as a few matrices of equal rows.

All rows of the same bits, in their order, are a *part*: an ordinary matrix, with some of the rows. The tiled layout of
a ragged matrix is that of its parts one after the other, most bits first, uint8 ``[bytes]``. So no kernel need know
ragged planes, and a product takes the time of the bits that there are. A backend says what is a layout of its own: how
it tiles a matrix of equal rows, and the shape of its planes then.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .matrix import TILED, PlaneMatrix, select_rows

Tiler = Callable[[PlaneMatrix], PlaneMatrix]
Shape = Callable[[PlaneMatrix, int, int], tuple[int, ...]]  # of the tiled planes of so many rows and bits of a matrix


class Arrangement(NamedTuple):
    """Where the rows of a ragged matrix are in its tiled layout."""

    rows: list[tuple[int, Tensor]]  # of each part: bits, and the rows that have them, int64, ascending
    places: Tensor  # int64 [rows]: the place of each row in its part
    changes: int  # of row_bits, when this was found


class Part(NamedTuple):
    """Rows of a ragged matrix that have the same bits."""

    whole: PlaneMatrix
    rows: Tensor  # int64 [n], ascending: which rows of the whole
    bits: int
    planes: Tensor  # of these rows alone, in the layout of the whole

    @property
    def matrix(self) -> PlaneMatrix:
        """The part as a matrix of equal rows, with copies of its parameters."""
        w = self.whole
        return w._replace(
            planes=self.planes,
            scales=w.scales[: self.bits, self.rows],  # one plane of scales, or as many as there are bits
            offsets=None if w.offsets is None else w.offsets[self.rows],
            zeros=None if w.zeros is None else w.zeros[self.rows],
            row_bits=None,
            bits=self.bits,
        )


def tile(w: PlaneMatrix, tile_part: Tiler, margin: int = 0) -> PlaneMatrix:
    """Ragged `w`, in the file's layout, in the tiled one. Parameters stay as they are.

    Args:
        tile_part: the backend's function for matrices of equal rows.
        margin: bytes of memory behind the planes, that kernels may read.
    """
    found = _arrange(w)
    plain = (Part(w, rows, bits, select_rows(w, rows).planes[:bits]) for bits, rows in found.rows)
    tiled = [tile_part(part.matrix).planes.flatten() for part in plain]
    room = torch.empty(sum(map(len, tiled)) + margin, dtype=torch.uint8, device=w.planes.device)
    out = torch.cat(tiled, out=room[: len(room) - margin])
    out._lowbit_rows = found  # type: ignore[attr-defined]
    return w._replace(planes=out, layout=TILED)


def parts(w: PlaneMatrix, shape: Shape) -> list[Part]:
    """The parts of tiled `w`, most bits first; their planes are views."""
    planes, found, begin = w.planes.detach(), list[Part](), 0
    for bits, rows in arrangement(w).rows:
        size = shape(w, len(rows), bits)
        end = begin + math.prod(size)
        found.append(Part(w, rows, bits, planes[begin:end].view(size)))
        begin = end
    return found


def arrangement(w: PlaneMatrix) -> Arrangement:
    """Where the rows of tiled `w` are; it is kept with its planes."""
    kept: Arrangement | None = getattr(w.planes, "_lowbit_rows", None)
    if kept is None or kept.changes != changes(w.row_bits):
        w.planes._lowbit_rows = kept = _arrange(w)  # type: ignore[attr-defined]
    return kept


def changes(tensor: Tensor | None) -> int:
    """How often `tensor` was changed in place. Of one made in inference mode torch does not know: it counts as changed
    whenever it is asked for.
    """
    if tensor is None:
        return 0
    return next(_unknown) if tensor.is_inference() else tensor._version


_unknown = itertools.count(-1, -1)


def own_bits(w: PlaneMatrix) -> Tensor:
    """Bits of each row, uint8 ``[rows]``. At a lower precision long rows are cut to its bits (NST-2)."""
    assert w.row_bits is not None  # noqa: S101 - for the type checker: the matrix is ragged
    return w.row_bits.detach().clamp(max=w.bits)


def _arrange(w: PlaneMatrix) -> Arrangement:
    own = own_bits(w)
    counts = torch.bincount(own, minlength=w.bits + 1).tolist()
    rows = [(bits, (own == bits).nonzero().flatten()) for bits in range(w.bits, 0, -1) if counts[bits]]
    places = torch.empty(w.rows, dtype=torch.int64, device=own.device)
    for _, some in rows:
        places[some] = torch.arange(len(some), device=own.device)
    return Arrangement(rows, places, changes(w.row_bits))
