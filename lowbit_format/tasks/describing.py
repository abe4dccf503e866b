"""What a model says of a task that is going to be trained on it (TSK-12)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..integrations.labels import base_labels, given_labels
from .bundle_config import Description


def description_of(model: Any, start: Description | None = None) -> Description | None:
    """The kind of task, by the model's class, and the names of its labels: the base's own, whatever task is active.

    Where the base has none, they are those of `start`, the task that the training starts from. None if nothing is said.
    """
    with base_labels(model):
        told = _told_by_class(model)
    if start is None or (told is not None and told.labels):
        return told
    return replace(start, metrics={})  # they were another training's


def _told_by_class(model: Any) -> Description | None:
    name, config = type(model).__name__, model.config
    if "ForTokenClassification" in name:
        return Description("token-classification", given_labels(config))
    if "ForSequenceClassification" in name:
        regression = config.problem_type == "regression" or config.num_labels == 1
        return Description("regression") if regression else Description("classification", given_labels(config))
    return Description("language-modelling") if name.endswith(("ForCausalLM", "LMHeadModel")) else None
