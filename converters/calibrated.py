"""Quantizes the weights of a checkpoint block by block, on what its layers see of given data.

The steps of a plan are carried out in this order: tensors that need no data, the blocks in the order in which the model
calls them, and last the layers outside of blocks. When the first step of a block comes, the whole block is quantized;
the other steps of the block take what was made of them. Memory holds what is outside of blocks, one block, and one
batch; what blocks give lies in files of the work directory, from which an interrupted run goes on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..calibration.activations import Activations
from ..calibration.blocks import Blocks, find_blocks, order_of_execution
from ..calibration.data import Data, is_causal
from ..calibration.effort import Effort
from ..calibration.experts import alike
from ..calibration.hessians import LEAST_ROWS, Collector, is_transposed
from ..calibration.ladder import BlockResult
from ..calibration.walk import Place, Walk, places_of
from ..container.atomic import write_json
from ..container.writer import StoredTensor
from ..errors import CalibrationError
from ..matrix import F32, StoredMatrix
from ..quantize import Quantized, quantize
from ..quantize.calibrated import quantize_for_outputs
from ..quantize.recognise import recognise
from ..quantize.solve import measured
from ..reference import decode
from ..runtime.known_experts import is_grouped
from .calibration_memory import needs_data, peak_memory
from .experts import recognised_stack, store_stack
from .float_model import FloatModel
from .journal import Outcome
from .plan import Plan, Step
from .quantizer import WithoutData
from .source import Source
from .steps import load_step
from .student import Quality
from .together import FULL, train_together

ACTIVATIONS = "activations"  # in the work directory
_ERRORS = ".errors.json"  # after the position of a block, beside what it gave


@dataclass(frozen=True)
class Matrices:
    """The matrices of the experts of a stack, and whether they are stored without loss."""

    matrices: tuple[StoredMatrix, ...]
    lossless: bool = False


class Calibrated:
    """Quantizes with data; see :class:`.quantizer.Quantizer`.

    Args:
        source: the checkpoint.
        plan: of its conversion.
        data: what goes into the model; the batches held out only measure.
        effort: how much work to do.
        device: to compute on.
        report: called with the path of a block and what came of it.

    Attributes:
        quality: at each precision (None is full) on the batches held out; empty before the end, or if there are none.
        unseen: paths of the layers that too little data reached; of a module of experts, how many of them.
        blocks: of each block its path and two errors of what it gives, relative to its variance: with its layers
            quantized one by one, and in the end; empty before the end.

    Raises:
        CalibrationError: nothing is fitted to data, or the model has no blocks, or cannot be run block by block.
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
        if not any(needs_data(step) for step in plan.steps):
            raise CalibrationError(
                f"{plan.architecture}: no layer is fitted to data: what is quantized are embeddings, or is rounded "
                "by default; convert it without --calibrate, or quantize layers"
            )
        self.identity = f"{data.identity} {data.held_out} {effort} {device.type}"
        self.quality: dict[int | None, Quality] = {}
        self.unseen: list[str] = []
        self._source, self._data, self._effort, self._device, self._report = source, data, effort, device, report
        self._without = WithoutData()
        self._float = FloatModel(source, plan, device)
        lists = find_blocks(self._float.model)
        if not lists:
            raise CalibrationError(
                f"{plan.architecture}: has no repeated blocks to go through one by one; convert it without --calibrate"
            )
        self._all_lists, self._lists = lists, self._called(lists)
        places = places_of(self._lists)
        self._place: dict[int, Place | None] = {}  # by id of a step
        for step in plan.steps:
            name = step.destination.target or step.destination.path
            self._place[id(step)] = next((p for p in places if name.startswith(f"{p.path}.")), None)
        key = {id(s): _rank(s, self._place[id(s)], len(places)) for s in plan.steps}
        self.steps = tuple(sorted(plan.steps, key=lambda step: key[id(step)]))
        last = {place.position: id(s) for s in self.steps if (place := self._place[id(s)]) is not None}
        self._last = set(last.values())  # ids of the last step of each block
        self._found: dict[str, Quantized | StoredMatrix] = {}
        self._stacks: dict[str, Matrices] = {}
        self._reached = -1  # position of the block that was quantized last
        self._outside: dict[str, Collector] | None = None
        self.blocks: list[tuple[str, float, float]] = []

    def _called(self, lists: list[Blocks]) -> list[Blocks]:
        """The lists of blocks that the model calls for the data, in this order."""
        batch = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in self._data.batches[0].items()}
        with self._float.on_meta() as model:
            return order_of_execution(model, lists, batch)

    def peak_memory(self) -> int:
        """Expected peak of resident memory in bytes."""
        places = {step: None if place is None else place.path for step, place in self._place.items()}
        causal, blocks = is_causal(self._float.model), len(places_of(self._lists))
        return peak_memory(self.steps, places, self._data.batches, self._effort, causal=causal, blocks=blocks)

    # --- the protocol of a quantizer ---

    def begin(self, work: Path, done: int) -> None:
        self._directory = work / ACTIVATIONS
        self._walk = Walk(
            self._float.model,
            self._lists,
            self._data.batches,
            Activations(self._directory),
            self._device,
            held_out=self._data.held_out,
        )
        self._float.load("", leave=tuple(blocks.path for blocks in self._all_lists))
        for step in self.steps[:done]:  # an interrupted run has quantized these: others are to see them so
            if step.to_fit is not None and self._place[id(step)] is None:
                if step.stack is None:
                    self.quantize(step, load_step(self._source, step))
                else:
                    self.quantize_stack(self._source, step)

    def quantize(self, step: Step, weight: F32) -> Quantized:
        found = self._quantize(step, weight)
        if self._place[id(step)] is None:
            decoded = torch.from_numpy(decode(found.matrix))
            transposed = step.destination.kind == "conv1d"
            self._walk.replace_outside(step.destination.target, decoded.T if transposed else decoded)
        return found

    def _quantize(self, step: Step, weight: F32) -> Quantized:
        assert step.to_fit is not None  # noqa: S101 - the driver quantizes only what has a target
        if not needs_data(step):
            return self._without.quantize(step, weight)
        place = self._place[id(step)]
        if place is None:
            return _recognised(step, weight) or self._quantize_outside(step, weight)
        if place.position != self._reached:
            self._quantize_block(place)
        found = self._found.pop(step.path, None)
        if found is None:
            return self._unseen(step, weight)
        return measured(weight, found) if isinstance(found, StoredMatrix) else found

    def quantize_stack(self, source: Source, step: Step) -> tuple[list[StoredTensor], Outcome]:
        place = self._place[id(step)]
        if place is not None and place.position != self._reached:
            self._quantize_block(place)
        stack, target = step.stack, step.to_fit
        assert stack is not None and target is not None  # noqa: S101, PT018 - the driver says so
        found = self._stacks.pop(step.path, None) or _recognised_stack(source, step)
        if found is None:
            self.unseen.append(step.path)
            plain = replace(target, recognise=False)
            weights = (stack.matrix(source, expert) for expert in range(stack.shape[0]))
            found = Matrices(alike(quantize(weight, plain, name=step.path).matrix for weight in weights))
        if place is None:
            decoded = torch.from_numpy(np.stack([decode(matrix) for matrix in found.matrices]))
            transposed = stack.kind == "experts_transposed"
            self._walk.replace_outside(stack.path, decoded.mT.contiguous() if transposed else decoded)
        return store_stack(source, stack, found.matrices, lossless=found.lossless)

    def must_save(self, step: Step) -> bool:
        return id(step) in self._last

    def improve(self, work: Path, outcomes: Mapping[str, Outcome]) -> tuple[dict[str, Outcome], dict[str, Any]]:
        steps = [s for s in self.steps if s.to_fit is not None]
        changed, quality = train_together(
            work, self._directory, self._source, self._float, self._walk, steps, outcomes, self._effort
        )
        return changed, {"quality": quality, "blocks": self._read_blocks()}

    def end(self, measured: dict[str, Any]) -> None:
        if self._data.held_out:
            quality = measured["quality"].items()
            self.quality = {None if k == FULL else int(k): Quality.from_json(found) for k, found in quality}
        self.blocks = [(path, before, after) for path, before, after in measured["blocks"]]
        shutil.rmtree(self._directory, ignore_errors=True)

    # --- its parts ---

    def _quantize_block(self, place: Place) -> None:
        everything = {s.path: s for s in self.steps if self._place[id(s)] is place and needs_data(s)}
        steps = {path: step for path, step in everything.items() if step.stack is None}
        exact = {path: _recognised_stack(self._source, step) for path, step in everything.items()}
        self._stacks = {path: matrices for path, matrices in exact.items() if matrices is not None}
        recognised = {path: _recognised(step, load_step(self._source, step)) for path, step in steps.items()}
        lossless = {path: found for path, found in recognised.items() if found is not None}
        targets = {
            path.removeprefix(f"{place.path}."): step.to_fit
            for path, step in everything.items()
            if step.to_fit is not None and path not in lossless | self._stacks and not self._is_grouped(step)
        }
        self._float.load(place.path)
        result = self._walk.quantize(place, targets, self._effort)
        self._float.release(place.path)
        self._found = lossless | {f"{place.path}.{name}": found.matrix for name, found in result.layers.items()}
        made = {f"{place.path}.{name}": stack for name, stack in result.stacks.items()}
        self._stacks |= {path: Matrices(stack.matrices) for path, stack in made.items()}
        few = {path.rpartition(".")[0]: f"{len(s.unseen)} of {len(s.matrices)}" for path, s in made.items() if s.unseen}
        self.unseen += [f"{path} ({of} experts)" for path, of in few.items()]
        self._reached = place.position
        self._save_errors(place, result)
        self._report(place.path, result)

    def _save_errors(self, place: Place, result: BlockResult) -> None:
        """Keep the errors of a block beside what it gave, for an interrupted run."""
        errors = list(result.errors.values())
        write_json(self._directory / f"{place.position:05d}{_ERRORS}", [place.path, errors[0], errors[-1]])

    def _read_blocks(self) -> list[tuple[str, float, float]]:
        files = sorted(self._directory.glob(f"*{_ERRORS}"))
        return [tuple(json.loads(file.read_text("utf-8"))) for file in files]

    def _is_grouped(self, step: Step) -> bool:
        """Whether a stack's module gets rows that are sorted already, which is not calibrated."""
        return step.stack is not None and is_grouped(self._float.model.get_submodule(step.path.rpartition(".")[0]))

    def _quantize_outside(self, step: Step, weight: F32) -> Quantized:
        """Quantize a layer outside of blocks, on what it sees where all blocks are quantized."""
        assert step.to_fit is not None  # noqa: S101 - the driver quantizes only what has a target
        if self._outside is None:
            self._outside = self._see_outside()
        seen = self._outside.pop(step.path, None)
        if seen is None or seen.rows < LEAST_ROWS:
            return self._unseen(step, weight)
        tensor = torch.from_numpy(weight).to(self._device)
        sweeps, name = self._effort.sweeps, step.tensor.name
        return measured(
            weight, quantize_for_outputs(tensor, step.to_fit, seen.hessian, sweeps=sweeps, name=name).matrix
        )

    def _see_outside(self) -> dict[str, Collector]:
        collectors: dict[str, Collector] = {}
        mask: Tensor | None = None
        hooks = []
        for step in self.steps:
            if not needs_data(step) or step.stack is not None or self._place[id(step)] is not None:
                continue
            layer = self._float.model.get_submodule(step.path)
            seen = Collector(layer.weight.shape[0 if is_transposed(layer) else 1], self._device)

            def see(module: nn.Module, args: tuple[Any, ...], seen: Collector = seen) -> None:
                seen.add(args[0], mask)

            collectors[step.path] = seen
            hooks.append(layer.register_forward_pre_hook(see))
        try:
            for i in range(self._walk.samples):
                mask = self._walk.mask(i)
                self._walk.output(i, "quantized")
        finally:
            for hook in hooks:
                hook.remove()
        return collectors

    def _unseen(self, step: Step, weight: F32) -> Quantized:
        self.unseen.append(step.path)
        return self._without.quantize(step, weight)


def _rank(step: Step, place: Place | None, places: int) -> int:
    if place is not None:
        return place.position
    return places if needs_data(step) else -1


def _recognised(step: Step, weight: F32) -> Quantized | None:
    """The weight stored without loss, if the target asks for it and the weight is on a grid already (ENC-3)."""
    if step.to_fit is None or not step.to_fit.recognise:
        return None
    found = recognise(weight, step.to_fit, step.tensor.dtype)
    return None if found is None else measured(weight, found, lossless=True)


def _recognised_stack(source: Source, step: Step) -> Matrices | None:
    """As :func:`_recognised`, for all experts of a stack."""
    if step.stack is None or step.to_fit is None:
        return None
    found = recognised_stack(source, step.stack, step.to_fit)
    return None if found is None else Matrices(found, lossless=True)
