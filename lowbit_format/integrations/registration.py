"""Registers the format with transformers, whichever is imported first.

Without registration transformers warns and loads *random* weights. So :func:`register` runs when ``lowbit_format`` is
imported, and when torch is: torch loads the entry points of the group ``torch.backends`` at the end of its own import
(``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` turns this off). Both must cost next to nothing and must never fail. Nothing
heavy is imported here: our side of transformers is imported right behind theirs. (PEFT needs no registration: a
lowbit module is an ``nn.Linear``.)

There are three cases. A module that is not imported yet gets a step behind its execution (:class:`_Watcher`). One that
is imported already is joined at once. One that is being imported *now* is joined when it is complete
(:class:`_Announcing`): ``transformers.quantizers.auto`` imports torch, and torch then calls :func:`register`, in the
middle of both.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

TRANSFORMERS = "transformers.quantizers.auto"
AFTER_IMPORT = {  # module to wait for -> our module that registers itself there when imported
    TRANSFORMERS: "lowbit_format.integrations.quantizer",
    "transformers.modeling_utils": "lowbit_format.integrations.parts",
}


def register() -> None:
    """Join every module of :data:`AFTER_IMPORT` that is imported already, and wait for the others. Idempotent.

    Never raises: where our side cannot be imported, a RuntimeWarning says so, and loading a lowbit model raises.
    """
    if not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())
    for name in AFTER_IMPORT:
        _join_when_complete(name, (name, "torch"))


def _join_when_complete(name: str, waiting_for: Sequence[str]) -> None:
    """Join the module `name`, if it is imported, as soon as none of `waiting_for` is in the middle of its import."""
    if name not in sys.modules:  # not imported, or its import has failed
        return
    for other in waiting_for:
        spec = getattr(sys.modules.get(other), "__spec__", None)
        if getattr(spec, "_initializing", False):
            _Announcing.watch(spec, lambda: _join_when_complete(name, waiting_for))
            return
    _join(name)


def _join(name: str) -> None:
    """Import our side of the module `name`; warn where that fails."""
    try:
        importlib.import_module(AFTER_IMPORT[name])
    except Exception as error:
        package = name.partition(".")[0]
        version = getattr(sys.modules.get(package), "__version__", "of unknown version")
        message = (
            f"lowbit_format could not register with {package} {version} ({type(error).__name__}: {error}). Models in "
            f"the lowbit format do not work with {package} in this process, all others do. Install versions that fit: "
            f"pip install -U lowbit-format {package}"
        )
        if package == "transformers" and TRANSFORMERS in sys.modules:
            _refuse_models(sys.modules[TRANSFORMERS], message, error)
        warnings.warn(message, RuntimeWarning, stacklevel=2)


def _refuse_models(auto: ModuleType, message: str, cause: Exception) -> None:
    """Make transformers raise a LoadError for a lowbit model, which it would fill with random weights otherwise."""
    from ..errors import LoadError

    class Unavailable:
        """Stands in the place of our config class."""

        @classmethod
        def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
            raise LoadError(message) from cause

    getattr(auto, "AUTO_QUANTIZATION_CONFIG_MAPPING", {})["lowbit"] = Unavailable


class _Watcher(importlib.abc.MetaPathFinder):
    """Finds nothing itself; lets the other finders find a watched module and adds a step behind its execution."""

    def __init__(self) -> None:
        self._searching: set[str] = set()

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in AFTER_IMPORT or name in self._searching:
            return None
        self._searching.add(name)  # find_spec below asks this finder again
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._searching.discard(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """The real loader, and then the import of our side."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)  # get_source, get_data, … for inspect and linecache

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._real.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self._real.exec_module(module)
        _join_when_complete(module.__name__, ("torch",))  # the module itself is complete, though still marked


class _Announcing(ModuleSpec):
    """The spec of a module that is being imported; it calls back when the import system marks that as done.

    Python sets ``spec._initializing`` to False behind every import, successful or not. There is no public sign of
    that moment for a module whose execution has begun already.
    """

    _callbacks: list[Callable[[], None]]

    @classmethod
    def watch(cls, spec: Any, callback: Callable[[], None]) -> None:
        """Call `callback` once, when the module of `spec` is complete."""
        if not isinstance(spec, cls):
            spec.__class__ = cls
            spec._callbacks = []
        spec._callbacks.append(callback)

    @property
    def _initializing(self) -> bool:
        return bool(self.__dict__["_initializing"])

    @_initializing.setter
    def _initializing(self, value: bool) -> None:
        self.__dict__["_initializing"] = value
        if not value:
            callbacks = self.__dict__.pop("_callbacks")
            self.__class__ = ModuleSpec  # type: ignore[assignment]
            for callback in callbacks:
                callback()
