"""The float model of a checkpoint, run with one block of it in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.blocks import find_blocks
from ..calibration.whole import run_whole
from .float_model import FloatModel
from .plan import Plan, Step
from .source import Source


class BlockwiseModel:
    """A float model of which only what lies outside of blocks stays in memory.

    Args:
        source: the checkpoint.
        plan: of its conversion.
        device: to compute on.

    Attributes:
        float_model: the model; weights of blocks are on the meta device.
        lists: its lists of blocks.

    Raises:
        CalibrationError: the model cannot be run block by block.
    """

    def __init__(self, source: Source, plan: Plan, device: torch.device) -> None:
        self.float_model, self._plan = FloatModel(source, plan, device), plan
        self.lists = find_blocks(self.float_model.model)
        self.float_model.load("", leave=tuple(blocks.path for blocks in self.lists))

    def run(self, batch: Mapping[str, Any]) -> Any:
        """The output for a batch that is on the device."""
        return run_whole(self.float_model.model, self.lists, batch, self._weights_of)

    def layers(self) -> Iterator[tuple[Step, nn.Module]]:
        """Every Linear and Conv1D to quantize: its step of the plan, and the module."""
        for step in self._plan.quantized:
            target = step.destination.target
            if step.destination.kind in ("linear", "conv1d") and target:
                yield step, self.float_model.model.get_submodule(target.removesuffix(".weight"))

    def _weights_of(self, path: str) -> dict[str, Tensor]:
        return self.float_model.read(path) if path else {}
