"""The model that transformers builds from a checkpoint's config: on the meta device, with its names and ties."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SourceError
from ..integrations.architecture import named_class

if TYPE_CHECKING:
    import torch


def meta_model(directory: Path) -> Any:
    """The model class of the checkpoint's config, built without weights."""
    import torch

    return build_model(directory, torch.device("meta"))


def build_model(directory: Path, device: torch.device) -> Any:
    """The model class of the checkpoint's config with random weights on `device`.

    Raises:
        SourceError: transformers does not know the architecture, or cannot build it.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as e:  # of many kinds, since a config may hold anything
        if _lacks_type(directory):
            raise SourceError(
                f"{directory}: config.json has no 'model_type', by which transformers knows the architecture, such as "
                "that of a part that was saved without its model; convert the directory of the whole model"
            ) from e
        if "trust_remote_code" in str(e):
            raise SourceError(
                f"{directory}: its config needs code of its own, since transformers {transformers.__version__} does "
                "not know the architecture; code from the checkpoint is never run, a newer transformers may know it"
            ) from e
        raise SourceError(
            f"{directory}: transformers {transformers.__version__} cannot read its config: {str(e)[:300]}; a newer "
            "transformers may know the architecture, code from the checkpoint is never run"
        ) from e
    cls = named_class(config)
    with device:
        try:
            if cls is not None:
                return cls(config)
            return transformers.AutoModel.from_config(config, trust_remote_code=False)  # type: ignore[no-untyped-call]
        except Exception as e:
            raise SourceError(
                f"{directory}: cannot build the architecture {config.architectures or type(config).__name__}: {e}"
            ) from e


def _lacks_type(directory: Path) -> bool:
    """Whether ``config.json`` tells the model's class and not its ``model_type``."""
    try:
        config = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and bool(config.get("architectures")) and not config.get("model_type")


def tied_keys(model: Any) -> dict[str, str]:
    """Tied parameter to the parameter that owns the weight; empty where the config unties them."""
    if hasattr(model, "all_tied_weights_keys"):
        return dict(model.all_tied_weights_keys)
    return dict(model.get_expanded_tied_weights_keys(all_submodels=True))


class Renamer:
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

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of the model's tensor `name`; None if it has none of this name."""
        return tuple(self._state[name].shape) if name in self._state else None

    def conversion(self, key: str) -> tuple[str, Any, str | None]:
        """Name in the model, and the conversion that makes it with the pattern that `key` matches, or None twice."""
        name, pattern = self._rename_with_pattern(key, self._state)
        found = next((c for c in self._converters if pattern in c.source_patterns), None) if pattern else None
        return name, found, pattern

    def targets(self, key: str) -> list[str]:
        """All names in the model that the tensor has a part in; a conversion may split it."""
        name, converter = self(key)[0], self._converter(key)
        if converter is None:
            return [name]
        first, *others = converter.target_patterns
        return [name, *(name.replace(first, other) for other in others)]

    def operations(self, key: str) -> list[Any]:
        """What transformers does to the tensor on loading, besides renaming it."""
        converter = self._converter(key)
        return [] if converter is None else list(converter.operations)

    def _converter(self, key: str) -> Any:
        """The conversion that the tensor goes into, or None."""
        from transformers.core_model_loading import rename_source_key

        for converter in self._converters if self(key)[1] else ():
            if rename_source_key(key, self._renamings, [converter], self._prefix, self._state)[1] is not None:
                return converter
        return None

    def keeps(self, name: str) -> bool:
        """Whether the lowbit tensors of the weight `name` of the model load under their own names."""
        path = name.removesuffix(".weight")
        probes = {f"{path}.{role}": self._state[name] for role in ("planes", "scales")}
        return all(self._rename(probe, {**self._state, **probes}) == (probe, False) for probe in probes)

    def keeps_stack(self, name: str) -> bool:
        """As :meth:`keeps`, for a parameter of stacked experts."""
        probes = {f"{name}_{role}": self._state[name] for role in ("planes", "scales")}
        return all(self._rename(probe, {**self._state, **probes}) == (probe, False) for probe in probes)

    def _rename(self, key: str, state: dict[str, Any]) -> tuple[str, bool]:
        renamed, pattern = self._rename_with_pattern(key, state)
        return renamed, pattern is not None

    def _rename_with_pattern(self, key: str, state: dict[str, Any]) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        renamed, pattern = rename_source_key(key, self._renamings, self._converters, self._prefix, state)
        if renamed not in state and key in state:
            renamed, pattern = rename_source_key(key, [], [], self._prefix, state)
        return renamed, pattern


def bare_model(model: Any) -> Any:
    """The base model inside of `model`, built by its own class on the meta device; None if `model` is one itself."""
    import torch

    base = model.base_model
    if base is model or not hasattr(base, "main_input_name"):
        return None
    with torch.device("meta"):
        return type(base)(base.config)


def siblings(model: Any) -> Iterator[Any]:
    """The other models that transformers makes of the config, on the meta device, the largest first."""
    import sys

    import torch

    config, found = model.config, []
    for cls in vars(sys.modules[type(model).__module__]).values():
        is_model = (
            isinstance(cls, type) and hasattr(cls, "main_input_name") and cls.__module__ == type(model).__module__
        )
        if not is_model or cls is type(model) or getattr(cls, "config_class", None) is not type(config):
            continue
        if cls.__name__.endswith("PreTrainedModel") or not cls.__name__.startswith(_family(model)):
            continue
        with torch.device("meta"), contextlib.suppress(Exception):  # some take a config with more in it
            found.append(cls(config))
    yield from sorted(found, key=lambda m: -len(m.state_dict()))


def _family(model: Any) -> str:
    """What the names of the config and of its models begin with."""
    return type(model.config).__name__.removesuffix("Config")


def output_heads(model: Any) -> set[str]:
    """Paths of the modules that give the model's output, or that of one of its parts.

    These are the output embeddings of every part, what a part with a head has outside of its base model, and modules
    that say so by their name.
    """
    heads = set[str]()
    for path, part in model.named_modules():
        if not hasattr(part, "main_input_name"):
            continue
        prefix = f"{path}." if path else ""
        output = part.get_output_embeddings() if hasattr(part, "get_output_embeddings") else None
        own = {id(m) for m in output.modules()} if output is not None else set[int]()
        heads |= {prefix + name for name, module in part.named_modules() if id(module) in own}
        base = f"{part.base_model_prefix}." if part.base_model is not part and part.base_model_prefix else ""
        if base and (not path or _HEADED.search(type(part).__name__)):
            heads |= {prefix + name for name, _ in part.named_modules() if name and not f"{name}.".startswith(base)}
    for path, _ in model.named_modules():
        names = path.split(".")
        own_name = next((name for name in reversed(names) if not name.isdigit()), "")
        if _HEAD_NAME.fullmatch(own_name) and not any("att" in name for name in names):
            heads.add(path)
    return heads


def word_matrices(model: Any, heads: Set[str]) -> set[str]:
    """Paths of the matrices with one row for each word, in a model that generates text; of another model none.

    These are the input embeddings of the model and of its parts, and those of its `heads` with as many rows. Tables of
    positions or of types of tokens are none.
    """
    import torch

    parts = [(path, part) for path, part in model.named_modules() if hasattr(part, "main_input_name")]
    if not any(part.can_generate() for _, part in parts):
        return set()
    inputs = set[int]()
    for _, part in parts:
        try:
            inputs.add(id(part.get_input_embeddings()))
        except (NotImplementedError, AttributeError):  # it takes no words
            continue
    embeddings, outputs = dict[str, int](), dict[str, int]()  # path to rows
    for path, module in model.named_modules(remove_duplicate=False):
        weight = getattr(module, "weight", None)
        if id(module) in inputs and isinstance(module, torch.nn.Embedding):
            embeddings[path] = module.num_embeddings
        elif path in heads and isinstance(weight, torch.Tensor) and weight.dim() == 2:
            outputs[path] = weight.shape[0]
    words = set(embeddings.values()) & set(outputs.values())
    return {path for path, rows in (embeddings | outputs).items() if rows in words}


_HEADED = re.compile(r"For[A-Z]|LMHead")
_HEAD_NAME = re.compile(r"(\w+_)?heads?|class_embed|classifier|embed_out|lm_out(put)?")
