"""A look at a conversion before it is published: every tensor has its place, and it decodes to what was meant.

The model is built without data, so this takes no memory to speak of. One module of each kind is read
back, and must have the very error that it had when it was quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..container.reader import ModelReader
from ..errors import ConversionError, LowbitError
from ..integrations.file_names import FileNames
from ..integrations.placement import place_modules, tie
from ..quantize.solve import measured
from ..runtime.active_tasks import TaskState
from .architecture import meta_model
from .completeness import fit
from .experts import stack_errors
from .journal import Outcome
from .plan import Plan, Step, Taken
from .source import Source
from .steps import load_step
from .taken import check_taken


def check_output(source: Source, plan: Plan, outcomes: Mapping[str, Outcome], directory: Path) -> None:
    """Raise ConversionError unless the lowbit model in `directory` is what `plan` made of `source`, with `outcomes`."""
    try:
        reader = ModelReader(directory)
        model = meta_model(directory)
        if type(model).__name__ != plan.architecture:
            raise ConversionError(f"config.json names {type(model).__name__}, expected {plan.architecture}")
        placed = place_modules(model, FileNames(model, reader), None, TaskState())
        tie(model, placed)
        lacking = reader.config.modules.keys() - {entry.path for entry in placed.files.values()}
        if lacking:
            raise ConversionError(f"{type(model).__name__} has no place for {min(lacking)!r}")
        fit(model, list(reader.names()), directory)
    except LowbitError as e:
        raise ConversionError(
            f"the conversion made a directory that does not load, which is a fault of lowbit_format: {e}; it was not "
            "published. Please report this, with the name of the checkpoint"
        ) from e
    for step in _samples(plan):
        _compare(source, step, outcomes[step.path], reader)


def _samples(plan: Plan) -> list[Step]:
    """The smallest module of each kind and dtype."""
    smallest: dict[Any, Step] = {}
    for step in sorted(plan.quantized, key=lambda s: -s.tensor.numel):
        smallest[step.destination.kind, step.tensor.dtype] = step
    return list(smallest.values())


def _compare(source: Source, step: Step, outcome: Outcome, reader: ModelReader) -> None:
    if isinstance(step.target, Taken):
        experts = [None] if step.stack is None else range(step.stack.shape[0])
        check_taken(step, (reader.matrix(step.path, expert) for expert in experts))
        return
    if step.stack is not None:
        found = stack_errors(source, step.stack, lambda expert: reader.matrix(step.path, expert))
    else:
        found = measured(load_step(source, step), reader.matrix(step.path)).squared_error
    if found != outcome.squared_error:
        raise ConversionError(
            f"{step.path}: decodes to other weights than the solver gave, which is a fault of lowbit_format or of the "
            "disk; nothing was published. Please run again, and report it if it stays"
        )
