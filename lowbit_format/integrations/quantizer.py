"""The format as a quantization method of transformers. Importing this module registers it under ``"lowbit"``.

transformers reads a pre-quantized checkpoint in three steps: it builds the model without data, lets the quantizer
replace modules, and loads tensors by name. The file's tensor names are those of our modules' parameters, so the third
step needs no code of ours.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..container.fingerprint import Identity
from ..container.reader import CONFIG_FILE, ModelReader
from ..container.writer import file_metadata
from ..errors import LoadError
from ..runtime.active_tasks import TaskState
from ..runtime.decoder_layer import restore_layers, shorten_layers
from ..runtime.expert_forward import take_out
from ..runtime.experts import LowbitExperts
from ..runtime.modules_to_save import SwitchedModule
from ..schema import QUANT_METHOD, QuantizationConfig
from ..tensors import tensor_specs
from .base_model import Base, base_of_files, digest
from .file_names import ExactNames, FileNames, exact_names
from .model import base_state_dict, generalize, specialize
from .placement import Placement, describe, lowbit_modules, place_modules, refuse_offloaded_experts, tie
from .references import set_modules

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """The base of which a directory holds one precision alone: tasks of this base are tasks of the directory.

    Attributes:
        identity: of the whole base.
        bits: the precision.
    """

    identity: Identity
    bits: int


@dataclass(frozen=True)
class LoadOptions:
    """How to load a model.

    Attributes:
        bits: precision to read at (NST-1); None is full precision.
        verify: check all digests and rules first.
        origin: the base that the directory is a part of; None: it is whole.
    """

    bits: int | None = None
    verify: bool = False
    origin: Origin | None = None


_DEFAULT = LoadOptions()
_options: ContextVar[LoadOptions] = ContextVar("lowbit_load_options", default=_DEFAULT)


@contextlib.contextmanager
def load_options(options: LoadOptions) -> Iterator[None]:
    """Options for the models loaded inside the block.

    Not arguments of the config: a file could set its config's keys.
    """
    token = _options.set(options)
    try:
        yield
    finally:
        _options.reset(token)


@register_quantization_config(QUANT_METHOD)
class LowbitConfig(QuantizationConfigMixin):
    """``quantization_config`` as transformers wants it, around a parsed :class:`QuantizationConfig`.

    Raises ConfigError or VersionError if it breaks a rule of the spec (CFG and VER rules).
    """

    def __init__(self, **kwargs: Any) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # a str enum in transformers
        self.parsed = QuantizationConfig.from_dict({"quant_method": QUANT_METHOD, **kwargs})

    @classmethod
    def of(cls, parsed: QuantizationConfig) -> LowbitConfig:
        """Wrap a parsed config."""
        return cls(**parsed.to_dict())

    def to_dict(self) -> dict[str, Any]:
        return self.parsed.to_dict()

    def to_diff_dict(self) -> dict[str, Any]:  # the base class of transformers 5.0 calls it but lacks it
        return self.to_dict()

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()


@register_quantizer(QUANT_METHOD)
class LowbitQuantizer(HfQuantizer):
    """Places lowbit modules before loading, checks and ties them afterwards, describes them on saving."""

    requires_calibration = True  # transformers' word for: cannot quantize on the fly
    is_trainable = True
    is_qat_trainable = True  # the Trainer takes a model without adapters only with both
    is_compileable = True

    def __init__(self, quantization_config: LowbitConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **{**kwargs, "pre_quantized": True})  # also if given as an argument
        self.options = _options.get()
        self.placed = Placement()
        self.exact_names: list[ExactNames] = []
        self.base: Base | None = None

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """At a lower precision the file has more planes than the module: that is no mismatch of shapes."""
        return self.options.bits is not None and param_name.endswith((".planes", "_planes"))

    def get_weight_conversions(self) -> list[Any]:
        return list(self.exact_names)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        return [*weight_conversions, *self.get_weight_conversions()]

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        reader = self._open(checkpoint_files)
        state, files = TaskState(), FileNames(model, reader)
        self.placed = place_modules(model, files, self.options.bits, state)
        refuse_offloaded_experts(self.placed, kwargs.get("device_map"))
        specialize(model, state)
        model.lowbit_files = files
        self.exact_names = exact_names(model, _wanted_names(files, self.placed))
        origin, prefix = self.options.origin, model.base_model_prefix
        identity, bits = (reader.identity(), self.options.bits) if origin is None else (origin.identity, origin.bits)
        self.base = base_of_files(identity, self.placed.files, prefix, bits)
        tie(model, self.placed)  # the loader must neither miss the tensors of tied modules nor tie their `weight`
        if self.options.bits is not None:  # the parameters of other precisions are not loaded
            ignored = model._keys_to_ignore_on_load_unexpected  # None, a list or a set: versions differ
            kind = list if ignored is None else type(ignored)
            model._keys_to_ignore_on_load_unexpected = kind([*(ignored or ()), r"[._](scales|offsets|zeros)(_k\d)?$"])
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for path in self.placed.files:
            model.get_submodule(path).finish_loading(path)
        for place, owner in self.placed.tied.items():
            model.get_submodule(place).tie_to(model.get_submodule(owner))
        tie(model, self.placed)  # again: at a lower precision finish_loading has renamed parameters
        self.quantization_config = LowbitConfig.of(describe(model, self.placed))
        model.config.quantization_config = self.quantization_config
        model.lowbit_base, model.lowbit_files = self.base, None
        # Saved names are the model's own, as in quantization_config; transformers must not revert its renaming.
        model._weight_conversions = []
        for path in self.placed.files:  # last: whatever reads planes would undo it
            model.get_submodule(path).tile()
        shorten_layers(model)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """On saving: the state dict of the base, and digests of its tensors, one map for all shards (DIG-2)."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}
        base, twice = base_state_dict(model), model.all_tied_weights_keys
        for _, module in lowbit_modules(model):
            module.refuse_shared_out()
        tensors = {name: t for name, t in base.items() if name not in twice}
        plain = {name: t for name, t in tensors.items() if type(t) is Tensor and not t.is_meta}
        return base, file_metadata({name: digest(t) for name, t in plain.items()})

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        """Replace lowbit modules by float ones with the active task; ties and the models' former classes return."""
        if isinstance(dtype, str):  # config.dtype is one once the model was saved
            dtype = getattr(torch, dtype)
        weights, plain = dict[int, nn.Parameter](), dict[str, nn.Module]()
        for module in list(model.modules()):
            if isinstance(module, SwitchedModule):
                module.become_plain(module.task_state.active)
        for path, module in list(lowbit_modules(model)):
            if isinstance(module, LowbitExperts):
                parent, _, name = path.rpartition(".")
                take_out(model.get_submodule(parent), name, module.float_parameter(dtype))
                continue
            if module.matrix_id not in weights:
                weights[module.matrix_id] = nn.Parameter(module.dequantize(dtype).contiguous())
            plain[path] = module.float_module(weights[module.matrix_id])
        set_modules(model, plain)
        tie(model, self.placed)  # by ``weight`` again
        generalize(model)
        restore_layers(model)
        del model._weight_conversions  # a float model is saved under the names of its checkpoints again
        return model.to(dtype)

    def _open(self, checkpoint_files: list[str] | None) -> ModelReader:
        """A reader of the files' directory, which it checks (section 3, TEN-1); with ``verify`` also their data."""
        if not checkpoint_files or not (Path(checkpoint_files[0]).parent / CONFIG_FILE).is_file():
            raise LoadError("a lowbit model is loaded from the files of its directory, not from a state_dict")
        reader = ModelReader(Path(checkpoint_files[0]).parent)
        if self.options.verify and (unverified := reader.verify()):
            log.warning("%s: %d tensors have no digest", reader.directory, unverified)
        return reader


def _wanted_names(files: FileNames, placed: Placement) -> dict[str, str]:
    """The model's name of every tensor of the directory that the model has, by its name in the directory."""
    lowbit = {
        spec.name: replace(entry, path=path).tensor(spec.role)
        for path, entry in placed.files.items()
        for spec in tensor_specs(entry)
    }
    return {**files.of, **lowbit}
