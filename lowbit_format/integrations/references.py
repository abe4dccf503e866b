"""References to modules beside torch's registry: model code may keep them in lists and attributes of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def set_modules(model: nn.Module, new: Mapping[str, nn.Module]) -> None:
    """Put modules in the places of others, by path, also where a module lists or names the old one in another way.

    MaskFormer, for one, calls the layers of a Python list; they are registered beside it, for their names alone.
    """
    replaced = {}
    for path, module in new.items():
        replaced[id(model.get_submodule(path))] = module
        model.set_submodule(path, module)
    for owner in model.modules():
        for name, value in vars(owner).items():
            if name not in _REGISTRIES and (changed := _with(value, replaced)) is not value:
                object.__setattr__(owner, name, changed)


_REGISTRIES = ("_modules", "_parameters", "_buffers")


def _with(value: Any, replaced: Mapping[int, nn.Module]) -> Any:
    """`value` with new modules for old ones; lists and dictionaries are changed in place."""
    if isinstance(value, nn.Module):
        return replaced.get(id(value), value)
    if type(value) is list:
        value[:] = [_with(item, replaced) for item in value]
    elif type(value) is dict:
        value.update({key: _with(item, replaced) for key, item in value.items()})
    elif type(value) is tuple and any(_with(item, replaced) is not item for item in value):
        return tuple(_with(item, replaced) for item in value)
    return value
