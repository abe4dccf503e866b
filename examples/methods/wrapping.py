"""Puts a method's layer around each linear layer of a model that it names, and freezes the model."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TypeVar

from torch import nn

Layer = TypeVar("Layer", bound=nn.Module)


def wrap_linears(model: nn.Module, names: Collection[str], make: Callable[[nn.Linear], Layer]) -> list[Layer]:
    """Replace linear layers by ``make(layer)``.

    Args:
        model: from here on only what `make` adds is trained.
        names: last names of the layers' paths, such as ``("q_proj", "v_proj")``.
        make: gives a module that contains the layer.

    Returns:
        What `make` gave, in the model's order.

    Raises:
        ValueError: no linear layer has one of these names.
    """
    found = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.Linear)]
    there = {path.rpartition(".")[2] for path, _ in found}
    if not there & set(names):
        raise ValueError(f"no linear layer is called {' or '.join(names)}; there are {', '.join(sorted(there))}")
    model.requires_grad_(False)
    layers = []
    for path, linear in found:
        parent, _, name = path.rpartition(".")
        if name in names:
            layers.append(make(linear))
            setattr(model.get_submodule(parent), name, layers[-1])
    return layers
