"""Destinations: to which module and parameter of a transformers model each tensor of a checkpoint belongs.

The model is built on the meta device, and names go through transformers' own conversion mapping. So the output loads
whatever renames a release of transformers makes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import SourceError
from ..runtime.known_modules import known
from .architecture import Renamer, meta_model, output_heads, tied_keys, word_matrices
from .completeness import fit
from .experts import Stack, find_stacks
from .reads import READ, weights_read


@dataclass(frozen=True)
class Destination:
    """One tensor's place in the model.

    Attributes:
        key: name in the checkpoint.
        path: the module's path in the model.
        kind: ``linear``, ``conv1d`` or ``embedding`` for the weight of such a module; ``experts`` or
            ``experts_transposed`` for a part of a stack of experts, ``expert`` if such a stack cannot be quantized;
            else ``other``.
        head: whether the module lies outside of the base model, or gives the output.
        reason: why it cannot be quantized, or None.
        target: name of the parameter in the model; empty if transformers makes it from several tensors.
        stack: of experts, to which it belongs.
    """

    key: str
    path: str
    kind: str
    head: bool = False
    reason: str | None = None
    target: str = ""
    stack: Stack | None = None


@dataclass(frozen=True)
class Names:
    """The checkpoint as transformers sees it.

    Attributes:
        destinations: by name in the checkpoint.
        tied: path of a tied module to the path of the module that owns the weight.
        base_model_prefix: of the model class.
        architecture: name of the model class that the checkpoint holds.
        named: name of the model class that its config names.
        absent: parameters of that class that the checkpoint does not have.
        kinds: path of every module that might be quantized to its kind.
        heads: paths of the modules that give an output.
        strange: tensors of the checkpoint that the class does not know, by name.
        words: paths of the matrices with one row for each word, in a model that generates text.
    """

    destinations: dict[str, Destination]
    tied: dict[str, str] = field(default_factory=dict)
    base_model_prefix: str = ""
    architecture: str = ""
    named: str = ""
    absent: tuple[str, ...] = ()
    kinds: dict[str, str] = field(default_factory=dict)
    heads: frozenset[str] = frozenset()
    strange: tuple[str, ...] = ()
    words: frozenset[str] = frozenset()


def map_names(directory: Path, shapes: dict[str, tuple[int, ...]]) -> Names:
    """Find the destination of every tensor of the checkpoint in `directory`.

    Args:
        directory: holds ``config.json``.
        shapes: shape of every tensor, by name.

    Raises:
        SourceError: the architecture is unknown, needs code of its own, or does not fit the tensors.
    """
    named = meta_model(directory)
    model, absent = fit(named, shapes, directory)
    modules = dict(model.named_modules())
    rename, heads = Renamer(model), output_heads(model)
    tied = {t[:-7]: s[:-7] for t, s in tied_keys(model).items() if t.endswith(".weight") and s.endswith(".weight")}
    matrices = {path: module for path, module in modules.items() if known(module) is not None}
    read = weights_read(model, matrices)
    prefix = model.base_model_prefix or ""
    has_body = any(name == prefix for name in modules) and prefix != ""
    stacks, of_experts = find_stacks(model, rename, shapes)
    destinations = {}
    _check_unique(rename, shapes, directory)
    for key, shape in shapes.items():
        target, converted = rename(key)
        path = target.removesuffix(".weight")
        module = modules.get(path) if target.endswith(".weight") else None
        owner = tied.get(path, path)
        head = path in heads or (has_body and not path.startswith(f"{prefix}."))
        kind, reason = _kind(module)
        if key in of_experts:
            target, why = of_experts[key]
            stack = stacks.get(target)
            kind, reason = (stack.kind, None) if stack is not None else ("expert", why)
            destinations[key] = Destination(key, target, kind, head, reason, "" if converted else target, stack)
            continue
        if converted and kind != "other":
            reason = "transformers converts it on loading"
        elif not converted and rename.shape(target) not in (None, tuple(shape)):
            raise SourceError(
                f"{directory}: tensor {key!r} has shape {list(shape)}, the model that config.json describes expects "
                f"{list(rename.shape(target) or ())}; get the checkpoint again, or correct config.json"
            )
        elif path in read:
            reason = READ
        elif kind != "other" and not rename.keeps(f"{owner}.weight"):
            reason = "transformers would rename it on loading"
        destinations[key] = Destination(key, path, kind, head, reason, "" if converted else target)
    kinds = {path: _kind(module)[0] for path, module in matrices.items()}
    cls, named_cls = type(model).__name__, type(named).__name__
    strange = tuple(key for key, to in destinations.items() if to.target and rename.shape(to.target) is None)
    words = frozenset(word_matrices(model, heads))
    return Names(destinations, tied, prefix, cls, named_cls, absent, kinds, frozenset(heads), strange, words)


def _check_unique(rename: Renamer, keys: Iterable[str], directory: Path) -> None:
    """Raise SourceError if two tensors of the checkpoint are the same one of the model: which would be loaded?"""
    plain, parts = dict[str, str](), dict[str, str]()
    for key in keys:
        if rename(key)[1]:
            parts.update(dict.fromkeys(rename.targets(key), key))
            continue
        target = rename(key)[0]
        if target in plain and rename.shape(target) is not None:
            raise SourceError(_TWICE.format(directory, plain[target], key, target))
        plain[target] = key
    for target in plain.keys() & parts.keys():
        raise SourceError(_TWICE.format(directory, plain[target], parts[target], target))


_TWICE = "{}: the tensors {!r} and {!r} both become {!r} of the model; take one of them out of the checkpoint"


def _kind(module: Any) -> tuple[str, str | None]:
    """Kind of a module, and why it cannot be quantized: a subclass may compute something else from its weight."""
    import torch
    from transformers.pytorch_utils import Conv1D

    found = None if module is None else known(module)
    if found is not None:
        return found.kind, None
    for base, kind in ((torch.nn.Linear, "linear"), (Conv1D, "conv1d"), (torch.nn.Embedding, "embedding")):
        if isinstance(module, base):
            return kind, f"{type(module).__name__} is a subclass with a forward of its own"
    return "other", None
