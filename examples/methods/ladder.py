"""Ladder side tuning (Sung et al. 2022, arXiv:2206.06522): a small transformer beside the backbone, rung by rung.

The side network has a block of width d / r for each of the backbone's. Its i-th block reads
``m_i h_i + (1 - m_i) s_(i-1)``: the backbone's i-th hidden state through a projection to d / r, and what the side
network has so far, mixed by a gate m_i = sigmoid(a_i / T) with T = 0.1. A projection back to d ends it, so that the
backbone's own head can stand behind it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

TEMPERATURE = 0.1


class Ladder(nn.Module):
    """The side network.

    Args:
        width: d, of the backbone's hidden states.
        layers: how many blocks the backbone has.
        reduction: r; d / r must be a multiple of `heads`.
        heads: of attention.
        causal: a token sees only those before it, as in a language model.
    """

    def __init__(self, width: int, layers: int, reduction: int = 8, heads: int = 2, causal: bool = False) -> None:
        super().__init__()
        small = width // reduction
        self.causal = causal
        self.first = nn.Linear(width, small)  # of the embeddings
        self.rungs = nn.ModuleList(nn.Linear(width, small) for _ in range(layers))
        self.gates = nn.Parameter(torch.zeros(layers))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(small, heads, 4 * small, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm, self.last = nn.LayerNorm(small), nn.Linear(small, width)

    def forward(self, hidden: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """Hidden states ``[batch, tokens, width]``, the embeddings first, to one of them; `mask`: 1 for tokens."""
        side, tokens = self.first(hidden[0]), hidden[0].shape[1]
        later = torch.ones(tokens, tokens, dtype=torch.bool, device=side.device).triu(1) if self.causal else None
        padding = None if mask is None else mask == 0
        for h, rung, gate, block in zip(hidden[1:], self.rungs, self.gates, self.blocks, strict=True):
            mixed = torch.sigmoid(gate / TEMPERATURE)
            side = block(mixed * rung(h) + (1 - mixed) * side, src_mask=later, src_key_padding_mask=padding)
        return self.last(self.norm(side))
