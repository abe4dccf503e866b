"""Where a transformers model with lowbit modules differs from a float one: dtype, sizes, casts, resizing, saving.

``PreTrainedModel`` computes its dtype and its sizes from its parameters, which are uint8 planes and float16 scales now.
The class of a loaded model is a subclass of its former class, of the same name, with :class:`LowbitModel` in front.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TaskError, UnsupportedOperationError
from ..hub import push_model_directory
from ..runtime.active_tasks import ModelCall, TaskState, batch_rows, model_call, traced
from ..runtime.class_mixin import Mixin, mix_in, restore_class
from ..runtime.deltas import TunedDelta
from ..runtime.modules import LowbitEmbedding, LowbitModule
from ..runtime.modules_to_save import SwitchedModule
from ..runtime.placeholder import initialising
from .base_model import Base
from .card import model_base_card
from .file_names import FileNames
from .labels import Names, base_labels
from .placement import refuse_missing

log = logging.getLogger(__name__)


class LowbitModel(Mixin):
    """Mixin in front of a ``PreTrainedModel``.

    Attributes:
        lowbit_base: the base that task bundles are bound to.
        lowbit_state: the active task and the loaded ones.
        lowbit_fresh: names of parameters that the files did not have, such as a new classifier's.
        lowbit_save: writes a task instead of the base when the Trainer saves the model.
        lowbit_files: the names in the directory, while the model is being loaded.
        lowbit_labels: the base's own names of labels, while the config has those of the active task.
        lowbit_asked: it was in training, and was asked whether anything is trained there that was chosen for it.
    """

    lowbit_base: Base
    lowbit_state: TaskState = TaskState()  # of a model that someone makes with ``type(loaded)(config)``, without tasks
    lowbit_fresh: tuple[str, ...] = ()
    lowbit_save: Callable[[Any, str], None] | None = None
    lowbit_files: FileNames | None = None
    lowbit_labels: Names | None = None
    lowbit_asked: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As in torch; inside of ``use_tasks`` the modules learn how many rows the batch has."""
        if self.training and not self.lowbit_asked:  # type: ignore[attr-defined]
            _ask_what_is_trained(self)
        if not self.lowbit_state.is_open:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        if torch.compiler.is_compiling():
            return self._traced_call(*args, **kwargs)
        tasks, name = self.lowbit_state.row_tasks(), type(self).__name__
        rows, is_text = _rows(args, kwargs)
        if tasks is not None and rows is not None and batch_rows() is None and len(tasks.names) > 1:
            check = tasks.check_rows if not is_text or _has_codebooks(self) else tasks.check_batch
            check(rows, name)
        with model_call(rows, exact=_is_mixed(kwargs), part=None if is_text else name):
            return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def _traced_call(self, *args: Any, **kwargs: Any) -> Any:
        """The call inside of ``use_tasks`` as a graph has it: tasks are asked for, and checked, when the graph runs."""
        outer, (rows, is_text) = traced.call, _rows(args, kwargs)
        whole = outer or ModelCall(batch=rows if is_text and not _has_codebooks(self) else None)
        traced.call = whole.inner(rows, _is_mixed(kwargs), None if is_text else type(self).__name__)
        try:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        finally:
            traced.call = outer

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype: ``save_pretrained`` writes it, and model code builds masks and caches in it."""
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, LowbitModule):
                return module.compute_dtype
            for param in module.parameters(recurse=False):
                if param.is_floating_point():
                    dtype: torch.dtype = param.dtype
                    return dtype
        raise AttributeError("a model without modules has no dtype")

    def _expand_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, whose ``generate`` repeats the rows of its input here; tasks are for the rows before."""
        tasks = self.lowbit_state.row_tasks() if self.lowbit_state.blocks else None
        if tasks is not None and len(tasks.names) > 1:
            ids = kwargs.get("input_ids")
            if isinstance(ids, Tensor) and not _has_codebooks(self):
                tasks.repeats = 1
                tasks.check_batch(len(ids), f"generate of {type(self).__name__}")
            tasks.repeats = kwargs.get("expand_size", 1)
        return super()._expand_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]

    def get_submodule(self, target: str) -> nn.Module:
        """As in torch. The path at which PEFT looks for the embedding of tokens first leads to a quantized one.

        Elsewhere it would look for a parameter with as many rows as the vocabulary, which planes are not.
        """
        if target == _PEFT_EMBEDDING:
            embedding: Any = self.get_input_embeddings()  # type: ignore[attr-defined]
            if isinstance(embedding, LowbitEmbedding):
                return embedding
        return super().get_submodule(target)  # type: ignore[misc,no-any-return]

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of parameters of the float model: a quantized matrix counts rows * cols.

        With `only_trainable`, the sizes of the tensors that get gradients.
        """
        total, seen = 0, set[int]()
        for module in self.modules():  # type: ignore[attr-defined]
            # Not ``parameters``: the Trainer counts at every step, and that would undo the layout of the planes.
            own = [p for p in module._parameters.values() if p is not None]
            if isinstance(module, TunedDelta) and not only_trainable:
                continue
            if exclude_embeddings and isinstance(module, nn.Embedding):
                seen.update(map(id, own))
                continue
            matrix = module.matrix_parameters().values() if isinstance(module, LowbitModule) else ()
            if matrix and not only_trainable and module.matrix_id not in seen:
                total += math.prod(module.shape)
                seen.update(id(p) for p in matrix)
            for p in own:
                if id(p) not in seen and (p.requires_grad or not only_trainable):
                    total += p.numel()
                    seen.add(id(p))
        return total

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers, which calls this while loading with the names that the file lacks."""
        super().tie_weights(*args, **kwargs)  # type: ignore[misc]
        if kwargs.get("missing_keys") and self.lowbit_files is not None:
            refuse_missing(self, self.lowbit_files, kwargs["missing_keys"])
            self.lowbit_fresh = tuple(sorted(kwargs["missing_keys"]))

    def initialize_weights(self) -> None:
        """As in transformers, which calls this while loading: quantized weights have their values already."""
        with initialising():
            super().initialize_weights()  # type: ignore[misc]

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """As in transformers: the base, whatever task is active (``save_task`` writes a task).

        While a task is in training, the Trainer's own calls write the task instead. We recognise the Trainer by
        ``state_dict=``, which it always passes and users rarely do; so nothing has to be undone when training stops
        early.
        """
        if self.lowbit_save is not None and "state_dict" in kwargs:
            if kwargs.get("is_main_process", True):
                self.lowbit_save(self, str(save_directory))
            return None
        if _in_training(self):  # type: ignore[arg-type]
            log.warning(
                "%s: the base is saved, without the scales in training. save_task writes them, and so does the Trainer",
                save_directory,
            )
        with base_labels(self):
            return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in torch. During tuning a checkpoint may omit everything except the tensors in training.

        Raises TaskError if it lacks some of them: training would start over without a warning.
        """
        result: Any = super().load_state_dict(state_dict, strict, assign)  # type: ignore[misc]
        if _in_training(self):  # type: ignore[arg-type]
            trained = trained_state_dict(self)  # type: ignore[arg-type]
            names = self.named_parameters(remove_duplicate=False)  # type: ignore[attr-defined]
            given = {id(p) for name, p in names if name in state_dict}  # a tied tensor may have any of its names
            lacking = [n for n in result.missing_keys if n in trained and id(trained[n]) not in given]
            if lacking:
                raise TaskError(
                    f"the checkpoint lacks {len(lacking)} of {len(trained)} tensors in training, such as "
                    f"{lacking[0]!r}: it was written for another tuning, or holds the base"
                )
            if trained.keys() >= state_dict.keys():
                result.missing_keys.clear()  # a checkpoint of the task alone: the base is loaded already
        return result

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = None,
        tags: list[str] | None = None,
    ) -> str:
        """As in transformers, in one commit: the base, with a card that says how to load it.

        A card that the repository has already is kept. Returns the URL of the commit. Raises HubError where the Hub
        refuses or cannot be reached.
        """
        with tempfile.TemporaryDirectory() as directory:
            sizes = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
            self.save_pretrained(directory, **sizes)
            return push_model_directory(
                directory,
                repo_id,
                card=model_base_card(self, repo_id, tags or ()),
                commit_message=commit_message or f"Upload {type(self).__name__}",
                commit_description=commit_description,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )

    def half(self) -> Any:
        """Compute in float16; the tensors of quantized matrices keep their dtype."""
        return self.to(torch.float16)  # type: ignore[attr-defined]

    def float(self) -> Any:
        """Compute in float32; the tensors of quantized matrices keep their dtype."""
        return self.to(torch.float32)  # type: ignore[attr-defined]

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args: Any, **kwargs: Any
    ) -> nn.Module:
        """As in transformers. Raises UnsupportedOperationError if quantized embeddings would change their size."""
        places = (self.get_input_embeddings(), self.get_output_embeddings())  # type: ignore[attr-defined]
        rows = next((m.rows for m in places if isinstance(m, LowbitModule)), None)
        wanted = rows if new_num_tokens is None else new_num_tokens
        if rows is not None and wanted is not None:
            wanted += -wanted % (pad_to_multiple_of or 1)
            if wanted != rows:
                raise UnsupportedOperationError(
                    f"cannot resize token embeddings from {rows} to {wanted}: they are stored as bit-planes. Convert "
                    "the model with embeddings and output head in full precision, or call model.dequantize() first"
                )
        resized: nn.Module = super().resize_token_embeddings(  # type: ignore[misc]
            new_num_tokens, pad_to_multiple_of, *args, **kwargs
        )
        return resized


def _has_codebooks(model: Any) -> bool:
    """Whether a row of the model's text is one of several codebooks, as of sounds: there are more rows than inputs."""
    configs = (model.config, getattr(model.config, "decoder", None))
    return any(getattr(config, "num_codebooks", 1) > 1 for config in configs)


def _ask_what_is_trained(model: Any) -> None:
    """Warn, once, if a model is trained as it was loaded: nothing that is quantized would change.

    Whoever chose what to train has frozen something else, as ``prepare_scale_tuning`` and PEFT do.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or "lowbit_base" not in vars(model):
        return
    model.lowbit_asked = True
    quantized = {id(p) for m in model.modules() if isinstance(m, LowbitModule) for p in m.matrix_parameters().values()}
    others = [p for p in model.parameters() if id(p) not in quantized and p.is_floating_point()]
    if all(p.requires_grad for p in others) and not _in_training(model):
        log.warning(
            "%s: this model is in training as it was loaded. Its quantized weights cannot change; only %s numbers in "
            "full precision would (norms, biases, what is not quantized). Call lowbit_format.prepare_scale_tuning to "
            "train the scales of a task, or add an adapter with PEFT; or freeze what is not to be trained",
            type(model).__name__,
            f"{sum(p.numel() for p in others):,}",
        )


_PEFT_EMBEDDING = "embeddings.word_embeddings"


def _in_training(model: nn.Module) -> bool:
    return any(isinstance(module, TunedDelta) for module in model.modules())


def _rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int | None, bool]:
    """Rows of what a model is called with (None if no argument tells), and whether that is text."""
    for x in args:
        if isinstance(x, Tensor) and x.dim() > 0:
            return len(x), not x.is_floating_point()
    for name in (*_TEXTS, *_INPUTS):
        x = kwargs.get(name)
        if isinstance(x, Tensor) and x.dim() > 0:
            return len(x), name in _TEXTS
    return None, False


def _is_mixed(kwargs: dict[str, Any]) -> bool:
    """Whether a model is called with text and something else, of which a row may have any number."""
    given = {name for name, value in kwargs.items() if value is not None}
    return not given.isdisjoint(("input_ids", "inputs_embeds")) and any(name.startswith(_MEDIA) for name in given)


_MEDIA = ("pixel_values", "image", "video", "audio", "input_features", "input_values")
_TEXTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
_INPUTS = ("pixel_values", "input_features", "input_values", "hidden_states")


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The ``state_dict`` of the base: without deltas in training, and with the base's head where a task replaces it."""
    tensors = dict(model.state_dict())
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        if isinstance(module, TunedDelta):
            for name in module.state_dict():
                del tensors[prefix + name]
        elif isinstance(module, SwitchedModule):
            tensors.update({prefix + name: t for name, t in module.module_of(None).state_dict().items()})
    return tensors


def trained_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint during tuning needs: parameters in training, and all tensors of modules trained whole."""
    tensors: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for path, module in model.named_modules():
        if isinstance(module, SwitchedModule) and module.task_own is not None:
            tensors.update({f"{path}.{name}": t for name, t in module.module_of(module.task_own).state_dict().items()})
    return tensors


def specialize(model: nn.Module, state: TaskState) -> None:
    """Make every transformers model inside `model` that has lowbit modules a :class:`LowbitModel` with `state`."""
    for module in model.modules():
        is_model = hasattr(module, "all_tied_weights_keys")
        if is_model and any(isinstance(m, LowbitModule) for m in module.modules()):
            if not isinstance(module, LowbitModel):  # ``type(loaded).from_pretrained`` makes one that is
                mix_in(LowbitModel, module)
            mixed: Any = module
            mixed.lowbit_state = state


def generalize(model: nn.Module) -> None:
    """Undo :func:`specialize`."""
    for module in model.modules():
        if isinstance(module, LowbitModel):
            restore_class(module)
            for attribute in [name for name in vars(module) if name in LowbitModel.__annotations__]:
                delattr(module, attribute)
