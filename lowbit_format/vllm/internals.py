"""All that this plugin changes in vLLM beyond its hooks for plugins. Checked against the versions in :data:`TRIED`.

vLLM has no hook for another kind of adapter. Three names are replaced, each by one that does the same for other models:

* the class of which a model runner makes its manager of adapters, by a choice between that and ours;
* ``OpenAIServingModels.unload_lora_adapter``, which tells the workers too: vLLM leaves it to their cache to forget an
  adapter, and ours forgets none;
* ``OpenAIServingModels.load_lora_adapter``, which answers 400 for a bundle that is refused: vLLM answers 500 for every
  error but one, that of an adapter which does not exist (404).

:func:`check` looks at everything that the plugin relies on, before anything is changed.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
from http import HTTPStatus
from typing import Any

import vllm
from vllm.lora import worker_manager
from vllm.v1.worker import lora_model_runner_mixin

from ..errors import LoadError
from .bundles import REFUSED
from .task_table import GROUPS, ROWS

TRIED = ("0.32.0",)
TASKS_VARIABLE = "LOWBIT_VLLM_TASKS"

_RELIED_ON = {  # object -> parameters that we pass or override
    "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager.__init__": ("vllm_config", "device", "embedding_modules"),
    "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager.add_adapter": ("lora_request",),
    "vllm.lora.worker_manager:WorkerLoRAManager._load_adapter": ("lora_request",),
    "vllm.lora.worker_manager:WorkerLoRAManager.remove_adapter": ("adapter_id",),
    "vllm.lora.model_manager:LoRAModelManager._create_lora_modules": (),
    "vllm.lora.model_manager:LoRAModelManager._add_adapter": ("lora",),
    "vllm.lora.model_manager:LoRAModelManager._set_adapter_mapping": ("mapping",),
    "vllm.lora.model_manager:LoRAModelManager._deactivate_adapter": ("lora_id",),
    "vllm.lora.model_manager:LoRAModelManager._get_punica_wrapper": ("module_name",),
    "vllm.lora.model_manager:LoRAModelManager.create_dummy_lora": ("lora_id", "rank", "embedding_modules"),
    "vllm.lora.model_manager:LRUCacheLoRAModelManager.activate_adapter": ("lora_id",),
    "vllm.lora.lora_model:LoRAModel.__init__": ("lora_model_id", "rank", "loras"),
    "vllm.lora.layers:LoRAMapping.__init__": ("index_mapping", "prompt_mapping"),
    "vllm.model_executor.layers.linear:LinearMethodBase.create_weights": (
        "layer", "input_size_per_partition", "output_partition_sizes", "input_size", "output_size", "params_dtype",
    ),
    "vllm.model_executor.layers.fused_moe.fused_moe_method_base:FusedMoEMethodBase.apply": (
        "layer", "x", "topk_weights", "topk_ids", "shared_experts", "shared_experts_input",
    ),
    "vllm.model_executor.layers.fused_moe:RoutedExperts.load_weights": ("weights",),
    "vllm.model_executor.layers.quantization.base_config:QuantizeMethodBase.tie_weights": ("layer", "embed_tokens"),
}  # fmt: skip


def check() -> None:
    """Raise LoadError, which names what is missing, if this vLLM has another shape than the plugin was written for."""
    for name, parameters in _RELIED_ON.items():
        module, _, path = name.partition(":")
        try:
            found: Any = functools.reduce(getattr, path.split("."), importlib.import_module(module))
            has = inspect.signature(found).parameters
        except (ImportError, AttributeError) as e:
            raise _mismatch(f"it has no {name.replace(':', '.')} ({e})") from e
        if lacking := [p for p in parameters if p not in has]:
            raise _mismatch(f"{name.replace(':', '.')} takes no {', '.join(lacking)}")
    if not hasattr(lora_model_runner_mixin, "LRUCacheWorkerLoRAManager"):
        raise _mismatch("its model runner makes its manager of adapters in another way")


def apply() -> None:
    """Replace the class of managers. Idempotent."""
    if lora_model_runner_mixin.LRUCacheWorkerLoRAManager is worker_manager.LRUCacheWorkerLoRAManager:
        lora_model_runner_mixin.LRUCacheWorkerLoRAManager = _worker_manager


def join_server() -> None:
    """Change two methods of the server. Idempotent."""
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

    if getattr(OpenAIServingModels, "knows_lowbit_tasks", False):
        return
    OpenAIServingModels.knows_lowbit_tasks = True
    OpenAIServingModels.load_lora_adapter = _answering_400(OpenAIServingModels.load_lora_adapter)
    OpenAIServingModels.unload_lora_adapter = _telling_workers(OpenAIServingModels.unload_lora_adapter)


def _answering_400(load: Any) -> Any:
    from vllm.entrypoints.serve import create_error_response
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse

    @functools.wraps(load)
    async def load_lora_adapter(self: Any, *args: Any, **named: Any) -> Any:
        answer = await load(self, *args, **named)
        if not isinstance(answer, ErrorResponse) or REFUSED not in answer.error.message:
            return answer
        message = answer.error.message[answer.error.message.index(REFUSED) :]
        return create_error_response(
            message=message, err_type="BadRequestError", status_code=HTTPStatus.BAD_REQUEST, param="lora_path"
        )

    return load_lora_adapter


def _telling_workers(unload: Any) -> Any:
    @functools.wraps(unload)
    async def unload_lora_adapter(self: Any, request: Any) -> Any:
        known = self.lora_requests.get(request.lora_name)
        answer = await unload(self, request)
        if known is not None and request.lora_name not in self.lora_requests:
            await self.engine_client.remove_lora(known.lora_int_id)
        return answer

    return unload_lora_adapter


def _worker_manager(vllm_config: Any, device: Any, embedding_modules: Any, *more: Any) -> Any:
    """A worker's manager of adapters: ours for a lowbit model."""
    from .config import LowbitConfig
    from .task_manager import TaskWorkerManager, model_directory

    quantization, model = vllm_config.quant_config, vllm_config.model_config
    if not isinstance(quantization, LowbitConfig):
        return worker_manager.LRUCacheWorkerLoRAManager(vllm_config, device, embedding_modules, *more)
    kind = os.environ.get(TASKS_VARIABLE, ROWS)
    if kind not in (ROWS, GROUPS):
        raise LoadError(f"{TASKS_VARIABLE} is {kind!r}, expected {ROWS!r} or {GROUPS!r}")
    directory = model_directory(model.model, model.revision, vllm_config.load_config.download_dir)
    return TaskWorkerManager(directory, quantization.bits, kind, vllm_config, device, embedding_modules, *more)


def _mismatch(what: str) -> LoadError:
    return LoadError(
        f"lowbit-format works with vLLM {' and '.join(TRIED)}; this is vLLM {vllm.__version__}, and {what}. Install "
        "one of those versions, or a newer lowbit-format. Other models are served as ever"
    )
