"""The model class that a config names."""

from __future__ import annotations

from typing import Any


def named_class(config: Any) -> Any:
    """The first of ``config.architectures`` that is a model class of the installed transformers, or None.

    Other names are ignored: they come from a file, and transformers exports functions too.
    """
    import transformers

    names = getattr(config, "architectures", None) or []
    found = (getattr(transformers, name, None) for name in names if isinstance(name, str))
    return next((c for c in found if isinstance(c, type) and issubclass(c, transformers.PreTrainedModel)), None)
