"""Codes in training: each may become that of the next level of its group, above or below.

A weight has a *place*, in gaps between levels: 0 is the level of the code that the solver chose, and beyond half a gap
the neighbour's code takes over. Decoding rounds the place; its gradient passes straight through (SignRound, Cheng et
al. 2023, arXiv:2309.05516). Two things differ from there, both measured (tools/benchmarks/README.md):

- A place begins where the float weight lies, but within the reach of the solver's code: error feedback has put many
  weights on another level than the nearest. So nothing changes at first, and codes change one after the other rather
  than all at the same step.
- A step is the gradient in units of its root mean square over the matrix, in place of its sign: weights that matter
  move first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels import operators
from ..matrix import StoredMatrix
from .decoded import plane_matrix
from .neighbours import Neighbours, neighbours, planes_of

BYTES = 13  # for each weight: three codes, a place and its gradient, and for the way back its planes and a truth value
_EDGE = 0.49  # a place begins no further out than this
_MEMORY = 0.95  # of the mean square, from step to step
_FASTEST = 3.0  # of a weight, in root mean squares


def can_choose(matrix: StoredMatrix) -> bool:
    """Whether the codes of a matrix may change.

    With nested precisions they stay: the next level at one precision is another at the others. So do ragged rows.
    """
    return not matrix.nested and matrix.row_bits is None


class CodeChoice:
    """The codes of a matrix ``[rows, cols]`` in training.

    Args:
        matrix: see :func:`can_choose`.
        original: the float weight ``[rows, cols]``.
        device: to compute on.

    Attributes:
        place: of each weight, float32 ``[rows, cols]``, in [-1, 1]; see the top of this file.
    """

    def __init__(self, matrix: StoredMatrix, original: Tensor, device: torch.device) -> None:
        self._bits, self._cols = matrix.scheme.bits, matrix.cols
        self._near = neighbours(matrix, device)
        self.place = _first_place(matrix, self._near, original.to(device)).requires_grad_()
        self._square = self._weight = 0.0  # of the gradient: running mean over steps, and the sum of their weights

    def codes(self) -> Tensor:
        """The codes so far, uint8 ``[rows, 8 * row_bytes(cols)]``."""
        found = self._near.codes.clone()
        place, inner = self.place.detach(), found[:, : self._cols]
        for out, near in ((place > 0.5, self._near.above), (place < -0.5, self._near.below)):
            inner.copy_(torch.where(out, near[:, : self._cols], inner))
        return found

    def planes(self) -> Tensor:
        """The planes of :meth:`codes`, uint8 ``[bits, rows, bytes]``."""
        return planes_of(self.codes(), self._bits)

    def through(self, weight: Tensor) -> Tensor:
        """A decoded weight ``[rows, cols]`` as it is; its gradient reaches :attr:`place` too, where a code has a
        neighbour."""
        found: Tensor = _Through.apply(weight, self.place, self._has(self._near.below) | self._has(self._near.above))
        return found

    def step(self, rate: float) -> None:
        """Move all places along their gradients.

        Args:
            rate: gaps that a weight moves whose gradient is as large as the root mean square.
        """
        gradient = self.place.grad
        if gradient is None:  # an expert that no token of the batch was for
            return
        with torch.no_grad():
            self._square = _MEMORY * self._square + (1 - _MEMORY) * float(gradient.square().mean())
            self._weight = _MEMORY * self._weight + (1 - _MEMORY)
            size = (self._square / self._weight) ** 0.5
            if size > 0:
                self.place.sub_((gradient / size).clamp_(-_FASTEST, _FASTEST), alpha=rate)
                self.place.clamp_(-self._has(self._near.below).float(), self._has(self._near.above).float())
        self.place.grad = None

    def _has(self, near: Tensor) -> Tensor:
        """Where a neighbour is another code, bool ``[rows, cols]``."""
        return (near != self._near.codes)[:, : self._cols]


def _first_place(matrix: StoredMatrix, near: Neighbours, original: Tensor) -> Tensor:
    """Where the float weight lies between the levels around its code's own, within the reach of that code."""
    w = plane_matrix(matrix, original.device)
    own, below, above = (operators.dequantize(w._replace(planes=planes_of(codes, w.bits))) for codes in near)
    away = original - own
    gap = torch.where(away > 0, above.sub_(own), own.sub_(below))
    return torch.where(gap > 0, away / gap, 0.0).clamp_(-_EDGE, _EDGE)


class _Through(torch.autograd.Function):
    """The first argument; gradients reach the second, of the same shape, where the third says so."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, place: Tensor, where: Tensor) -> Tensor:
        ctx.save_for_backward(where)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        (where,) = ctx.saved_tensors
        return gradient, gradient * where, None
