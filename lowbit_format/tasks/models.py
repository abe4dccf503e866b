"""What the other files here ask of a model: its modules by the names that bundles use, and its tasks."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import TaskError
from ..integrations.model import LowbitModel
from ..integrations.placement import lowbit_modules
from ..runtime.active_tasks import TaskState
from ..runtime.modules import LowbitModule
from ..schema import QuantizationConfig
from .bundle_config import TaskConfig
from .matching import modules_by_name


@dataclass(frozen=True)
class LoadedTask:
    """A loaded task.

    Attributes:
        name: by which it is chosen.
        config: what its bundle says of it.
        numbers: how many numbers its deltas have; each takes 4 bytes.
        saved_numbers: how many numbers its ``modules_to_save`` have.
        saved_bytes: memory that these take.
        tuned: it is being trained.
        active: the model computes with it wherever no ``use_tasks`` block says otherwise.
    """

    name: str
    config: TaskConfig
    numbers: int
    saved_numbers: int = 0
    saved_bytes: int = 0
    tuned: bool = False
    active: bool = False

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of its labels, in the order of the outputs; empty where it has none."""
        return () if self.config.task is None else self.config.task.labels

    @property
    def nbytes(self) -> int:
        """Memory that the task takes."""
        return 4 * self.numbers + self.saved_bytes


def unwrapped(model: Any) -> Any:
    """The lowbit model inside of DDP, FSDP, PEFT, ``torch.compile``, or any module that contains one.

    Raises TaskError if there is none, or more than one.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # a PeftModel has it
    while not isinstance(inner, LowbitModel):
        wrapped = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
        inner = _only_inside(inner) if wrapped is None else wrapped
    if not hasattr(inner, "lowbit_base"):
        raise TaskError(f"this {type(inner).__name__} is a part of a lowbit model: tasks belong to the whole one")
    return inner


def _only_inside(model: Any) -> Any:
    """The one lowbit model that the module contains, such as a SentenceTransformer; TaskError if there is not one."""
    inside = list(model.named_modules()) if isinstance(model, nn.Module) else []
    found = {path: m for path, m in inside if isinstance(m, LowbitModel) and hasattr(m, "lowbit_base")}
    if len(found) == 1:
        return next(iter(found.values()))
    kind = type(model).__name__
    if not isinstance(model, nn.Module) and isinstance(getattr(model, "model", None), nn.Module):
        raise TaskError(f"a {kind} is no model but has one, as a pipeline has: give its `model`")
    if found:
        raise TaskError(f"a {kind} contains {len(found)} lowbit models: give one of them, {' or '.join(found)}")
    if any(isinstance(m, LowbitModule) for _, m in inside):
        raise TaskError(f"this {kind} is a part of a lowbit model: tasks belong to the whole one")
    if hasattr(model, "lowbit_base"):
        raise TaskError(f"this {kind} was loaded from a lowbit model, but none of its own modules is quantized")
    if "lowbit" in str(getattr(getattr(model, "config", None), "quantization_config", "")):
        raise TaskError(
            f"this {kind} has the config of a lowbit model but no lowbit modules, as if transformers did not know the "
            "format: its weights are RANDOM. Load it with from_pretrained after `import lowbit_format`"
        )
    raise TaskError(
        f"a {kind} is no lowbit model: load one with from_pretrained from a directory that convert_hf_to_lowbit wrote"
    )


def config_of(model: Any) -> QuantizationConfig:
    """What the model's modules are now, by the model's own paths."""
    config: QuantizationConfig = model.config.quantization_config.parsed
    return config


def state_of(model: Any) -> TaskState:
    """Which tasks are loaded, and which is active."""
    state: TaskState = model.lowbit_state
    return state


def loaded_tasks(model: Any) -> dict[str, LoadedTask]:
    """What is known of each loaded task, by name, in the order of loading; the model's own dict."""
    loaded: dict[str, LoadedTask] = state_of(model).loaded
    return loaded


def tuned_task(model: Any) -> str | None:
    """The task that is being trained, if one is."""
    return next((task.name for task in loaded_tasks(model).values() if task.tuned), None)


def refuse_tuned(model: Any) -> None:
    """Raise TaskError if a task is being trained, whose numbers would be lost."""
    if (name := tuned_task(model)) is not None:
        raise TaskError(f"task {name!r} is being trained on this model: save it and unload_task it first")


def named_modules(model: Any) -> dict[str, LowbitModule]:
    """Lowbit modules that have tensors of their own, by the names that bundles use (TSK-7)."""
    by_path = {module.path: module for _, module in lowbit_modules(model)}  # PEFT may have put them deeper since
    return {name: by_path[entry.path] for name, (entry, _) in modules_by_name(config_of(model)).items()}


def model_path(model: Any, name: str) -> str | None:
    """The model's path of a float module that a bundle names; None if it has none such."""
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    name = name.removeprefix(prefix)
    for candidate in (prefix + name, name):  # in this order (TSK-5)
        with contextlib.suppress(AttributeError):
            model.get_submodule(candidate)
            return candidate
    return None


def bundle_path(model: Any, path: str) -> str:
    """The name of the model's module `path` in bundles: without the base's prefix (TSK-5)."""
    return path.removeprefix(f"{model.base_model_prefix}.") if model.base_model_prefix else path


def outermost(paths: Sequence[str]) -> list[str]:
    """Those of `paths` that lie in no other."""
    return [p for p in paths if not any(p.startswith(f"{q}.") for q in paths)]


def tied_to(module: LowbitModule, model: nn.Module) -> list[LowbitModule]:
    """All modules that share the matrix of `module`, this one too (TIE-1)."""
    return [m for _, m in lowbit_modules(model) if m.matrix_id == module.matrix_id]
