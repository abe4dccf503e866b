"""Training runs of a task with the memory of inference: :class:`..tasks.zeroth_order.ZerothOrder` over a job's batches.

A checkpoint is what the optimizer's state is, seeds and derivatives, with the evaluations so far. Nothing else is kept:
numbers of any step are those of the start with the steps repeated, bit for bit, and that is how the best checkpoint
comes back, too.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ..container.atomic import atomic_file
from ..errors import OutputError, TuningError
from ..tasks.zeroth_order import ZerothOrder
from .training import (
    PATIENCE,
    Job,
    Trained,
    collator,
    diverged,
    evaluation_steps,
    groups_of,
    measure,
    trained,
    weighted_loss,
)

MORE_STEPS = 10  # times those of a training with gradients
RATES = (1e-2, 3e-2, 1e-1)  # that are tried
TRIAL = 10  # of so many parts of the steps is a trial; its rate is the rate itself
ALIKE = 50  # batches whose examples are sorted by length
CHECKPOINT = "checkpoint-steps.safetensors"


@dataclass
class Evaluations:
    """The losses on the examples to choose by.

    Attributes:
        steps: after which.
        losses: as many.
    """

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def best_step(self) -> int:
        """The first step with the least loss."""
        return self.steps[self.losses.index(min(self.losses))]

    @property
    def stale(self) -> int:
        """Evaluations since the best one."""
        return len(self.losses) - 1 - self.losses.index(min(self.losses)) if self.losses else 0


def try_rate(job: Job, rate: float, steps: int) -> float:
    """The loss after a tenth of the steps, infinite if it diverged; the model is left as it was."""
    start, count = _values(job.model), max(1, steps // TRIAL)
    try:
        _run(job, _optimizer(job, rate), rate, count, f"rate {rate:g}", range(count))
        loss = measure(job, job.choose)["loss"]
    except TuningError:  # a loss that is not finite
        return math.inf
    finally:
        _put(job.model, start)
    return loss if math.isfinite(loss) else math.inf


def train(job: Job, rate: float, steps: int, *, resume: bool = False) -> Trained:
    """As :func:`.training.train`, without a backward pass: train, stop early, leave the best numbers in the model."""
    start, optimizer, found = _values(job.model), _optimizer(job, rate), Evaluations()
    path = job.work / CHECKPOINT
    if resume and path.exists():
        found = _read(path, optimizer)
    between = evaluation_steps(steps)
    while (done := len(optimizer.seeds)) < steps and found.stale < PATIENCE:
        try:
            _run(job, optimizer, rate, steps, "training", range(done, done + between))
        except TuningError as e:
            raise diverged(rate) from e
        loss = measure(job, job.choose)["loss"]
        if not math.isfinite(loss):
            raise diverged(rate)
        found.steps.append(len(optimizer.seeds))
        found.losses.append(loss)
        _write(path, optimizer, found)
    _put(job.model, start)
    state = {name: values[: found.best_step] for name, values in optimizer.state_dict().items()}
    _optimizer(job, rate).load_state_dict(state)
    return Trained(len(optimizer.seeds), found.best_step, min(found.losses))


def _run(job: Job, optimizer: ZerothOrder, rate: float, steps: int, stage: str, part: range) -> None:
    """Steps `part` of a training of `steps`, whose rate falls to nothing."""
    loss_of: Callable[..., Tensor] | None = None if job.weights is None else weighted_loss(job.weights)
    model, device = job.model.eval(), next(job.model.parameters()).device
    rates, batches = [group["lr"] for group in groups_of(job.model, rate)], _Batches(job)
    for step in part:
        batch = {name: t.to(device) for name, t in batches[step].items()}

        def loss(batch: dict[str, Tensor] = batch) -> Tensor:
            outputs = model(**batch)
            found: Tensor = outputs.loss if loss_of is None else loss_of(outputs, batch["labels"])
            return found

        for group, full in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = full * (1 - step / steps)
        optimizer.step(loss)
        job.report(stage, step + 1, steps)


class _Batches:
    """The padded batch of each step. Each epoch has an order of its own, drawn from the seed and the epoch's number.

    Examples of about the same length stand together, so that little of a batch is padding.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.collate = job, collator(job)
        self._of_epoch = functools.lru_cache(maxsize=1)(self._draw)

    def __getitem__(self, step: int) -> Any:
        epoch, i = divmod(step, math.ceil(len(self.job.train) / self.job.batch_size))
        return self.collate([self.job.train[k] for k in self._of_epoch(epoch)[i]])

    def _draw(self, epoch: int) -> list[list[int]]:
        """Indices of the examples of every batch."""
        train, size, draw = self.job.train, self.job.batch_size, random.Random(f"{self.job.seed}/{epoch}")
        order, batches = draw.sample(range(len(train)), len(train)), list[list[int]]()
        for i in range(0, len(order), ALIKE * size):
            alike = sorted(order[i : i + ALIKE * size], key=lambda k: len(train[k]["input_ids"]))
            batches += [alike[j : j + size] for j in range(0, len(alike), size)]
        draw.shuffle(batches)
        return batches


def _optimizer(job: Job, rate: float) -> ZerothOrder:
    return ZerothOrder(groups_of(job.model, rate), rate, seed=job.seed)


def _values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in trained(model)]


@torch.no_grad()
def _put(model: nn.Module, values: list[Tensor]) -> None:
    for p, value in zip(trained(model), values, strict=True):
        p.copy_(value)


def _write(path: Path, optimizer: ZerothOrder, found: Evaluations) -> None:
    tensors = {
        **optimizer.state_dict(),
        "evaluated": torch.tensor(found.steps, dtype=torch.int64),
        "losses": torch.tensor(found.losses, dtype=torch.float64),
    }
    with atomic_file(path) as f:
        f.write(safetensors.torch.save(tensors))


def _read(path: Path, optimizer: ZerothOrder) -> Evaluations:
    """Repeat the steps of a checkpoint; its evaluations."""
    try:
        tensors = safetensors.torch.load(path.read_bytes())
        found = Evaluations(tensors["evaluated"].tolist(), tensors["losses"].tolist())
    except (OSError, KeyError, safetensors.SafetensorError) as e:
        raise OutputError(f"{path}: cannot be read ({e}); remove {path.parent} and begin anew") from e
    optimizer.load_state_dict(tensors)
    return found
