"""Codes in training: each may become that of the next level of its group, above or below.

A code changes where that alone would lower the block's error well: with the gradient g of the error by a weight, its
curvature h and the gap to the next level, the error changes by ``g * gap + h * gap**2 / 2``. What several codes change
adds up; so one code of a group changes at a time (up, and one down), that with the largest gain for its gap (by the
gain alone blocks came out slightly worse), and the gain has to be there with :data:`CAUTION` times the curvature too.
Gradients pass straight through decoding, and are means over steps.

The curvature is that of Gauss and Newton: random signs at the block's outputs, taken back through it, have squares
whose mean is the diagonal (Hutchinson 1989); of them a mean for each row and each column is kept (as Adafactor does,
Shazeer and Stern 2018, arXiv:1804.04235). SignRound (Cheng et al. 2023, arXiv:2309.05516), whose steps are signs
of gradients and know no curvature, makes blocks worse that the solver left near an optimum; figures of both are in
tools/benchmarks/README.md.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import operators
from ..kernels.matrix import PlaneMatrix
from ..matrix import StoredMatrix
from .neighbours import neighbours, planes_of

BYTES = 14  # for each weight: four codes, a gradient and its mean; on the way back, its planes and a truth value
CAUTION = 3.0
_MEMORY = 0.5  # of the mean gradient, from step to step


def can_choose(matrix: StoredMatrix) -> bool:
    """Whether the codes of a matrix may change.

    With nested precisions they stay: the next level at one precision is another at the others. So do ragged rows.
    """
    return not matrix.nested and matrix.row_bits is None


class CodeChoice:
    """The codes of a matrix ``[rows, cols]`` in training.

    Args:
        matrix: see :func:`can_choose`.
        device: to compute on.

    Attributes:
        codes: so far, uint8 ``[rows, 8 * row_bytes(cols)]``: those of the matrix, or neighbours of these.
    """

    def __init__(self, matrix: StoredMatrix, device: torch.device) -> None:
        self._bits, self._cols = matrix.scheme.bits, matrix.cols
        self._size = matrix.scheme.group_columns(matrix.cols)
        self._near = neighbours(matrix, device)
        self.codes = self._near.codes.clone()
        self._mean = torch.zeros(matrix.rows, matrix.cols, device=device, requires_grad=True)  # gradients come to it
        self._steps = self._probes = 0
        self._rows, self._columns = (
            torch.zeros(matrix.rows, 1, device=device),
            torch.zeros(1, matrix.cols, device=device),
        )

    def planes(self) -> Tensor:
        """The planes of :attr:`codes`, uint8 ``[bits, rows, bytes]``."""
        return planes_of(self.codes, self._bits)

    def through(self, weight: Tensor) -> Tensor:
        """A decoded weight ``[rows, cols]`` as it is; its gradient is seen where a code has a neighbour."""
        where = self._is_other(self._near.below) | self._is_other(self._near.above)
        found: Tensor = _Through.apply(weight, self._mean, where)  # type: ignore[no-untyped-call]
        return found

    def gradient(self) -> Tensor:
        """What :meth:`through` has seen since the last call, float32 ``[rows, cols]``."""
        found, self._mean.grad = self._mean.grad, None
        return torch.zeros_like(self._mean) if found is None else found  # no token was for this expert

    def probe(self) -> None:
        """Learn of the curvature: what :meth:`through` has seen is the gradient of outputs with random signs."""
        square = self.gradient().square()
        self._rows += square.mean(1, keepdim=True)
        self._columns += square.mean(0, keepdim=True)
        self._probes += 1

    def step(self, w: PlaneMatrix) -> None:
        """Change the codes that the gradients speak against.

        Args:
            w: the matrix with the present parameters; its planes do not matter.
        """
        with torch.no_grad():
            self._mean.mul_(_MEMORY).add_(self.gradient(), alpha=1 - _MEMORY)
            self._steps += 1
            share = 1 - _MEMORY**self._steps
            for near, back in ((self._near.above, self._near.below), (self._near.below, self._near.above)):
                # From the code of the solver to its neighbour, or from the neighbour on the other side back to it.
                at_own, at_back = self.codes == self._near.codes, (self.codes == back) & (back != self._near.codes)
                wanted = torch.where(at_own, near, torch.where(at_back, self._near.codes, self.codes))
                gap = self._decoded(w, wanted).sub_(self._decoded(w, self.codes))
                slope = self._curvature().mul_(gap)  # of the gradient, on the way
                gain = (self._mean / share).mul_(gap.sign()).add_(slope.abs(), alpha=CAUTION / 2)
                gain.masked_fill_(slope == 0, 0.0)  # no curvature was seen, or there is no neighbour
                change = (gain < 0) & self._is_least(gain)
                self._mean.add_(torch.where(change, slope, 0.0), alpha=share)
                inner = self.codes[:, : self._cols]
                inner.copy_(torch.where(change, wanted[:, : self._cols], inner))

    def _is_least(self, gain: Tensor) -> Tensor:
        """Where a value ``[rows, cols]`` is the least of its group: one in each."""
        short = -self._cols % self._size
        groups = F.pad(gain, (0, short), value=torch.inf).reshape(len(gain), -1, self._size)
        least = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, groups.argmin(-1, keepdim=True), True)
        return least.flatten(1)[:, : self._cols]

    def _curvature(self) -> Tensor:
        """Of the error by each weight, float32 ``[rows, cols]``; 0 where no probe has come."""
        mean = self._rows.mean() * max(1, self._probes)
        return self._rows * self._columns / torch.where(mean > 0, mean, 1.0)

    def _decoded(self, w: PlaneMatrix, codes: Tensor) -> Tensor:
        return operators.dequantize(w._replace(planes=planes_of(codes, self._bits)))

    def _is_other(self, near: Tensor) -> Tensor:
        """Where a neighbour is another code, bool ``[rows, cols]``."""
        return (near != self._near.codes)[:, : self._cols]


class _Through(torch.autograd.Function):
    """The first argument; gradients reach the second, of the same shape, where the third says so."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, seen: Tensor, where: Tensor) -> Tensor:
        ctx.save_for_backward(where)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (where,) = ctx.saved_tensors
        return gradient, gradient * where, None
