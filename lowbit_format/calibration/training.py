"""Training of the scales, offsets and codes of a block, all together, by gradients of the error of what it gives."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..matrix import StoredMatrix
from .blocks import first_output, replaced_forward
from .effort import Effort
from .experts import StackResult, computing_with, matrices_of, own_matrices
from .hessians import Inputs, as_rows, is_transposed, weight_of
from .trained_matrix import TrainedMatrix


def train(
    block: nn.Module,
    matrices: Mapping[str, StoredMatrix],
    stacks: Mapping[str, StackResult],
    originals: MutableMapping[str, Tensor],
    inputs: Inputs,
    effort: Effort,
    seed: int,
) -> tuple[dict[str, StoredMatrix], dict[str, StackResult]]:
    """The matrices of a block with parameters and codes that are trained together; the block stays as it is.

    Args:
        block: with decoded weights.
        matrices: of layers, by name within the block.
        stacks: of experts, by name of the parameter within the block. Experts that saw too little data are not trained.
        originals: the float parameters of the block, by name within it. They are taken out one by one.
        inputs: the block's calls.
        effort: how much work to do.
        seed: of the order of batches.
    """
    random = np.random.default_rng(seed)
    if not effort.code_rate:
        originals.clear()
    layers, experts = _layers(block, matrices, originals), _experts(block, stacks, originals)
    originals.clear()
    trained = [*layers.values(), *(one for stack in experts.values() for one in stack.values())]
    if not trained:
        return dict(matrices), dict(stacks)
    forwards = _forwards(block, experts)
    optimizer = torch.optim.Adam([t for one in trained for t in one.tensors], lr=effort.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / effort.steps)
    choices = [one.choice for one in trained if one.choice is not None]
    order = np.concatenate([random.permutation(inputs.batches) for _ in range(effort.steps)])[: effort.steps]
    for step, i in enumerate(map(int, order)):
        new = {name: one.weight() for name, one in layers.items()}
        new = {f"{n}.weight": w.T if is_transposed(block.get_submodule(n)) else w for n, w in new.items()}
        args, kwargs = inputs.arguments(i)
        wanted, mask = inputs.wanted(i), inputs.mask(i)
        with replaced_forward(forwards):
            away = first_output(functional_call(block, new, args, kwargs)) - wanted
            size = (wanted - wanted.mean()).square().mean()
            if mask is not None and away.shape[:2] == mask.shape:
                away = away[mask != 0]
            optimizer.zero_grad()
            (away.square().mean() / size).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        for choice in choices:
            choice.step(effort.code_rate / effort.steps * (1 - step / effort.steps))
    results = {name: one.stored() for name, one in layers.items()}
    return results, {name: _trained_stack(stack, experts[name]) for name, stack in stacks.items()}


def _layers(
    block: nn.Module, matrices: Mapping[str, StoredMatrix], originals: MutableMapping[str, Tensor]
) -> dict[str, TrainedMatrix]:
    found = {}
    for name, matrix in matrices.items():
        layer, original = block.get_submodule(name), originals.pop(f"{name}.weight", None)
        rows = None if original is None else as_rows(layer, original)
        found[name] = TrainedMatrix(matrix, weight_of(layer).device, rows)
    return found


def _experts(
    block: nn.Module, stacks: Mapping[str, StackResult], originals: MutableMapping[str, Tensor]
) -> dict[str, dict[int, TrainedMatrix]]:
    found: dict[str, dict[int, TrainedMatrix]] = {}
    for name, stack in stacks.items():
        device, original = block.get_parameter(name).device, originals.pop(name, None)
        rows = [None] * len(stack.matrices) if original is None else matrices_of(block, name, original)
        found[name] = {
            expert: TrainedMatrix(matrix, device, rows[expert])
            for expert, matrix in enumerate(stack.matrices)
            if expert not in stack.unseen
        }
    return found


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
