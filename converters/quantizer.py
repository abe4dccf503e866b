"""The part of a conversion that turns a weight into a stored matrix: with data (:mod:`.calibrated`), or without."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ..container.writer import StoredTensor
from ..matrix import F32
from ..quantize import Quantized, quantize
from .experts import quantize_stack
from .journal import Outcome
from .plan import Step
from .source import Source


class Quantizer(Protocol):
    """Quantizes the weights of a plan, one step after the other.

    Attributes:
        identity: a string that changes with all that results depend on beside the plan; "" for nothing.
    """

    identity: str

    def begin(self, work: Path, done: int) -> None:
        """Prepare to go on after the first `done` steps; `work` is the directory of the unfinished conversion."""
        ...

    def quantize(self, step: Step, weight: F32) -> Quantized:
        """The weight ``[rows, cols]`` of a step as a stored matrix."""
        ...

    def quantize_stack(self, source: Source, step: Step) -> tuple[list[StoredTensor], Outcome]:
        """The tensors of a stack of experts, and the outcome."""
        ...

    def must_save(self, step: Step) -> bool:
        """Whether the journal must be saved once this step is done: what comes before it will be forgotten."""
        ...

    def improve(self, work: Path, outcomes: Mapping[str, Outcome]) -> tuple[dict[str, Outcome], dict[str, Any]]:
        """Improve the weights of the complete model in `work` together, and measure it.

        Returns new outcomes of the modules that have changed, and what was measured, as JSON takes it. It may be
        called again after an interruption.
        """
        ...

    def end(self, measured: dict[str, Any]) -> None:
        """Take what :meth:`improve` measured, perhaps in an earlier run, and remove what is in the work directory."""
        ...


class WithoutData:
    """Every weight is quantized alone."""

    identity = ""

    def begin(self, work: Path, done: int) -> None:
        pass

    def quantize(self, step: Step, weight: F32) -> Quantized:
        assert step.to_fit is not None  # noqa: S101 - the driver quantizes only what has a target
        return quantize(weight, step.to_fit, source_dtype=step.tensor.dtype, name=step.tensor.name)

    def quantize_stack(self, source: Source, step: Step) -> tuple[list[StoredTensor], Outcome]:
        assert step.stack is not None and step.to_fit is not None  # noqa: S101, PT018 - the driver says so
        return quantize_stack(source, step.stack, step.to_fit)

    def must_save(self, step: Step) -> bool:
        return False

    def improve(self, work: Path, outcomes: Mapping[str, Outcome]) -> tuple[dict[str, Outcome], dict[str, Any]]:
        return {}, {}

    def end(self, measured: dict[str, Any]) -> None:
        pass
