"""Writes a model's task as a bundle: what was trained, bit for bit, bound to the base's fingerprint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..codecs import CODECS
from ..container.header import ITEM_BYTES
from ..container.reader import CONFIG_FILE
from ..dtypes import BY_NAME
from ..errors import TaskError
from ..runtime.active_tasks import Name
from ..runtime.modules import LowbitModule
from ..runtime.stored_tensors import from_torch
from .bundle import CARD_FILE, TASK_CONFIG_FILE, TaskBundle, rounding_loss, write_bundle
from .models import model_path, named_modules, state_of, unwrapped


def save_task(
    model: Any,
    directory: str | os.PathLike[str],
    *,
    name: str | None = None,
    dtype: str = "float32",
    base_model: str | None = None,
    revision: str | None = None,
    metrics: Mapping[str, float] | None = None,
    **card: Any,
) -> None:
    """Write a task of `model` into `directory` as a bundle, with a model card.

    Args:
        model: a lowbit model, also inside of DDP or ``torch.compile``.
        directory: made if it is not there; a bundle that it holds is replaced. A ``README.md`` of something else stays.
        name: which task; by default the one that is on.
        dtype: of the deltas in the file. ``"float32"`` keeps them exactly; ``"float16"`` and ``"bfloat16"`` halve the
            file, and the card says what that loses.
        base_model, revision: where people find the base; by default where this model came from.
        metrics: results to put on the card.
        **card: more for the card: ``dataset`` (Hub id), ``language``, ``license``, ``notes`` (Markdown), and
            ``repo_id`` and ``subfolder`` where the bundle is going to be.

    Raises:
        TaskError: no task is on, the named one is not loaded, an unknown `dtype`, or a directory with a model.
        BundleError: a delta is not finite, or does not fit into `dtype`. OutputError: the disk refuses.
    """
    from .card import task_card

    if dtype not in BY_NAME:
        raise TaskError(f"unknown dtype {dtype!r} for deltas: choose one of {', '.join(BY_NAME)}")
    bundle = bundle_of(model, name, base_model=base_model, revision=revision)
    stored = BY_NAME[dtype]
    if stored != "F32":
        card["notes"] = "\n\n".join(filter(None, [card.get("notes"), _loss(bundle, dtype)]))
    path = Path(directory)
    if (path / CONFIG_FILE).exists() and not (path / TASK_CONFIG_FILE).exists():
        raise TaskError(f"{path}: holds a model; give the task a directory of its own")
    if bundle.config.modules_to_save:
        inner = unwrapped(model)
        card = {"model_class": type(inner).__name__, "num_labels": _labels(inner), **card}
    nbytes = bundle.nbytes - (4 - ITEM_BYTES[stored]) * bundle.delta_values
    text = task_card(bundle, metrics=metrics, nbytes=nbytes, **card)
    foreign = (path / CARD_FILE).exists() and not (path / TASK_CONFIG_FILE).exists()
    write_bundle(path, bundle, dtype=stored, card=None if foreign else text)


def bundle_of(
    model: Any, name: Name = None, *, base_model: str | None = None, revision: str | None = None
) -> TaskBundle:
    """A task of `model` as a bundle in memory; arguments as for :func:`save_task`."""
    model = unwrapped(model)
    state = state_of(model)
    name = state.active if name is None else name
    if name is None:
        raise TaskError("no task is on: choose one with set_task, or say which with name=")
    state.check([name])
    config = replace(
        state.loaded[name].config,
        base_model_name_or_path=base_model or model.name_or_path or None,
        revision=revision or (None if base_model else getattr(model.config, "_commit_hash", None)),
    )
    deltas = {}
    for module_name, module in named_modules(model).items():
        delta = module.delta_of(name)
        for part, tensor in (delta._asdict() if delta is not None else {}).items():
            if tensor is not None:
                values = tensor.detach().cpu().float().contiguous().numpy().copy()
                deltas[f"{module_name}.{_operation(module, part, values.ndim)}"] = values
    saved = []
    for listed in config.modules_to_save:
        path = model_path(model, listed)
        head = model.get_submodule(path).module_of(name)
        saved += [from_torch(f"{listed}.{key}", tensor) for key, tensor in head.state_dict().items()]
    return TaskBundle(config, deltas, tuple(saved))


def _labels(model: Any) -> int | None:
    """How many labels the model's head tells apart, if that is not what transformers takes for granted."""
    labels = getattr(model.config, "num_labels", 2)
    return labels if labels != 2 and "Classification" in type(model).__name__ else None


def _loss(bundle: TaskBundle, dtype: str) -> str:
    """A sentence on what storing the deltas in fewer bits costs."""
    loss = rounding_loss(bundle, BY_NAME[dtype])
    return (
        f"The deltas are stored in {dtype}: {loss.changed:,} of them are not what was trained, by at most "
        f"{loss.largest:.2g}, and by {loss.relative_rms:.2g} of their root mean square."
    )


def _operation(module: LowbitModule, part: str, dims: int) -> str:
    """How the spec calls it (TSK-6)."""
    if part == "shift":
        return f"{CODECS[module.scheme.codec].shift}.add"
    return "scales.mul" if dims == 2 else "scales.add"
