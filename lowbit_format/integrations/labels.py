"""Label names in ``model.config``, where pipelines read them: the active task's, or the base's own (TSK-12)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from ..schema import is_name

Names = tuple[dict[int, str], dict[str, int]]  # id2label and label2id, as transformers has them


def show_labels(model: Any, labels: Sequence[str]) -> None:
    """Put `labels` into the config of a lowbit model; the base's own where they are none, or not as many as outputs."""
    show_base_labels(model)
    if labels and len(labels) == len(model.config.id2label):
        model.lowbit_labels = _names(model.config)
        _set(model.config, (dict(enumerate(labels)), {name: i for i, name in enumerate(labels)}))


def show_base_labels(model: Any) -> None:
    """Put the base's own names back."""
    if model.lowbit_labels is not None:
        _set(model.config, model.lowbit_labels)
        model.lowbit_labels = None


@contextlib.contextmanager
def base_labels(model: Any) -> Iterator[None]:
    """Inside the block the config has the base's own names: what is saved there is the base."""
    shown, own = _names(model.config), model.lowbit_labels
    show_base_labels(model)
    try:
        yield
    finally:
        if own is not None:
            _set(model.config, shown)
            model.lowbit_labels = own


def given_labels(config: Any) -> tuple[str, ...]:
    """The names of a config by id; none where transformers made them up, or a bundle cannot have them (TSK-12)."""
    names = dict(config.id2label)
    if sorted(names) != list(range(len(names))) or names == {i: f"LABEL_{i}" for i in names}:
        return ()
    found = tuple(str(names[i]) for i in range(len(names)))
    return found if all(map(is_name, found)) and len(set(found)) == len(found) else ()


def _names(config: Any) -> Names:
    return config.id2label, config.label2id


def _set(config: Any, names: Names) -> None:
    config.id2label, config.label2id = names
