"""The quantization method ``lowbit`` of vLLM, made from ``config.json`` alone."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig as VllmQuantizationConfig
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from ..errors import LoadError
from ..schema import QUANT_METHOD, ModuleEntry, QuantizationConfig
from .experts import LowbitExpertsMethod
from .methods import LowbitEmbeddingMethod, LowbitLinearMethod

BITS_KEY = "lowbit_bits"  # in --hf-overrides: the precision to read at (NST-1)


class LowbitConfig(VllmQuantizationConfig):
    """A parsed ``quantization_config``, and which of vLLM's layers its matrices make up.

    Attributes:
        parsed: of the file.
        bits: precision to read at; None is the file's own.
        entries: matrices of the file by the names of modules in vLLM before it fuses them.
    """

    def __init__(self, parsed: QuantizationConfig) -> None:
        super().__init__()
        self.parsed = parsed
        self.bits: int | None = None
        tied = {place: parsed.modules[owner] for place, owner in parsed.tied.items()}
        self.entries: dict[str, ModuleEntry] = {**parsed.modules, **tied}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LowbitConfig:
        """Parse it; raises ConfigError or VersionError (CFG and VER rules)."""
        return cls(QuantizationConfig.from_dict(config))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Take the precision from ``--hf-overrides '{"lowbit_bits": 3}'``; PrecisionError if the file lacks it."""
        bits = getattr(hf_config, BITS_KEY, None)
        self.parsed.check_precision(bits)
        self.bits = bits

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Know the matrices by the model's names in vLLM too."""
        self.entries.update(hf_to_vllm_mapper.apply_dict(self.entries))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of a layer: ours if a matrix of the file is in it."""
        prefix = prefix.removeprefix(".")  # some models put a dot behind no name
        if isinstance(layer, VocabParallelEmbedding):
            entry = self.entries.get(prefix) if prefix else self._embedding(layer)
            return None if entry is None else LowbitEmbeddingMethod(entry, self.bits)
        if not isinstance(layer, LinearBase):
            return self._experts(layer, prefix)
        names = self._names(prefix)
        found = [self.entries.get(name) for name in names]
        if not any(found):
            return UnquantizedLinearMethod()
        return LowbitLinearMethod(list(zip(names, found, strict=True)), self.bits)

    def _names(self, prefix: str) -> list[str]:
        """Names of the modules that vLLM has fused to one at `prefix`; it alone if the file has them in one too."""
        parent, dot, name = prefix.rpartition(".")
        if prefix in self.entries:
            return [prefix]
        return [f"{parent}{dot}{part}" for part in self.packed_modules_mapping.get(name, [name])]

    def _experts(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of a layer of experts that has stacks of the file."""
        path = prefix.removesuffix(".routed_experts")
        found = {e.path.rpartition(".")[2]: e for name, e in self.entries.items() if name.rpartition(".")[0] == path}
        stacks = {name: entry for name, entry in found.items() if entry.experts is not None}
        if not path or not stacks:
            return None
        if not isinstance(layer, RoutedExperts):
            return None  # the runner around it, which vLLM asks about too
        return LowbitExpertsMethod(path, stacks, self.bits, layer)

    def _embedding(self, layer: VocabParallelEmbedding) -> ModuleEntry | None:
        """The embedding of a model that gives its layer no name: the only one that has its shape."""
        shape = (layer.org_vocab_size, layer.embedding_dim)
        fits = [e for e in self.parsed if e.kind == "embedding" and e.shape == shape]
        if len(fits) > 1:
            names = ", ".join(e.path for e in fits)
            raise LoadError(f"vLLM gives an embedding {list(shape)} no name, and several of the file fit: {names}")
        return fits[0] if fits else None

    # --- what vLLM asks ---

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80  # of the Triton kernels

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []
