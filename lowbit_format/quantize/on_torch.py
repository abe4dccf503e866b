"""The quantizers on torch tensors of any device: for a GPU, or for a weight that is a tensor already.

They use batched tensor operations instead of compiled loops, with the same mathematics: the two starts and the rounds
of :mod:`.bcq`, and the line fits of :mod:`.uniform`. The results have the same quality, but are not equal bit for bit:
sums are computed in another order. The result is a :class:`StoredMatrix` on the host.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..errors import NonFiniteWeightError, QuantizationError
from ..matrix import Params, StoredMatrix
from . import bcq, uniform
from .solve import round_and_assign
from .target import Target

if TYPE_CHECKING:
    from torch import Tensor

_AT_ONCE = 1 << 24  # most values of the largest intermediate tensor, [groups, columns, unknowns]


def quantize_tensor(
    weight: Tensor, target: Target, *, importance: Tensor | None = None, name: str = "weight"
) -> StoredMatrix:
    """Quantize one matrix on its device.

    Args:
        weight: float ``[rows, cols]`` on any device.
        target: codec ``bcq`` or ``uniform``; ``recognise`` is ignored.
        importance: float ``[cols]`` >= 0: how much each column's error counts; None: all columns count the same.
        name: tensor name for messages.

    Raises:
        NonFiniteWeightError: the weight holds NaN or an infinity.
        QuantizationError: the target is a codebook, or parameters overflow.
    """
    if target.codec not in _FITS:
        raise QuantizationError(f"{name}: a {target.codec} is not fitted on torch tensors; use quantize() on an array")
    weight = weight.detach().float()
    if not bool(torch.isfinite(weight).all()):
        raise NonFiniteWeightError(f"{name}: holds NaN or infinite values")
    exact = fit_groups(weight, importance, target)
    host = np.ascontiguousarray(weight.cpu().numpy())
    for dtype in (target.scale_dtype, "F32"):
        matrix = round_and_assign(host, target, exact, dtype)
        if matrix is not None:
            return matrix
    raise QuantizationError(f"{name}: its parameters overflow float32; keep this module in full precision")


def fit_groups(weight: Tensor, importance: Tensor | None, target: Target) -> Params:
    """The parameters of a float32 weight ``[rows, cols]`` before rounding; importance is ``[cols]`` or None."""
    rows, cols = weight.shape
    scheme = target.scheme()
    groups, size = scheme.groups(cols), scheme.group_columns(cols)
    x = torch.nn.functional.pad(weight, (0, groups * size - cols)).reshape(-1, size)
    column = torch.ones_like(weight[0]) if importance is None else importance.to(weight).float()
    w = torch.nn.functional.pad(column, (0, groups * size - cols)).reshape(1, groups, size)
    present = torch.nn.functional.pad(torch.ones_like(column), (0, groups * size - cols)).reshape(1, groups, size)
    w = torch.where(
        w.sum(-1, keepdim=True) > 0, w, present
    )  # a group without importance: all its columns count the same
    w = w.expand(rows, -1, -1).reshape(-1, size)
    if importance is None and target.codec == "bcq" and target.bits >= bcq.SIZED_BITS:
        w = _by_size(x, w)
    step = max(1, _AT_ONCE // (size * (target.bits + 1)))
    parts = [_FITS[target.codec](x[i : i + step], w[i : i + step], target) for i in range(0, len(x), step)]
    scales = torch.cat([p[0] for p in parts], dim=1).reshape(-1, rows, groups).cpu().numpy()
    shift = torch.cat([p[1] for p in parts]).reshape(rows, groups).cpu().numpy()
    return Params(scales, None if target.codec == "bcq" and not target.offset else shift)


def _by_size(x: Tensor, w: Tensor) -> Tensor:
    """Importances of errors by the size of their weights; see :func:`bcq._weigh_by_size`."""
    part = x / x.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    mean = (w * part**2).sum(1, keepdim=True) / w.sum(1, keepdim=True)
    return w * (1 + part**2 / torch.where(mean > 0, mean, torch.inf))


def _fit_bcq(x: Tensor, w: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """Scales ``[bits, n]`` and offsets ``[n]`` of groups ``[n, size]``; see :func:`bcq.fit`."""
    rounds = bcq.ROUNDS if target.rounds is None else target.rounds
    unit = x.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    x = x / unit
    s, z = _greedy_start(x, w, target)
    constant = (torch.where(w > 0, x, x[:, :1]) == x[:, :1]).all(1)
    best = (s.clone(), z.clone())
    s, z, gain = _alternate(x, w, s, z, target.offset, rounds)
    other, other_z, other_gain = _alternate(x, w, *_grid_start(x, w, target), target.offset, rounds)
    better = other_gain > gain
    s, z = torch.where(better[:, None], other, s), torch.where(better, other_z, z)
    s, z, _ = _alternate(x, w, s, z, target.offset, rounds)
    s, z = torch.where(constant[:, None], best[0], s), torch.where(constant, best[1], z)
    return (s * unit).T, z * unit[:, 0]


def _greedy_start(x: Tensor, w: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    total = w.sum(1)
    z = x[:, 0] + (w * (x - x[:, :1])).sum(1) / total if target.offset else torch.zeros_like(x[:, 0])
    rest, scales = (x - z[:, None]).abs(), []
    for _ in range(target.bits):
        scales.append((w * rest).sum(1) / total)
        rest = (rest - scales[-1][:, None]).abs()
    return torch.stack(scales, 1), z


def _grid_start(x: Tensor, w: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    inside = torch.where(w > 0, x, x[:, :1])
    low, high = inside.amin(1), inside.amax(1)
    if not target.offset:
        high = torch.maximum(high, -low)
        low = -high
    share = torch.tensor(
        [2.0 ** (target.bits - 1 - p) for p in range(target.bits)], dtype=torch.float32, device=x.device
    )
    reach = (high - low) / 2 * bcq.GRID_RANGE[target.bits - 1]
    return reach[:, None] * share / (2**target.bits - 1), (low + high) / 2


def _alternate(x: Tensor, w: Tensor, s: Tensor, z: Tensor, offset: bool, rounds: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rounds of nearest codes and least squares; see :func:`bcq._alternate`."""
    bits, gain = s.shape[1], torch.zeros_like(z)
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=bits)), dtype=torch.float32, device=x.device)
    for _ in range(rounds):
        level, order = (s @ signs.T + z[:, None]).sort(dim=1, stable=True)
        mids = ((level[:, 1:] + level[:, :-1]) / 2).contiguous()
        design = signs[order.gather(1, torch.searchsorted(mids, x.contiguous(), right=True))]
        if offset:
            design = torch.cat([design, torch.ones_like(design[..., :1])], 2)
        weighted = design * w[..., None]
        ridge = float(bcq.RIDGE) * w.sum(1)[:, None, None] * torch.eye(design.shape[2], device=x.device)
        right = (weighted * x[..., None]).sum(1)
        solution = torch.linalg.solve(weighted.transpose(1, 2) @ design + ridge, right)
        gain = (right * solution).sum(1)
        s = solution[:, :bits].abs().sort(dim=1, descending=True)[0]
        z = solution[:, bits] if offset else z
    return s, z, gain


def _fit_uniform(x: Tensor, w: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """Scales ``[1, n]`` and zero points ``[n]`` of groups ``[n, size]``; see :func:`uniform.fit`."""
    inside = torch.where(w > 0, x, x[:, :1])
    low, high = inside.amin(1), inside.amax(1)
    top = 2**target.bits - 1
    if target.solver == "symmetric":
        largest = torch.maximum(-low, high)
        half = 2 ** (target.bits - 1)
        scale = 2 * largest if target.bits == 1 else largest / (half - 1)
        return scale[None], torch.full_like(scale, 0.5 if target.bits == 1 else half)
    scale, zero = _from_range(low, high, 1.0, top)
    if target.solver == "mse":
        scale, zero = _least_error(x, w, low, high, top, uniform.ROUNDS if target.rounds is None else target.rounds)
    return scale[None], zero


def _from_range(low: Tensor, high: Tensor, part: float, top: int) -> tuple[Tensor, Tensor]:
    middle, reach = low / 2 + high / 2, part * (high / 2 - low / 2)
    scale = torch.where(reach > 0, reach / (top / 2), middle.abs())
    zero = torch.where(reach > 0, top / 2 - middle / scale, (middle < 0).float())
    return scale, zero


def _least_error(x: Tensor, w: Tensor, low: Tensor, high: Tensor, top: int, rounds: int) -> tuple[Tensor, Tensor]:
    best = torch.full_like(low, torch.inf)
    scale, zero = _from_range(low, high, 1.0, top)
    total = w.sum(1)
    for part in uniform.CLIPS:
        a, z = _from_range(low, high, part, top)
        for step in range(rounds + 1):
            v = x / torch.where(a > 0, a, 1)[:, None] + z[:, None]
            q = (v + 0.5).floor().clamp(0, top)
            error = (w * (q - v) ** 2).sum(1) * a**2
            better = error < best
            best, scale, zero = (torch.where(better, new, old) for new, old in ((error, best), (a, scale), (z, zero)))
            if step == rounds:
                break
            mean_q, mean_v = (w * q).sum(1) / total, (w * v).sum(1) / total
            spread = (w * (q - mean_q[:, None]) ** 2).sum(1)
            slope = (w * (q - mean_q[:, None]) * (v - mean_v[:, None])).sum(1) / spread
            good = (spread > 0) & (slope > 0) & (low < high)
            slope, middle = torch.where(good, slope, 1.0), torch.where(good, mean_v - slope * mean_q, 0.0)
            a, z = a * slope, (z - middle) / slope
    return scale, zero


_FITS = {"bcq": _fit_bcq, "uniform": _fit_uniform}
