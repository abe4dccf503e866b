"""The small llama that the tests of the vLLM plugin serve."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lowbit_format.schema import Scheme

from .building import write_model

LLAMA = LlamaConfig(
    vocab_size=96,  # vLLM pads it to 128
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.3,
    eos_token_id=None,
    bos_token_id=None,
)


def write_llama(directory: Path, scheme: Scheme) -> Path:
    """The llama with all its linear layers quantized by `scheme`."""
    torch.manual_seed(0)
    return write_model(
        LlamaForCausalLM(LLAMA), directory, lambda path, module: scheme if isinstance(module, nn.Linear) else None
    )
