"""``lowbit_format.tune``: from a base and data to a task bundle, in one call."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..container.atomic import atomic_directory, check_absent
from ..errors import TuningError
from ..tasks.bundle import SCALES_FILE
from ..tasks.bundle_config import Description
from ..tasks.saving import save_task
from ..tasks.sharing import push_task_to_hub
from . import base as bases
from . import forward_training, training
from .columns import CLASSIFICATION, LANGUAGE, REGRESSION, TOKENS
from .data import EncodedParts, read_data
from .journal import Journal
from .rates import RATES, choose_rate
from .training import Job, Report, class_weights_of, measure, steps_for, without_dropout

AUTO = "auto"


class Run(Protocol):
    """A module with the training runs of an optimizer."""

    def try_rate(self, job: Job, rate: float, steps: int) -> float:
        """The loss after a short training that stands for a whole one."""
        ...

    def train(self, job: Job, rate: float, steps: int, *, resume: bool) -> training.Trained:
        """Train, and leave the best numbers in the model."""
        ...


@dataclass(frozen=True)
class Optimizer:
    """A way to train: its runs, the rates that are tried at first, and how many times more steps it takes."""

    runs: Run
    rates: tuple[float, ...]
    more_steps: int = 1


OPTIMIZERS = {
    "adam": Optimizer(training, RATES),
    "zo": Optimizer(forward_training, forward_training.RATES, forward_training.MORE_STEPS),
}
BATCH_SIZES = {CLASSIFICATION: 32, REGRESSION: 32, TOKENS: 16, LANGUAGE: 8}
MAX_LENGTH = 512  # tokens, where the model takes as many


def _quiet(stage: str, done: int, total: int) -> None:
    """Tell nothing."""


@dataclass(frozen=True)
class Tuned:
    """A task that has been tuned.

    Attributes:
        directory: of its bundle.
        kind: of task.
        labels: names of its labels; empty where it has none.
        method: by which it was tuned.
        numbers, saved_numbers: how many numbers were trained: in scales, and in a head.
        nbytes: of the bundle's file.
        examples: how many there were: to train on, to choose the rate and the checkpoint by, to judge by.
        notes: what was done to the data: truncated, left out.
        rate: the learning rate.
        rates: the losses of those that were tried, by rate; empty if it was given.
        steps, best_step: of the training, and of its best checkpoint, which the bundle holds.
        before, after: results on the examples to judge by, by name: of the base (with a fresh head, where it needs
            one) and of the task.
        most_frequent: the part of the examples to judge by that have the most frequent label; None without labels.
        seconds: in all, without those of a run that was interrupted.
        peak_bytes: most memory that the process has had.
        url: of the commit on the Hub, if it was pushed.
        optimizer: that trained it, ``"adam"`` or ``"zo"``.
    """

    directory: Path
    kind: str
    labels: tuple[str, ...]
    method: str
    numbers: int
    saved_numbers: int
    nbytes: int
    examples: tuple[int, int, int]
    notes: tuple[str, ...]
    rate: float
    rates: Mapping[float, float]
    steps: int
    best_step: int
    before: Mapping[str, float]
    after: Mapping[str, float]
    most_frequent: float | None
    seconds: float
    peak_bytes: int
    url: str | None = None
    optimizer: str = "adam"


def tune(
    base: str | os.PathLike[str],
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    kind: str | None = None,
    columns: Mapping[str, str] | None = None,
    labels: Sequence[str] | None = None,
    eval: str | os.PathLike[str] | float = 0.1,
    method: str | None = None,
    bits: int | None = None,
    lr: float | str = AUTO,
    optimizer: str = "adam",
    epochs: float | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    class_weights: bool = False,
    seed: int = 0,
    resume: bool = False,
    push: str | None = None,
    report: Report = _quiet,
) -> Tuned:
    """Tune the scales of a base for a task, and write the task's bundle.

    The task is what the columns of the data make it: ``text`` (and ``text_pair``) with ``label`` a classification, or
    of numbers with fractions a regression; ``tokens`` with ``tags`` a token classification; ``prompt`` (and ``input``,
    which follows it behind a blank line) with ``completion``, ``messages``, or ``text`` alone language modelling, with
    the loss on completions and on the assistant's turns. Columns that are not used are told in the notes.

    A tenth of the examples to train on is kept apart, by which the learning rate and the best checkpoint are chosen.
    The examples of `eval` only judge what came out. Needs ``pip install "lowbit-format[tune]"``.

    Args:
        base: a lowbit model with a tokenizer: directory or Hub id.
        data: a file (``.jsonl``, ``.csv``, ``.tsv``) or a data set of the Hub (``user/name[:config]``).
        out: directory of the bundle; it appears when all is done. Until then, checkpoints are in ``OUT.tuning`` beside.
        kind: ``"classification"``, ``"regression"``, ``"token-classification"`` or ``"language-modelling"``.
        columns: names of the data's columns by meaning, such as ``{"text": "review"}``, where they are not usual ones.
        labels: names of the labels; labels that are numbers then count them, from 0 on.
        eval: to judge by: a file, a split of the Hub's data set, or a part of `data` to hold out.
        method: ``"alphatuning"``, ``"peqa"`` or ``"scales"``, as in ``prepare_scale_tuning``; by default what the
            base's codec wants.
        bits: precision to tune at, of a base with several.
        lr: learning rate of the deltas; ``"auto"``: chosen by short trainings.
        optimizer: ``"adam"``, or ``"zo"``: two forward passes a step and no backward pass, with the memory of
            inference and many more steps (:class:`lowbit_format.ZerothOrder`).
        epochs: how often each example is seen, at most; by default three times, of few examples more often, and ten
            times that without a backward pass.
        batch_size: examples of a step; by default 32, of language modelling 8.
        max_length: most tokens of an example; by default 512, or as many as the model takes.
        class_weights: let each label count the same in the loss, however rare.
        seed: of all that is drawn.
        resume: go on with an interrupted tuning, to the same bundle bit for bit.
        push: repository of the Hub to publish the bundle in.
        report: called with a stage, the steps done and their number.

    Raises:
        DataError: the data cannot be read, or make no such task.
        TuningError: the base cannot do it, an option does not fit, or the training diverged.
        LoadError: `base` is no lowbit model. OutputError: `out` exists, or cannot be written.
    """
    began, place, directory = time.perf_counter(), os.fspath(base), Path(out)
    check_absent(directory)
    _check_options(lr, optimizer, epochs, batch_size, max_length)
    way = OPTIMIZERS[optimizer]
    data_read = read_data(os.fspath(data), eval, kind=kind, columns=columns or {}, labels=labels, seed=seed)
    about = Description(data_read.columns.kind, () if data_read.labels is None else data_read.labels.names)
    tokenizer = bases.load_tokenizer(place, words=about.kind == TOKENS)
    length = bases.longest(place, tokenizer, max_length, MAX_LENGTH)
    encoded = data_read.encode(tokenizer, length)
    train_items = encoded.train.items
    weights = class_weights_of(about.kind, train_items, len(about.labels)) if class_weights else None
    model, tuning, chosen = bases.load(place, about, method=method, bits=bits, seed=seed, name=directory.name)
    bases.settle(model, tokenizer, about, [item["labels"] for item in train_items])
    size = batch_size or BATCH_SIZES[about.kind]
    steps = steps_for(len(train_items), size, epochs, way.more_steps)
    settings = {
        "base": model.lowbit_base.fingerprint.body,
        **{"kind": about.kind, "labels": list(about.labels), "method": chosen, "bits": bits, "lr": lr, "steps": steps},
        **{"batch_size": size, "max_length": length, "class_weights": class_weights, "seed": seed},
        "optimizer": optimizer,
        "data": _digest(train_items, encoded.choose.items),
    }
    journal = Journal(directory.with_name(f"{directory.name}.tuning"), settings, resume=resume)
    job = Job(
        model, about.kind, tokenizer, train_items, encoded.choose.items, size, seed, weights, journal.work, report
    )
    with without_dropout(model):
        before = measure(job, encoded.judge.items)
        rate = float(lr) if lr != AUTO else choose_rate(lambda r: way.runs.try_rate(job, r, steps), journal, way.rates)
        done = way.runs.train(job, rate, steps, resume=resume)
        after = measure(job, encoded.judge.items)
    with atomic_directory(directory) as work:
        save_task(model, work, metrics={name: value for name, value in after.items() if name != "loss"})
    journal.finish()
    url = None if push is None else push_task_to_hub(directory, push)
    return Tuned(
        directory,
        about.kind,
        about.labels,
        chosen,
        tuning.numbers,
        tuning.saved_numbers,
        (directory / SCALES_FILE).stat().st_size,
        (len(train_items), len(encoded.choose.items), len(encoded.judge.items)),
        (*data_read.notes, *encoded.notes),
        rate,
        dict(journal),
        done.steps,
        done.best_step,
        before,
        after,
        _most_frequent(encoded) if about.kind == CLASSIFICATION else None,
        time.perf_counter() - began,
        _peak_bytes(),
        url,
        optimizer,
    )


def _check_options(
    lr: float | str, optimizer: str, epochs: float | None, batch_size: int | None, max_length: int | None
) -> None:
    if optimizer not in OPTIMIZERS:
        raise TuningError(f"unknown optimizer {optimizer!r}: choose one of {', '.join(OPTIMIZERS)}")
    if lr != AUTO and not (isinstance(lr, float | int) and lr > 0):
        raise TuningError(f"the learning rate is {lr!r}, expected a number above 0, or {AUTO!r}")
    for name, value, least in (("epochs", epochs, 0), ("batch_size", batch_size, 0), ("max_length", max_length, 1)):
        if value is not None and not value > least:
            raise TuningError(f"{name} is {value}, expected more than {least}")
    if importlib.util.find_spec("accelerate") is None:
        raise TuningError('transformers\' Trainer needs the package accelerate: pip install "lowbit-format[tune]"')


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _most_frequent(encoded: EncodedParts) -> float:
    counts = Counter(item["labels"] for item in encoded.judge.items)
    return max(counts.values()) / counts.total()


def _peak_bytes() -> int:
    """Most memory that this process has had so far; 0 where the system does not tell."""
    try:
        import resource
        import sys
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
