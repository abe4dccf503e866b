"""Writes a model's task as a bundle: what was trained, bit for bit, bound to the base's fingerprint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..container.reader import CONFIG_FILE
from ..dtypes import BY_NAME, DTYPES
from ..errors import TaskError
from ..runtime.active_tasks import Name
from ..runtime.stored_tensors import from_torch, whole
from .bundle import CARD_FILE, SCALES_FILE, TaskBundle, rounding_loss, write_bundle
from .bundle_config import TASK_CONFIG_FILE, described
from .models import loaded_tasks, model_path, named_modules, state_of, unwrapped
from .operations import delta_name


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
) -> Path:
    """Write a task of `model` into `directory` as a bundle, with a model card.

    The bundle says what kind of task it is, by the model's class, and the names of labels, if ``model.config`` had some
    (``from_pretrained(…, id2label={0: "no", 1: "yes"})``) when it was prepared. Of a task that was loaded it says what
    that one's bundle said.

    Args:
        model: a lowbit model, also inside of DDP or ``torch.compile``. After ``fully_shard`` every process has to call
            this, each with a directory of its own: they gather what was trained.
        directory: made if it does not exist. A bundle in it is replaced; a ``README.md`` that is no task's card stays.
        name: which task; by default the active one.
        dtype: of the deltas in the file. ``"float32"`` keeps them exactly; ``"float16"`` and ``"bfloat16"`` halve the
            file, and the card says what is lost.
        base_model, revision: Hub id and revision of the base; by default where this model was loaded from.
        metrics: results, for the bundle and its card.
        **card: more for the card: ``dataset`` (Hub id), ``language``, ``license``, ``notes`` (Markdown), and
            ``repo_id`` and ``subfolder`` of the place that the bundle will be pushed to.

    Returns:
        `directory`.

    Raises:
        TaskError: no task is active, the named one is not loaded, an unknown `dtype`, or `directory` holds a model.
        BundleError: a delta is not finite, or does not fit into `dtype`. OutputError: the files cannot be written.
    """
    _check_dtype(dtype)
    bundle = bundle_of(model, name, base_model=base_model, revision=revision, metrics=metrics)
    write_task(model, bundle, Path(directory), dtype, metrics=metrics, **card)
    return Path(directory)


def write_task(model: Any, bundle: TaskBundle, directory: Path, dtype: str, **card: Any) -> dict[str, Path]:
    """Write a model's bundle with its card; arguments as for :func:`save_task`. Returns the bundle's files by name."""
    from .card import task_card

    _check_dtype(dtype)
    stored = BY_NAME[dtype]
    if stored != "F32":
        card["notes"] = "\n\n".join(filter(None, [card.get("notes"), _loss(bundle, dtype)]))
    if (directory / CONFIG_FILE).exists() and not (directory / TASK_CONFIG_FILE).exists():
        raise TaskError(f"{directory}: holds a model; give the task a directory of its own")
    if bundle.config.modules_to_save:
        inner = unwrapped(model)
        name = type(inner).__name__.removeprefix("FSDP")  # which fully_shard puts in front
        card = {"model_class": name, "num_labels": _labels(inner), **card}
    nbytes = bundle.nbytes - (DTYPES["F32"].nbytes - DTYPES[stored].nbytes) * bundle.delta_values
    text = task_card(bundle, nbytes=nbytes, **card)
    foreign = (directory / CARD_FILE).exists() and not (directory / TASK_CONFIG_FILE).exists()
    write_bundle(directory, bundle, dtype=stored, card=None if foreign else text)
    return {name: directory / name for name in (SCALES_FILE, CARD_FILE, TASK_CONFIG_FILE)}


def bundle_of(
    model: Any,
    name: Name = None,
    *,
    base_model: str | None = None,
    revision: str | None = None,
    metrics: Mapping[str, float] | None = None,
) -> TaskBundle:
    """A task of `model` as a bundle in memory, with tensors of its own; arguments as for :func:`save_task`."""
    model = unwrapped(model)
    state = state_of(model)
    name = state.active if name is None else name
    if name is None:
        raise TaskError("no task is active: choose one with set_task, or say which with name=")
    state.check([name])
    config = loaded_tasks(model)[name].config
    config = replace(
        config,
        task=described(config.task, metrics),
        base_model_name_or_path=base_model or model.name_or_path or None,
        revision=revision or (None if base_model else getattr(model.config, "_commit_hash", None)),
    )
    deltas = {}
    for module_name, module in named_modules(model).items():
        delta = module.delta_of(name)
        for field, tensor in (delta._asdict() if delta is not None else {}).items():
            if tensor is not None:
                values = whole(tensor).cpu().float().clone(memory_format=torch.contiguous_format).numpy()
                axes = values.ndim - (module.experts is not None)
                deltas[delta_name(module_name, field, axes, module.scheme.shift)] = values
    saved = []
    for listed in config.modules_to_save:
        path = model_path(model, listed)
        head = model.get_submodule(path).module_of(name)
        saved += [from_torch(f"{listed}.{key}", whole(t).clone()) for key, t in head.state_dict().items()]
    return TaskBundle(config, deltas, tuple(saved))


def _check_dtype(dtype: str) -> None:
    if dtype not in BY_NAME:
        raise TaskError(f"unknown dtype {dtype!r} for deltas: choose one of {', '.join(BY_NAME)}")


def _labels(model: Any) -> int | None:
    """Number of labels of a classifier's head, or None if it is transformers' default, 2, or the head has none."""
    labels = getattr(model.config, "num_labels", 2)
    return labels if labels != 2 and "Classification" in type(model).__name__ else None


def _loss(bundle: TaskBundle, dtype: str) -> str:
    """A sentence on what storing the deltas in fewer bits costs."""
    loss = rounding_loss(bundle, BY_NAME[dtype])
    return (
        f"The deltas are stored in {dtype}: {loss.changed:,} of them are not what was trained, by at most "
        f"{loss.largest:.2g}, and by {loss.relative_rms:.2g} of their root mean square."
    )
