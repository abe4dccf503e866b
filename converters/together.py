"""The last part of a calibrated conversion: the scales of all layers are trained together, and the model is measured.

It works on the complete model in the work directory. What is trained is kept in a file before the shards are written
again, so that an interrupted run changes each of them once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor

from ..calibration.compare import Comparison
from ..calibration.effort import Effort
from ..calibration.end_to_end import tune
from ..calibration.walk import Walk
from ..container.reader import ModelReader
from ..container.writer import StoredTensor, module_tensors, replace_tensors
from ..matrix import Params, StoredMatrix
from ..quantize.solve import measured
from .float_model import FloatModel
from .journal import Outcome
from .plan import Step
from .source import Source
from .steps import load_step
from .student import Quality, Student, matrices_at, precisions

TRAINED = "trained.safetensors"  # beside the activations
FULL = "full"  # precision, in what was measured


class _Samples:
    """See :class:`..calibration.end_to_end.Samples`."""

    def __init__(self, walk: Walk, student: Student) -> None:
        self._walk, self._student = walk, student
        self.batches = walk.samples

    def wanted(self, batch: int) -> Any:
        return self._walk.output(batch, "float")

    def found(self, batch: int) -> Any:
        return self._student.output(self._walk.batch(batch))

    def mask(self, batch: int) -> Tensor | None:
        return self._walk.mask(batch)


def compare(walk: Walk, student: Student) -> Comparison:
    """The student beside the float model, on the batches held out."""
    comparison = Comparison()
    with torch.no_grad():
        for i in range(walk.samples, len(walk.batches)):
            batch = walk.batch(i)
            comparison.add(student.output(batch), walk.output(i, "float"), batch)
    return comparison


def train_together(
    directory: Path,
    scratch: Path,
    source: Source,
    float_model: FloatModel,
    walk: Walk,
    steps: Sequence[Step],
    outcomes: Mapping[str, Outcome],
    effort: Effort,
) -> tuple[dict[str, Outcome], dict[str, Any]]:
    """Train the scales of a model, at each of its precisions, and measure them.

    Args:
        directory: of the model; its files are written again.
        scratch: keeps what is trained until then.
        source: the checkpoint.
        float_model: the same as a model.
        walk: through all its blocks.
        steps: that were quantized.
        outcomes: of them.
        effort: says for how long; perhaps not at all.

    Returns:
        New outcomes of the modules that have changed, and the :class:`Quality` at each precision as JSON takes it.
    """
    trained = scratch / TRAINED
    if not trained.is_file():
        _train(trained, directory, float_model, walk, steps, outcomes, effort)
    with safe_open(trained, "np") as f:
        found: dict[str, Any] = json.loads(f.metadata()["measured"])
        params = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 - it is no dictionary
    return _write(directory, source, steps, outcomes, params), found


def _train(
    file: Path,
    directory: Path,
    float_model: FloatModel,
    walk: Walk,
    steps: Sequence[Step],
    outcomes: Mapping[str, Outcome],
    effort: Effort,
) -> None:
    reader = ModelReader(directory)
    trainable = [s.path for s in steps if s.stack is None and not s.rounded and not outcomes[s.path].lossless]
    nested = {path: reader.module(path).scheme.nested for path in trainable}
    full: dict[str, StoredMatrix] = {}  # what was trained at full precision
    params: dict[str, np.ndarray[Any, Any]] = {}
    found: dict[str, Any] = {}
    for bits in precisions(reader, steps):

        def fixed(path: str, bits: int | None = bits) -> list[StoredMatrix]:
            return [full[path]] if path in full else matrices_at(reader, path, bits)

        here = [path for path in trainable if bits is None or bits in nested[path]]
        trained = {path: matrices_at(reader, path, bits)[0] for path in here}
        student = Student(float_model, walk.lists, walk.device, steps, trained, fixed)
        before = after = compare(walk, student)
        if effort.passes and trained:
            tune(student.trained.values(), _Samples(walk, student), effort)
            for one in student.trained.values():
                one.round()
            after = compare(walk, student)
            if after.distance > before.distance:
                after = before
        found[FULL if bits is None else str(bits)] = asdict(Quality(before, after))
        if after is before:
            continue
        for path in trained:
            matrix = student.trained[path].stored()
            params[_name(path, "scales", bits)] = matrix.params.scales
            if matrix.params.shift is not None:
                params[_name(path, "shift", bits)] = matrix.params.shift
            if bits is None:
                full[path] = matrix
    partial = file.with_suffix(".tmp")
    save_file(params, partial, {"measured": json.dumps(found)})
    os.replace(partial, file)


def _name(path: str, what: str, bits: int | None) -> str:
    """Of an array in the file of what was trained."""
    return f"{path} {what} {FULL if bits is None else bits}"


def _write(
    directory: Path,
    source: Source,
    steps: Sequence[Step],
    outcomes: Mapping[str, Outcome],
    params: Mapping[str, np.ndarray[Any, Any]],
) -> dict[str, Outcome]:
    """Write the shards again with other parameters; the new outcomes."""
    reader = ModelReader(directory)
    new: dict[str, dict[str, StoredTensor]] = {}  # by file
    changed = {}

    def other(old: Params, path: str, bits: int | None) -> Params:
        scales = params.get(_name(path, "scales", bits))
        return old if scales is None else Params(scales, params.get(_name(path, "shift", bits)))

    for step in steps:
        if not any(name.startswith(f"{step.path} ") for name in params):
            continue
        matrix, outcome = reader.matrix(step.path), outcomes[step.path]
        nested = {k: other(p, step.path, k) for k, p in matrix.nested.items()}
        matrix = replace(matrix, params=other(matrix.params, step.path, None), nested=nested)
        for tensor in module_tensors(outcome.module, matrix):
            if tensor.dtype == outcome.module.scheme.scale_dtype:
                new.setdefault(reader.file_of(tensor.name), {})[tensor.name] = tensor
        result = measured(load_step(source, step), matrix)
        changed[step.path] = replace(outcome, squared_error=result.squared_error)
    del reader  # which maps the files
    for name, tensors in new.items():
        replace_tensors(directory / name, tensors)
    return changed
