"""Convert a Hugging Face checkpoint: open, plan, carry out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..container.writer import SHARD_BYTES
from ..errors import BudgetError, CalibrationError, RecipeError, WorkerError
from ..matrix import F32
from .budgeted import Budget, Choice, choose_bits
from .calibration_data import Calibration, read_data
from .card import model_card
from .check import check_output
from .conversion_report import HELD_OUT, OWN_TEXT, Evaluated, conversion_report, write_report
from .driver import run
from .huggingface import open_checkpoint
from .journal import Outcome
from .plan import Plan, Step
from .planning import DEFAULT_RECIPE, plan_conversion, plan_opened
from .recipe import Recipe
from .source import Source, named_as_shown
from .streamed import StreamedSource
from .workers import Workers, workers_memory

if TYPE_CHECKING:
    import torch

    from ..calibration.compare import Comparison
    from ..calibration.ladder import BlockResult
    from ..remote import Traffic
    from .calibrated import Calibrated
    from .sensitivity import Divergences
    from .student import Quality


@dataclass(frozen=True)
class Conversion:
    """A finished conversion.

    Attributes:
        directory: of the model.
        plan: what was planned.
        outcomes: of every quantized module, by path.
        seconds: that it took.
        quality: at each precision (None is full): on data that were held out, or without data on a text of our own.
        unmeasured: why a conversion without data could not be measured, or "".
        calibrated: it was made with data.
        unseen: paths of modules that too little of the data reached: they were quantized without. Of a module of
            experts, how many of them.
        traffic: what was fetched of the weights, where they were streamed without workers; else None.
        choice: of bits for a budget, if one was given.
    """

    directory: Path
    plan: Plan
    outcomes: dict[str, Outcome]
    seconds: float
    quality: dict[int | None, Quality] = field(default_factory=dict)
    unmeasured: str = ""
    calibrated: bool = False
    unseen: tuple[str, ...] = ()
    traffic: Traffic | None = None
    choice: Choice | None = None

    @property
    def comparison(self) -> Comparison | None:
        """With the float model, at full precision, on data that were held out; None if there were none."""
        return self.quality[None].after if None in self.quality else None


def fit_budget(
    source: str,
    budget: Budget,
    recipe: Recipe = DEFAULT_RECIPE,
    *,
    calibration: Calibration | None = None,
    report: Callable[[Step, int], None] = lambda step, total: None,
    **options: Any,
) -> Choice:
    """Choose the bits of every module for a size, so that the expected damage is least.

    It is the divergence from the float model's predictions, as :mod:`.sensitivity` measures it on data, or without data
    (a causal model with a tokenizer, where memory allows) on a short text of our own.

    Args:
        source: a directory, or a repository on the Hub.
        budget: the size.
        recipe: all but the bits: codec, group size, modules to keep, limits of bits by pattern.
        calibration: data; damage is then that of what layers give, else that of their weights.
        report: called after the candidates of each module with its step and the number of all.
        options: others of :func:`plan_conversion`.

    Returns:
        The choice; its recipe makes the same bytes as a conversion with the budget.

    Raises:
        BudgetError: the budget is less than the least, or there is nothing to choose.
        SourceError, RecipeError, CoverageError, CalibrationError: as for a conversion.
    """
    opened, plan, _ = plan_conversion(source, recipe, **options)
    with named_as_shown(opened):
        return _fit(opened, plan, recipe, budget, calibration, report)


def _fit(
    opened: Source,
    plan: Plan,
    recipe: Recipe,
    budget: Budget,
    calibration: Calibration | None,
    report: Callable[[Step, int], None] = lambda step, total: None,
) -> Choice:
    weighed: dict[str, F32] | None = None
    divergences: Divergences | None = None
    shares: dict[str, NDArray[np.float64]] | None = None
    if budget.rows:
        shares = _shares(opened, plan, calibration)
    if calibration is not None:
        from .importance import importances  # a leaf that imports torch
        from .sensitivity import Divergences, probe_batch

        data, device = read_data(calibration, opened.directory), torch_device(calibration)
        weighed = importances(opened, plan, data, device)
        divergences = Divergences(opened, plan, probe_batch(data), device)
    elif not isinstance(opened, StreamedSource):
        from .measure import divergences_without_data

        divergences = divergences_without_data(opened, plan)
    return choose_bits(opened, plan, recipe, budget, weighed, divergences, report, shares)


def _shares(opened: Source, plan: Plan, calibration: Calibration | None) -> dict[str, NDArray[np.float64]]:
    """What a budget of rows needs. Raises BudgetError if it cannot be had."""
    if calibration is not None:
        raise BudgetError(
            "rows of different bits are quantized without data, and --calibrate gives data; leave --rows or it out"
        )
    from .measure import shares_without_data  # a leaf that imports torch

    found = None if isinstance(opened, StreamedSource) else shares_without_data(opened, plan)
    if not found:
        raise BudgetError(
            f"{plan.architecture}: bits of rows need the gradients of a causal model on a short text, which cannot be "
            "had here (no tokenizer, too little memory, a stream, or another kind of model); leave --rows out"
        )
    return found


def convert_hf_to_lowbit(
    source: str,
    out: str | Path,
    recipe: Recipe = DEFAULT_RECIPE,
    *,
    budget: Budget | Choice | None = None,
    revision: str | None = None,
    min_coverage: float = 0.9,
    strip_prefix: Sequence[str] = (),
    leave_out: Sequence[str] = (),
    requantize: bool = False,
    calibration: Calibration | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    stream: bool | None = None,
    resume: bool = False,
    workers: int | None = None,
    ray: str | None = None,
    measured: bool | None = None,
    report: Callable[[Step, int], None] = lambda step, total: None,
    report_block: Callable[[str, BlockResult], None] = lambda path, result: None,
) -> Conversion:
    """Convert a Hugging Face checkpoint into a lowbit model directory.

    Memory stays at about 1 GiB plus three times the largest tensor in float32, whatever the size of the model. Of a
    stack of experts, one expert is in float32 at a time, beside the whole stack in its new form.

    Args:
        source: a directory, or a repository on the Hub.
        out: directory to make; must not exist, or be empty.
        recipe: what to quantize, and how.
        budget: a size for which the bits are chosen that `recipe` leaves open, or what :func:`fit_budget` chose.
        revision: branch, tag or commit on the Hub.
        min_coverage: part of the matrices' weights that must be quantized.
        strip_prefix: taken off the names of the tensors, such as ``_orig_mod.``.
        leave_out: patterns of files beside the weights that must not come along.
        requantize: quantize the weights of a release that is quantized already anew, from what it decodes to.
        calibration: data to quantize with, and how much work to do; None quantizes every weight alone.
        max_shard_bytes: size at which a new file is begun.
        stream: fetch the Hub's weights tensor by tensor, by range requests, and keep none of their files; None: where
            they do not fit the disk of the Hub's cache.
        resume: go on with what an interrupted run left; the result is the same bytes.
        workers: processes that quantize, a tensor each at a time; the result is the same bytes. None: this process
            alone, with a thread for each core. A script needs its main part under ``if __name__ == "__main__":``.
        ray: address of a Ray cluster that has the workers (extra ``ray``): ``auto``, ``ray://host:10001``, or ``local``
            for one that is begun here. Its machines have the same packages, and `source` under the same path.
        measured: compare the model with its checkpoint in the end: with data on what is held out for this, without data
            (a causal model only) on a short text of our own. None: only with data. Without data it is left out where
            weights are streamed: all of them would be fetched again, and again for every sample.
        report: called after every tensor with its step and the number of all steps.
        report_block: called after every block that was calibrated with its path and what came of it.

    Raises:
        LowbitError: one of its subclasses; nothing that looks finished is left behind.
    """
    began = time.perf_counter()
    checkpoint = open_checkpoint(source, revision=revision, leave_out=leave_out, stream=stream)
    traffic = checkpoint.traffic if isinstance(checkpoint, StreamedSource) else None
    planned: dict[str, Any] = {
        "min_coverage": min_coverage, "strip_prefix": strip_prefix, "leave_out": leave_out, "requantize": requantize,
    }  # fmt: skip
    with named_as_shown(checkpoint):
        opened, plan, config = plan_opened(checkpoint, recipe, **planned)
        choice = None
        if budget is not None:
            choice = budget if isinstance(budget, Choice) else _fit(opened, plan, recipe, budget, calibration)
            recipe = choice.recipe
            opened, plan, config = plan_opened(checkpoint, recipe, **planned)
        elif limits := [rule.match for rule in recipe.rules if rule.is_open]:
            raise RecipeError(
                f"the rule for {limits[0]!r} leaves its bits open, which needs a budget (--bits-budget, --size)"
            )
    others = None
    if workers is not None or ray is not None:
        if calibration is not None:
            raise WorkerError(
                "a calibration needs its blocks one after the other, which workers cannot do; leave the workers out "
                "(one process uses all cores)"
            )
        where = os.path.abspath(source) if checkpoint.repo_id is None else source
        streamed = traffic is not None
        opening = partial(plan_conversion, where, recipe, revision=checkpoint.revision, stream=streamed, **planned)
        others = Workers(opening, workers, ray)
    fetched = traffic if others is None else None  # what workers fetch is not known here
    out, quantizer = Path(out), None
    if calibration is not None:
        with named_as_shown(checkpoint):
            quantizer = calibrated(opened, plan, calibration, report_block, measured=measured is not False)
        plan = replace(plan, steps=quantizer.steps)

    def tell(work: Path, found: dict[str, Outcome]) -> None:
        (work / "README.md").write_text(model_card(opened, plan, found, name=out.name), "utf-8")
        blocks = [] if quantizer is None else quantizer.blocks
        evaluated = None if quantizer is None else Evaluated(quantizer.quality, HELD_OUT)
        write_report(work, conversion_report(plan, found, blocks=blocks, evaluated=evaluated, choice=choice))

    outcomes = run(
        opened,
        plan,
        config,
        out,
        side=lambda work: plan.side.write(opened.directory, work),
        tell=tell,
        max_shard_bytes=max_shard_bytes,
        quantizer=quantizer,
        workers=others,
        check=lambda work, found: check_output(opened, plan, found, work),
        resume=resume,
        report=report,
    )
    seconds = time.perf_counter() - began
    if quantizer is not None:
        return Conversion(
            out, plan, outcomes, seconds, quantizer.quality, calibrated=True, unseen=tuple(quantizer.unseen),
            traffic=fetched, choice=choice,
        )  # fmt: skip
    if not measured:
        return Conversion(out, plan, outcomes, seconds, traffic=fetched, choice=choice)
    if traffic is not None:
        why = "its weights are streamed, and would all be fetched again"
        return Conversion(out, plan, outcomes, seconds, unmeasured=why, traffic=fetched, choice=choice)
    from .measure import measure  # a leaf that imports torch

    found = measure(opened, plan, out)
    quality, why = ({}, found) if isinstance(found, str) else (found, "")
    if quality:
        write_report(out, conversion_report(plan, outcomes, evaluated=Evaluated(quality, OWN_TEXT), choice=choice))
    return Conversion(out, plan, outcomes, seconds, quality, why, choice=choice)


def peak_memory(
    source: Source, plan: Plan, calibration: Calibration | None, *, measured: bool, workers: int | None = None
) -> int:
    """Expected peak of resident memory of a conversion, with all its workers on one machine, in bytes."""
    if workers is not None:
        return workers_memory(plan, workers)
    if calibration is not None:
        return calibrated(source, plan, calibration, measured=measured).peak_memory()
    if not measured:
        return plan.peak_memory()
    from .measure import is_measured, measuring_memory  # a leaf that imports torch

    return max(plan.peak_memory(), measuring_memory(plan) if is_measured(plan, source.directory) else 0)


def calibrated(
    source: Source,
    plan: Plan,
    calibration: Calibration,
    report: Callable[[str, BlockResult], None] = lambda path, result: None,
    *,
    measured: bool = True,
) -> Calibrated:
    """What quantizes the weights of a plan with data.

    Raises:
        CalibrationError: the data cannot be used, or the model cannot be run on them.
    """
    from .calibrated import Calibrated  # a leaf that imports torch

    if plan.release and not plan.requantized:
        raise CalibrationError(
            f"{source.directory}: is quantized already ({plan.release}), and its own grid is kept: there is nothing to "
            "calibrate; leave --calibrate out, quantize it anew (--requantize), or convert the original checkpoint"
        )
    device = torch_device(calibration)
    data = read_data(calibration, source.directory)
    if not measured:
        data = replace(data, batches=data.batches[: len(data.batches) - data.held_out], held_out=0)
    return Calibrated(source, plan, data, calibration.work, device=device, report=report)


def torch_device(calibration: Calibration) -> torch.device:
    """The device to calibrate on. Raises CalibrationError if torch cannot use it."""
    import torch

    try:
        device = torch.device(calibration.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise CalibrationError(f"device is {calibration.device!r}, which torch cannot use here: {e}") from e
    return device
