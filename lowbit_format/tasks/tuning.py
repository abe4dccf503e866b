"""Prepares a model so that only a task's numbers are trained: scales, perhaps shifts, and modules such as a new head.

AlphaTuning (Kwon et al. 2022, arXiv:2210.03858) trains the first scale of every row of a binary-coded matrix, PEQA
(Kim et al. 2023, arXiv:2305.14152) the step size of a uniform one. Here both train a float32 *delta* on the scale, by
default its relative change ``scale * (1 + delta)``, one for each row. So what is saved is what was trained, bit for
bit; learning rates do not depend on the size of the weights (try 1e-2); and weight decay pulls towards the base
instead of towards zero.

The gradient of a scale is a sum over the columns that share it. AlphaTuning's equation 4 divides it by their number;
here gradients are those of autograd. With Adam this makes no difference: it divides each gradient by a running measure
of the gradient's size, which cancels any constant factor (but for epsilon, 1e-8). With plain SGD, divide the learning
rate by that number.
"""

from __future__ import annotations

import difflib
import fnmatch
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..codecs import CODECS
from ..errors import TaskError, TuningError
from ..integrations.placement import lowbit_modules
from ..runtime.deltas import Delta, TunedDelta
from ..runtime.modules import LowbitEmbedding, LowbitModule
from ..runtime.modules_to_save import plain_copy, switched
from .bundle_config import TaskConfig
from .checkpoint import save_checkpoint
from .describing import description_of
from .models import (
    LoadedTask,
    bundle_path,
    loaded_tasks,
    model_path,
    named_modules,
    outermost,
    refuse_tuned,
    state_of,
    tied_to,
    unwrapped,
)
from .operations import OPERATIONS
from .serving import set_task

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Method:
    """Which scales a method trains: of modules of `codecs`, the first `planes` planes (None: all)."""

    codecs: tuple[str, ...]
    planes: int | None


METHODS = {
    "alphatuning": Method(("bcq",), 1),
    "peqa": Method(("uniform",), 1),
    "scales": Method(tuple(CODECS), None),
}
KINDS = ("mul", "add")
HEADS = ("classifier", "score", "qa_outputs")  # as transformers names them; PEFT trains the same by default


@dataclass(frozen=True)
class Tuning:
    """What is going to be trained.

    Attributes:
        name: of the task.
        modules: paths of the lowbit modules with a delta.
        numbers: how many numbers their deltas have.
        modules_to_save: paths of the modules that are trained whole.
        saved_numbers: how many numbers those have.
    """

    name: str
    modules: tuple[str, ...]
    numbers: int
    modules_to_save: tuple[str, ...]
    saved_numbers: int

    def __str__(self) -> str:
        whole = f", and {self.saved_numbers:,} in {', '.join(self.modules_to_save)}" if self.modules_to_save else ""
        return f"task {self.name!r}: {self.numbers:,} numbers in {len(self.modules)} modules{whole}"


def prepare_scale_tuning(
    model: Any,
    method: str = "alphatuning",
    *,
    kind: str = "mul",
    offsets: bool = False,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    modules_to_save: Sequence[str] | None = None,
    name: str = "default",
    start: str | None = None,
) -> Tuning:
    """Freeze everything but one task's float32 deltas, and make that task the active one. Then train in any loop.

    The Hugging Face ``Trainer`` then saves the task, kilobytes, where it would save the model (:class:`TaskCallback`).

    Patterns are paths with ``*`` (``"*.query"``), or the last names of paths (``"query"``), as PEFT has them.

    Args:
        model: a loaded lowbit model, trained by no other task; or a module around one, such as a SentenceTransformer.
        method: ``"alphatuning"`` (bcq: the first scale), ``"peqa"`` (uniform: the step size) or ``"scales"`` (all).
        kind: ``"mul"``: one factor for each row and plane, shared by the row's groups; ``"add"``: one addend for each
            group, so the bundle is larger by the number of groups. Addends are in the units of the weights and need a
            smaller learning rate, about 1e-3.
        offsets: train the offsets (bcq) or zero points (uniform) too, one addend for each group, in the units of the
            weights (zero points: of codes).
        include: lowbit modules to train; by default all but embeddings, what is tied to them, and the output head of a
            model that predicts words: that has a row for each word.
        exclude: modules of `include` not to train.
        modules_to_save: float modules to train whole and to save with the task. By default a classifier's head
            (:data:`HEADS`), and modules that were newly initialised because the model's files do not have them;
            ``[]`` for none. A module that was put into the model later has to be named.
        name: of the task.
        start: a loaded task to start from; by default all deltas are zero, which is the base.

    Returns:
        What is going to be trained; ``print`` it.

    Raises:
        TuningError: an unknown method or kind, a pattern that matches nothing, a module that does not fit the method.
        TaskError: the model is no lowbit model, or is being trained already; the name is taken.
    """
    whole, model = model, unwrapped(model)
    state = state_of(model)
    _check(model, name, method, kind)
    modules = _chosen_modules(model, METHODS[method], method, include, exclude)
    saved = _saved_modules(model, modules_to_save)
    if start is not None:
        state.check([start])
        _check_covers(model, start, modules, saved)

    deltas = {}
    for path, module in modules.items():
        initial = _start(module, METHODS[method], kind, offsets)
        deltas[path] = TunedDelta(initial if start is None else _from(module.delta_of(start), initial, path, start))
    if any(p.requires_grad and "lora_" in key for key, p in model.named_parameters()):
        log.warning("adapters that are in training on this model are frozen now: only the task is trained")
    whole.requires_grad_(False)
    for path, delta in deltas.items():
        for module in tied_to(modules[path], model):
            module.tuned, module.tuned_name = delta, name
    for path in saved:
        _train_whole(model, path, state, name, start)

    trained = sum(d.delta().numel() for d in deltas.values())
    whole = sum(p.numel() for path in saved for p in model.get_submodule(path).parameters())
    base, names = model.lowbit_base, tuple(bundle_path(model, path) for path in saved)
    task = description_of(model, None if start is None else loaded_tasks(model)[start].config.task)
    config = TaskConfig(
        base.fingerprint.body, base.fingerprint.head, method, bits=base.bits, modules_to_save=names, task=task
    )
    model.lowbit_save = save_checkpoint
    state.add(name, LoadedTask(name, config, trained, tuned=True, saved_numbers=whole))
    set_task(model, name)
    return Tuning(name, tuple(modules), trained, tuple(saved), whole)


def _check(model: Any, name: str, method: str, kind: str) -> None:
    state = state_of(model)
    if method not in METHODS:
        raise TuningError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    if kind not in KINDS:
        raise TuningError(f"unknown kind {kind!r} of delta: choose one of {', '.join(KINDS)}")
    refuse_tuned(model)
    if any(module.is_shared_out for _, module in lowbit_modules(model)):
        raise TuningError(
            "the model is shared out by fully_shard, which would not know what is added now: call prepare_scale_tuning "
            "first, and fully_shard after it"
        )
    if not name or name in state.loaded:
        taken = f"the name {name!r} is taken" if name else "a task needs a name"
        raise TaskError(f"{taken}: choose another, or unload_task it first")


def _chosen_modules(
    model: Any, method: Method, name: str, include: Sequence[str] | None, exclude: Sequence[str] | None
) -> dict[str, LowbitModule]:
    """The modules to train by path, a tied matrix once."""
    owners = {m.matrix_id: m for m in named_modules(model).values()}
    paths = {m.path: m for _, m in lowbit_modules(model)}  # tied places too: they stand for their owner
    embeddings = {m.matrix_id for m in paths.values() if isinstance(m, LowbitEmbedding)}
    if include is None:
        heads = {id(m.get_output_embeddings()) for m in model.modules() if hasattr(m, "get_output_embeddings")}
        chosen = [path for path, m in paths.items() if m.matrix_id not in embeddings and id(m) not in heads]
    else:
        chosen = _matching(include, paths, "include")
    left_out = {paths[path].matrix_id for path in _matching(exclude or (), paths, "exclude")}
    found = [owners[paths[path].matrix_id] for path in chosen if paths[path].matrix_id not in left_out]
    modules = {m.path: m for m in found}
    if not modules:
        raise TuningError("no module is left to train")
    unfit = {path: m.scheme.codec for path, m in modules.items() if m.scheme.codec not in method.codecs}
    if unfit:
        path, codec = next(iter(unfit.items()))
        raise TuningError(
            f"{name} trains {' and '.join(method.codecs)} modules; {path!r} ({len(unfit)} in all) is {codec}. Choose "
            "method='scales', or exclude these modules"
        )
    return modules


def _saved_modules(model: Any, patterns: Sequence[str] | None) -> list[str]:
    """Paths of the modules to train whole."""
    plain = {
        path: m
        for path, m in model.named_modules()
        if path and not any(isinstance(part, (LowbitModule, TunedDelta)) for part in m.modules())
    }
    if patterns is None:
        holders = {key.rpartition(".")[0] for key in model.lowbit_fresh} | set(HEADS)
        chosen = [path for path in plain if path in holders and _tied_parameter(model, path) is None]
    else:
        chosen = _matching(patterns, plain, "modules_to_save")
        for path in chosen:
            if not any(True for _ in plain[path].parameters()):
                raise TuningError(f"modules_to_save: {path!r} has no parameters")
            if type(plain[path]).forward is nn.Module.forward:
                raise TuningError(f"modules_to_save: {path!r} only contains modules; name those, such as '{path}.*'")
            if tied := _tied_parameter(model, path):
                raise TuningError(f"modules_to_save: {path!r} is tied to {tied!r}, which a task cannot change")
    for path in chosen:
        if (other := model_path(model, bundle_path(model, path))) != path:
            raise TuningError(f"modules_to_save: {path!r} would be taken for {other!r} in a bundle (TSK-5)")
    return outermost(chosen)


def _tied_parameter(model: Any, path: str) -> str | None:
    """The name elsewhere of a parameter that the module at `path` shares, such as an embedding's; None if none."""
    own = {id(p) for p in model.get_submodule(path).parameters()}
    everywhere = model.named_parameters(remove_duplicate=False)
    return next((name for name, p in everywhere if id(p) in own and not name.startswith(f"{path}.")), None)


def _matching(patterns: Iterable[str], paths: Iterable[str], what: str) -> list[str]:
    """Those of `paths` that a pattern matches; TuningError for a pattern that matches none."""
    if isinstance(patterns, str):
        raise TuningError(f"{what} is a string; give a list of patterns: [{patterns!r}]")
    paths, found = list(paths), set[str]()
    for pattern in patterns:
        mine = {p for p in paths if fnmatch.fnmatchcase(p, pattern) or f".{p}".endswith(f".{pattern}")}
        mine |= {p for p in paths if fnmatch.fnmatchcase(p, f"*.{pattern}")}  # without the base's prefix, as in bundles
        if not mine:
            near = difflib.get_close_matches(pattern, paths, 3, 0.3) or paths[:3]
            raise TuningError(f"{what}: {pattern!r} matches no module that it could; there are such as {near}")
        found |= mine
    return [path for path in paths if path in found]


def _check_covers(model: Any, start: str, modules: dict[str, LowbitModule], saved: Sequence[str]) -> None:
    """Raise TuningError if task `start` changes a module that is not going to be trained: its change would be lost."""
    trained = {id(module) for module in modules.values()}
    kept = {bundle_path(model, path) for path in saved}
    lost = [n for n, m in named_modules(model).items() if m.delta_of(start) is not None and id(m) not in trained]
    lost += [n for n in loaded_tasks(model)[start].config.modules_to_save if n not in kept]
    if lost:
        raise TuningError(
            f"task {start!r} changes {lost[0]!r} ({len(lost)} in all), which this tuning leaves out: choose with "
            "include and modules_to_save what that task was tuned with"
        )


def _start(module: LowbitModule, method: Method, kind: str, offsets: bool) -> Delta:
    """Zeros of the right shapes, on the module's device."""
    *stack, planes, rows, groups = module.scales.shape  # of experts, their number stands in front (TSK-7)
    p = planes if method.planes is None else min(method.planes, planes)
    shape = OPERATIONS[f"scales.{kind}"].shape(p, rows, groups)
    shift = module.offsets if module.offsets is not None else module.zeros
    if offsets and shift is None:
        raise TuningError(
            f"{module.path!r} has no offsets or zero points to train: convert with an offset, or leave it"
        )
    zeros = torch.zeros(*stack, *shape, dtype=torch.float32, device=module.scales.device)
    return Delta(zeros, zeros.new_zeros(*stack, rows, groups) if offsets else None)


def _from(task: Delta | None, zeros: Delta, path: str, name: str) -> Delta:
    """The values of a loaded task, in the shapes that are going to be trained."""
    if task is None:
        return zeros
    for mine, other in zip(zeros, task, strict=True):
        if other is not None and (mine is None or mine.shape != other.shape):
            shape = None if mine is None else list(mine.shape)
            raise TuningError(f"{path!r}: task {name!r} has a delta {list(other.shape)}, this tuning {shape}")
    return Delta(*(m if o is None else o for m, o in zip(zeros, task, strict=True)))


def _train_whole(model: Any, path: str, state: Any, name: str, start: str | None) -> None:
    """From here on the module holds the task's parameters, and a copy of the module holds the base's."""
    module: Any = switched(model.get_submodule(path), path, state)
    base: Any = plain_copy(module)
    if start is not None:
        module.load_state_dict(module.module_of(start).state_dict())
    module.task_copies[None], module.task_own = base, name
    for param in module.parameters():
        param.requires_grad_(param.is_floating_point())
