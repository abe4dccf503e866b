"""LoRA over lowbit modules: every new ``LoraConfig`` maps them to layers. Imported when PEFT is.

PEFT picks its layer by ``isinstance(base, nn.Linear)`` and refuses other types, unless the config maps them to a
layer class. PEFT's own layers work: they call the base module and read shapes, device and dtype. An adapter cannot be
merged into bit-planes: that raises an UnsupportedOperationError.
"""

from __future__ import annotations

import functools
from typing import Any

from peft.tuners.lora.config import LoraConfig
from torch import nn

from ..runtime.modules import LowbitEmbedding, LowbitLinear

_post_init: Any = LoraConfig.__post_init__


@functools.wraps(_post_init)
def _post_init_with_lowbit(self: Any) -> None:
    _post_init(self)
    self._register_custom_module(_layers())


LoraConfig.__post_init__ = _post_init_with_lowbit  # type: ignore[method-assign]


@functools.cache
def _layers() -> dict[type[nn.Module], type[nn.Module]]:
    from peft.tuners.lora import layer  # not at the top: this module is imported in the middle of PEFT's import

    class LoraLowbitLinear(layer.Linear):
        """PEFT's LoRA layer over a lowbit linear layer."""

        def _get_in_out_features(self, module: Any) -> tuple[int, int]:
            return module.in_features, module.out_features

    class LoraLowbitEmbedding(layer.Embedding):
        """PEFT's LoRA layer over a lowbit embedding."""

        def _get_in_out_features(self, module: Any) -> tuple[int, int]:
            return module.num_embeddings, module.embedding_dim

    return {LowbitLinear: LoraLowbitLinear, LowbitEmbedding: LoraLowbitEmbedding}
