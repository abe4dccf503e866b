"""HUT (Zhang et al. 2024, arXiv:2409.13501): the weight is multiplied, entry by entry, by what two thin matrices make.

Here as ``W * (1 + left right)``: the change of an entry is in proportion to it, and with zeros in `left` it starts as
the layer alone. The weight itself is read at every call.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HUTLinear(nn.Module):
    """A frozen linear layer whose weight is multiplied.

    Args:
        linear: the layer.
        rank: of the matrix of factors.
    """

    def __init__(self, linear: nn.Linear, rank: int = 8) -> None:
        super().__init__()
        like = {"dtype": linear.weight.dtype, "device": linear.weight.device}
        self.linear = linear
        self.left = nn.Parameter(torch.zeros(linear.out_features, rank, **like))
        self.right = nn.Parameter(torch.empty(rank, linear.in_features, **like))
        nn.init.kaiming_uniform_(self.right, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[..., in_features]`` to ``[..., out_features]``."""
        return F.linear(x, self.linear.weight * (1 + self.left @ self.right), self.linear.bias)
