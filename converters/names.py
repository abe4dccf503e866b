"""What each tensor of a checkpoint is to transformers: a module of which kind, under which name.

The model is built on the meta device, and names go through transformers' own conversion mapping, so that what
is written loads whatever renames a release of transformers makes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import SourceError
from ..integrations.architecture import named_class


@dataclass(frozen=True)
class Destination:
    """One tensor's place in the model.

    Attributes:
        key: name in the checkpoint.
        path: the module's path in the model.
        kind: ``linear``, ``conv1d`` or ``embedding`` where it is the weight of such a module; ``expert`` for a part
            of a
            fused experts parameter; ``other``.
        head: the module lies outside of the base model, or gives the output.
        reason: why it cannot be quantized, or None.
    """

    key: str
    path: str
    kind: str
    head: bool = False
    reason: str | None = None


@dataclass(frozen=True)
class Names:
    """The checkpoint as transformers sees it.

    Attributes:
        destinations: by name in the checkpoint.
        tied: path of a tied module to the path of the module that owns the weight.
        base_model_prefix: of the model class.
        architecture: name of the model class.
    """

    destinations: dict[str, Destination]
    tied: dict[str, str] = field(default_factory=dict)
    base_model_prefix: str = ""
    architecture: str = ""


def map_names(directory: Path, shapes: dict[str, tuple[int, ...]]) -> Names:
    """Find the destination of every tensor of the checkpoint in `directory`.

    Args:
        directory: holds ``config.json``.
        shapes: shape of every tensor, by name.

    Raises:
        SourceError: the architecture is unknown, needs code of its own, or does not fit the tensors.
    """
    model = _meta_model(directory)
    modules = dict(model.named_modules())
    rename = _Renamer(model)
    tied = {t.removesuffix(".weight"): s.removesuffix(".weight") for t, s in _tied_keys(model).items()}
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    prefix = model.base_model_prefix or ""
    has_body = any(name == prefix for name in modules) and prefix != ""
    destinations, found = {}, set[str]()
    for key, shape in shapes.items():
        target, converted = rename(key)
        found.update(rename.targets(key))
        path = target.removesuffix(".weight")
        module = modules.get(path) if target.endswith(".weight") else None
        owner = tied.get(path, path)
        head = (module is not None and module is output) or (has_body and not path.startswith(f"{prefix}."))
        kind, reason = _kind(module)
        if _is_expert(model, target):
            kind, reason = "expert", "fused experts are not quantized yet"
        elif converted and kind != "other":
            reason = "transformers converts it on loading"
        elif kind != "other" and module is not None and tuple(module.weight.shape) != tuple(shape):
            raise SourceError(
                f"{directory}: tensor {key!r} has shape {list(shape)}, the model expects {list(module.weight.shape)}"
            )
        elif kind != "other" and not rename.keeps(f"{owner}.weight"):
            reason = "transformers would rename it on loading"
        destinations[key] = Destination(key, path, kind, head, reason)
    _check_complete(model, found, directory)
    return Names(destinations, tied, prefix, type(model).__name__)


def _check_complete(model: Any, found: set[str], directory: Path) -> None:
    """Raise SourceError for tensors of the model that the checkpoint lacks: they would be random when it is loaded."""
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    tied = _tied_keys(model)
    found = found | {t for pair in tied.items() if found & set(pair) for t in pair}
    missing = [n for n in model.state_dict() if n not in found and not any(p.search(n) for p in ignored)]
    if missing:
        raise SourceError(
            f"{directory}: lacks {len(missing)} tensors of {type(model).__name__}, such as {missing[0]!r}, which would "
            "be random; get the checkpoint again, or load it with transformers and save it, which completes it"
        )


def _kind(module: Any) -> tuple[str, str | None]:
    """Kind of a module by its exact type: a subclass may compute something else from its weight."""
    import torch
    from transformers.pytorch_utils import Conv1D

    exact = {torch.nn.Linear: "linear", Conv1D: "conv1d", torch.nn.Embedding: "embedding"}
    if module is None:
        return "other", None
    if type(module) in exact:
        return exact[type(module)], None
    for base, kind in exact.items():
        if isinstance(module, base):
            return kind, f"{type(module).__name__} is a subclass with a forward of its own"
    return "other", None


def _is_expert(model: Any, name: str) -> bool:
    """Whether the parameter is a stack of expert matrices: three dimensions, in a module that says so by its name."""
    import torch

    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return False
    parameter = getattr(module, leaf, None)
    named = "expert" in f"{path} {type(module).__name__}".lower()
    return named and isinstance(parameter, torch.nn.Parameter) and parameter.ndim == 3


def _meta_model(directory: Path) -> Any:
    """The model class of the checkpoint's config, built without weights."""
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as e:
        raise SourceError(
            f"{directory}: transformers {transformers.__version__} cannot read its config: {str(e)[:300]}; a newer "
            "transformers may know the architecture, code from the checkpoint is never run"
        ) from e
    cls = named_class(config)
    with torch.device("meta"):
        try:
            if cls is not None:
                return cls(config)
            return transformers.AutoModel.from_config(config, trust_remote_code=False)  # type: ignore[no-untyped-call]
        except Exception as e:
            raise SourceError(
                f"{directory}: cannot build the architecture {config.architectures or type(config).__name__}: {e}"
            ) from e


def _tied_keys(model: Any) -> dict[str, str]:
    """Tied parameter to the parameter that owns the weight; empty where the config unties them."""
    if hasattr(model, "all_tied_weights_keys"):
        return dict(model.all_tied_weights_keys)
    return dict(model.get_expanded_tied_weights_keys(all_submodels=True))


class _Renamer:
    """transformers' renaming of checkpoint keys for one model."""

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        mapping = get_model_conversion_mapping(model)
        self._renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
        self._converters = [m for m in mapping if isinstance(m, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._state = model.state_dict()

    def __call__(self, key: str) -> tuple[str, bool]:
        """Name in the model, and whether a conversion beyond renaming is needed."""
        return self._rename(key, self._state)

    def targets(self, key: str) -> list[str]:
        """All names in the model that the tensor has a part in; a conversion may split it."""
        from transformers.core_model_loading import rename_source_key

        name, converted = self(key)
        for converter in self._converters if converted else ():
            if rename_source_key(key, self._renamings, [converter], self._prefix, self._state)[1] is not None:
                first, *others = converter.target_patterns
                return [name, *(name.replace(first, other) for other in others)]
        return [name]

    def keeps(self, name: str) -> bool:
        """Whether the lowbit tensors of the weight `name` of the model load under their own names."""
        path = name.removesuffix(".weight")
        probes = {f"{path}.{role}": self._state[name] for role in ("planes", "scales")}
        return all(self._rename(probe, {**self._state, **probes}) == (probe, False) for probe in probes)

    def _rename(self, key: str, state: dict[str, Any]) -> tuple[str, bool]:
        from transformers.core_model_loading import rename_source_key

        renamed, pattern = rename_source_key(key, self._renamings, self._converters, self._prefix, state)
        if renamed not in state and key in state:
            renamed, pattern = rename_source_key(key, [], [], self._prefix, state)
        return renamed, pattern is not None
