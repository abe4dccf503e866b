"""A network beside a frozen one: it reads the frozen one's hidden states and is all that gradients pass through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class SideTuned(nn.Module):
    """A frozen backbone, which runs without a backward pass, and a side network that makes its hidden states over.

    Args:
        backbone: a model of transformers that returns hidden states; from here on frozen.
        side: takes the tuple of hidden states ``[batch, tokens, width]``, the embeddings first, and the attention mask
            or None; gives ``[batch, tokens, width]``.
        head: what comes behind it.
    """

    def __init__(self, backbone: nn.Module, side: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.side, self.head = backbone.requires_grad_(False), side, head

    def forward(self, **inputs: Any) -> Tensor:
        """The head's result for the backbone's `inputs`."""
        with torch.no_grad():
            hidden = self.backbone(**inputs, output_hidden_states=True).hidden_states
        return self.head(self.side(hidden, inputs.get("attention_mask")))
