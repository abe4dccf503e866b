"""UniPT (Diao et al. 2023, arXiv:2308.14316): all layers of the backbone at once, seen from its last one.

Every hidden state goes through a projection to d / r. Parallel interaction: tokens of the last layer (the anchor)
gather those of each other layer by ``relu(anchor layer^T)``, each row divided by its sum, plus the token itself.
Confidence aggregation: a gate reads the product of both layers' means; softmax over layers weighs what was gathered.
The result is ``up(relu(anchor + project(weighted sum)))``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ParallelTuning(nn.Module):
    """The side network, for models whose tokens all see each other: a layer's weight is one for the whole sentence.

    Args:
        width: d, of the backbone's hidden states, and of the result.
        states: how many hidden states there are: one more than blocks.
        reduction: r.
    """

    def __init__(self, width: int, states: int, reduction: int = 2) -> None:
        super().__init__()
        small = width // reduction
        self.downs = nn.ModuleList(nn.Sequential(nn.Linear(width, small), nn.LayerNorm(small)) for _ in range(states))
        self.project = nn.Sequential(nn.Linear(small, small), nn.LayerNorm(small))
        self.confidence = nn.Linear(small, 1)
        self.up = nn.Sequential(nn.ReLU(), nn.Linear(small, width))

    def forward(self, hidden: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """Hidden states ``[batch, tokens, width]`` to one of that shape; `mask`: 1 for tokens, 0 for padding."""
        *layers, anchor = (down(h) for h, down in zip(hidden, self.downs, strict=True))
        there = anchor.new_ones(anchor.shape[:2]) if mask is None else mask.to(anchor)
        gathered = torch.stack([_gather(anchor, layer, there) for layer in layers], 1)
        seen = torch.stack([self.confidence(_mean(anchor, there) * _mean(layer, there)) for layer in layers], 1)
        merged = (gathered * seen.softmax(1)[..., None]).sum(1)
        return self.up(anchor + self.project(merged))


def _gather(anchor: Tensor, layer: Tensor, there: Tensor) -> Tensor:
    """For each token of `anchor` that of `layer`, and others by how alike they are; ``[batch, tokens, small]``."""
    alike = (anchor @ layer.transpose(1, 2)).relu() * there[:, None]
    return layer + alike / (alike.sum(-1, keepdim=True) + 1e-8) @ layer


def _mean(tokens: Tensor, there: Tensor) -> Tensor:
    return (tokens * there[..., None]).sum(1) / there.sum(1, keepdim=True)
