"""Which tensor of a model each tensor of a lowbit directory is, if the model has another class than was converted.

A directory of a ``CLIPModel`` is also loaded as a ``CLIPVisionModel``, one of a ``BertForMaskedLM`` as a ``BertModel``.
transformers maps the names of a *checkpoint* to those of any class. Kept tensors have such names. Lowbit tensors have
those of the converted class (as everything has that ``save_pretrained`` wrote): where transformers does not know these,
they are first turned back into the checkpoint's.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ..container.reader import ModelReader
from ..errors import LoadError
from .architecture import converted_model


class FileNames:
    """The names of a directory's tensors in a model that has no data yet, and no lowbit modules.

    Attributes:
        reader: of the directory.
        own: the model has the class that the directory was written for.
        of: by the name of a parameter in the directory (of a lowbit module: its ``weight``), the name in the model.
    """

    def __init__(self, model: Any, reader: ModelReader) -> None:
        self.reader = reader
        self.own = type(model).__name__ in (reader.model_config.get("architectures") or ())
        self._state = dict(model.state_dict())
        self._prefix = _prefix_of(model)
        self._rename = _Renaming(model)
        self.of = self._match()

    def path(self, weight: str) -> str | None:
        """The model's path of the module whose `weight` the directory has quantized; None if the model lacks it."""
        found = self.of.get(weight)
        return None if found is None else found.removesuffix(".weight")

    def expects(self, name: str) -> bool:
        """Whether the checkpoint that was converted had the model's tensor `name`, as far as can be known."""
        if name not in self._state:
            return True  # of a lowbit module, which is only made where the directory has its matrix
        if _in_layer(name) in self._unmatched:
            return True
        return not self._never_written(name, self._prefix) if self.own else name in self._of_converted

    def check_config(self, name: str) -> None:
        """Raise LoadError for a parameter that its own class lacks, unless options of the call have dropped it."""
        if self.own and self._converted is not None and name not in self._converted.state_dict():
            raise LoadError(
                f"{self.reader.directory}: the file has {name!r}, but {type(self._converted).__name__} as config.json "
                "describes it has no such module: config.json and the weights do not belong together"
            )

    def _match(self) -> dict[str, str]:
        lowbit = self.reader.lowbit_names()
        of_modules = {entry.weight for entry in self.reader.config} | {f"{p}.weight" for p in self.reader.config.tied}
        of = {}
        names = sorted({*of_modules, *(n for n in self.reader.names() if n not in lowbit)})
        for name in names:
            target = name if self.own and name in of_modules else self._rename(name)
            if target in self._state:
                of[name] = target
        if not self.own and set(of.values()) < self._state.keys():
            for name in names:
                target = self._rename(self._in_checkpoint(name)) if name not in of else ""
                if target in self._state and target not in of.values():
                    of[name] = target
        return of

    @functools.cached_property
    def _converted(self) -> Any:
        return converted_model(self.reader.directory)

    @functools.cached_property
    def _back(self) -> Any:
        return None if self._converted is None else _Reverting(self._converted)

    def _in_checkpoint(self, name: str) -> str:
        """The name in the converted checkpoint of the converted class's parameter `name`."""
        return name if self._back is None else str(self._back(name))

    @functools.cached_property
    def _of_converted(self) -> set[str]:
        """The model's names of all tensors of the class that was converted; all names, if that class is unknown."""
        if self._converted is None:
            return set(self._state)
        prefix = _prefix_of(self._converted)
        names = [n for n in self._converted.state_dict() if not self._never_written(n, prefix)]
        return {self._rename(n) for n in names} | {self._rename(self._in_checkpoint(n)) for n in names}

    @functools.cached_property
    def _unmatched(self) -> set[str]:
        """Names within their layers of the quantized modules that the model does not have."""
        return {_in_layer(entry.weight) for entry in self.reader.config if entry.weight not in self.of} - {""}

    def _never_written(self, name: str, prefix: str) -> bool:
        """Whether the part of the converted class's tensor `name`, such as a pooler, was not there to be converted.

        Only digests of all that was written can tell.
        """
        prefix = prefix if name.startswith(prefix) else ""
        part = prefix + name.removeprefix(prefix).partition(".")[0]
        return bool(self._written) and not any(n == part or n.startswith(f"{part}.") for n in self._written)

    @functools.cached_property
    def _written(self) -> set[str]:
        """The converted class's names of all tensors that have digests; empty unless all in the directory have some."""
        headers = self.reader.headers.values()
        if any(header.digests.keys() < header.tensors.keys() for header in headers):
            return set()
        rename = self._rename if self.own else _Renaming(self._converted)
        kept = {n for header in headers for n in header.digests} - self.reader.lowbit_names()
        return {rename(n) for n in kept} | {entry.weight for entry in self.reader.config}


def _prefix_of(model: Any) -> str:
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def _in_layer(name: str) -> str:
    """The end of a name from its numbered layer on, such as ``layers.0.mlp.up_proj.weight``; empty without one."""
    found = re.search(r"[^.]+\.\d+\..*", name)
    return "" if found is None else found.group()


class ExactNames(WeightRenaming):
    """A last step of transformers' renaming, for lowbit tensors that it would load elsewhere, or nowhere.

    Attributes:
        names: what transformers has made of a name in the directory -> the name in the model.
    """

    def __init__(self, names: dict[str, str]) -> None:
        super().__init__(source_patterns=r"(?!)", target_patterns="")  # the pattern matches nothing
        self.names = names

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        found = self.names.get(source_key)
        return (source_key, None) if found is None else (found, source_key)


def exact_names(model: Any, wanted: dict[str, str]) -> list[ExactNames]:
    """The step that `model`, whose lowbit modules are in place, needs to be loaded; none, where transformers does it.

    Args:
        model: on the meta device.
        wanted: by the name of a tensor in the directory, the name in the model.

    Raises:
        LoadError: two tensors cannot be told apart, or transformers would rename the result once more.
    """
    rename, state = _Renaming(model), model.state_dict()
    names, renamed = dict[str, str](), {name: rename.first(name) for name in sorted(wanted)}
    shared = Counter(renamed.values())
    for name, step in renamed.items():
        if wanted[name] in state and rename(name, state) != wanted[name]:
            names[step] = wanted[name]
            if shared[step] > 1 or rename(wanted[name], state, renamed=True) != wanted[name]:
                raise LoadError(
                    f"{name}: transformers gives {type(model).__name__} this tensor as {rename(name, state)!r}, but it "
                    f"is {wanted[name]!r}: load the class that the directory was written for"
                )
    return [ExactNames(names)] if names else []


class _Renaming:
    """transformers' renaming on loading: names in a checkpoint to names in `model`."""

    def __init__(self, model: Any) -> None:
        mapping = get_model_conversion_mapping(model)
        self._renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
        self._converters = [m for m in mapping if isinstance(m, WeightConverter)]
        self._prefix, self._state = model.base_model_prefix, dict(model.state_dict())

    def __call__(self, name: str, state: Any = None, *, renamed: bool = False) -> str:
        """The name in the model (of a tensor that is split, the first); `renamed`: :meth:`first` is done already."""
        renamings = [] if renamed else self._renamings
        return rename_source_key(name, renamings, self._converters, self._prefix, state or self._state)[0]

    def first(self, name: str) -> str:
        """The name after all renamings, before conversions and the base model's prefix."""
        return rename_source_key(name, self._renamings, [])[0]


class _Reverting:
    """transformers' renaming on saving: names in `model` to names in a checkpoint.

    What a conversion makes of a tensor besides is left out: names are only turned back into the model's afterwards.
    """

    def __init__(self, model: Any) -> None:
        mapping = reversed(get_model_conversion_mapping(model, add_legacy=False))
        # A change of the prefix only tells what names may have been.
        renamings = [m for m in mapping if isinstance(m, WeightRenaming) and type(m).__name__ != "PrefixChange"]
        self._renamings: list[Any] = [m.reverse_transform() for m in renamings]

    def __call__(self, name: str) -> str:
        return str(rename_source_key(name, self._renamings, [])[0])
