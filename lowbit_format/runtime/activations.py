"""How exactly the products of a loaded model compute: with its activations as they are, or in eight bits."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator

from torch import nn

from ..errors import UnsupportedOperationError
from ..kernels.matrix import EXACT, INT8
from .modules import LowbitModule

CHOICES = (EXACT, INT8)

_one_choice = threading.RLock()  # at a time: the layers' self-test changes modules for a moment


def set_activations(model: nn.Module, activations: str) -> None:
    """Choose how the products of `model` take their activations, from now on.

    ``"exact"``, as a model is loaded, multiplies them as they are. ``"int8"`` rounds sums of four of them to eight bits
    where few rows are multiplied, as in decoding on a CPU: that is faster, and each product is off by about half a
    percent of its norm (docs/load-and-serve.md). Products of many rows, codebooks and machines without an instruction
    that looks up bytes stay exact. Weights, scales, offsets and tasks are not rounded, and gradients are those of the
    exact product.

    Args:
        model: a lowbit model, or a module that contains one.
        activations: ``"exact"`` or ``"int8"``.

    Raises:
        UnsupportedOperationError: `activations` is something else, `model` has no quantized matrix, or ``"int8"`` is
            asked for and a matrix is not on a CPU.
    """
    check_activations(activations)
    modules = [module for module in model.modules() if isinstance(module, LowbitModule)]
    if not modules:
        raise UnsupportedOperationError(
            f"this {type(model).__name__} has no quantized matrix: its products cannot change"
        )
    elsewhere = [m for m in modules if m.device.type not in ("cpu", "meta")]
    if activations == INT8 and elsewhere:
        raise UnsupportedOperationError(
            f"{elsewhere[0].path} is on {elsewhere[0].device}, and activations='int8' is for a CPU. On a GPU the exact "
            "product is the fast one: it takes each activation in two or more parts of 8 bits. Leave it 'exact' there, "
            "or move the model with model.to('cpu') first"
        )
    with _one_choice:
        for module in modules:
            module.set_activations(activations)


def check_activations(activations: str) -> None:
    """Raise UnsupportedOperationError unless it is a choice."""
    if activations not in CHOICES:
        expected = " or ".join(map(repr, CHOICES))
        raise UnsupportedOperationError(f"activations={activations!r}: expected {expected}")


@contextlib.contextmanager
def exactly(modules: Iterable[LowbitModule]) -> Iterator[None]:
    """Inside the block the products of `modules` are exact; another thread's choice waits for its end."""
    with _one_choice:
        before = [(module, module.activations) for module in modules]
        for module, _ in before:
            module.set_activations(EXACT)
        try:
            yield
        finally:
            for module, activations in before:
                module.set_activations(activations)
