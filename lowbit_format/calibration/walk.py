"""Walks through a model's blocks in the order in which it calls them, and quantizes one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..quantize import Target
from .activations import Activations
from .blocks import Batch, Blocks, Outputs, arguments, run
from .effort import Effort
from .ladder import BlockResult, OutputError, quantize_block


@dataclass(frozen=True)
class Place:
    """A block of a model.

    Attributes:
        position: its number among all blocks that the model calls.
        blocks: the list that it is in.
        index: its number in the list.
    """

    position: int
    blocks: Blocks
    index: int

    @property
    def path(self) -> str:
        return self.blocks.path_of(self.index)

    @property
    def module(self) -> nn.Module:
        return self.blocks.modules[self.index]


def places_of(lists: Sequence[Blocks]) -> list[Place]:
    """All blocks of lists, one list after the other."""
    pairs = [(blocks, index) for blocks in lists for index in range(len(blocks.modules))]
    return [Place(position, blocks, index) for position, (blocks, index) in enumerate(pairs)]


class Walk:
    """The state of a calibration between two blocks.

    Args:
        model: the float model; weights of blocks other than the present one need not be there.
        lists: its lists of blocks, in the order of execution.
        batches: its inputs.
        activations: where the outputs of blocks are kept.
        device: to compute on.
        held_out: number of batches, the last ones, on which nothing is fitted.
    """

    def __init__(
        self,
        model: nn.Module,
        lists: Sequence[Blocks],
        batches: Sequence[Batch],
        activations: Activations,
        device: torch.device,
        held_out: int = 0,
    ) -> None:
        self.samples = len(batches) - held_out
        self._outside: dict[str, Tensor] = {}
        self.model, self.batches, self.activations, self.device = model, batches, activations, device
        self.lists = list(lists)
        self._first = {id(p.blocks): p.position for p in places_of(lists) if p.index == 0}

    def known(self, place: Place | None, kind: str, batch: int) -> dict[nn.Module, Outputs]:
        """Stored outputs for the blocks before a place (for all, if it is None): those of the last one stand for all
        of a list, since nothing else of the model reads the others."""
        known: dict[nn.Module, Outputs] = {}
        for blocks in self.lists:
            before = len(blocks.modules)
            if place is not None and blocks is place.blocks:
                before = place.index
            if before:
                outputs = self._load(self._first[id(blocks)] + before - 1, kind, batch)
                known.update(dict.fromkeys(blocks.modules[:before], outputs))
            if place is not None and blocks is place.blocks:
                break
        return known

    def _load(self, position: int, kind: str, batch: int) -> Outputs:
        found = self.activations.load(position, kind, batch)
        values = tuple(None if v is None else v.to(self.device) for v in found.values)
        return Outputs(values, found.is_tuple)

    def replace_outside(self, name: str, weight: Tensor) -> None:
        """From now on a parameter outside of blocks is this one where blocks are quantized."""
        self._outside[name] = weight.to(self.device)

    def _weights(self, kind: str) -> dict[str, Tensor]:
        return self._outside if kind == "quantized" else {}

    def batch(self, i: int) -> dict[str, Any]:
        """A batch on the device."""
        return {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in self.batches[i].items()}

    def mask(self, i: int) -> Tensor | None:
        mask = self.batch(i).get("attention_mask")
        return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def arguments(self, place: Place, kind: str, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of a block for a batch, after float or quantized blocks."""
        with torch.no_grad():
            known = self.known(place, kind, batch)
            found = arguments(self.model, place.module, self.batch(batch), known, self._weights(kind))
        if found is None:
            raise CalibrationError(f"{place.path}: the model does not call it for batch {batch} of the data")
        return found

    def quantize(
        self,
        place: Place,
        targets: Mapping[str, Target],
        effort: Effort,
    ) -> BlockResult:
        """Quantize the layers of a block, and store what it gives.

        Args:
            place: the block, with its float weights.
            targets: of its layers, by name within it.
            effort: how much work to do.
        """
        if place.index and not self.activations.has(place.position - 1, len(self.batches)):
            raise CalibrationError(
                f"{self.activations.directory}: lacks what the block before {place.path} gave, from which it would go "
                "on; remove the unfinished conversion and begin again"
            )
        self._store(place, "float")
        result = quantize_block(place.module, targets, _Inputs(self, place), effort, path=place.path)
        error = OutputError(self.samples)
        self._store(place, "quantized", error)
        result = replace(result, errors={**result.errors, result.last: error.value})
        if place.index >= 2:  # an interrupted run may go on from the block before; the last of a list are needed later
            self.activations.drop(place.position - 2)
        return result

    def _store(self, place: Place, kind: str, error: OutputError | None = None) -> None:
        for i in range(len(self.batches)):
            args, kwargs = self.arguments(place, kind, i)
            with torch.no_grad():
                outputs = Outputs.of(place.module(*args, **kwargs))
            if not bool(torch.isfinite(outputs.hidden).all()):
                raise CalibrationError(
                    f"{place.path}: gives values that are not finite for batch {i}; leave out the text that causes "
                    "them, or keep this block in full precision"
                )
            self.activations.save(place.position, kind, i, outputs)
            if error is not None and i in error.batches:
                error.add(outputs.hidden, self._load(place.position, "float", i).hidden, self.mask(i))

    def output(self, batch: int, kind: str) -> Any:
        """The model's output for a batch, after float or quantized blocks."""
        known = self.known(None, kind, batch)
        with torch.no_grad():
            return run(self.model, self.batch(batch), known, self._weights(kind))


class _Inputs:
    """See :class:`.hessians.Inputs`."""

    def __init__(self, walk: Walk, place: Place) -> None:
        self._walk, self._place = walk, place
        self.batches = walk.samples

    def arguments(self, batch: int, kind: str = "quantized") -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self._walk.arguments(self._place, kind, batch)

    def mask(self, batch: int) -> Tensor | None:
        return self._walk.mask(batch)

    def wanted(self, batch: int) -> Tensor:
        return self._walk._load(self._place.position, "float", batch).hidden
