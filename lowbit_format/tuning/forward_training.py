"""Training runs of a task with the memory of inference: :class:`..tasks.zeroth_order.ZerothOrder` over batches.

Only deltas are perturbed. A head, which begins at random and has the last word, gets its own gradients from the same
two passes: what it needs for them is its input alone, since nothing below it has gradients.

A checkpoint is what the optimizer's state is, seeds and derivatives, with the evaluations so far, and the head. Deltas
of any step are those of the start with the steps repeated, bit for bit: so the best ones come back, too.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..container.atomic import atomic_file
from ..errors import OutputError, TuningError
from ..tasks.zeroth_order import LOG, ZerothOrder
from .training import (
    HEAD_RATE,
    PATIENCE,
    Job,
    Trained,
    collator,
    diverged,
    evaluation_steps,
    measure,
    parts_of,
    trained,
    weighted_loss,
)

MORE_STEPS = 10  # times those of a training with gradients
RATES = (3e-4, 1e-3, 3e-3)  # that are tried
TRIAL = 10  # of so many parts of the steps is a trial; its rate is the rate itself
ALIKE = 50  # batches whose examples are sorted by length
CHECKPOINT = "checkpoint-steps.safetensors"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of a parameter


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
    def best(self) -> int:
        """The index of the least loss, of equal ones the first."""
        return self.losses.index(min(self.losses))

    @property
    def stale(self) -> int:
        """Evaluations since the best one."""
        return len(self.losses) - 1 - self.best if self.losses else 0


class Run:
    """A training of `steps` steps that has begun.

    Attributes:
        deltas: makes the steps of the scales.
        head: makes those of the other numbers; None if there are none.
        best: the head's numbers at the best evaluation.
    """

    def __init__(self, job: Job, rate: float, steps: int) -> None:
        self.job, self.rate, self.steps = job, rate, steps
        self.scales, self.others = parts_of(job.model)
        self.deltas = ZerothOrder(self.scales, rate, seed=job.seed)
        self.head = torch.optim.AdamW(self.others, HEAD_RATE, weight_decay=0.0) if self.others else None
        self.best = _values(self.others)

    @property
    def done(self) -> int:
        """Steps that have been made."""
        return len(self.deltas.seeds)

    def go(self, count: int, stage: str) -> None:
        """Make `count` steps. Raises TuningError if a loss is not finite."""
        batches, device = _Batches(self.job), self.scales[0].device
        self.job.model.eval()
        for p in self.scales:
            p.requires_grad_(False)
        try:
            for step in range(self.done, self.done + count):
                self._step({name: t.to(device) for name, t in batches[step].items()}, 1 - step / self.steps)
                self.job.report(stage, step + 1, self.steps)
        finally:
            for p in self.scales:
                p.requires_grad_()

    def _step(self, batch: dict[str, Tensor], part: float) -> None:
        """One step, at `part` of the rates."""
        self.deltas.param_groups[0]["lr"] = self.rate * part
        if self.head is None:
            self.deltas.step(lambda: self._loss(batch))
            return
        self.head.param_groups[0]["lr"] = HEAD_RATE * part
        self.head.zero_grad()
        self.deltas.step(lambda: self._loss_of_head(batch))
        self.head.step()

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        outputs, weights = self.job.model(**batch), self.job.weights
        found: Tensor = outputs.loss if weights is None else weighted_loss(weights)(outputs, batch["labels"])
        return found

    def _loss_of_head(self, batch: dict[str, Tensor]) -> float:
        """The loss; half its gradient is added to the head's, which is then that in the middle of two passes."""
        with torch.inference_mode(False), torch.enable_grad():
            loss = self._loss(batch)
            (loss / 2).backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def state_dict(self) -> dict[str, Tensor]:
        """All that the rest of the training depends on, and the head's best numbers."""
        tensors: dict[str, Tensor] = self.deltas.state_dict()
        for i, (p, best) in enumerate(zip(self.others, self.best, strict=True)):
            moments = {} if self.head is None else self.head.state[p]
            named = {"numbers": p.detach(), "best": best, **moments}
            tensors |= {f"head.{i}.{name}": t.contiguous() for name, t in named.items()}
        return tensors

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Undo :meth:`state_dict`, in a run that has just begun. Raises KeyError for tensors that are missing."""
        self.deltas.load_state_dict(tensors)
        for i, p in enumerate(self.others):
            mine = {name: tensors[f"head.{i}.{name}"] for name in ("numbers", "best", *MOMENTS)}
            _put([p], [mine.pop("numbers")])
            self.best[i] = mine.pop("best").to(p.device)
            if self.head is not None:
                self.head.state[p] = {name: t if name == "step" else t.to(p.device) for name, t in mine.items()}


def try_rate(job: Job, rate: float, steps: int) -> float:
    """The loss after a tenth of the steps, infinite if it diverged; the model is left as it was."""
    start, count = _values(trained(job.model)), max(1, steps // TRIAL)
    try:
        Run(job, rate, count).go(count, f"rate {rate:g}")
        loss = measure(job, job.choose)["loss"]
    except TuningError:  # a loss that is not finite
        return math.inf
    finally:
        _put(trained(job.model), start)
    return loss if math.isfinite(loss) else math.inf


def train(job: Job, rate: float, steps: int, *, resume: bool = False) -> Trained:
    """As :func:`.training.train`, without a backward pass: train, stop early, leave the best numbers in the model."""
    start, found, path = _values(trained(job.model)), Evaluations(), job.work / CHECKPOINT
    run = Run(job, rate, steps)
    if resume and path.exists():
        found = _read(path, run)
    while run.done < steps and found.stale < PATIENCE:
        try:
            run.go(evaluation_steps(steps), "training")
        except TuningError as e:
            raise diverged(rate) from e
        loss = measure(job, job.choose)["loss"]
        if not math.isfinite(loss):
            raise diverged(rate)
        found.steps.append(run.done)
        found.losses.append(loss)
        if found.stale == 0:
            run.best = _values(run.others)
        _write(path, run, found)
    best_step = found.steps[found.best]
    _put(trained(job.model), start)
    state = run.deltas.state_dict()
    ZerothOrder(run.scales).load_state_dict(state | {name: state[name][:best_step] for name in LOG})
    _put(run.others, run.best)
    return Trained(run.done, best_step, min(found.losses))


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


def _values(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]


@torch.no_grad()
def _put(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for p, value in zip(parameters, values, strict=True):
        p.copy_(value)


def _write(path: Path, run: Run, found: Evaluations) -> None:
    tensors = {
        **run.state_dict(),
        "evaluated": torch.tensor(found.steps, dtype=torch.int64),
        "losses": torch.tensor(found.losses, dtype=torch.float64),
    }
    with atomic_file(path) as f:
        f.write(safetensors.torch.save(tensors))


def _read(path: Path, run: Run) -> Evaluations:
    """Put `run` where a checkpoint is; its evaluations."""
    try:
        tensors = safetensors.torch.load(path.read_bytes())
        run.load_state_dict(tensors)
        return Evaluations(tensors["evaluated"].tolist(), tensors["losses"].tolist())
    except (OSError, KeyError, TuningError, safetensors.SafetensorError) as e:
        raise OutputError(f"{path}: cannot be read ({e}); remove {path.parent} and begin anew") from e
