"""Quantizes the weights of a checkpoint block by block, on what its layers see of given data.

The steps of a plan are carried out in this order: tensors outside of blocks that need no data, the blocks in the order
in which the model calls them, and last the layers outside of blocks. When the first step of a block comes, the whole
block is quantized; the other steps of the block take what was made of them. Memory holds what is outside of blocks, one
block, and one batch; what blocks give lies in files of the work directory, from which an interrupted run goes on.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..calibration.activations import Activations
from ..calibration.blocks import find_blocks, order_of_execution
from ..calibration.compare import Comparison
from ..calibration.data import Data
from ..calibration.effort import Effort
from ..calibration.hessians import Collector, is_transposed
from ..calibration.ladder import LEAST_ROWS, BlockResult
from ..calibration.walk import Place, Walk
from ..errors import CalibrationError
from ..matrix import F32
from ..quantize import Quantized
from ..quantize.calibrated import quantize_for_outputs
from ..quantize.recognise import recognise
from ..quantize.solve import measured
from .float_model import FloatModel
from .plan import Plan, Step
from .quantizer import WithoutData
from .source import Source, as_float32

ACTIVATIONS = "activations"  # in the work directory


class Calibrated:
    """Quantizes with data.

    Args:
        source: the checkpoint.
        plan: of its conversion.
        data: what goes into the model; the last `held_out` batches only measure.
        effort: how much work to do.
        device: to compute on.
        report: called with the path of a block and what came of it.

    Raises:
        CalibrationError: the model has no blocks, or cannot be run on the data.
    """

    def __init__(
        self,
        source: Source,
        plan: Plan,
        data: Data,
        effort: Effort,
        *,
        device: torch.device,
        report: Callable[[str, BlockResult], None] = lambda path, result: None,
    ) -> None:
        self.identity = f"{data.identity} {data.held_out} {effort} {device.type}"
        self._source, self._data, self._effort, self._device = source, data, effort, device
        self._report = report
        self._without = WithoutData()
        self._float = FloatModel(source, plan, device)
        model = self._float.model
        lists = find_blocks(model)
        if not lists:
            raise CalibrationError(
                f"{plan.architecture}: has no repeated blocks to go through one by one; convert it without --calibrate"
            )
        self._lists = self._called(model, lists, plan)
        self.walk: Walk | None = None
        self._found: dict[str, Quantized] = {}
        self._calibrated = set[int]()
        self.unseen: list[str] = []  # paths of layers that too little data reached
        self.comparison: Comparison | None = None

    def _called(self, model: nn.Module, lists: list[Any], plan: Plan) -> list[Any]:
        """The lists of blocks in the order in which the model calls them for the data; it runs without weights."""
        meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in self._data.batches[0].items()}
        buffers = {name: buffer for name, buffer in model.named_buffers() if not buffer.is_meta}
        for name in buffers:
            self._float._set(name, buffers[name].to("meta"))
        try:
            called = order_of_execution(model, lists, meta)
        except Exception:  # what depends on values cannot run on the meta device: take the order of the model
            called = lists
        finally:
            for name, buffer in buffers.items():
                self._float._set(name, buffer)
        return called or lists

    def arrange(self, steps: tuple[Step, ...]) -> tuple[Step, ...]:
        places = Walk(self._float.model, self._lists, (), None, self._device).places  # type: ignore[arg-type]
        order = {place.path: place.position for place in places}

        def key(step: Step) -> int:
            position = next((n for path, n in order.items() if _is_in(step, path)), None)
            if position is not None:
                return position
            return len(order) if _needs_data(step) else -1

        return tuple(sorted(steps, key=key))

    def begin(self, work: Path, steps: tuple[Step, ...], done: int) -> None:
        self._steps, self._directory = steps, work / ACTIVATIONS
        self.walk = Walk(
            self._float.model,
            self._lists,
            self._data.batches,
            Activations(self._directory),
            self._device,
            held_out=self._data.held_out,
        )
        self._float.load("", leave=tuple(blocks.path for blocks in self._lists))
        self._outside: dict[str, Collector] | None = None

    def quantize(self, step: Step, weight: F32) -> Quantized:
        assert self.walk is not None and step.target is not None  # noqa: S101, PT018 - begin() comes first
        place = self._place(step)
        if not _needs_data(step):
            return self._without.quantize(step, weight)
        found = recognise(weight, step.target, step.tensor.dtype) if step.target.recognise else None
        if found is not None:
            return measured(weight, found, lossless=True)
        if place is None:
            return self._quantize_outside(step, weight)
        if place.position not in self._calibrated:
            self._calibrate(place)
        return self._found.pop(step.path, None) or self._unseen(step, weight)

    def must_save(self, step: Step) -> bool:
        place = self._place(step)
        last = place is not None and [s for s in self._steps if _is_in(s, place.path)][-1] is step
        return last

    def end(self) -> None:
        if self.walk is not None and self._data.held_out:
            self.comparison = self._compare()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _place(self, step: Step) -> Place | None:
        assert self.walk is not None  # noqa: S101 - begin() comes first
        return next((p for p in self.walk.places if _is_in(step, p.path)), None)

    def _unseen(self, step: Step, weight: F32) -> Quantized:
        self.unseen.append(step.path)
        return self._without.quantize(step, weight)

    def _calibrate(self, place: Place) -> None:
        """Quantize a block. Blocks before it whose outputs are not there were finished by an interrupted run."""
        assert self.walk is not None  # noqa: S101 - begin() comes first
        walk, steps = self.walk, [s for s in self._steps if _is_in(s, place.path)]
        targets = {}
        self._float.load(place.path)
        for step in steps:
            if step.target is None or not _needs_data(step):
                continue
            weight = as_float32(self._source.read(step.tensor.name), step.tensor)
            weight = np.ascontiguousarray(weight.T) if step.destination.kind == "conv1d" else weight
            if not step.target.recognise or recognise(weight, step.target, step.tensor.dtype) is None:
                targets[step.path.removeprefix(f"{place.path}.")] = step.target
        result = walk.quantize(place, targets, self._effort)
        by_path = {step.path: step for step in steps if step.target is not None}
        for name, found in result.layers.items():
            step = by_path[f"{place.path}.{name}"]
            weight = as_float32(self._source.read(step.tensor.name), step.tensor)
            weight = np.ascontiguousarray(weight.T) if step.destination.kind == "conv1d" else weight
            self._found[step.path] = measured(weight, found.matrix)
        self._float.release(place.path)
        self._calibrated.add(place.position)
        self._report(place.path, result)

    def _quantize_outside(self, step: Step, weight: F32) -> Quantized:
        """Quantize a layer outside of blocks, on what it sees where all blocks are quantized."""
        assert self.walk is not None and step.target is not None  # noqa: S101, PT018 - begin() comes first
        if self._outside is None:
            self._outside = self._see_outside()
        seen = self._outside.pop(step.path, None)
        if seen is None or seen.rows < LEAST_ROWS:
            return self._unseen(step, weight)
        tensor = torch.from_numpy(weight).to(self._device)
        found = quantize_for_outputs(
            tensor, step.target, seen.hessian, sweeps=self._effort.sweeps, name=step.tensor.name
        )
        return measured(weight, found.matrix)

    def _see_outside(self) -> dict[str, Collector]:
        assert self.walk is not None  # noqa: S101 - begin() comes first
        walk, model = self.walk, self._float.model
        collectors: dict[str, Collector] = {}
        hooks, mask = [], None
        for step in self._steps:
            if step.target is not None and _needs_data(step) and self._place(step) is None:
                layer = model.get_submodule(step.path)
                cols = layer.weight.shape[0 if is_transposed(layer) else 1]
                collectors[step.path] = Collector(cols, self._device)
                hooks.append(
                    layer.register_forward_pre_hook(
                        lambda module, args, seen=collectors[step.path]: seen.add(args[0], mask)
                    )
                )
        try:
            for i in range(walk.samples):
                mask = walk.mask(i)
                walk.output(i, "quantized")
        finally:
            for hook in hooks:
                hook.remove()
        return collectors

    def _compare(self) -> Comparison | None:
        assert self.walk is not None  # noqa: S101 - begin() comes first
        walk, comparison = self.walk, Comparison()
        for i in range(walk.samples, len(walk.batches)):
            wanted, found = (walk.output(i, kind) for kind in ("float", "quantized"))
            comparison.add(found, wanted, walk.batch(i))
        return comparison


def _is_in(step: Step, path: str) -> bool:
    return (step.path or step.destination.target).startswith(f"{path}.") or step.destination.target.startswith(
        f"{path}."
    )


def _needs_data(step: Step) -> bool:
    return step.target is not None and step.destination.kind in ("linear", "conv1d")
