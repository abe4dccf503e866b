"""Products with 8-bit activations: what is rounded, and to what. In plain torch, the truth that kernels are held to.

A plane adds ``+x`` where its bit is 1 and ``-x`` where it is 0. Of every four columns that is one of 16 sums
``±x0 ±x1 ±x2 ±x3``, and such sums are what is stored in eight bits: as an integer from -127 to 127 times a *step*. Each
four columns (a *quad*) have a step of their own, ``(|x0| + |x1| + |x2| + |x3|) / 127`` rounded up to 1 to 64 times a
*unit*, which all columns of a group of the matrix share, or at most :data:`COLUMNS` of them: the largest such step
among them is 64 units. So all integers can be added exactly, each times its multiplier. Scales, and the sum of x that
meets offsets and zeros, are not rounded.

To round sums of four is what lookups need (T-MAC: Wei et al. 2024, arXiv:2407.00088, has tables in 8 bits, one scale
for each group of activations). With steps of their own a large activation costs the quad that it is in, and no other.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from .matrix import PlaneMatrix, present_rows

COLUMNS = 256  # that share a step, at most
LARGEST = 127  # integer
UNITS = 64  # of the largest step; the sums of eight quads, 127 * 64 each, fit in two numbers of 16 bits
SMALLEST = 1e-30  # sum of absolute values for which there is a unit; where all are smaller, sums are 0


def product(x: Tensor, w: PlaneMatrix, bits: Iterable[Tensor]) -> Tensor:
    """``x @ weight.T`` with rounded sums.

    Args:
        x: float ``[n, cols]``.
        w: the matrix, of any codec but the codebook, whose products are no sums over planes.
        bits: of each plane, bool ``[rows, groups, columns of a group]``.

    Returns:
        float64 ``[n, rows]``; NaN where x is not finite.
    """
    grouped = _grouped(x.float(), w)
    quads = _quads(grouped)
    by, multipliers, unit = _steps(quads)
    totals = grouped.double().sum(-1)
    unit = unit + (totals - totals)[..., None]  # NaN where x is not finite
    shift, scales = _as_bcq(w)
    out = torch.einsum("ng,rg->nr", totals, shift)
    for bit, scale in zip(bits, scales, strict=True):
        signed = quads[:, None] * _quads(bit.float() * 2 - 1)  # [n, rows, groups, blocks, quads, 4]
        sums = ((signed[..., 0] + signed[..., 1]) + signed[..., 2]) + signed[..., 3]
        integers = (torch.round(sums * by[:, None]) * multipliers[:, None]).double().sum(-1)
        out += torch.einsum("nrgb,ngb,rg->nr", integers, unit, scale)
    return out


def _steps(quads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From x ``[..., blocks, quads, 4]`` for each quad one over its step, and the step in units, float32; and the unit
    of each block, float64. Every operation is a float32 one that kernels repeat.
    """
    sizes = quads.abs()
    size = (sizes[..., 0] + sizes[..., 1]) + (sizes[..., 2] + sizes[..., 3])
    most = size.amax(-1, keepdim=True)
    is_some = most > SMALLEST
    share = torch.where(is_some, torch.full_like(most, UNITS) / most, 0)
    multipliers = torch.round(size * share + 0.5).clamp(min=1)  # never below size * share
    by = torch.where(is_some, torch.full_like(most, UNITS * LARGEST) / most, 0) / multipliers
    return by, multipliers, (most / (UNITS * LARGEST)).double().squeeze(-1)


def _grouped(x: Tensor, w: PlaneMatrix) -> Tensor:
    """``[n, cols]`` as ``[n, groups, columns of a group]``, with zeros behind a short last group."""
    padded = F.pad(x, (0, w.groups * w.group_columns - w.cols))
    return padded.view(len(x), w.groups, w.group_columns)


def _quads(grouped: Tensor) -> Tensor:
    """``[..., columns of a group]`` as ``[..., blocks, quads of a block, 4]``, with zeros behind the last columns."""
    columns = grouped.shape[-1]
    block = min(COLUMNS, -(-columns // 4) * 4)
    return F.pad(grouped, (0, -columns % block)).view(*grouped.shape[:-1], -1, block // 4, 4)


def _as_bcq(w: PlaneMatrix) -> tuple[Tensor, list[Tensor]]:
    """What meets the sum of x, and the scales of each plane: float64 ``[rows, groups]`` (see cpu/README.md)."""
    scales, shift = w.scales.double(), w.shift
    added = torch.zeros_like(scales[0]) if shift is None else shift.double()
    present = present_rows(w)
    there = torch.ones(w.bits, w.rows, device=scales.device) if present is None else present
    own = there.double().sum(0)[:, None]  # bits of each row
    if w.scale_per_plane:
        return added, [scales[p] * there[p][:, None] for p in range(w.bits)]
    middle = scales[0] * (2**own - 1) / 2
    planes = [scales[0] * 2 ** (own - 2 - p) * there[p][:, None] for p in range(w.bits)]
    return middle + added if w.has_offsets else middle - scales[0] * added, planes
