"""What a task changes in one matrix: a float32 delta on its scales, its shift, or both (TSK-6, TSK-8)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.matrix import PlaneMatrix


class Delta(NamedTuple):
    """The delta of one task in one matrix, float32.

    Attributes:
        scales: ``[p, rows]``: the first p planes' scales are multiplied by ``1 + delta``; ``[p, rows, groups]``: the
            delta is added to them; None: they stay.
        shift: ``[rows, groups]``, added to the offsets (bcq) or the zero points (uniform), or None.
    """

    scales: Tensor | None = None
    shift: Tensor | None = None

    def map(self, fn: Callable[[Tensor], Tensor]) -> Delta:
        """`fn` applied to every tensor."""
        return Delta(*(None if t is None else fn(t) for t in self))

    def numel(self) -> int:
        """Number of values."""
        return sum(t.numel() for t in self if t is not None)


class TunedDelta(nn.Module):
    """A delta in training, always float32. The optimizer's parameters are the delta itself, so saving is exact.

    Args:
        start: initial values; zeros are the base.
    """

    scales: nn.Parameter | None
    shift: nn.Parameter | None

    def __init__(self, start: Delta) -> None:
        super().__init__()
        for name, values in start._asdict().items():
            param = None if values is None else nn.Parameter(values.detach().to(torch.float32, copy=True))
            self.register_parameter(name, param)

    def delta(self) -> Delta:
        """The parameters themselves: gradients flow into them."""
        return Delta(self.scales, self.shift)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(keeping_dtype(fn), recurse)  # type: ignore[no-untyped-call]


def keeping_dtype(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The argument of ``nn.Module._apply``, reduced to its moves between devices: no change of dtype."""

    def move(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

    return move


def shifted(w: PlaneMatrix, delta: Delta) -> PlaneMatrix:
    """`w` with the delta's shift added (TSK-8); the operators apply its scales."""
    if delta.shift is None:
        return w
    values = w.shift
    if values is None:  # checked when the delta was made or loaded (TSK-7)
        return w
    values = values.to(torch.promote_types(values.dtype, torch.float32)) + delta.shift
    return w.with_shift(values)


def stackable(deltas: Sequence[Delta | None]) -> bool:
    """Whether one call of an operator can take all of them: scales only, and all of one shape."""
    some = [d for d in deltas if d is not None]
    kinds = {None if d.scales is None else d.scales.dim() for d in some}
    return len(kinds) == 1 and None not in kinds and all(d.shift is None for d in some)


def stack(deltas: Sequence[Delta | None]) -> Tensor:
    """Deltas ``[tasks, p, rows(, groups)]`` as operators take them.

    -0.0 stands for the base (None) and fills planes that a delta lacks: a factor of ``1 + -0.0`` and an added ``-0.0``
    keep every scale, including the sign of a zero.
    """
    scales = [None if d is None else d.scales for d in deltas]
    some = [s for s in scales if s is not None]
    planes = max(len(s) for s in some)
    full = torch.full_like(some[0][:1], -0.0).expand(planes, *some[0].shape[1:])
    return torch.stack([full if s is None else _pad(s, planes) for s in scales])


def _pad(scales: Tensor, planes: int) -> Tensor:
    return F.pad(scales, (0, 0) * (scales.dim() - 1) + (0, planes - len(scales)), value=-0.0)
