"""Hierarchical side tuning (Lin et al. 2023, arXiv:2310.05393): features of several scales beside a vision transformer.

The side network is a pyramid: a stem of convolutions, then stages, each of half the resolution of the one before. A
stage has a block for each of the backbone's that it belongs to. A block attends from the pyramid's features to two
kinds of tokens: those of the meta-register, which the backbone's block has computed beside its own, and the mean of its
image tokens. Then it adds these image tokens, brought to the stage's resolution, and ends with an MLP. A projection
brings what the backbone gives to the stage's width (the transformation bridge).

The tokens of the meta-register are trained. Since they go through the backbone, gradients have to as well. With
``register=0`` there are none, and the backbone runs without a backward pass. (The authors train the norms of the
backbone as well.)
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HierarchicalSideTuning(nn.Module):
    """A frozen vision transformer with its side network and a classifier.

    Args:
        embeddings: of the backbone: pixels ``[batch, 3, height, width]`` to tokens, one for the class and then patches.
        blocks: of the backbone.
        width: of the backbone's tokens.
        labels: how many.
        stages: widths of the pyramid's stages, multiples of `heads`; as many blocks belong to each.
        heads: of attention.
        register: how many tokens the meta-register has in each block.
    """

    def __init__(
        self,
        embeddings: Callable[[Tensor], Tensor],
        blocks: Sequence[nn.Module],
        width: int,
        labels: int,
        stages: Sequence[int] = (32, 48, 64, 72),
        heads: int = 2,
        register: int = 1,
    ) -> None:
        super().__init__()
        self.embeddings, self.blocks = embeddings, nn.ModuleList(blocks)
        self.requires_grad_(False)  # what is made from here on is trained
        self.per_stage = len(blocks) // len(stages)
        self.register = nn.Parameter(torch.empty(len(blocks), register, width)) if register else None
        if self.register is not None:
            nn.init.xavier_uniform_(self.register)
        narrow = nn.Conv2d(3, stages[0], 3, stride=2, padding=1, bias=False)
        stem = nn.Sequential(narrow, nn.BatchNorm2d(stages[0]), nn.ReLU(), nn.Conv2d(stages[0], stages[0], 2, stride=2))
        steps = [nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in itertools.pairwise(stages)]
        self.steps, self.step_norms = nn.ModuleList([stem, *steps]), nn.ModuleList(nn.LayerNorm(d) for d in stages)
        self.bridges = nn.ModuleList(nn.Linear(width, d) for d in stages)
        self.side = nn.ModuleList(
            nn.ModuleList(_Block(d, heads, register) for _ in range(self.per_stage)) for d in stages
        )
        self.norms = nn.ModuleList(nn.LayerNorm(d) for d in stages)
        self.head_norm, self.head = nn.BatchNorm1d(stages[-1], affine=False), nn.Linear(stages[-1], labels)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels ``[batch, 3, height, width]`` to logits ``[batch, labels]``."""
        read = self._read(pixels)
        x = pixels
        for s, (step, bridge) in enumerate(zip(self.steps, self.bridges, strict=True)):
            grid = step(x)
            side = self.step_norms[s](grid.flatten(2).transpose(1, 2))
            for i, block in enumerate(self.side[s]):
                meta, patches = read[s * self.per_stage + i]
                image = bridge(_resized(patches, grid.shape[2:]))
                side = block(side, bridge(meta), image)
            side = self.norms[s](side)
            x = side.transpose(1, 2).reshape(grid.shape)
        return self.head(self.head_norm(side.mean(1)))

    def _read(self, pixels: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Of each block of the backbone: tokens of the register ``[batch, register, width]``, and those of patches."""
        found = []
        with torch.no_grad() if self.register is None else contextlib.nullcontext():
            x = self.embeddings(pixels)
            for i, block in enumerate(self.blocks):
                meta = x[:, :0] if self.register is None else self.register[i].expand(len(x), -1, -1)
                y = block(torch.cat([meta, x], 1))
                meta, x = y.split([meta.shape[1], x.shape[1]], 1)
                found.append((meta, x[:, 1:]))
        return found


class _Block(nn.Module):
    """A block of the side network, of width `d`."""

    def __init__(self, d: int, heads: int, register: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.meta_norm = nn.LayerNorm(d) if register else nn.Identity()
        self.attention = nn.MultiheadAttention(d, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x: Tensor, meta: Tensor, image: Tensor) -> Tensor:
        """``x`` and `image` ``[batch, places, d]``, `meta` ``[batch, register, d]``, to ``[batch, places, d]``."""
        tokens = torch.cat([self.meta_norm(meta), image.mean(1, keepdim=True)], 1)
        x = x + self.attention(self.norm1(x), tokens, tokens, need_weights=False)[0] + image
        return x + self.mlp(self.norm2(x))


def _resized(patches: Tensor, size: torch.Size) -> Tensor:
    """Tokens of a square of patches ``[batch, patches, width]`` at another resolution, as tokens again."""
    side = round(patches.shape[1] ** 0.5)
    image = patches.transpose(1, 2).unflatten(2, (side, side))
    return F.interpolate(image, tuple(size), mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
