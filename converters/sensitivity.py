"""How much a model's predictions suffer when modules of it are quantized.

All modules of a kind (the last name of their path, such as ``v_proj``) are quantized to a few bits, the others stay in
float, and the divergence of the predictions from the float model's is measured. By the linearity theorem (Malinovskii
et al. 2024, arXiv:2411.17525) it grows as their damage does: so the damage of any choice comes in nats. The theorem
holds for small damage. What a choice of bits for all modules comes to is measured in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..calibration.compare import Comparison
from ..calibration.data import Data, is_causal
from ..matrix import StoredMatrix
from ..quantize import Target, quantize
from .blockwise import BlockwiseModel
from .candidates import kind_of
from .experts import KINDS
from .plan import Plan
from .source import Source
from .steps import load_step
from .streamed import StreamedSource
from .student import Student

PROBED, PROBED_OTHERS = 2, 4  # samples of text, and of other inputs
MOST_NATS, MOST_COSINE = 1.0, 0.25  # expected damage of a choice that would have to be calibrated before it tells more


def probe_batch(data: Data) -> dict[str, Any]:
    """A part of the data that is enough for :class:`Divergences`: some samples; of inputs that do not say how many
    they are, the first batch.
    """
    first = data.batches[0]
    shapes = {name: value.shape for name, value in first.items() if isinstance(value, Tensor)}
    if len(shapes) < len(first) or len({shape[:1] for shape in shapes.values()}) != 1 or () in shapes.values():
        return dict(first)
    wanted = PROBED if "input_ids" in first else PROBED_OTHERS
    count = len(next(iter(first.values())))
    some = [b for b in data.batches[: -(-wanted // count)] if {name: t.shape for name, t in b.items()} == shapes]
    return {name: torch.cat([batch[name] for batch in some])[:wanted] for name in first}


class Divergences:
    """Measures how far predictions are from the float model's when modules are quantized, without data.

    Float weights of one block, and one quantized block, are in memory at a time.

    Args:
        source: the checkpoint.
        plan: of its conversion.
        batch: what goes into the model.
        device: to compute on.

    Raises:
        CalibrationError: the model cannot be run block by block.
    """

    def __init__(self, source: Source, plan: Plan, batch: Mapping[str, Any], device: torch.device) -> None:
        self._source, self._device = source, device
        self._steps = {step.path: step for step in plan.quantized}
        self._batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        self._model = BlockwiseModel(source, plan, device)
        with torch.no_grad():
            self._wanted = self._model.run(self._batch)
        self._most = MOST_NATS if is_causal(self._model.float_model.model) else MOST_COSINE

    def by_kind(self, targets: Mapping[str, Target]) -> dict[str, float]:
        """:meth:`with_targets` for the modules of each kind alone; kinds for which it is not above 0 are absent."""
        kinds: dict[str, dict[str, Target]] = {}
        for path, target in targets.items():
            kinds.setdefault(kind_of(path), {})[path] = target
        found = {kind: self.with_targets(own) for kind, own in kinds.items()}
        return {kind: value for kind, value in found.items() if value > 0}  # also not NaN

    def with_targets(self, targets: Mapping[str, Target]) -> float:
        """With modules that are quantized to the targets of their paths; the others stay in float.

        Returns:
            In nats a token; of a model that predicts no next token, what the mean cosine of its outputs lacks of 1.
        """
        steps = [self._steps[path] for path in targets]
        fixed = partial(self._quantized, targets)
        student = Student(self._model.float_model, self._model.lists, self._device, steps, {}, fixed)
        comparison = Comparison()
        with torch.no_grad():
            comparison.add(student.output(self._batch), self._wanted, self._batch)
        return comparison.distance

    def tells(self, expected: float) -> bool:
        """Whether to measure whole choices of so much expected damage.

        Not where it is so large that their order would be chance, nor where each would be streamed again.
        """
        return expected <= self._most and not isinstance(self._source, StreamedSource)

    def _quantized(self, targets: Mapping[str, Target], path: str) -> list[StoredMatrix]:
        """The matrix of a module, or those of its experts."""
        step = self._steps[path]
        plain = replace(targets[path], recognise=False, nested=())
        if step.destination.kind not in KINDS or step.stack is None:
            return [quantize(load_step(self._source, step), plain, name=step.tensor.name).matrix]
        stack = step.stack
        experts = (stack.matrix(self._source, i) for i in range(stack.shape[0]))
        return [quantize(expert, plain, name=step.tensor.name).matrix for expert in experts]
