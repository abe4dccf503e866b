"""The quantized model as it stands on the disk, run block by block, and how far it is from the float model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..calibration.blocks import Batch, Blocks, find_blocks
from ..calibration.compare import Comparison
from ..calibration.decoded import decoded
from ..calibration.trained_matrix import TrainedMatrix
from ..calibration.walk import places_of
from ..calibration.whole import run_whole
from ..container.reader import ModelReader
from ..matrix import StoredMatrix
from .float_model import FloatModel
from .plan import Step

TRANSPOSED = ("conv1d", "experts_transposed")  # kinds whose parameter has the columns first


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
        lists: of its blocks, those that it calls.
        device: to compute on.
        steps: that were quantized.
        trained: matrices whose scales are to be trained, by path.
        fixed: gives those of another path, which are read when they are needed: one, or one for each expert.
    """

    def __init__(
        self,
        float_model: FloatModel,
        lists: Sequence[Blocks],
        device: torch.device,
        steps: Sequence[Step],
        trained: Mapping[str, StoredMatrix],
        fixed: Callable[[str], Sequence[StoredMatrix]],
    ) -> None:
        self._float, self._lists, self._device, self._fixed = float_model, lists, device, fixed
        self.trained = {path: TrainedMatrix(matrix, device) for path, matrix in trained.items()}
        self._steps = {parameter_of(s): s for s in steps}
        self._inside: dict[str, dict[str, Step]] = {}  # by path of a block, by name within it
        self._outside = dict(self._steps)
        for place in places_of(lists):
            names = [name for name in self._steps if name.startswith(f"{place.path}.")]
            self._inside[place.path] = {name.removeprefix(f"{place.path}."): self._outside.pop(name) for name in names}
        for blocks in find_blocks(float_model.model):  # that are not called
            self._outside = {n: s for n, s in self._outside.items() if not n.startswith(f"{blocks.path}.")}

    def output(self, batch: Batch) -> Any:
        """Its output, with gradients for :attr:`trained` where they are enabled."""
        return run_whole(self._float.model, self._lists, batch, self._weights)

    def _weights(self, path: str) -> dict[str, Tensor]:
        if not path:
            return {name: self._weight(step) for name, step in self._outside.items()}
        kept = self._float.read(path, leave=self._steps)
        return kept | {name: self._weight(step) for name, step in self._inside[path].items()}

    def _weight(self, step: Step) -> Tensor:
        trained = self.trained.get(step.path)
        if trained is not None:
            weight = trained.weight()
        else:
            weights = [decoded(one, self._device) for one in self._fixed(step.path)]
            weight = weights[0] if step.stack is None else torch.stack(weights)
        return weight.mT if step.destination.kind in TRANSPOSED else weight


def precisions(reader: ModelReader, steps: Sequence[Step]) -> list[int | None]:
    """At which a model can be read: full (None), and those that are nested in any of its modules."""
    return [None, *sorted({k for s in steps for k in reader.module(s.path).scheme.nested})]


def matrices_at(reader: ModelReader, path: str, bits: int | None) -> list[StoredMatrix]:
    """The matrix of a module, or those of its experts, where the model is read at `bits` (NST-1, NST-3)."""
    module = reader.module(path)
    only = bits if bits in module.scheme.nested else None
    return [reader.matrix(path, e, only=only) for e in ((None,) if module.experts is None else range(module.experts))]


def parameter_of(step: Step) -> str:
    """The name of the parameter of the float model that a step quantizes."""
    return step.destination.target if step.stack is None else step.stack.path
