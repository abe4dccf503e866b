"""Training of the scales and offsets of a block, all together, by gradients of the error of what the block gives."""

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


def train(
    block: nn.Module,
    matrices: Mapping[str, StoredMatrix],
    stacks: Mapping[str, StackResult],
    inputs: Inputs,
    effort: Effort,
    seed: int,
) -> tuple[dict[str, StoredMatrix], dict[str, StackResult]]:
    """The matrices of a block with scales and offsets that are trained together; the block stays as it is.

    Args:
        block: with decoded weights.
        matrices: of layers, by name within the block.
        stacks: of experts, by name of the parameter within the block. Experts that saw too little data are not trained.
        inputs: the block's calls.
        effort: how much work to do.
        seed: of the order of batches.
    """
    random = np.random.default_rng(seed)
    layers = {name: TrainedMatrix(m, weight_of(block.get_submodule(name)).device) for name, m in matrices.items()}
    experts = {
        name: {
            expert: TrainedMatrix(matrix, block.get_parameter(name).device)
            for expert, matrix in enumerate(stack.matrices)
            if expert not in stack.unseen
        }
        for name, stack in stacks.items()
    }
    trained = [t for one in (*layers.values(), *(e for s in experts.values() for e in s.values())) for t in one.tensors]
    if not trained:
        return dict(matrices), dict(stacks)
    forwards = _forwards(block, experts)
    optimizer = torch.optim.Adam(trained, lr=effort.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / effort.steps)
    order = np.concatenate([random.permutation(inputs.batches) for _ in range(effort.steps)])[: effort.steps]
    for i in map(int, order):
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
    results = {name: one.stored() for name, one in layers.items()}
    return results, {name: _trained_stack(stack, experts[name]) for name, stack in stacks.items()}


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
