"""One training run of a task: transformers' ``Trainer``, with what scale tuning needs set."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import TuningError
from ..runtime.deltas import TunedDelta
from ..tasks.checkpoint import WEIGHTS_FILE
from ..tasks.trainer import TaskCallback
from .columns import CLASSIFICATION, LANGUAGE, TOKENS
from .encoding import Item
from .metrics import reduced, results
from .rates import trial_rate, trial_steps

Report = Callable[[str, int, int], None]  # of a stage by name: steps done, and of all

WARM_UP = 0.06  # part of the steps
HEAD_RATE = 3e-3  # most for a head: its numbers have the size of weights, not of deltas
PATIENCE = 3  # evaluations without a better one, and the training ends
EVALUATIONS = 10  # in a training, not more often than every 5 steps


@dataclass(frozen=True)
class Job:
    """What all runs of one tuning share.

    Attributes:
        model: after ``prepare_scale_tuning``.
        kind: of task.
        tokenizer: pads batches.
        train, choose: encoded examples: to train on; to choose the rate and the checkpoint by.
        batch_size: examples of a step.
        seed: of the order of examples.
        weights: of the labels in the loss, float32 ``[labels]``; None: all the same.
        work: directory for checkpoints.
        report: told of every step.
    """

    model: Any
    kind: str
    tokenizer: Any
    train: Sequence[Item]
    choose: Sequence[Item]
    batch_size: int
    seed: int
    weights: Tensor | None
    work: Path
    report: Report


@dataclass(frozen=True)
class Trained:
    """A finished training: its steps, those of the best checkpoint, whose numbers the model has, and the best loss."""

    steps: int
    best_step: int
    loss: float


def try_rate(job: Job, rate: float, steps: int) -> float:
    """The loss after the short training that stands for one of `steps` with `rate` (:mod:`.rates`)."""
    return loss_after(job, trial_rate(rate, steps), trial_steps(steps), f"rate {rate:g}")


def loss_after(job: Job, rate: float, steps: int, stage: str) -> float:
    """The loss on the examples to choose by after a training, infinite if it diverged; the model is left as it was."""
    start = [p.detach().clone() for p in trained(job.model)]
    try:
        trainer = _trainer(job, rate, steps, stage, save_strategy="no", eval_strategy="no")
        trainer.train()
        loss = measure(job, job.choose, trainer)["loss"]
    finally:
        with torch.no_grad():
            for p, value in zip(trained(job.model), start, strict=True):
                p.copy_(value)
                p.grad = None
    return loss if math.isfinite(loss) else math.inf


def train(job: Job, rate: float, steps: int, *, resume: bool = False) -> Trained:
    """Train, keep checkpoints in ``job.work``, stop early, and leave the best checkpoint's numbers in the model.

    With `resume` it goes on from the newest whole checkpoint there, to the same numbers as without a pause; where that
    ended the training, nothing is trained.
    """
    checkpoint = newest_checkpoint(job.work) if resume else None
    if checkpoint is not None and (done := _ended(checkpoint, steps)) is not None:
        _load(job.model, job.work / f"checkpoint-{done.best_step}")
        return done
    every = evaluation_steps(steps)
    kept = {"save_strategy": "steps", "save_steps": every, "save_total_limit": 2}
    judged = {
        "eval_strategy": "steps",
        "eval_steps": every,
        "metric_for_best_model": "loss",
        "greater_is_better": False,
    }
    trainer = _trainer(
        job, rate, steps, "training", **kept, **judged,
        load_best_model_at_end=True, restore_callback_states_from_checkpoint=True,
    )  # fmt: skip
    trainer.add_callback(transformers.EarlyStoppingCallback(PATIENCE))
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return _trained_by(trainer.state)


def _ended(checkpoint: Path, steps: int) -> Trained | None:
    """What was trained, if the training ended with this checkpoint: at its last step, or early.

    The Trainer forgets an early end when it resumes.
    """
    state = transformers.TrainerState.load_from_json(str(checkpoint / transformers.trainer.TRAINER_STATE_NAME))
    patience = state.stateful_callbacks["EarlyStoppingCallback"]["attributes"]["early_stopping_patience_counter"]
    return _trained_by(state) if state.global_step >= steps or patience >= PATIENCE else None


def _trained_by(state: Any) -> Trained:
    return Trained(state.global_step, int(Path(state.best_model_checkpoint).name.split("-")[-1]), state.best_metric)


def _load(model: nn.Module, checkpoint: Path) -> None:
    """Put the trained numbers of a checkpoint into the model, as the Trainer does with those of the best."""
    found = load_file(checkpoint / WEIGHTS_FILE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(found[name])


def measure(job: Job, items: Sequence[Item], trainer: Any = None) -> dict[str, float]:
    """Results of the model as it is, by name."""
    trainer = trainer or _trainer(job, 0.0, 1, "evaluation", save_strategy="no", eval_strategy="no")
    found = trainer.evaluate(eval_dataset=list(items))
    names = [key.removeprefix("eval_") for key in found if key.startswith("eval_")]
    return {name: found[f"eval_{name}"] for name in names if name in _RESULTS}


_RESULTS = ("loss", "accuracy", "f1", "mse", "pearson", "perplexity")


def newest_checkpoint(work: Path) -> Path | None:
    """The newest checkpoint that is whole: the Trainer writes its state last."""
    whole = [p.parent for p in work.glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=lambda p: int(p.name.split("-")[-1]), default=None)


def steps_for(examples: int, batch_size: int, epochs: float | None, more: int = 1) -> int:
    """How many steps to train: three epochs; of few examples up to 20 for 200 steps, of many one for 2,000 steps.

    Without a number of epochs, `more` times as many. Rounded up, so that the last step is followed by an evaluation.
    """
    an_epoch = math.ceil(examples / batch_size)
    few, many = min(200, 20 * an_epoch), max(2000, an_epoch)
    steps = more * min(max(3 * an_epoch, few), many) if epochs is None else max(1, round(epochs * an_epoch))
    return math.ceil(steps / evaluation_steps(steps)) * evaluation_steps(steps)


def evaluation_steps(steps: int) -> int:
    """Steps between two evaluations."""
    return min(steps, max(5, math.ceil(steps / EVALUATIONS)))


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """No dropout inside the block: it helps where many numbers are trained, and costs where few are."""
    modules = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    before = [m.p for m in modules]
    for m in modules:
        m.p = 0.0
    try:
        yield
    finally:
        for m, p in zip(modules, before, strict=True):
            m.p = p


def _trainer(job: Job, rate: float, steps: int, stage: str, **options: Any) -> Any:
    arguments = transformers.TrainingArguments(
        str(job.work),
        max_steps=steps,
        learning_rate=rate,
        warmup_steps=round(WARM_UP * steps),
        lr_scheduler_type="linear",
        weight_decay=0.0,
        max_grad_norm=0.0,  # Adam divides by the gradient's size
        per_device_train_batch_size=job.batch_size,
        per_device_eval_batch_size=job.batch_size * (1 if job.kind == LANGUAGE else 2),
        seed=job.seed,
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        label_names=["labels"],
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    trainer = transformers.Trainer(
        job.model,
        arguments,
        data_collator=collator(job),
        train_dataset=list(job.train),  # type: ignore[arg-type, unused-ignore]
        eval_dataset=list(job.choose),  # type: ignore[arg-type, unused-ignore]
        compute_loss_func=None if job.weights is None else weighted_loss(job.weights),
        preprocess_logits_for_metrics=lambda logits, labels: reduced(job.kind, logits, labels),
        compute_metrics=lambda found: _results(job.kind, found),
        optimizers=(_optimizer(job.model, rate), None),
        callbacks=[TaskCallback(), _Watch(stage, job.report)],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _results(kind: str, found: Any) -> dict[str, float]:
    return results(kind, found.predictions, found.label_ids)


def _optimizer(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """Adam without decay; a head's numbers get at most :data:`HEAD_RATE`."""
    rates = rate, min(rate, HEAD_RATE)
    groups = [{"params": part, "lr": r} for part, r in zip(parts_of(model), rates, strict=True) if part]
    return torch.optim.AdamW(groups, weight_decay=0.0)


def parts_of(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """What is trained: deltas, and other numbers."""
    deltas = {id(p) for m in model.modules() if isinstance(m, TunedDelta) for p in m.parameters()}
    return [p for p in trained(model) if id(p) in deltas], [p for p in trained(model) if id(p) not in deltas]


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters in training."""
    return [p for p in model.parameters() if p.requires_grad]


def collator(job: Job) -> Any:
    """Makes a padded batch of examples."""
    if job.kind == LANGUAGE:
        return transformers.DataCollatorForSeq2Seq(job.tokenizer)  # it pads labels as well
    if job.kind == TOKENS:
        return transformers.DataCollatorForTokenClassification(job.tokenizer)
    return transformers.DataCollatorWithPadding(job.tokenizer)


def class_weights_of(kind: str, items: Sequence[Item], count: int) -> Tensor:
    """Weights of the labels by which each counts the same in all, float32 ``[count]``; 1 on average of the examples."""
    if kind not in (CLASSIFICATION, TOKENS):
        raise TuningError(f"a task of {kind} has no classes to weigh (--class-weights, class_weights=)")
    flat = [label for item in items for label in _listed(item["labels"]) if label >= 0]
    numbers = torch.bincount(torch.tensor(flat), minlength=count).float()
    return len(flat) / (count * numbers.clamp_min(1))


def _listed(labels: Any) -> list[int]:
    return labels if isinstance(labels, list) else [labels]


def weighted_loss(weights: Tensor) -> Callable[..., Tensor]:
    """The loss of a batch, from what the model gives and the labels, with weights of classes."""

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        logits = outputs["logits"].float()
        flat = logits.reshape(-1, logits.shape[-1])
        return nn.functional.cross_entropy(flat, labels.reshape(-1), weights.to(flat.device))

    return loss


class _Watch(transformers.TrainerCallback):
    """Tells of every step, and stops a training that diverged before anything of it is saved."""

    def __init__(self, stage: str, report: Report) -> None:
        self.stage, self.report = stage, report

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.report(self.stage, state.global_step, state.max_steps)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.save_strategy != "no" and not math.isfinite(kwargs["metrics"]["eval_loss"]):
            raise diverged(args.learning_rate)


def diverged(rate: float) -> TuningError:
    """The error of a training whose loss is no longer finite."""
    return TuningError(f"the training diverged at the learning rate {rate:g}; give a smaller one (--lr, lr=)")
