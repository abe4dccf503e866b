"""Hessians of the layers in a block: for each, the mean of ``x^T x`` over the inputs x that reach it.

Layers are taken in *stages*, in the order in which the block calls them. The layers of a stage get the same input, such
as query, key and value, and share a Hessian. Those of later stages see what the quantized ones before them give.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

LEAST_ROWS = 64  # inputs of a layer: with fewer, it is quantized as without data


@dataclass
class Stage:
    """Layers that get the same input, or one module of experts.

    Attributes:
        layers: by name within the block.
    """

    layers: list[str] = field(default_factory=list)


class Enough(Exception):
    """The last layer in question has been called."""


def find_stages(
    block: nn.Module, layers: Iterable[str], call: Callable[[], Any], alone: Iterable[str] = ()
) -> list[Stage]:
    """The stages of the layers that `call` reaches, in their order.

    Args:
        block: holds the layers.
        layers: their names within it.
        call: runs the block once.
        alone: names of modules, each of which is a stage of its own.
    """
    calls: list[tuple[str, Tensor | None]] = []
    hooks = [
        block.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: calls.append((name, args[0])))
        for name in layers
    ]
    hooks += [
        block.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: calls.append((name, None)))
        for name in alone
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
    """Sums up products of the inputs of one layer.

    Attributes:
        total: ``x^T x``, float32 ``[cols, cols]``.
        cross: ``y^T x``, y being the inputs that the layer has in the float model; or None.
        rows: number of inputs.
    """

    def __init__(self, cols: int, device: torch.device, *, with_cross: bool = False) -> None:
        self.total = torch.zeros(cols, cols, dtype=torch.float32, device=device)
        self.cross = torch.zeros_like(self.total) if with_cross else None
        self.rows = 0

    def add(self, x: Tensor, mask: Tensor | None, y: Tensor | None = None) -> None:
        """Add the rows of an input ``[..., cols]``, without tokens that `mask` ``[batch, tokens]`` pads out.

        `y` is that of the float model.
        """
        x = _rows(x, mask)
        self.total.addmm_(x.T, x)
        self.rows += len(x)
        if self.cross is not None and y is not None:
            self.cross.addmm_(_rows(y, mask).T, x)

    @property
    def hessian(self) -> Tensor:
        return self.total / max(1, self.rows)


def _rows(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None and x.dim() == 3 and x.shape[:2] == mask.shape:
        x = x[mask.to(x.device) != 0]
    elif mask is not None and x.dim() == 2 and len(x) == mask.numel():  # before experts, tokens stand in one row
        x = x[mask.to(x.device).reshape(-1) != 0]
    return x.detach().reshape(-1, x.shape[-1]).float()


class Inputs(Protocol):
    """The calls of a block, one for each batch.

    Attributes:
        batches: their number.
    """

    batches: int

    def arguments(self, batch: int, kind: str = "quantized") -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments for a batch, after quantized or after float blocks."""
        ...

    def mask(self, batch: int) -> Tensor | None:
        """``[batch, tokens]``, 0 for tokens that do not count; None if all do."""
        ...

    def wanted(self, batch: int) -> Tensor:
        """The hidden states that the float block gives after float blocks."""
        ...


class Call(NamedTuple):
    """One batch: running the block on it, after quantized or after float blocks, and its mask of tokens."""

    quantized: Callable[[], Any]
    float: Callable[[], Any] | None
    mask: Tensor | None


def arguments_of(module: nn.Module, calls: Iterable[Call]) -> Iterator[tuple[Tensor | None, list[tuple[Any, ...]]]]:
    """The arguments that a module gets in each call that reaches it: after quantized blocks, and, where the call gives
    these, after float ones; before them the call's mask."""
    seen: list[tuple[Any, ...]] = []

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((*args, *kwargs.values()))
        raise Enough

    hook = module.register_forward_pre_hook(see, with_kwargs=True)
    try:
        for call in calls:
            seen.clear()
            for run in filter(None, (call.quantized, call.float)):
                with contextlib.suppress(Enough):
                    run()
            if seen:
                yield call.mask, list(seen)
    finally:
        hook.remove()


def collect(block: nn.Module, stage: Stage, calls: Iterable[Call]) -> Collector:
    """The products of a stage's inputs: with those in the float model too, where calls give these.

    Args:
        block: holds the layers.
        stage: the layers.
        calls: one for each batch.
    """
    layer = block.get_submodule(stage.layers[0])
    weight, calls = weight_of(layer), list(calls)
    collector = Collector(weight.shape[1], weight.device, with_cross=all(call.float for call in calls))
    for mask, seen in arguments_of(layer, calls):
        collector.add(seen[0][0], mask, seen[-1][0])
    return collector


def is_transposed(layer: nn.Module) -> bool:
    """Whether the layer keeps its weight as ``[cols, rows]`` (transformers' Conv1D)."""
    return not isinstance(layer, nn.Linear)


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a layer as ``[rows, cols]``."""
    weight = layer.weight
    assert isinstance(weight, Tensor)  # noqa: S101 - a layer has one; tells the type checker
    return weight.detach().T if is_transposed(layer) else weight.detach()
