"""Hessians of the layers in a block: for each, the mean of ``x^T x`` over the inputs x that reach it.

Layers are taken in *stages*, in the order in which the block calls them. The layers of a stage get the same input, such
as query, key and value, and share a Hessian. Those of later stages see what the quantized ones before them give.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Stage:
    """Layers that get the same input.

    Attributes:
        layers: by name within the block.
    """

    layers: list[str] = field(default_factory=list)


class Enough(Exception):
    """The last layer in question has been called."""


def find_stages(block: nn.Module, layers: Iterable[str], call: Callable[[], Any]) -> list[Stage]:
    """The stages of the layers that `call` reaches, in their order.

    Args:
        block: holds the layers.
        layers: their names within it.
        call: runs the block once.
    """
    calls: list[tuple[str, Tensor]] = []
    hooks = [
        block.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: calls.append((name, args[0])))
        for name in layers
    ]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    stages: list[Stage] = []
    last: Tensor | None = None
    seen = set[str]()
    for name, x in calls:
        if name in seen:  # called again: it belongs where it was called first
            continue
        seen.add(name)
        if last is None or x is not last:
            stages.append(Stage())
        stages[-1].layers.append(name)
        last = x
    return stages


class Collector:
    """Sums up ``x^T x`` of one layer.

    Attributes:
        total: float32 ``[cols, cols]``.
        rows: number of inputs.
    """

    def __init__(self, cols: int, device: torch.device) -> None:
        self.total = torch.zeros(cols, cols, device=device)
        self.rows = 0

    def add(self, x: Tensor, mask: Tensor | None) -> None:
        """Add the rows of an input ``[..., cols]``, without tokens that `mask` ``[batch, tokens]`` pads out."""
        if mask is not None and x.dim() == 3 and x.shape[:2] == mask.shape:
            x = x[mask.to(x.device) != 0]
        x = x.detach().reshape(-1, x.shape[-1]).float()
        self.total.addmm_(x.T, x)
        self.rows += len(x)

    @property
    def hessian(self) -> Tensor:
        return self.total / max(1, self.rows)


def collect(block: nn.Module, stage: Stage, calls: Iterable[tuple[Callable[[], Any], Tensor | None]]) -> Collector:
    """The Hessian of a stage.

    Args:
        block: holds the layers.
        stage: the layers.
        calls: each runs the block on one batch, which has this mask of tokens.
    """
    layer = block.get_submodule(stage.layers[0])
    weight = weight_of(layer)
    collector = Collector(weight.shape[1], weight.device)
    mask: Tensor | None = None

    def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        collector.add(args[0], mask)
        raise Enough

    hook = layer.register_forward_pre_hook(see)
    try:
        for call, mask in calls:  # noqa: B007 - `see` reads the mask
            with contextlib.suppress(Enough):
                call()
    finally:
        hook.remove()
    return collector


def is_transposed(layer: nn.Module) -> bool:
    """Whether the layer keeps its weight as ``[cols, rows]`` (transformers' Conv1D)."""
    return not isinstance(layer, nn.Linear)


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a layer as ``[rows, cols]``."""
    weight = layer.weight
    assert isinstance(weight, Tensor)  # noqa: S101 - a layer has one; tells the type checker
    return weight.detach().T if is_transposed(layer) else weight.detach()
