"""SoRA (Ding et al. 2023, arXiv:2311.11696): a low-rank adapter whose rank is found by training.

``y = W x + (alpha / r) up (gate * down x)``. The gate has an L1 penalty of strength lambda, and gets its zeros from the
penalty's proximal step: after a step of the optimizer with rate eta, every entry shrinks towards zero by eta * lambda.
Directions with a gate of zero are cut off afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


class SoRALinear(nn.Module):
    """A frozen linear layer with an adapter.

    Args:
        linear: the layer.
        rank: at the start.
        alpha: strength of the adapter.
    """

    def __init__(self, linear: nn.Linear, rank: int = 8, alpha: float = 16) -> None:
        super().__init__()
        like = {"dtype": linear.weight.dtype, "device": linear.weight.device}
        self.linear, self.scaling = linear, alpha / rank
        self.down = nn.Parameter(torch.empty(rank, linear.in_features, **like))
        self.gate = nn.Parameter(torch.randn(rank, **like))
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank, **like))  # it starts as the layer alone
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[..., in_features]`` to ``[..., out_features]``."""
        return self.linear(x) + (x @ self.down.T * self.gate) @ self.up.T * self.scaling

    @torch.no_grad()
    def prune(self) -> int:
        """Cut off what the gate has closed; returns the rank that is left."""
        kept = self.gate.nonzero().flatten()
        self.down, self.gate = nn.Parameter(self.down[kept]), nn.Parameter(self.gate[kept])
        self.up = nn.Parameter(self.up[:, kept])
        return len(kept)


@torch.no_grad()
def shrink_gates(layers: Iterable[SoRALinear], threshold: float) -> None:
    """The proximal step, after a step of the optimizer; `threshold` is its rate times lambda."""
    for layer in layers:
        layer.gate.copy_(torch.nn.functional.softshrink(layer.gate, threshold))
