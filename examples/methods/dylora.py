"""DyLoRA (Valipour et al. 2022, arXiv:2210.07558): one low-rank adapter that is good at every rank up to its own.

``y = W x + (alpha / b) up[:, :b] down[:b] x``. Each step draws a rank b for all layers, uniformly from 1 to r, so that
the first rows of `down` and the first columns of `up` learn to do without the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


class DyLoRALinear(nn.Module):
    """A frozen linear layer with an adapter.

    Args:
        linear: the layer.
        rank: the largest rank r.
        alpha: strength of the adapter.
        frozen: a step with rank b trains row and column b alone (the paper's faster variant).

    Attributes:
        rank: the rank b to compute with, from 1 to r; it may be set at any time.
    """

    def __init__(self, linear: nn.Linear, rank: int = 8, alpha: float = 16, frozen: bool = False) -> None:
        super().__init__()
        like = {"dtype": linear.weight.dtype, "device": linear.weight.device}
        self.linear, self.rank, self.alpha, self.frozen = linear, rank, alpha, frozen
        self.down = nn.Parameter(torch.empty(rank, linear.in_features, **like))
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank, **like))  # it starts as the layer alone
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[..., in_features]`` to ``[..., out_features]``."""
        b = self.rank
        down, up = self.down[:b], self.up[:, :b]
        if self.frozen and self.training:
            down = torch.cat([down[:-1].detach(), down[-1:]])
            up = torch.cat([up[:, :-1].detach(), up[:, -1:]], 1)
        return self.linear(x) + (x @ down.T @ up.T) * (self.alpha / b)


def draw_rank(layers: Iterable[DyLoRALinear], generator: torch.Generator | None = None) -> int:
    """Set one random rank in all layers, for the next step."""
    layers = list(layers)
    rank = 1 + int(torch.randint(len(layers[0].down), (), generator=generator))
    for layer in layers:
        layer.rank = rank
    return rank
