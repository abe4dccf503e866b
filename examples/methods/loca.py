"""LoCA (Du et al. 2025, arXiv:2502.06820): a change of the weight with few cosine frequencies, whose places are learnt.

``W + alpha C^T S D``: C and D are the matrices of the discrete cosine transform (DCT-II, orthonormal), and S is zero
but for K coefficients a_k at the places (i_k, j_k). So the change is the sum of the outer products a_k C[i_k] D[j_k]^T,
and is applied as such: ``x -> ((x D[j]^T) * a) C[i]``, without a matrix of the weight's size.

Places are integers. Their gradient is a central difference: a_k / 2 times the difference of what the coefficient's
gradient would be one place further and one place before. Steps take turns: some train coefficients, some places, and
after a while all train coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class LoCALinear(nn.Module):
    """A frozen linear layer with an adapter.

    Args:
        linear: the layer.
        frequencies: their number K.
        alpha: strength of the adapter.
    """

    def __init__(self, linear: nn.Linear, frequencies: int = 64, alpha: float = 1.0) -> None:
        super().__init__()
        like = {"dtype": linear.weight.dtype, "device": linear.weight.device}
        self.linear, self.alpha = linear, alpha
        self.coefficients = nn.Parameter(torch.zeros(frequencies, **like))  # it starts as the layer alone
        self.places = nn.Parameter(
            torch.rand(2, frequencies, device=like["device"])
        )  # in fractions of the weight's shape

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[..., in_features]`` to ``[..., out_features]``."""
        shape = (self.linear.out_features, self.linear.in_features)
        flat = x.reshape(-1, shape[1])
        change = _Cosines.apply(flat, self.coefficients, self.places, shape) * self.alpha
        return self.linear(x) + change.view(*x.shape[:-1], shape[0])


def take_turns(
    layers: Iterable[LoCALinear], step: int, coefficients: int = 10, places: int = 20, until: int = 1000
) -> None:
    """Choose what step `step` trains: `coefficients` steps of these, `places` of those; from `until` on these alone."""
    of_coefficients = step >= until or step % (coefficients + places) < coefficients
    for layer in layers:
        layer.coefficients.requires_grad_(of_coefficients)
        layer.places.requires_grad_(not of_coefficients)


class _Cosines(torch.autograd.Function):
    """``((x D[j]^T) * a) C[i]`` for x ``[n, in]``, coefficients a ``[K]`` and places in fractions ``[2, K]``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
        i, j = (_index(places[axis], shape[axis]) for axis in (0, 1))
        ctx.save_for_backward(x, a, i, j)
        ctx.shape = shape
        return (x @ cosines(j, shape[1]).to(x).T * a) @ cosines(i, shape[0]).to(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, i, j = ctx.saved_tensors
        rows, cols = ctx.shape

        def of_coefficient(i: Tensor, j: Tensor) -> Tensor:
            """The gradient of coefficients at these places: entries of the DCT of the weight's gradient."""
            return ((grad @ cosines(i, rows).to(x).T) * (x @ cosines(j, cols).to(x).T)).sum(0)

        of_x = of_a = of_places = None
        if ctx.needs_input_grad[0]:
            of_x = (grad @ cosines(i, rows).to(x).T * a) @ cosines(j, cols).to(x)
        if ctx.needs_input_grad[1]:
            of_a = of_coefficient(i, j)
        if ctx.needs_input_grad[2]:
            by_row = of_coefficient((i + 1).clamp(max=rows - 1), j) - of_coefficient((i - 1).clamp(min=0), j)
            by_col = of_coefficient(i, (j + 1).clamp(max=cols - 1)) - of_coefficient(i, (j - 1).clamp(min=0))
            of_places = (torch.stack([by_row, by_col]) * (a / 2)).clamp(-1, 1).float()
        return of_x, of_a, of_places, None


def cosines(frequencies: Tensor, size: int) -> Tensor:
    """Rows of the orthonormal DCT-II of `size` points, ``[len(frequencies), size]``."""
    points = torch.arange(size, device=frequencies.device) + 0.5
    rows = torch.cos(math.pi / size * frequencies[:, None] * points) * math.sqrt(2 / size)
    return torch.where(frequencies[:, None] == 0, rows / math.sqrt(2), rows)


def _index(fractions: Tensor, size: int) -> Tensor:
    return (fractions.clamp(0, 1) * (size - 1)).round().long()
