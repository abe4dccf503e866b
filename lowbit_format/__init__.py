"""One low-bit model, many tasks: a bit-plane format for Hugging Face models.

Importing this package registers the format with transformers and costs next to nothing: torch, transformers
and numba are imported by the names below when these are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import LowbitError
from .registration import register

if TYPE_CHECKING:
    from .container.reader import ModelReader
    from .runtime.loading import from_pretrained

__version__ = "0.1.0"

__all__ = ["LowbitError", "ModelReader", "__version__", "convert_hf_to_lowbit", "from_pretrained"]

_LAZY = {  # public name -> module that defines it
    "ModelReader": "lowbit_format.container.reader",
    "convert_hf_to_lowbit": "lowbit_format.converters",
    "from_pretrained": "lowbit_format.runtime.loading",
}

register()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
