"""Tasks of a model in memory: load, choose, mix in one batch, list, unload.

A loaded task takes memory for its deltas and a copy of its head. Planes are never changed.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BundleError, TaskError
from ..integrations.labels import show_labels
from ..integrations.placement import lowbit_modules
from ..runtime.active_tasks import Name
from ..runtime.compiled_tasks import forget_stacks
from ..runtime.deltas import Delta
from ..runtime.modules import LowbitModule
from ..runtime.modules_to_save import SwitchedModule, plain_copy, switched
from ..runtime.stored_tensors import TORCH_DTYPES, to_torch
from .bundle import TaskBundle, check_bundle
from .finding import find_bundle
from .matching import check_matches, without_prefix
from .models import LoadedTask, loaded_tasks, model_path, named_modules, outermost, state_of, tuned_task, unwrapped
from .operations import split_delta

log = logging.getLogger(__name__)


# The batch is not the first axis, or projections that tasks change are applied to one table of relative positions.
NOT_BATCH_FIRST = ("longformer", "led", "xlnet", "fsmt", "deberta", "deberta-v2")


def load_task(
    model: Any,
    source: str | os.PathLike[str] | TaskBundle,
    *,
    name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> str:
    """Load a task's bundle into `model`, beside its other tasks. :func:`set_task` or :func:`use_tasks` makes it active.

    Args:
        model: a loaded lowbit model.
        source: directory, Hub id, or a bundle in memory.
        name: of the task in this model; by default the last part of `subfolder` or `source`.
        subfolder: of the directory or repository.
        revision: branch, tag or commit on the Hub.
        token: of the Hub; by default the saved one.
        cache_dir: of the Hub's files; by default that of huggingface_hub.
        local_files_only: read the cache and do not ask the Hub.
        force_download: download again, whatever the cache holds.

    Returns:
        The name.

    Raises:
        TaskError: the name is taken, or the bundle has a head that the model does not have.
        FingerprintError: it was tuned on another base. PrecisionError, BundleError: another precision, a delta that
            does not fit, a damaged or ill-formed bundle (TSK and MAT rules). HubError: it cannot be downloaded.
    """
    model = unwrapped(model)
    state = state_of(model)
    if name is None:
        name = "task" if isinstance(source, TaskBundle) else Path(subfolder or Path(source).absolute()).name
    if not name or name in state.loaded:
        taken = f"the name {name!r} is taken" if name else "a task needs a name"
        raise TaskError(f"{taken}: give another with name=, or unload_task it first")
    if isinstance(source, TaskBundle):
        if subfolder or revision:
            raise TypeError("a bundle in memory has no subfolder or revision")
        check_bundle(source)
        bundle = source
    else:
        bundle = find_bundle(
            source,
            subfolder=subfolder,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        ).bundle
    base = model.lowbit_base
    check_matches(bundle, base.config, base.fingerprint, base.bits)
    bundle = without_prefix(bundle, base.config)
    whole = tuple(outermost(bundle.config.modules_to_save))  # a copy of a module has its parts' tensors too
    bundle = replace(bundle, config=replace(bundle.config, modules_to_save=whole))
    modules = named_modules(model)
    with torch.inference_mode(False):  # so that they may take part in training
        deltas = {module: _checked(delta, modules[module]) for module, delta in _deltas(bundle, modules).items()}
        heads = {path: _head(model, bundle, listed, path) for listed, path in _head_paths(model, bundle).items()}

    for module, delta in deltas.items():  # from here on nothing fails: a task is loaded whole or not at all
        modules[module].deltas[name] = delta
    for path, head in heads.items():
        switched(model.get_submodule(path), path, state).task_copies[name] = head
    numbers = sum(d.numel() for d in deltas.values())
    tensors = [t for head in heads.values() for t in head.state_dict().values()]
    size, nbytes = sum(t.numel() for t in tensors), sum(t.nbytes for t in tensors)
    state.add(name, LoadedTask(name, bundle.config, numbers, size, nbytes))
    return name


def set_task(model: Any, name: Name) -> None:
    """Compute with task `name`, or with the base (None), wherever no :func:`use_tasks` block says otherwise.

    ``model.config`` then has the task's names of labels, which pipelines show. Takes effect for all threads, also for
    one that is computing: a server with several threads uses :func:`use_tasks` instead.

    Raises TaskError if the task is not loaded.
    """
    model = unwrapped(model)
    state = state_of(model)
    state.check([name])
    state.active = name
    for module in model.modules():
        if isinstance(module, (LowbitModule, SwitchedModule)):
            module.set_task(name)
    show_labels(model, () if name is None else loaded_tasks(model)[name].labels)


@contextlib.contextmanager
def use_tasks(model: Any, tasks: Sequence[Name] | Name) -> Iterator[None]:
    """Inside the block, compute each row of a batch with the task given for it.

    The block holds for the thread (or asyncio task) that opens it. A thread started inside, such as that of
    ``generate`` for a ``TextIteratorStreamer``, opens its own block. The backward pass has to run inside the block too.
    ``generate`` may repeat rows by itself, for beams and several answers: the tasks are those of the rows it is given.

    Args:
        model: a lowbit model.
        tasks: names of loaded tasks, None for the base, one for each row of the batch; or one name for all rows.

    Raises TaskError if a task is not loaded, when a batch has another number of rows, or if several tasks are given
    for a model that does not compute row by row.
    """
    model = unwrapped(model)
    state, rows = state_of(model), [tasks] if tasks is None or isinstance(tasks, str) else list(tasks)
    if not rows:
        raise TaskError("use_tasks needs a task for each row of the batch; it got none")
    state.check(rows)
    if len(set(rows)) > 1 and model.config.model_type in NOT_BATCH_FIRST:
        raise TaskError(
            f"{model.config.model_type} models do not keep the rows of a batch apart in their first axis: run the rows "
            "of each task in a batch of their own"
        )
    with state.choose(rows):
        yield


def list_tasks(model: Any) -> list[LoadedTask]:
    """The loaded tasks, in the order of loading."""
    model = unwrapped(model)
    state = state_of(model)
    return [replace(info, active=info.name == state.active) for info in loaded_tasks(model).values()]


def unload_task(model: Any, name: str) -> None:
    """Remove a task and free its memory, also one in training. Raises TaskError if it is not loaded."""
    model = unwrapped(model)
    state = state_of(model)
    if name is None:
        raise TaskError("the base cannot be unloaded")
    state.check([name])
    if state.active == name:
        set_task(model, None)
    if tuned_task(model) == name:
        model.lowbit_save = None
    state.remove(name)
    forget_stacks()
    for _, module in lowbit_modules(model):
        module.deltas.pop(name, None)
        if module.tuned_name == name:
            module.tuned, module.tuned_name = None, None
    for module in model.modules():
        if isinstance(module, SwitchedModule):
            module.forget(name)


def deltas_of(bundle: TaskBundle) -> dict[str, Delta]:
    """What a bundle changes, by the name that it gives to a module (TSK-7)."""
    found = dict[str, Delta]()
    for name, values in bundle.deltas.items():
        module, operation = split_delta(name)
        found[module] = found.get(module, Delta())._replace(**{operation.field: torch.tensor(values)})
    return found


def _deltas(bundle: TaskBundle, modules: dict[str, Any]) -> dict[str, Delta]:
    """Deltas by module name. Those of modules that the model's class lacks are left out, with a warning."""
    found = deltas_of(bundle)
    if missing := found.keys() - modules.keys():
        log.warning("the task also changes %s, which this model class does not have", ", ".join(sorted(missing)))
    return {module: delta for module, delta in found.items() if module in modules}


def _checked(delta: Delta, module: Any) -> Delta:
    """The delta on the module's device; BundleError if it makes a value infinite (MAT-6)."""
    if module.device.type == "meta":
        raise TaskError(f"{module.path} is offloaded: tasks need the whole model in memory")
    delta = delta.map(lambda t: t.to(module.device))
    for values in module.parameters_with(delta).values():
        if not bool(torch.isfinite(values).all()):
            raise BundleError("MAT-6", "the deltas make a scale, offset or zero infinite", tensor=module.path)
    return delta


def _head_paths(model: Any, bundle: TaskBundle) -> dict[str, str]:
    """The model's path of each module that the bundle brings whole, by the bundle's name of it."""
    paths = {}
    for listed in bundle.config.modules_to_save:
        path = model_path(model, listed)
        if path is None:
            raise TaskError(
                f"the task brings a module {listed!r}, but {type(model).__name__} has none: load the base with the "
                "class that the task was tuned with, such as model_class=AutoModelForSequenceClassification [MAT-7]"
            )
        paths[listed] = path
    return paths


def _head(model: Any, bundle: TaskBundle, listed: str, path: str) -> nn.Module:
    """A copy of the base's module at `path` with the bundle's tensors in it; others stay the base's (MAT-7)."""
    module = model.get_submodule(path)
    base = module.module_of(None) if isinstance(module, SwitchedModule) else module
    head = plain_copy(base).requires_grad_(False)
    own: dict[str, Tensor] = head.state_dict()
    given = {t.name.removeprefix(f"{listed}."): t for t in bundle.saved if t.name.startswith(f"{listed}.")}
    if wrong := sorted(set(given) - set(own)):
        raise TaskError(f"the task brings {wrong} of module {path!r}, which the model's module does not have [MAT-7]")
    for name, tensor in given.items():
        if tensor.shape != tuple(own[name].shape) or tensor.dtype not in TORCH_DTYPES:
            labels = f", such as num_labels={tensor.shape[0]}" if tensor.shape else ""
            raise TaskError(
                f"the task's {path}.{name} is {tensor.dtype} {list(tensor.shape)}, the model has "
                f"{list(own[name].shape)}: load the base with the same options{labels} [MAT-7]"
            )
        own[name].copy_(to_torch(tensor))
    return head
