"""Registers the format with transformers (and its LoRA layers with PEFT), whichever is imported first.

Without registration transformers loads *random* weights with a mere warning. So ``import lowbit_format`` must
suffice, but must not import transformers: what is loaded already is served at once, the rest when it gets imported.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

AFTER_IMPORT = {  # module to wait for -> our module that registers itself there when imported
    "transformers.quantizers.auto": "lowbit_format.integrations.quantizer",
    "peft.tuners.lora.config": "lowbit_format.integrations.peft",
}


def register() -> None:
    """Import our side of every module of :data:`AFTER_IMPORT` that is loaded, and wait for the others. Idempotent."""
    for name, ours in AFTER_IMPORT.items():
        if name in sys.modules:
            importlib.import_module(ours)
    if not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


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
    """The real loader, and then the import of our side. An error there fails the import: better than random weights."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)  # get_source, get_data, … for inspect and linecache

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._real.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self._real.exec_module(module)
        importlib.import_module(AFTER_IMPORT[module.__name__])
