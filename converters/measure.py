"""How a model that was converted without data predicts a short text, beside the float model.

Both run block by block, so that no more than one block of each is in memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..calibration.compare import Comparison
from ..calibration.data import causal_batches, is_causal, windows
from ..container.reader import ModelReader
from ..errors import CalibrationError, LowbitError
from ..quantize import Target
from .architecture import meta_model
from .blockwise import BlockwiseModel
from .calibration_data import SENTENCES, load_tokenizer
from .plan import BASE_MEMORY, Plan
from .row_shares import row_shares
from .sensitivity import PROBED, Divergences
from .source import Source
from .student import Quality, Student, matrices_at, precisions

SAMPLES, LENGTH = 4, 256  # of the text, in tokens
_WORKING = 128 << 20  # bytes for what a block and a comparison compute


def measure(source: Source, plan: Plan, directory: Path) -> dict[int | None, Quality] | str:
    """Compare a converted causal model with its checkpoint on a text of our own.

    Args:
        source: the checkpoint.
        plan: of its conversion.
        directory: of the lowbit model.

    Returns:
        The quality at each precision (None is full); empty for a model that predicts no next token. A sentence, if it
        cannot be measured.
    """
    if not is_causal(meta_model(source.directory)):
        return {}
    try:
        if measuring_memory(plan) > _allowed(plan):
            return f"that would take {measuring_memory(plan) / 1e9:.1f} GB of memory"
        return _measure(source, plan, directory)
    except LowbitError as e:
        return str(e)
    except Exception as e:  # whatever a model's own code needs: the conversion is done, and must not fail for this
        return f"{type(e).__name__}: {e}"


def short_text(source: Source) -> list[dict[str, Tensor]]:
    """Batches of one window each of a text of our own, for a causal model.

    Raises CalibrationError if it is too short, or there is no tokenizer.
    """
    tokenizer = load_tokenizer(source.directory)
    text = SENTENCES.read_text("utf-8")
    tokens = len(tokenizer(text)["input_ids"])
    positions = getattr(meta_model(source.directory).config, "max_position_embeddings", None) or LENGTH
    length = min(LENGTH, positions, tokens // 2)
    if length < 2:
        raise CalibrationError(f"the tokenizer makes {tokens} tokens of the text that is measured on")
    samples = min(SAMPLES, tokens // length)
    rows = windows([text], tokenizer, samples=samples, length=length, where=SENTENCES.name)
    return [{"input_ids": ids[None]} for batch in causal_batches(rows) for ids in batch["input_ids"]]


def _measure(source: Source, plan: Plan, directory: Path) -> dict[int | None, Quality]:
    batches = short_text(source)
    device = torch.device("cpu")
    model = BlockwiseModel(source, plan, device)
    reader = ModelReader(directory)
    students = {
        bits: Student(
            model.float_model, model.lists, device, plan.quantized, {}, partial(matrices_at, reader, bits=bits)
        )
        for bits in precisions(reader, plan.quantized)
    }
    found = {bits: Comparison() for bits in students}
    with torch.no_grad():
        for batch in batches:
            wanted: Any = model.run(batch)
            for bits, student in students.items():
                found[bits].add(student.output(batch), wanted, batch)
    return {bits: Quality(comparison, comparison) for bits, comparison in found.items()}


def _allowed(plan: Plan) -> int:
    """Most bytes of memory that a conversion may take: see :func:`.convert.convert_hf_to_lowbit`."""
    return (1 << 30) + 12 * max((s.tensor.numel for s in plan.steps), default=0)


def measuring_memory(plan: Plan) -> int:
    """Expected peak of resident memory in bytes. A tensor whose name has no number counts as outside of blocks."""
    blocks: dict[str, int] = {}
    outside = words = 0
    for step in plan.steps:
        parts = step.tensor.name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if number is not None:
            block = ".".join(parts[: number + 1])
            blocks[block] = blocks.get(block, 0) + step.tensor.numel
            continue
        outside += step.tensor.numel
        if step.destination.kind == "embedding":
            words = max(words, step.tensor.shape[0])
    logits = 8 * PROBED * LENGTH * words  # of both models, in float32
    return BASE_MEMORY + 4 * outside + 8 * max(blocks.values(), default=0) + logits + _WORKING


def is_measured(plan: Plan, directory: Path) -> bool:
    """Whether :func:`measure` will try."""
    return is_causal(meta_model(directory)) and measuring_memory(plan) <= _allowed(plan)


def divergences_without_data(source: Source, plan: Plan) -> Divergences | None:
    """:class:`.sensitivity.Divergences` on a text of our own; None where :func:`measure` would not try, or fails."""
    if not is_measured(plan, source.directory):
        return None
    try:
        ids = torch.cat([batch["input_ids"] for batch in short_text(source)[:PROBED]])
        return _OwnText(source, plan, {"input_ids": ids}, torch.device("cpu"))
    except Exception:  # no tokenizer, or whatever a model's own code needs: bits can be chosen without
        return None


class _OwnText(Divergences):
    """Of which nobody asked for a measurement: what fails counts as not measured."""

    def with_targets(self, targets: Mapping[str, Target]) -> float:
        try:
            return super().with_targets(targets)
        except Exception:  # as above
            return math.nan


def shares_without_data(source: Source, plan: Plan) -> dict[str, NDArray[np.float64]]:
    """What :func:`.row_shares.row_shares` gives on a text of our own; empty if the model's code cannot be run."""
    if not is_measured(plan, source.directory):
        return {}
    try:
        return row_shares(source, plan, short_text(source), torch.device("cpu"))
    except Exception:  # as in divergences_without_data; the caller says that it needs them
        return {}
