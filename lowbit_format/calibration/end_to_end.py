"""Trains the scales of a whole quantized model to predict what the float model predicts.

The codes stay; scales and offsets of all layers move together, by gradients of the Kullback-Leibler divergence of the
model's predictions from the float model's: the end-to-end pass of EfficientQAT (Chen et al. 2024, arXiv:2407.11062),
with the float model as the teacher as in LLM-QAT (Liu et al. 2023, arXiv:2305.17888).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import CalibrationError
from .effort import Effort
from .trained_matrix import TrainedMatrix

_WARM_UP = 4  # steps in which the learning rate rises


class Samples(Protocol):
    """What goes into the model, batch by batch.

    Attributes:
        batches: their number; each is an optimizer step.
    """

    batches: int

    def wanted(self, batch: int) -> Any:
        """The float model's output."""
        ...

    def found(self, batch: int) -> Any:
        """The quantized model's output with the matrices in training."""
        ...

    def mask(self, batch: int) -> Tensor | None:
        """``[samples, tokens]``, 0 for tokens that do not count; None if all do."""
        ...


def tune(matrices: Collection[TrainedMatrix], samples: Samples, effort: Effort, seed: int = 0) -> list[float]:
    """Train matrices in place.

    Args:
        matrices: of all layers.
        samples: to train on.
        effort: says for how long.
        seed: of the order of batches.

    Returns:
        The mean divergence of each step, in nats (of models without predictions: squared error relative to size).

    Raises:
        CalibrationError: the divergence is not finite.
    """
    random, losses = np.random.default_rng(seed), []
    optimizer = torch.optim.Adam([t for one in matrices for t in one.tensors], lr=effort.end_rate, betas=(0.9, 0.95))
    order = [int(i) for _ in range(effort.passes) for i in random.permutation(samples.batches)]

    def rate(step: int) -> float:
        return float(min(1.0, (step + 1) / _WARM_UP) * (1 - step / len(order)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for batch in order:
        optimizer.zero_grad()
        with torch.no_grad():
            wanted = samples.wanted(batch)
        loss = divergence(samples.found(batch), wanted, samples.mask(batch))
        if not bool(loss.isfinite()):
            raise CalibrationError(
                "the training of all scales together met a divergence that is not finite; take --effort fast, or "
                "another text"
            )
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(float(loss.detach()))
        optimizer.step()
        schedule.step()
    return losses


def divergence(found: Any, wanted: Any, mask: Tensor | None) -> Tensor:
    """How far an output is from the wanted one: of predictions the mean divergence in nats, else a relative error."""
    logits = getattr(wanted, "logits", None)
    if isinstance(logits, Tensor) and logits.dim() == 3:
        p, q = found.logits, logits
        if mask is not None and mask.shape == q.shape[:2]:
            p, q = p[mask != 0], q[mask != 0]
        p, q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        return torch.nn.functional.kl_div(p, q, reduction="none", log_target=True).sum(-1).mean()
    first, target = found[0].float(), wanted[0].float()
    if mask is not None and mask.shape == target.shape[:2]:
        first, target = first[mask != 0], target[mask != 0]
    error: Tensor = (first - target).square().mean() / (target - target.mean()).square().mean()
    return error
