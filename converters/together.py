"""The last part of a calibrated conversion: the scales of all layers are trained together, and the model is measured.

It works on the complete model in the work directory. What is trained is kept in a file before the shards are written
again, so that an interrupted run changes each of them once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor

from ..calibration.blocks import Batch
from ..calibration.compare import Comparison
from ..calibration.decoded import plane_matrix
from ..calibration.effort import Effort
from ..calibration.end_to_end import tune
from ..calibration.trained_matrix import TrainedMatrix
from ..calibration.walk import Walk, places_of
from ..calibration.whole import run_whole
from ..container.reader import ModelReader
from ..container.writer import StoredTensor, module_tensors, replace_tensors
from ..kernels import operators
from ..matrix import Params, StoredMatrix
from ..quantize.solve import measured
from .driver import load_step
from .float_model import FloatModel
from .journal import Outcome
from .plan import Step
from .source import Source

TRANSPOSED = ("conv1d", "experts_transposed")  # kinds whose parameter has the columns first
TRAINED = "trained.safetensors"  # beside the activations
FULL = "full"  # precision, in what was measured


@dataclass(frozen=True)
class Quality:
    """The quantized model beside the float model, on data on which nothing was fitted.

    Attributes:
        before: the scales of all layers were trained together.
        after: it; the same where that was left out, or did not help.
    """

    before: Comparison
    after: Comparison

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Quality:
        return cls(Comparison(**found["before"]), Comparison(**found["after"]))


class Student:
    """The quantized model, run block by block.

    Args:
        float_model: has what is not quantized.
        walk: knows its blocks and its inputs.
        steps: that were quantized.
        trained: matrices whose scales are to be trained, by path.
        fixed: all other matrices; of a stack of experts one for each.
    """

    def __init__(
        self,
        float_model: FloatModel,
        walk: Walk,
        steps: Sequence[Step],
        trained: Mapping[str, StoredMatrix],
        fixed: Mapping[str, Sequence[StoredMatrix]],
    ) -> None:
        self._float, self._walk = float_model, walk
        self.trained = {path: TrainedMatrix(matrix, walk.device) for path, matrix in trained.items()}
        self._fixed = {path: [plane_matrix(one, walk.device) for one in matrices] for path, matrices in fixed.items()}
        self._steps = {parameter_of(s): s for s in steps}
        self._inside: dict[str, dict[str, Step]] = {}  # by path of a block, by name within it
        self._outside = dict(self._steps)
        for place in places_of(walk.lists):
            names = [name for name in self._steps if name.startswith(f"{place.path}.")]
            self._inside[place.path] = {name.removeprefix(f"{place.path}."): self._outside.pop(name) for name in names}

    def output(self, batch: Batch) -> Any:
        """Its output, with gradients for :attr:`trained` where they are enabled."""
        return run_whole(self._walk.model, self._walk.lists, batch, self._weights)

    def _weights(self, path: str) -> dict[str, Tensor]:
        if not path:
            return {name: self._weight(step) for name, step in self._outside.items()}
        kept = self._float.read(path, leave=self._steps)
        return kept | {name: self._weight(step) for name, step in self._inside[path].items()}

    def _weight(self, step: Step) -> Tensor:
        fixed = self._fixed.get(step.path)
        if fixed is None:
            weight = self.trained[step.path].weight()
        elif step.stack is None:
            weight = operators.dequantize(fixed[0])
        else:
            weight = torch.stack([operators.dequantize(one) for one in fixed])
        return weight.mT if step.destination.kind in TRANSPOSED else weight


def parameter_of(step: Step) -> str:
    """The name of the parameter of the float model that a step quantizes."""
    return step.destination.target if step.stack is None else step.stack.path


class _Samples:
    """See :class:`..calibration.end_to_end.Samples`."""

    def __init__(self, walk: Walk, student: Student) -> None:
        self._walk, self._student = walk, student
        self.batches = walk.samples

    def pieces(self, batch: int) -> int:
        return self._walk.pieces(batch)

    def wanted(self, batch: int, piece: int) -> Any:
        return self._walk.output(batch, "float", piece)

    def found(self, batch: int, piece: int) -> Any:
        return self._student.output(self._walk.piece(batch, piece))

    def mask(self, batch: int, piece: int) -> Tensor | None:
        mask = self._walk.piece(batch, piece).get("attention_mask")
        return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def compare(walk: Walk, student: Student) -> Comparison:
    """The student beside the float model, on the batches held out."""
    comparison = Comparison()
    with torch.no_grad():
        for i in range(walk.samples, len(walk.batches)):
            for piece in range(walk.pieces(i)):
                batch = walk.piece(i, piece)
                comparison.add(student.output(batch), walk.output(i, "float", piece), batch)
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
    nested = {s.path: reader.module(s.path).scheme.nested for s in steps}
    trainable = [s.path for s in steps if s.stack is None and not outcomes[s.path].lossless]
    full = {s.path: _matrices(reader, s.path) for s in steps}
    params: dict[str, np.ndarray[Any, Any]] = {}
    found: dict[str, Any] = {}
    for bits in (None, *sorted({k for precisions in nested.values() for k in precisions})):
        here = full if bits is None else full | {p: _matrices(reader, p, bits) for p in full if bits in nested[p]}
        trained = {path: here[path][0] for path in trainable if bits is None or bits in nested[path]}
        fixed = {path: matrices for path, matrices in here.items() if path not in trained}
        student = Student(float_model, walk, steps, trained, fixed)
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
                full[path] = [matrix]
    partial = file.with_suffix(".tmp")
    save_file(params, partial, {"measured": json.dumps(found)})
    os.replace(partial, file)


def _matrices(reader: ModelReader, path: str, bits: int | None = None) -> list[StoredMatrix]:
    """The matrix of a module, or those of its experts, at full or at a nested precision."""
    experts = reader.module(path).experts
    return [reader.matrix(path, expert, only=bits) for expert in ((None,) if experts is None else range(experts))]


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
