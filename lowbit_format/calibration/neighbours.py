"""For each weight of a matrix, the codes whose levels lie next to that of its own code, in its group."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..bits import row_bytes, unpack_codes
from ..kernels import operators
from ..matrix import StoredMatrix
from .decoded import plane_matrix

_AT_ONCE = 1 << 20  # weights, or levels, that are looked at together


class Neighbours(NamedTuple):
    """Codes uint8 ``[rows, 8 * row_bytes(cols)]``; behind the last column all are 0.

    Attributes:
        codes: the matrix's own.
        below: of the nearest lower level of the group; the code itself where there is none.
        above: of the nearest higher level; likewise.
    """

    codes: Tensor
    below: Tensor
    above: Tensor


def neighbours(matrix: StoredMatrix, device: torch.device) -> Neighbours:
    """The codes of a matrix and their neighbours. Codes of equal levels are no neighbours of each other.

    Args:
        matrix: at full precision, with the same bits in all rows.
        device: to compute on.
    """
    rows, cols, scheme = matrix.rows, matrix.cols, matrix.scheme
    found = torch.zeros(3, rows, 8 * row_bytes(cols), dtype=torch.uint8, device=device)
    found[0, :, :cols] = torch.from_numpy(unpack_codes(matrix.planes, cols)).to(device)
    first = torch.arange(cols, device=device) // scheme.group_columns(cols) << scheme.bits  # place of a group's code 0
    for begin, end in _some_rows(rows, max(cols, scheme.groups(cols) << scheme.bits)):
        place = first + found[0, begin:end, :cols]
        for k, table in enumerate(_by_code(levels(matrix.row_slice(begin, end), device)), start=1):
            found[k, begin:end, :cols] = table.flatten(1).gather(1, place)
    return Neighbours(*found)


def levels(matrix: StoredMatrix, device: torch.device) -> Tensor:
    """The level of every code in every group: float32 ``[rows, groups, 2**bits]``, as a decoder computes them."""
    w = plane_matrix(matrix, device)
    count = 1 << w.bits
    every = torch.zeros(1, 8 * row_bytes(count), dtype=torch.uint8, device=device)
    every[0, :count] = torch.arange(count, device=device)
    each = w._replace(  # every group becomes a row, which has each code once
        planes=planes_of(every, w.bits).expand(-1, w.rows * w.groups, -1).contiguous(),
        scales=w.scales.reshape(len(w.scales), -1, 1),
        group_size=0,
        cols=count,
    )
    if w.shift is not None:
        each = each.with_shift(w.shift.reshape(-1, 1))
    return operators.dequantize(each).reshape(w.rows, w.groups, count)


def planes_of(codes: Tensor, bits: int) -> Tensor:
    """The planes of codes, as :func:`.bits.pack_codes` makes them.

    One multiplication gathers a bit of eight codes: each lands on its own bit of the top byte.

    Args:
        codes: uint8 ``[rows, 8 * bytes]``, contiguous.
        bits: number of planes.

    Returns:
        uint8 ``[bits, rows, bytes]``.
    """
    words = codes.view(torch.int64)
    tops = (((words >> p) & 0x0101010101010101) * 0x0102040810204080 >> 56 for p in range(bits - 1, -1, -1))
    return torch.stack([(top & 0xFF).to(torch.uint8) for top in tops])


def _some_rows(rows: int, each: int) -> Iterator[tuple[int, int]]:
    step = max(1, _AT_ONCE // each)
    return ((begin, min(rows, begin + step)) for begin in range(0, rows, step))


def _by_code(level: Tensor) -> tuple[Tensor, Tensor]:
    """Of levels ``[rows, groups, codes]``, for each code the codes below and above it: uint8 of the same shape."""
    ascending, order = level.sort(dim=-1, stable=True)
    below = torch.searchsorted(ascending, ascending, right=False) - 1
    above = torch.searchsorted(ascending, ascending, right=True)
    last = level.shape[-1] - 1
    nearest = (
        torch.where(below < 0, order, order.gather(-1, below.clamp(min=0))),
        torch.where(above > last, order, order.gather(-1, above.clamp(max=last))),
    )
    down, up = (torch.empty_like(order).scatter(-1, order, codes).to(torch.uint8) for codes in nearest)
    return down, up
