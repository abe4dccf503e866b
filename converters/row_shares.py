"""Which rows of a matrix count: the share of each in the damage that quantizing the matrix does.

An error in an output changes the divergence of a model's predictions by half its square times the mean square of the
derivative of the log likelihood by that output, for words drawn from the model's own predictions: the diagonal of
Fisher's information (Amari 1998; Martens and Grosse 2015, arXiv:1503.05671, for layers). With a relative error that all
rows of a matrix have alike, a row counts by that, times the mean square of its output, columns taken as independent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .blockwise import BlockwiseModel
from .plan import Plan, Step
from .source import Source
from .steps import load_step

SEED = 0  # of the words that are drawn


def row_shares(
    source: Source, plan: Plan, batches: Sequence[Mapping[str, Tensor]], device: torch.device
) -> dict[str, NDArray[np.float64]]:
    """The shares of the rows of every Linear and Conv1D to quantize, float64 ``[rows]`` that add up to 1, by its path.

    Memory holds one block at a time. A module that no gradient reaches is absent.

    Args:
        source: the checkpoint, of a causal model.
        plan: of its conversion.
        batches: of text, ``input_ids`` and what goes with them.
        device: to compute on.

    Raises:
        CalibrationError: the model cannot be run block by block.
    """
    model, seen = BlockwiseModel(source, plan, device), _Squares()
    hooks = [module.register_forward_hook(seen.of(step.path)) for step, module in model.layers()]
    embeddings: nn.Module = model.float_model.model.get_input_embeddings()
    hooks.append(embeddings.register_forward_hook(lambda module, args, out: out.detach().requires_grad_()))

    generator = torch.Generator(device).manual_seed(SEED)
    try:
        with torch.enable_grad():
            for batch in batches:
                seen.is_forward = True
                output: Any = model.run({k: v.to(device) for k, v in batch.items()})
                logits = output.logits.flatten(0, -2).float()
                words = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
                seen.is_forward = False  # on the way back blocks are computed once more
                torch.autograd.backward(nn.functional.cross_entropy(logits, words, reduction="sum"))
    finally:
        for hook in hooks:
            hook.remove()
    found = {step.path: _shares(source, step, seen) for step, _ in model.layers() if step.path in seen.outputs}
    return {path: shares for path, shares in found.items() if np.isfinite(shares).all()}


class _Squares:
    """Sums of squares: of each module's inputs ``[cols]``, and of derivatives by its outputs ``[rows]``."""

    def __init__(self) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.is_forward = True

    def of(self, path: str) -> Any:
        """A hook for the forward of the module at `path`."""

        def add(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            if self.is_forward and out.requires_grad:
                _add(self.inputs, path, args[0])
                out.register_hook(lambda grad: _add(self.outputs, path, grad))  # type: ignore[no-untyped-call]

        return add


def _add(sums: dict[str, Tensor], path: str, values: Tensor) -> None:
    squares = values.detach().reshape(-1, values.shape[-1]).double().square().sum(0)
    sums[path] = sums[path] + squares if path in sums else squares


def _shares(source: Source, step: Step, seen: _Squares) -> NDArray[np.float64]:
    inputs, outputs = (sums[step.path].cpu().numpy() for sums in (seen.inputs, seen.outputs))
    weight = load_step(source, step)
    counts: NDArray[np.float64] = outputs * (np.square(weight, dtype=np.float64) @ inputs)
    total = counts.sum()
    return counts / total if total > 0 else np.full(len(counts), 1 / len(counts))
