"""Puts lowbit modules into a transformers model that has no data yet, and keeps its tied weights tied.

Which module of the model a module of the directory is, :mod:`.file_names` knows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..container.reader import ModelReader
from ..errors import LoadError
from ..runtime.active_tasks import TaskState
from ..runtime.expert_forward import put_in
from ..runtime.experts import EXPERTS
from ..runtime.known_experts import expert_parameters
from ..runtime.known_modules import known
from ..runtime.modules import MODULES, LowbitModule
from ..schema import ModuleEntry, QuantizationConfig
from ..tensors import all_roles
from .conversion_record import ConversionRecord
from .file_names import FileNames
from .references import set_modules


@dataclass
class Placement:
    """The lowbit modules of a model, by the model's paths.

    Attributes:
        files: path of a module in the model -> its entry in the file.
        tied: path of a module without a matrix in the file -> path of the owner of its matrix (TIE-1).
    """

    files: dict[str, ModuleEntry] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)


def place_modules(model: Any, files: FileNames, bits: int | None, state: TaskState) -> Placement:
    """Replace the modules that the directory has quantized; the new ones are on the meta device and share `state`.

    What the directory has besides is ignored, as in transformers: the model may be a part of it, or have fewer layers.

    Raises:
        LoadError: the model has a module with another type or shape, or none of the directory's modules; or
            config.json contradicts itself.
        PrecisionError: no parameters for `bits` (NST-3).
    """
    reader = files.reader
    reader.check_precision(bits)
    placed, modules, new = Placement(), dict(model.named_modules()), dict[str, LowbitModule]()
    for entry in reader.config:
        is_stack = entry.experts is not None  # whose path is a parameter's, perhaps one with the name ``weight``
        path = files.of.get(entry.weight) if is_stack else files.path(entry.weight)
        if path is None:
            files.check_config(entry.weight)
            continue
        if is_stack:
            _replace_experts(model, path, entry, bits)
        else:
            new[path] = _lowbit_module(model, path, modules[path], reader, entry, bits)
        placed.files[path] = entry
    for place, owner in _tied_places(model, modules, files, placed):
        new[place] = _lowbit_module(model, place, modules[place], reader, placed.files[owner], bits)
        placed.tied[place] = owner
    set_modules(model, new)
    for path in (*placed.files, *placed.tied):
        module = model.get_submodule(path)
        module.path, module.state = path, state
    if reader.config.modules and not placed.files:
        given = set(files.of.values())
        tied = {target for target, source in model.all_tied_weights_keys.items() if source in given}
        refuse_missing(model, files, model.state_dict().keys() - given - tied, all_needed=True)
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
            module.all_tied_weights_keys = mine
            if not isinstance(getattr(type(module), "_tied_weights_keys", None), property):
                module._tied_weights_keys = dict(mine)  # a property names modules, whose planes it finds by itself


def describe(model: Any, placed: Placement) -> QuantizationConfig:
    """The present ``quantization_config`` of the model, by the model's paths."""
    modules = {}
    for path in placed.files:
        m = model.get_submodule(path)
        modules[path] = ModuleEntry(path, m.scheme, m.kind, m.shape)
    return QuantizationConfig(modules, dict(placed.tied), model.base_model_prefix)


def refuse_missing(model: Any, files: FileNames, missing: Iterable[str], *, all_needed: bool = False) -> None:
    """Raise LoadError for tensors that the files lack; transformers would initialise them at random, with a warning.

    Allowed is what the converted checkpoint did not have either, such as a new head; with `all_needed` nothing is.
    """
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    absent = ConversionRecord.of(files.reader.model_config).absent
    ignored += [re.compile(rf"(^|\.){re.escape(name)}$") for name in absent]
    needed = [n for n in sorted(missing) if not any(p.search(n) for p in ignored) and not _is_computed(model, n)]
    lost = [n for n in needed if all_needed or files.expects(n)]
    if lost:
        known = " or ".join(files.reader.model_config.get("architectures") or ["another class"])
        cause = (
            "they are damaged, or the model's config (config.json, or options given to from_pretrained) is not theirs"
            if files.own
            else f"they were written for {known}; load that, or a class that has the same names"
        )
        raise LoadError(
            f"{files.reader.directory}: {type(model).__name__} has {lost[0]!r} ({len(lost)} such tensors in all), "
            f"which transformers does not find in the files by its name, so that it would be random: {cause}"
        )


def _is_computed(model: Any, name: str) -> bool:
    """Whether transformers computes this tensor when it initialises a model, as it does positions of waves."""
    return hasattr(model.get_submodule(name.rpartition(".")[0]), "create_weight")


def refuse_offloaded_experts(placed: Placement, device_map: object) -> None:
    """Raise LoadError if a device map offloads a stack of experts.

    What brings offloaded tensors back knows them by torch's names, which have a dot where the file's have an
    underscore (EXP-1).
    """
    if not isinstance(device_map, Mapping):
        return
    devices = {str(device) for device in device_map.values()}
    offloaded = {"disk", "cpu"} if devices - {"disk", "cpu"} else {"disk"}
    for path, entry in placed.files.items():
        keys = [key for key in device_map if key == "" or f"{path}.".startswith(f"{key}.")]
        if entry.experts is not None and keys and str(device_map[max(keys, key=len)]) in offloaded:
            raise LoadError(
                f"{path}: stacked experts cannot be offloaded, and device_map does; choose one that keeps them in the "
                "memory of a device that computes"
            )


def lowbit_modules(model: nn.Module) -> Iterator[tuple[str, LowbitModule]]:
    """All lowbit modules with their paths."""
    for path, module in model.named_modules():
        if isinstance(module, LowbitModule):
            yield path, module


def _tied_places(
    model: Any, modules: dict[str, nn.Module], files: FileNames, placed: Placement
) -> Iterator[tuple[str, str]]:
    """Pairs (path, owner's path) of modules that use another's matrix: by the file, then by transformers' own ties."""
    seen, tied = set(placed.files), files.reader.config.tied
    for place, owner in tied.items():
        at, owner_at = files.path(f"{place}.weight"), files.path(f"{owner}.weight")
        if at is not None and owner_at is not None and at not in seen:
            seen.add(at)
            yield at, owner_at
    stored = {target for name, target in files.of.items() if name.removesuffix(".weight") not in tied}
    for members in _tie_groups(model):
        given = [path for path in members if path in placed.files]
        for place in members if given else ():
            if place in modules and place not in seen and f"{place}.weight" not in stored:
                seen.add(place)
                yield place, given[0]


def _tie_groups(model: Any) -> list[list[str]]:
    """Paths of the modules whose weights transformers ties to one another, the source first.

    A file may have any of them: that of a decoder alone has its embedding, which a whole model has under another name.
    """
    groups: dict[str, list[str]] = {}
    for target, source in model.all_tied_weights_keys.items():
        groups.setdefault(source, [source.removesuffix(".weight")]).append(target.removesuffix(".weight"))
    return list(groups.values())


def _lowbit_module(
    model: Any, path: str, old: nn.Module, reader: ModelReader, entry: ModuleEntry, bits: int | None
) -> LowbitModule:
    """What `old` becomes, on the meta device."""
    kind, shape, options = _look_at(old, path)
    if shape != (entry.rows, entry.cols):
        raise LoadError(
            f"{path}: the file has {entry.kind} {list(entry.shape)}, {type(model).__name__} has {kind} {list(shape)}: "
            "the model's config (config.json, or options given to from_pretrained) does not fit the weights"
        )
    row_bits = reader.row_bits(entry.path)
    plane_rows = None if row_bits is None else int(row_bits.clip(max=bits or entry.scheme.bits).sum(dtype=int))
    options["dtype"] = _kept_dtype(model, path) or options["dtype"]
    new = MODULES[kind](
        entry.scheme, entry.rows, entry.cols, bits=bits, plane_rows=plane_rows, device="meta", **options
    )
    return new.train(old.training)


def _replace_experts(model: Any, path: str, entry: ModuleEntry, bits: int | None) -> None:
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    kind = expert_parameters(parent).get(name)
    if kind != entry.kind:
        raise LoadError(
            f"{path}: the file has {entry.kind}, and what a {type(parent).__name__} of this version of transformers "
            f"computes with its parameter is {'not known' if kind is None else f'that of {kind}'}; use the version "
            "with which the model was converted, or convert it again"
        )
    old = getattr(parent, name)
    experts, rows, cols = entry.shape
    expected = (experts, rows, cols) if kind == "experts" else (experts, cols, rows)
    if tuple(old.shape) != expected:
        raise LoadError(
            f"{path}: the file has {entry.kind} {list(entry.shape)}, which make a parameter {list(expected)}; that of "
            f"{type(model).__name__} is {list(old.shape)}: the model's config (config.json, or options given to "
            "from_pretrained) does not fit the weights"
        )
    dtype = _kept_dtype(model, path) or old.dtype
    stack = EXPERTS[kind](entry.scheme, rows, cols, experts=experts, bits=bits, dtype=dtype, device="meta")
    put_in(parent, name, stack.train(parent.training))


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
        if re.search(pattern.replace("*", ".*"), f"{path}.weight"):  # of experts, whose path is a parameter's, too
            return dtype  # type: ignore[no-any-return]
    return None
