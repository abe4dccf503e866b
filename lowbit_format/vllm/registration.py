"""What vLLM calls in each of its processes."""

from __future__ import annotations

import logging
from typing import Any

import vllm
from vllm.model_executor.layers.quantization import register_quantization_config

from ..errors import LoadError
from ..schema import QUANT_METHOD
from . import hub_tasks, internals

log = logging.getLogger("vllm.lowbit")  # below vLLM's logger, which has a handler

_done = False


def register() -> None:
    """Register the quantization method and everything for tasks. Idempotent.

    Never raises, since other models are none of our business. Where this vLLM has another shape, a warning says so,
    and loading a lowbit model raises LoadError.
    """
    global _done
    if _done:
        return
    _done = True
    try:
        internals.check()
        from .config import LowbitConfig

        internals.apply()
        internals.join_server()
        hub_tasks.register()
        config: Any = LowbitConfig
    except Exception as error:
        log.warning("lowbit: %s", error)
        config = _unavailable(error)
    else:
        if vllm.__version__ not in internals.TRIED:
            tried = ", ".join(internals.TRIED)
            log.warning("lowbit: this is vLLM %s; lowbit-format was tried with %s", vllm.__version__, tried)
    register_quantization_config(QUANT_METHOD)(config)


def _unavailable(error: Exception) -> Any:
    """A quantization method that raises LoadError as soon as a model needs it."""
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise LoadError(f"this vLLM cannot serve lowbit models: {error}") from error

    names = [*QuantizationConfig.__abstractmethods__, "from_config"]
    members: dict[str, Any] = dict.fromkeys(names, classmethod(refuse))
    members["override_quantization_method"] = classmethod(lambda cls, *args, **kwargs: None)
    return type("UnavailableLowbitConfig", (QuantizationConfig,), members)
