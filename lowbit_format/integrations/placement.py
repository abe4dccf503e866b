"""Puts lowbit modules into a transformers model that has no data yet, and keeps its tied weights tied.

A checkpoint may have been saved with another head than the model's, or without one. Each of its module paths is
therefore tried unchanged, with the base model's prefix, and without it, as transformers does for tensor names on load.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..container.reader import ModelReader
from ..errors import LoadError
from ..runtime.active_tasks import TaskState
from ..runtime.known_modules import known
from ..runtime.modules import MODULES, LowbitModule
from ..schema import ModuleEntry, QuantizationConfig
from ..tensors import all_roles
from .conversion_record import ConversionRecord


@dataclass
class Placement:
    """The lowbit modules of a model, by the model's paths.

    Attributes:
        files: path of a module in the model -> its entry in the file.
        tied: path of a module without a matrix in the file -> path of the owner of its matrix (TIE-1).
    """

    files: dict[str, ModuleEntry] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)


def place_modules(model: Any, reader: ModelReader, bits: int | None, state: TaskState) -> Placement:
    """Replace the modules that `reader`'s config lists; the new ones are on the meta device and share `state`.

    Raises:
        LoadError: the model lacks a module, or has it with another type or shape.
        PrecisionError: no parameters for `bits` (NST-3).
    """
    reader.check_precision(bits)
    placed, modules = Placement(), dict(model.named_modules())
    for entry in reader.config:
        if entry.experts is not None:
            raise LoadError(f"{entry.path}: this version of lowbit_format cannot load {entry.kind}; update it")
        path = _locate(model, modules, entry.path, reader.config)
        if path is not None:
            _replace(model, path, modules[path], reader, entry, bits)
            placed.files[path] = entry
    if reader.config.modules and not placed.files:
        some = next(iter(reader.config.modules))
        raise LoadError(f"{reader.directory}: {type(model).__name__} has none of its modules, such as {some!r}")
    for place, owner in _tied_places(model, modules, reader, placed):
        _replace(model, place, modules[place], reader, placed.files[owner], bits)
        placed.tied[place] = owner
    for path in (*placed.files, *placed.tied):
        module = model.get_submodule(path)
        module.path, module.state = path, state
    return placed


def tie(model: Any, placed: Placement) -> None:
    """Make the model's maps of tied weights name the present parameters of the modules: planes etc., or ``weight``.

    transformers uses the maps to tie weights after loading, and to write a tied tensor only once.
    """
    weights = {f"{path}.weight" for path in (*placed.files, *placed.tied)}
    keys = {
        t: s
        for t, s in model.all_tied_weights_keys.items()
        if not {t, s} & weights and t.rpartition(".")[2] not in all_roles()
    }
    for place, owner in placed.tied.items():
        module = model.get_submodule(place)
        roles = module.matrix_parameters() if isinstance(module, LowbitModule) else ("weight",)
        keys.update({f"{place}.{role}": f"{owner}.{role}" for role in roles})
    for name, module in model.named_modules():
        if hasattr(module, "all_tied_weights_keys"):
            prefix = f"{name}." if name else ""
            mine = {
                t.removeprefix(prefix): s.removeprefix(prefix)
                for t, s in keys.items()
                if t.startswith(prefix) and s.startswith(prefix)
            }
            module.all_tied_weights_keys, module._tied_weights_keys = mine, dict(mine)


def describe(model: Any, placed: Placement) -> QuantizationConfig:
    """The present ``quantization_config`` of the model, by the model's paths."""
    modules = {}
    for path in placed.files:
        m = model.get_submodule(path)
        modules[path] = ModuleEntry(path, m.scheme, m.kind, (m.rows, m.cols))
    return QuantizationConfig(modules, dict(placed.tied), model.base_model_prefix)


def refuse_missing(model: Any, missing: Iterable[str]) -> None:
    """Raise LoadError for tensors that the file lacks; transformers would initialise them at random, with a warning.

    Allowed are the head, and whole parts that the file lacks, of a class that the file was not written for.
    """
    same_class = type(model).__name__ in (model.config.architectures or [])
    names, missing = set(model.state_dict()), set(missing)
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    ignored += [re.compile(rf"(^|\.){re.escape(name)}$") for name in ConversionRecord.of(vars(model.config)).absent]
    for name in sorted(missing):
        path, _, role = name.rpartition(".")
        quantized = role in all_roles() and isinstance(model.get_submodule(path), LowbitModule)
        part = prefix + name.removeprefix(prefix).split(".")[0] + "."
        part_is_there = name.startswith(prefix) and any(n.startswith(part) for n in names - missing)
        expected = (same_class or part_is_there) and not any(pattern.search(name) for pattern in ignored)
        if quantized or expected:
            raise LoadError(
                f"{type(model).__name__} has {name!r}, but the file does not: "
                "config.json and the weights do not belong together"
            )


def lowbit_modules(model: nn.Module) -> Iterator[tuple[str, LowbitModule]]:
    """All lowbit modules with their paths."""
    for path, module in model.named_modules():
        if isinstance(module, LowbitModule):
            yield path, module


def _locate(model: Any, modules: dict[str, nn.Module], path: str, config: QuantizationConfig) -> str | None:
    """The path in the model of the file's module `path`; None if it belongs to a part that this model class lacks."""
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    bare = path.removeprefix(prefix)
    for candidate in (path, bare, prefix + path):
        if candidate in modules:
            return candidate
    headed = bool(prefix) and any(p.startswith(prefix) for p in config.modules)
    in_head = headed and bare == path
    if in_head or not isinstance(getattr(model.base_model, bare.split(".")[0], None), nn.Module):
        return None  # another head, or a part (such as a pooler) that this class does not have
    raise LoadError(
        f"the file has a quantized module {path!r}, but {type(model).__name__} has no such module: "
        "config.json and the weights do not belong together"
    )


def _tied_places(
    model: Any, modules: dict[str, nn.Module], reader: ModelReader, placed: Placement
) -> Iterator[tuple[str, str]]:
    """Pairs (path, owner's path) of modules that use another's matrix: by the file, then by transformers' own ties."""
    seen = set(placed.files)
    for place, owner in reader.config.tied.items():
        at, owner_at = _locate(model, modules, place, reader.config), _locate(model, modules, owner, reader.config)
        if at is not None and owner_at is not None and at not in seen:
            seen.add(at)
            yield at, owner_at
    stored = {_bare(model, name) for name in reader.names()}
    for target, source in model.all_tied_weights_keys.items():
        place, owner = target.removesuffix(".weight"), source.removesuffix(".weight")
        if owner in placed.files and place in modules and place not in seen and _bare(model, target) not in stored:
            seen.add(place)
            yield place, owner


def _bare(model: Any, name: str) -> str:
    return name.removeprefix(f"{model.base_model_prefix}.")


def _replace(model: Any, path: str, old: nn.Module, reader: ModelReader, entry: ModuleEntry, bits: int | None) -> None:
    kind, shape, options = _look_at(old, path)
    if shape != (entry.rows, entry.cols):
        raise LoadError(
            f"{path}: the file has {entry.kind} {list(entry.shape)}, {type(model).__name__} has {kind} {list(shape)}; "
            "config.json and the weights do not belong together"
        )
    row_bits = reader.row_bits(entry.path)
    plane_rows = None if row_bits is None else int(row_bits.clip(max=bits or entry.scheme.bits).sum(dtype=int))
    options["dtype"] = _kept_dtype(model, path) or options["dtype"]
    new = MODULES[kind](
        entry.scheme, entry.rows, entry.cols, bits=bits, plane_rows=plane_rows, device="meta", **options
    )
    new.train(old.training)
    model.set_submodule(path, new)


def _look_at(module: nn.Module, path: str) -> tuple[str, tuple[int, int], dict[str, Any]]:
    """Kind, shape ``(rows, cols)`` and options of a float module whose forward is known."""
    found = known(module)
    float_module: Any = module
    if found is not None:
        options: dict[str, Any] = {"dtype": float_module.weight.dtype}
        if found.kind == "embedding":
            options |= {"padding_idx": float_module.padding_idx, "float_class": type(module)}
            options |= {"scale": found.scale, "rounds_scale": found.rounds_scale}
        else:
            options["bias"] = float_module.bias is not None
        if found.kind == "linear":
            options["float_class"] = type(module)
        return found.kind, found.shape, options
    raise LoadError(
        f"{path}: a {type(module).__name__} cannot hold bit-planes: what it computes is not known; "
        "convert the model again with this module kept in full precision"
    )


def _kept_dtype(model: Any, path: str) -> torch.dtype | None:
    """The dtype that transformers keeps for this module, such as float32 for T5's ``wo``, or None.

    The placeholder must report it: model code reads ``weight.dtype``.
    """
    plan = model._get_dtype_plan(torch.get_default_dtype()) if hasattr(model, "_get_dtype_plan") else model.dtype_plan
    for pattern, dtype in plan.items():
        if re.search(pattern.replace("*", ".*"), f"{path}.weight"):
            return dtype  # type: ignore[no-any-return]
    return None
