"""One low-bit model, many tasks: a bit-plane format for Hugging Face models.

Importing this package registers the format with transformers and costs next to nothing: torch, transformers and numba
are imported when a name below is first used. Where this package is installed, importing torch registers the format too
(see :mod:`.integrations.registration`).

Public are the names in ``__all__``, :mod:`.testing` and :mod:`.errors`, and the commands with their options. A public
name is taken away only after one minor release in which its use gives a DeprecationWarning.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .calibration.data import Data
    from .container.reader import ModelReader
    from .converters import (
        Budget,
        Calibration,
        Recipe,
        Rule,
        Words,
        convert_hf_to_lowbit,
        fit_budget,
        load_recipe,
        write_recipe,
    )
    from .errors import LowbitError
    from .evaluation import evaluate
    from .loading import from_pretrained
    from .partial_download import fetch_precision
    from .quantize import Target
    from .report.write import write_report
    from .runtime.activations import set_activations
    from .runtime.autotune import autotune
    from .tasks.merging import merge_task
    from .tasks.saving import save_task
    from .tasks.serving import list_tasks, load_task, set_task, unload_task, use_tasks
    from .tasks.sharing import push_task_to_hub
    from .tasks.trainer import TaskCallback
    from .tasks.tuning import prepare_scale_tuning
    from .tasks.zeroth_order import ZerothOrder
    from .tuning.tune import tune

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "Calibration",
    "Data",
    "LowbitError",
    "ModelReader",
    "Recipe",
    "Rule",
    "Target",
    "TaskCallback",
    "Words",
    "ZerothOrder",
    "__version__",
    "autotune",
    "convert_hf_to_lowbit",
    "evaluate",
    "fetch_precision",
    "fit_budget",
    "from_pretrained",
    "list_tasks",
    "load_recipe",
    "load_task",
    "merge_task",
    "prepare_scale_tuning",
    "push_task_to_hub",
    "save_task",
    "set_activations",
    "set_task",
    "tune",
    "unload_task",
    "use_tasks",
    "write_recipe",
    "write_report",
]

_LAZY = {  # public name -> module that defines it
    "Budget": "lowbit_format.converters",
    "Calibration": "lowbit_format.converters",
    "Data": "lowbit_format.calibration.data",
    "LowbitError": "lowbit_format.errors",
    "ModelReader": "lowbit_format.container.reader",
    "Recipe": "lowbit_format.converters",
    "Rule": "lowbit_format.converters",
    "Target": "lowbit_format.quantize",
    "TaskCallback": "lowbit_format.tasks.trainer",
    "Words": "lowbit_format.converters",
    "ZerothOrder": "lowbit_format.tasks.zeroth_order",
    "autotune": "lowbit_format.runtime.autotune",
    "convert_hf_to_lowbit": "lowbit_format.converters",
    "evaluate": "lowbit_format.evaluation",
    "fetch_precision": "lowbit_format.partial_download",
    "fit_budget": "lowbit_format.converters",
    "from_pretrained": "lowbit_format.loading",
    "list_tasks": "lowbit_format.tasks.serving",
    "load_recipe": "lowbit_format.converters",
    "load_task": "lowbit_format.tasks.serving",
    "merge_task": "lowbit_format.tasks.merging",
    "prepare_scale_tuning": "lowbit_format.tasks.tuning",
    "push_task_to_hub": "lowbit_format.tasks.sharing",
    "save_task": "lowbit_format.tasks.saving",
    "set_activations": "lowbit_format.runtime.activations",
    "set_task": "lowbit_format.tasks.serving",
    "tune": "lowbit_format.tuning.tune",
    "unload_task": "lowbit_format.tasks.serving",
    "use_tasks": "lowbit_format.tasks.serving",
    "write_recipe": "lowbit_format.converters",
    "write_report": "lowbit_format.report.write",
}


def _register() -> None:
    """Register with transformers; the entry point that torch calls. Never raises: it must not break torch."""
    try:
        from .integrations.registration import register

        register()
    except Exception as error:
        import warnings

        warnings.warn(
            f"lowbit_format {__version__} could not register with transformers ({type(error).__name__}: {error}): "
            "lowbit models would load with RANDOM weights in this process. Its installation is damaged; repair it "
            "with: pip install --force-reinstall --no-deps lowbit-format",
            RuntimeWarning,
            stacklevel=1,
        )


_register()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
