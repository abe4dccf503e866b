"""Loads parts of a lowbit model by their own class, such as ``CLIPVisionModel`` from the directory of a ``CLIPModel``.

A quantizer is chosen by the model's config. The config of a part is taken out of the whole model's and has no
``quantization_config``, so that transformers would leave the part without lowbit modules, and give it random weights.
Therefore, when a model is about to be loaded without our quantizer, the directory of its files is asked. If that is a
lowbit model, loading begins again, with the ``quantization_config`` of the directory; and with its dtype, if the part's
config has none.

Importing this module puts the two steps into ``PreTrainedModel``; it is imported right behind that class.
"""

from __future__ import annotations

import contextlib
import functools
import json
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers.auto import AutoQuantizationConfig

from ..container.header import read_header
from ..container.reader import CONFIG_FILE
from ..errors import FormatError, LoadError
from ..schema import QUANT_METHOD


class _LowbitFilesError(Exception):
    """A model is about to be loaded from a lowbit directory without our quantizer, or with a config without dtype.

    Attributes:
        config: the directory's ``config.json``.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__("a lowbit model")
        self.config = config


# The config that was given has no dtype, and the call names none.
_no_dtype: ContextVar[bool] = ContextVar("lowbit_no_dtype", default=False)

_from_pretrained: Any = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]
_load_pretrained_model: Any = PreTrainedModel._load_pretrained_model


@functools.wraps(_from_pretrained)
def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """As in transformers; the config of a part of a lowbit model gets the ``quantization_config`` of the whole."""
    config = kwargs.get("config")
    auto = all(kwargs.get(name, "auto") == "auto" for name in ("dtype", "torch_dtype"))
    token = _no_dtype.set(auto and hasattr(config, "to_dict") and getattr(config, "dtype", None) is None)
    try:
        return _from_pretrained(cls, *args, **kwargs)
    except _LowbitFilesError as found:
        whole = found.config
    finally:
        _no_dtype.reset(token)
    if getattr(config, "quantization_config", None) is None:
        kwargs["quantization_config"] = AutoQuantizationConfig.from_dict(whole["quantization_config"])
    if auto:
        kwargs.pop("torch_dtype", None)
        kwargs["dtype"] = _dtype_of_part(cls, config, whole) or _dtype(whole) or "auto"
    return _from_pretrained(cls, *args, **kwargs)


def _dtype_of_part(cls: Any, config: Any, whole: dict[str, Any]) -> Any:
    """The dtype that the config of a part names, or None.

    Then transformers would take the dtype of a file's first float tensor, which may be a scale.
    """
    if hasattr(config, "to_dict"):
        return getattr(config, "dtype", None)
    own = getattr(cls, "config_class", None)
    waiting: list[Any] = [whole]
    for section in waiting:  # grows: parts may have parts
        if section is not whole and section.get("model_type") == getattr(own, "model_type", None):
            return _dtype(section)
        waiting.extend(value for value in section.values() if isinstance(value, dict))
    return None


def _dtype(section: dict[str, Any]) -> Any:
    return section.get("dtype") or section.get("torch_dtype")


def load_pretrained_model(
    model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any
) -> Any:
    """As in transformers; raises :class:`_LowbitFilesError` where the weights would be random."""
    quantizer = load_config.hf_quantizer
    method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", None)
    if method == QUANT_METHOD and checkpoint_files and _no_dtype.get():
        config = _lowbit_config(Path(checkpoint_files[0]))
        if config is not None and _dtype(config):
            raise _LowbitFilesError(config)
    if method != QUANT_METHOD and checkpoint_files:
        config = _lowbit_config(Path(checkpoint_files[0]))
        if config is not None and quantizer is not None:
            raise LoadError(
                f"{Path(checkpoint_files[0]).parent}: is a lowbit model, which {getattr(method, 'value', method)} "
                "cannot quantize again; load it without quantization_config"
            )
        if config is not None:
            raise _LowbitFilesError(config)
    if method != QUANT_METHOD and _has_planes(state_dict, checkpoint_files):
        raise LoadError(
            f"{type(model).__name__}: these are tensors of a lowbit model without its config.json, so that its weights "
            "would be random: load it from its directory or repository, without config= and state_dict="
        )
    return _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs)


def _lowbit_config(file: Path) -> dict[str, Any] | None:
    """The ``config.json`` of the lowbit directory of a model's weight file; None for any other file."""
    config = file.parent / CONFIG_FILE
    if not config.is_file() or file.name.startswith("adapter_"):
        return None
    try:
        found = json.loads(config.read_text("utf-8"))
        section = found.get("quantization_config")
    except (ValueError, AttributeError):  # not for us to judge
        return None
    return found if isinstance(section, dict) and section.get("quant_method") == QUANT_METHOD else None


def _has_planes(state_dict: Any, checkpoint_files: Any) -> bool:
    """Whether tensors that no ``config.json`` describes are those of a lowbit model."""
    names = set(state_dict or ())
    if checkpoint_files and not (Path(checkpoint_files[0]).parent / CONFIG_FILE).is_file():
        with contextlib.suppress(FormatError, OSError):  # another kind of file
            names |= read_header(checkpoint_files[0]).tensors.keys()
    return any(
        f"{name.removesuffix('planes')}scales" in names for name in names if name.endswith((".planes", "_planes"))
    )


_patched: Any = PreTrainedModel
_patched.from_pretrained = classmethod(from_pretrained)
_patched._load_pretrained_model = staticmethod(load_pretrained_model)
