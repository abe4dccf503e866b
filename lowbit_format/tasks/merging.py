"""Bakes a task into a base, for export: afterwards the model is a base of its own, with a fingerprint of its own."""

from __future__ import annotations

from typing import Any

from ..dtypes import BY_NAME
from ..errors import TaskError
from ..integrations.base_model import base_of_tensors
from ..integrations.labels import show_labels
from ..integrations.placement import Placement, describe, tie
from ..runtime.modules_to_save import SwitchedModule
from .models import config_of, loaded_tasks, named_modules, refuse_tuned, state_of, tied_to, tuned_task, unwrapped
from .serving import list_tasks, unload_task


def merge_task(model: Any, name: str, *, scale_dtype: str | None = "float32") -> None:
    """Put a task into the scales (offsets, zero points, head) of `model` for good. Planes stay as they are.

    All tasks are unloaded: they belong to the base that this model no longer is. Parameters of nested precisions go,
    since the task was not tuned for them.

    Args:
        model: a lowbit model; ``save_pretrained`` writes what it has become.
        name: a loaded task.
        scale_dtype: of the scales from here on. ``"float32"`` computes the same weights as the task did; None keeps the
            base's dtype, which rounds them, in float16 by up to 0.05%.

    Raises TaskError, and changes nothing, if the task is not loaded, another is being trained, or `scale_dtype` is
    unknown or cannot hold it.
    """
    from ..integrations.quantizer import LowbitConfig

    model = unwrapped(model)
    state_of(model).check([name])
    if tuned_task(model) != name:
        refuse_tuned(model)
    if scale_dtype is not None and scale_dtype not in BY_NAME:
        raise TaskError(f"unknown scale_dtype {scale_dtype!r}: choose float32, float16, bfloat16 or None")
    config = config_of(model)
    changed = [(m, delta) for m in named_modules(model).values() if (delta := m.delta_of(name)) is not None]
    stored = None if scale_dtype is None else BY_NAME[scale_dtype]
    merged = [(m, m.merged_parameters(delta, stored)) for m, delta in changed]  # all of them, or an error
    for module, values in merged:
        others = [m for m in tied_to(module, model) if m is not module]
        module.merge(values)
        for other in others:
            other.tie_to(module)
    for module in list(model.modules()):
        if isinstance(module, SwitchedModule):
            module.become_plain(name)
    labels = loaded_tasks(model)[name].labels
    for info in list_tasks(model):
        unload_task(model, info.name)
    show_labels(model, labels)
    model.lowbit_labels = None  # they are its own from here on
    placed = Placement({entry.path: entry for entry in config}, dict(config.tied))
    tie(model, placed)
    described = describe(model, placed)
    model.config.quantization_config = model.hf_quantizer.quantization_config = LowbitConfig.of(described)
    model.lowbit_base = base_of_tensors(model, described)
    model.name_or_path = model.config._name_or_path = ""  # where the old base is, which this is no more
    model.config._commit_hash = None
