"""``lowbit_format.from_pretrained``: the class from the config, a precision, and checking, in one call."""

from __future__ import annotations

import os
from typing import Any

from ..errors import LoadError
from ..schema import QUANT_METHOD
from .architecture import named_class


def from_pretrained(
    path_or_repo: str | os.PathLike[str],
    *,
    bits: int | None = None,
    verify: bool = False,
    revision: str | None = None,
    model_class: Any = None,
    **kwargs: Any,
) -> Any:
    """Load a lowbit model from a directory or the Hub.

    Args:
        path_or_repo: directory, or Hub id.
        bits: read the first `bits` planes of every matrix, with the parameters stored for that (NST-1).
        verify: check all digests and rules of the format before loading.
        revision: branch, tag or commit on the Hub.
        model_class: a transformers class, such as ``AutoModelForSequenceClassification``; by default the class
            that ``config.json`` names under ``architectures``, or ``AutoModel``.
        **kwargs: to the class's ``from_pretrained``: ``dtype``, ``device_map``, ``token``, …

    Raises:
        LoadError: not a lowbit model, or one that does not fit the class.
        FormatError: the directory breaks a rule of the format; PrecisionError: it has no parameters for `bits`.
    """
    import transformers

    from .hf import LoadOptions, load_options

    where = ("cache_dir", "token", "local_files_only", "force_download", "subfolder")
    hub = {key: kwargs[key] for key in where if key in kwargs}
    config = transformers.AutoConfig.from_pretrained(
        path_or_repo, revision=revision, trust_remote_code=kwargs.get("trust_remote_code", False), **hub
    )
    method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    if method != QUANT_METHOD:
        raise LoadError(
            f"{path_or_repo}: not a lowbit model (quant_method is {method!r}); convert it with convert_hf_to_lowbit"
        )
    if model_class is None:
        model_class = _class_of(config, path_or_repo)
    with load_options(LoadOptions(bits, verify)):
        return model_class.from_pretrained(path_or_repo, revision=revision, **kwargs)


def _class_of(config: Any, where: object) -> Any:
    """The model class that a config names, or AutoModel if it names none."""
    import transformers

    known = named_class(config)
    if known is None and getattr(config, "architectures", None):
        raise LoadError(
            f"{where}: transformers {transformers.__version__} has no model class {config.architectures}; update it"
        )
    return known or transformers.AutoModel
