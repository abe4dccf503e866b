"""How much a model's predictions suffer from the damage of its modules, by their kind.

All modules of a kind (the last name of their path, such as ``v_proj``) are quantized to a few bits, the others stay in
float, and the divergence of the predictions from the float model's is measured. By the linearity theorem (Malinovskii
et al. 2024, arXiv:2411.17525) it grows as their damage does: so the damage of any choice comes in nats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..calibration.compare import Comparison
from ..calibration.data import Data
from ..matrix import StoredMatrix
from ..quantize import Target, quantize
from .blockwise import BlockwiseModel
from .candidates import kind_of
from .experts import KINDS
from .plan import Plan, Step
from .source import Source
from .steps import load_step
from .student import Student

PROBED = 2  # samples of text


def probe_batches(data: Data) -> list[dict[str, Any]]:
    """A part of the data that is enough for :func:`divergences`: some samples of text, or one batch of other inputs."""
    first = data.batches[0]
    ids = first.get("input_ids")
    if ids is None or any(not isinstance(v, Tensor) or v.shape[:1] != ids.shape[:1] for v in first.values()):
        return [dict(first)]
    return [{name: value[i : i + 1] for name, value in first.items()} for i in range(min(PROBED, len(ids)))]


def divergences(
    source: Source,
    plan: Plan,
    probes: Mapping[str, Target],
    batches: Sequence[Mapping[str, Any]],
    device: torch.device,
) -> dict[str, float]:
    """The divergence of the model from the float model, by the kind of the modules that are quantized.

    Args:
        source: the checkpoint.
        plan: of its conversion.
        probes: targets of modules, by path. Other modules stay in float.
        batches: what goes into the model.
        device: to compute on.

    Returns:
        In nats a token; of a model that predicts no next token, what the mean cosine of its outputs lacks of 1. Kinds
        for which it is not above 0 are absent.
    """
    model = BlockwiseModel(source, plan, device)
    there = [{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()} for batch in batches]
    kinds: dict[str, list[Step]] = {}
    for step in plan.quantized:
        if step.path in probes:
            kinds.setdefault(kind_of(step.path), []).append(step)
    found = {}
    with torch.no_grad():
        wanted = [model.run(batch) for batch in there]
        for kind, steps in kinds.items():
            of_kind = {step.path: _quantized(source, step, probes[step.path]) for step in steps}
            student = Student(model.float_model, model.lists, device, steps, {}, of_kind.__getitem__)
            comparison = Comparison()
            for batch, output in zip(there, wanted, strict=True):
                comparison.add(student.output(batch), output, batch)
            if comparison.distance > 0:  # also not NaN
                found[kind] = comparison.distance
    return found


def _quantized(source: Source, step: Step, target: Target) -> list[StoredMatrix]:
    """The matrix of a module, or those of its experts."""
    plain = replace(target, recognise=False, nested=())
    if step.destination.kind not in KINDS or step.stack is None:
        return [quantize(load_step(source, step), plain, name=step.tensor.name).matrix]
    experts = range(step.stack.shape[0])
    return [quantize(step.stack.matrix(source, i), plain, name=step.tensor.name).matrix for i in experts]
