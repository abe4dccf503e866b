"""Training of the scales, offsets and codes of a block, all together, by gradients of the error of what it gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..matrix import StoredMatrix
from .blocks import first_output, replaced_forward
from .effort import Effort
from .experts import StackResult, computing_with, own_matrices
from .hessians import Inputs, is_transposed, weight_of
from .trained_matrix import TrainedMatrix

_PROBES = 16  # batches from which the curvature is measured


def train(
    block: nn.Module,
    matrices: Mapping[str, StoredMatrix],
    stacks: Mapping[str, StackResult],
    inputs: Inputs,
    effort: Effort,
    seed: int,
) -> tuple[dict[str, StoredMatrix], dict[str, StackResult]]:
    """The matrices of a block with parameters and codes that are trained together; the block stays as it is.

    Args:
        block: with decoded weights.
        matrices: of layers, by name within the block.
        stacks: of experts, by name of the parameter within the block. Experts that saw too little data are not trained.
        inputs: the block's calls.
        effort: how much work to do.
        seed: of the order of batches.
    """
    random = np.random.default_rng(seed)
    codes = effort.codes
    layers = {
        name: TrainedMatrix(matrix, weight_of(block.get_submodule(name)).device, codes=codes)
        for name, matrix in matrices.items()
    }
    experts = {
        name: {
            expert: TrainedMatrix(matrix, block.get_parameter(name).device, codes=codes)
            for expert, matrix in enumerate(stack.matrices)
            if expert not in stack.unseen
        }
        for name, stack in stacks.items()
    }
    trained = [*layers.values(), *(one for stack in experts.values() for one in stack.values())]
    if not trained:
        return dict(matrices), dict(stacks)
    run = _Run(block, layers, _forwards(block, experts), inputs)
    choices = [one.choice for one in trained if one.choice is not None]
    if choices:
        for i in range(0, inputs.batches, -(-inputs.batches // _PROBES)):
            run.probe(i, seed)
            for choice in choices:
                choice.probe()
    optimizer = torch.optim.Adam([t for one in trained for t in one.tensors], lr=effort.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / effort.steps)
    order = np.concatenate([random.permutation(inputs.batches) for _ in range(effort.steps)])[: effort.steps]
    for i in map(int, order):
        optimizer.zero_grad()
        run.error(i).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        for one in trained:
            one.change_codes()
    results = {name: one.stored() for name, one in layers.items()}
    return results, {name: _trained_stack(stack, experts[name]) for name, stack in stacks.items()}


class _Run:
    """Runs a block with the matrices in training."""

    def __init__(
        self,
        block: nn.Module,
        layers: Mapping[str, TrainedMatrix],
        forwards: Mapping[nn.Module, Any],
        inputs: Inputs,
    ) -> None:
        self._block, self._layers, self._forwards, self._inputs = block, layers, forwards, inputs

    def error(self, batch: int) -> Tensor:
        """The mean squared error of what the block gives for a batch, relative to its variance."""
        found, wanted, size = self._outputs(batch)
        error: Tensor = (found - wanted).square().mean() / size
        return error

    def probe(self, batch: int, seed: int) -> None:
        """Take random signs back through the block: in the mean, squares of gradients are the error's curvature."""
        found, _, size = self._outputs(batch)
        generator = torch.Generator().manual_seed(seed + batch)
        signs = torch.randint(0, 2, found.shape, generator=generator).to(found) * 2 - 1
        ((found * signs).sum() * (2 / (found.numel() * size)) ** 0.5).backward()  # type: ignore[no-untyped-call]

    def _outputs(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """What the block gives and what it should give, of tokens that count; and the variance of the latter."""
        new = {name: one.weight() for name, one in self._layers.items()}
        new = {f"{n}.weight": w.T if is_transposed(self._block.get_submodule(n)) else w for n, w in new.items()}
        args, kwargs = self._inputs.arguments(batch)
        wanted, mask = self._inputs.wanted(batch), self._inputs.mask(batch)
        with replaced_forward(self._forwards):
            found = first_output(functional_call(self._block, new, args, kwargs))
        size = (wanted - wanted.mean()).square().mean()
        if mask is not None and found.shape[:2] == mask.shape:
            found, wanted = found[mask != 0], wanted[mask != 0]
        return found, wanted, size


def _forwards(block: nn.Module, experts: Mapping[str, Mapping[int, TrainedMatrix]]) -> dict[nn.Module, Any]:
    """For each module of experts, a forward with the matrices in training."""
    by_module: dict[str, dict[str, Mapping[int, TrainedMatrix]]] = {}
    for name, of_stack in experts.items():
        path, _, leaf = name.rpartition(".")
        by_module.setdefault(path, {})[leaf] = of_stack
    forwards = {}
    for path, stacks in by_module.items():
        module = block.get_submodule(path)
        own = own_matrices(module)

        def weight(name: str, expert: int, stacks: Any = stacks, own: Any = own) -> Tensor:
            one = stacks.get(name, {}).get(expert)
            found: Tensor = own(name, expert) if one is None else one.weight()
            return found

        forwards[module] = computing_with(module, weight)
    return forwards


def _trained_stack(stack: StackResult, trained: Mapping[int, TrainedMatrix]) -> StackResult:
    matrices = (trained[e].stored() if e in trained else matrix for e, matrix in enumerate(stack.matrices))
    return replace(stack, matrices=tuple(matrices))
