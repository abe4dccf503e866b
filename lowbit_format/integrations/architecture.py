"""The model class that a config names."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def named_class(config: Any) -> Any:
    """The first of ``config.architectures`` that is a model class of the installed transformers, or None."""
    return known_class(getattr(config, "architectures", None))


def known_class(names: Iterable[object] | None) -> Any:
    """The first of `names` that is a model class of the installed transformers, or None.

    Other names are ignored: they come from a file, and transformers exports functions too.
    """
    import transformers

    found = (getattr(transformers, name, None) for name in names or () if isinstance(name, str))
    return next((c for c in found if isinstance(c, type) and issubclass(c, transformers.PreTrainedModel)), None)


def converted_model(directory: Path) -> Any:
    """A model of the class that the directory was written for, on the meta device; None if it cannot be made."""
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
        cls = named_class(config)
        with torch.device("meta"):
            return None if cls is None else cls(config)
    except Exception as error:  # whatever foreign code raises: the model is only asked for its names
        log.debug("%s: cannot build %s", directory, error)
        return None
