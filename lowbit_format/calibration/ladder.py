"""Quantizes the layers of one block, step by step; each step lowers the error of what the block gives."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import CalibrationError
from ..matrix import StoredMatrix
from ..quantize import Target
from ..quantize.calibrated import Calibrated, quantize_for_outputs, without_drift
from .blocks import first_output
from .decoded import decoded
from .effort import Effort
from .experts import StackResult, experts_of, quantize_experts, set_experts
from .hessians import LEAST_ROWS, Call, Inputs, collect, find_stages, is_transposed, weight_of
from .training import train

_MEASURED = 16  # batches on which the error of a block is measured


@dataclass(frozen=True)
class BlockResult:
    """A block whose layers are quantized.

    Attributes:
        layers: by name within the block; absent where too little data reached a layer.
        last: name of the last step.
        errors: squared error of the block's outputs relative to their variance, after each step.
        stacks: of experts, by name of the parameter within the block; absent where no data reached them.
    """

    layers: dict[str, Calibrated]
    last: str
    errors: dict[str, float] = field(default_factory=dict)
    stacks: dict[str, StackResult] = field(default_factory=dict)


def quantize_block(
    block: nn.Module, targets: Mapping[str, Target], inputs: Inputs, effort: Effort, *, path: str, seed: int = 0
) -> BlockResult:
    """Quantize layers of a block; their weights become the decoded ones.

    Args:
        block: with float weights, on the device to compute on.
        targets: of layers, and of parameters that are stacks of experts, by name within the block.
        inputs: the block's calls.
        effort: how much work to do.
        path: of the block, for messages.
        seed: of the order of batches in training.

    Raises:
        CalibrationError: what the block gives or gets is not finite.
    """
    experts = experts_of(block, targets)
    stacked = {f"{path}.{leaf}" for path, leaves in experts.items() for leaf in leaves}
    layers = {name: block.get_submodule(name) for name in targets if name not in stacked}
    weights = {name: weight_of(layer) for name, layer in layers.items()}

    originals: dict[str, Tensor] = {f"{name}.weight": layer.weight for name, layer in layers.items()}  # type: ignore[misc]
    originals |= {name: block.get_parameter(name) for name in stacked}

    def quantized(batch: int) -> Any:
        args, kwargs = inputs.arguments(batch)
        return block(*args, **kwargs)

    def plain(batch: int) -> Any:
        return functional_call(block, originals, *inputs.arguments(batch, "float"))

    calls = [
        Call(
            functools.partial(quantized, batch),
            functools.partial(plain, batch) if effort.drift else None,
            inputs.mask(batch),
        )
        for batch in range(inputs.batches)
    ]
    found: dict[str, Calibrated] = {}
    stacks: dict[str, StackResult] = {}
    with torch.no_grad():
        for stage in find_stages(block, layers, calls[0].quantized, alone=experts):
            at = stage.layers[0]
            if at in experts:
                own = {leaf: targets[f"{at}.{leaf}"] for leaf in experts[at]}
                made = quantize_experts(block.get_submodule(at), own, calls, effort, path=f"{path}.{at}")
                stacks |= {f"{at}.{leaf}": result for leaf, result in made.items()}
                continue
            seen = collect(block, stage, calls)
            if not bool(torch.isfinite(seen.total).all()):
                raise CalibrationError(
                    f"{path}.{stage.layers[0]}: gets inputs that are not finite; leave out the text that causes them, "
                    "or keep this block in full precision"
                )
            if seen.rows < LEAST_ROWS:
                continue
            for name in stage.layers:
                weight = weights[name] if seen.cross is None else without_drift(weights[name], seen.cross, seen.total)
                found[name] = quantize_for_outputs(
                    weight, targets[name], seen.hessian, sweeps=effort.sweeps, name=f"{path}.{name}"
                )
                _set_weight(layers[name], found[name].matrix)
        if not effort.steps or not (found or stacks):
            return BlockResult(found, "layer by layer", stacks=stacks)
        before = _error(quantized, inputs)
    originals.clear()  # memory: the float weights have done their work
    weights.clear()
    untrained = {name: one.matrix for name, one in found.items()}
    step = ""
    for step, work in _trainings(effort).items():
        matrices, trained = train(block, untrained, stacks, inputs, work, seed)
        with torch.no_grad():
            _put_in(block, matrices, trained)
            if _error(quantized, inputs) < before:
                found = {name: replace(found[name], matrix=matrix) for name, matrix in matrices.items()}
                return BlockResult(found, step, {"layer by layer": before}, trained)
    with torch.no_grad():  # a router is no smooth function of the scales before it
        _put_in(block, untrained, stacks)
    return BlockResult(found, step, {"layer by layer": before}, stacks)


def _trainings(effort: Effort) -> dict[str, Effort]:
    """Trainings of a block by their names, each to be tried if the one before it made the block worse."""
    scales = {"scales together": replace(effort, codes=False)}
    return {"scales and codes together": effort, **scales} if effort.codes else scales


def _error(quantized: Callable[[int], Any], inputs: Inputs) -> float:
    """The error of what the block gives now, see :class:`OutputError`."""
    error = OutputError(inputs.batches)
    for i in error.batches:
        error.add(first_output(quantized(i)), inputs.wanted(i), inputs.mask(i))
    return error.value


def _put_in(block: nn.Module, matrices: Mapping[str, StoredMatrix], stacks: Mapping[str, StackResult]) -> None:
    """Give layers and stacks of a block the weights that their matrices decode to."""
    for name, matrix in matrices.items():
        _set_weight(block.get_submodule(name), matrix)
    for name, stack in stacks.items():
        set_experts(block, name, stack)


def _set_weight(layer: nn.Module, matrix: StoredMatrix) -> None:
    """Give a layer the weight that the matrix decodes to."""
    old = weight_of(layer)
    new = decoded(matrix, old.device).to(old.dtype)
    layer.weight = nn.Parameter((new.T if is_transposed(layer) else new).contiguous(), requires_grad=False)


class OutputError:
    """Squared error of a block's outputs relative to their variance, over some of the batches.

    Attributes:
        batches: that are looked at.
    """

    def __init__(self, samples: int) -> None:
        self.batches = range(0, samples, -(-samples // _MEASURED))
        self._error = self._size = 0.0

    def add(self, found: Tensor, wanted: Tensor, mask: Tensor | None) -> None:
        """Add the hidden states that a block gives for a batch, and those that it should give."""
        away, wanted = (found - wanted).float(), wanted.float() - wanted.float().mean()
        if mask is not None and wanted.shape[:2] == mask.shape:
            away, wanted = away[mask != 0], wanted[mask != 0]
        self._error += float(away.square().sum())
        self._size += float(wanted.square().sum())

    @property
    def value(self) -> float:
        return self._error / self._size if self._size > 0 else 0.0
