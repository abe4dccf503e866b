"""Tasks in the place of vLLM's LoRA adapters: the managers of a worker.

vLLM has two. The worker's loads adapters when a request names one, the model's gives them slots and hands each step's
mapping of tokens to slots to the kernels. Here both keep their interfaces and their bookkeeping; what an adapter is,
and what happens when it gets a slot, is ours.

All loaded tasks stay in this process's memory until they are unloaded: they are small, and the files of one may be
gone when a request needs it again. ``--max-loras`` is the number of slots: how many tasks a batch may have. A task that
needs a slot takes that of the task which has not been used for the longest time.
"""

from __future__ import annotations

import logging
import sys
from collections import deque
from pathlib import Path
from typing import Any

from torch import Tensor
from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from ..errors import HubError, LoadError, LowbitError, TaskError
from ..hub import is_hub_id
from ..runtime.deltas import Delta
from .bundles import REFUSED, base_in, served_deltas
from .methods import PARTS
from .metrics import task_metrics
from .parts import PlanePart
from .task_table import BASE, ActiveTasks, TaskTable

log = logging.getLogger("vllm.lowbit")  # below vLLM's logger, which has a handler

UNLOADED_KEPT = 64  # unloaded tasks that stay in memory, since requests that name them may still wait


class TaskModel(LoRAModel):
    """A task in the place of an adapter.

    Attributes:
        name: for messages.
        deltas: as tables hold them, by path of the part.
    """

    def __init__(self, lora_model_id: int, name: str, deltas: dict[str, Tensor]) -> None:
        super().__init__(lora_model_id, 1, {})
        self.name, self.deltas = name, deltas

    @property
    def nbytes(self) -> int:
        """Memory of the deltas."""
        return sum(delta.nbytes for delta in self.deltas.values())

    def clone(self, lora_model_id: int) -> TaskModel:
        return TaskModel(lora_model_id, self.name, self.deltas)


class TaskManager(LRUCacheLoRAModelManager):
    """Slots of a model.

    Attributes:
        parts: quantized matrices by their path in the files; of several in one part, all their paths.
        tables: theirs, by the same paths.
    """

    parts: dict[str, PlanePart]
    tables: dict[str, TaskTable]
    kind: str  # of the tables; set by the class that the worker's manager makes

    def _create_lora_modules(self) -> None:
        """Give each of our matrices a table; layers stay what they are."""
        self.parts, self.tables = {}, {}
        self._active_tasks: dict[Any, ActiveTasks] = {}
        for name, layer in self.model.named_modules():
            for part in getattr(layer, PARTS, ()):
                if isinstance(part, PlanePart) and part.tasks is None:
                    part.tasks = TaskTable(
                        part.plane_matrix,
                        self.lora_slots,
                        self.kind,
                        self._active_of(self._get_punica_wrapper(name)),
                        fixed=part.device.type != "cpu",
                    )
                    self.parts[part.path], self.tables[part.path] = part, part.tasks
        log.info("lowbit: %d matrices can be changed by tasks, %d tasks in a batch", len(self.parts), self.lora_slots)

    def _active_of(self, punica_wrapper: Any) -> ActiveTasks:
        """The tasks of tokens, over the tensors that vLLM's own kernels read."""
        active = self._active_tasks.get(punica_wrapper)
        if active is None:
            active = ActiveTasks(punica_wrapper._token_lora_indices, punica_wrapper._sampler_indices)
            active.all = BASE if self.device.type == "cpu" else None
            self._active_tasks[punica_wrapper] = active
        return active

    def _set_adapter_mapping(self, mapping: Any) -> None:
        super()._set_adapter_mapping(mapping)
        for active in self._active_tasks.values():
            active.sample_count = len(mapping.prompt_mapping)
            if self.device.type == "cpu":
                slot_of = {t: s for s, t in enumerate(self.lora_index_to_id) if t is not None} | {0: BASE}
                slots = {slot_of[task] for task in set(mapping.index_mapping)}
                active.all = slots.pop() if len(slots) == 1 else None

    @property
    def capacity(self) -> int:
        """All tasks stay, see the head of this file."""
        return sys.maxsize

    def _add_adapter(self, lora: TaskModel) -> None:
        self._registered_adapters[lora.id] = lora

    def activate_adapter(self, lora_id: int) -> bool:
        """Give a task a slot, if it has none."""
        full = None not in self.lora_index_to_id
        if not super().activate_adapter(lora_id):
            return False
        slot, task = self.lora_index_to_id.index(lora_id), self._registered_adapters[lora_id]
        for path, table in self.tables.items():
            table.set(slot, task.deltas.get(path))
        log.info("lowbit: task %r takes slot %d; tables take %s", task.name, slot, _size(self.table_nbytes))
        if metrics := task_metrics():
            metrics.evictions.inc(full)
        self._show()
        return True

    def _deactivate_adapter(self, lora_id: int) -> None:
        if lora_id in self.lora_index_to_id and lora_id in self._registered_adapters:
            slot, name = self.lora_index_to_id.index(lora_id), self._registered_adapters[lora_id].name
            log.info("lowbit: task %r leaves slot %d", name, slot)
        super()._deactivate_adapter(lora_id)
        self._show()

    def _show(self) -> None:
        """Bring the metrics of slots up to date."""
        if metrics := task_metrics():
            metrics.slots.set(self.lora_slots)
            metrics.used.set(sum(task is not None for task in self.lora_index_to_id))
            metrics.table_nbytes.set(self.table_nbytes)

    @property
    def table_nbytes(self) -> int:
        """Memory of all slots of all tables."""
        return sum(table.nbytes for table in self.tables.values())

    def create_dummy_lora(self, lora_id: int, rank: int, embedding_modules: Any = None) -> TaskModel:
        """A task that changes nothing, for vLLM's warm-up."""
        return TaskModel(lora_id, f"warm-up {lora_id}", {})


class TaskWorkerManager(LRUCacheWorkerLoRAManager):
    """Loads tasks.

    Args:
        directory: the model's, whose fingerprint bundles name.
        bits: precision at which it is read.
        kind: of the tables.
        arguments: those of vLLM's manager.
    """

    def __init__(self, directory: Path, bits: int | None, kind: str, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.base, self.kind = base_in(directory, bits), kind
        self._manager_cls = type("TaskManager", (TaskManager,), {"kind": kind})
        self._unloaded: deque[int] = deque()

    def _load_adapter(self, lora_request: Any) -> TaskModel:
        """The task that a request names by its path.

        Raises:
            LoRAAdapterNotFoundError: there is no such directory; vLLM answers 404.
            TaskError: the bundle is refused (:func:`.served_deltas`); its message begins with :data:`.REFUSED`, by
                which the server knows that it has to answer 400. vLLM passes messages on from process to process, but
                no classes.
            HubError: the Hub cannot be reached; vLLM answers 500.
        """
        source = lora_request.lora_path
        if not Path(source).is_dir() and not is_hub_id(source):
            raise LoRAAdapterNotFoundError(lora_request.lora_name, source)
        try:
            deltas = self._for_tables(served_deltas(source, self.base))
        except HubError:
            raise
        except LowbitError as e:
            log.warning("lowbit: %s %r: %s", REFUSED, lora_request.lora_name, e)
            if metrics := task_metrics():
                metrics.refusals.inc()
            raise TaskError(f"{REFUSED} {lora_request.lora_name!r}: {e}") from e
        model = TaskModel(lora_request.lora_int_id, lora_request.lora_name, deltas)
        log.info("lowbit: task %r loaded from %s, %s", model.name, source, _size(model.nbytes))
        if metrics := task_metrics():
            metrics.loads.inc()
        return model

    def _for_tables(self, deltas: dict[str, Delta]) -> dict[str, Tensor]:
        """What a task changes in the parts that this process has: others are in another stage of the pipeline."""
        found = {}
        for path, part in self._adapter_manager.parts.items():
            delta = part.table_delta(deltas, self.kind)
            if delta is not None:
                found[path] = delta
        return found

    def add_adapter(self, lora_request: Any) -> bool:
        if lora_request.lora_int_id in self._unloaded:
            self._unloaded.remove(lora_request.lora_int_id)
        added: bool = super().add_adapter(lora_request)
        self._show()
        return added

    def remove_adapter(self, adapter_id: int) -> bool:
        """Unload a task, after some others: requests that name it may still wait."""
        if adapter_id not in self.list_adapters():
            return False
        self._unloaded.append(adapter_id)
        while len(self._unloaded) > UNLOADED_KEPT:
            super().remove_adapter(self._unloaded.popleft())
        self._show()
        return True

    def _show(self) -> None:
        """Bring the metrics of memory up to date."""
        if metrics := task_metrics():
            tasks = self._adapter_manager.list_adapters().values()
            metrics.loaded.set(len(tasks))
            metrics.nbytes.set(sum(task.nbytes for task in tasks))


def model_directory(model: str, revision: str | None, cache_dir: str | None) -> Path:
    """Where the files of a served model are: vLLM has downloaded those of a repository."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                cache_dir=cache_dir,
                allow_patterns=["*.json", "*.safetensors"],
                local_files_only=True,
            )
        )
    except Exception as e:
        raise LoadError(f"{model}: the fingerprint of the base needs its files, which are not in the cache: {e}") from e


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e6:.2f} MB"
