"""Small transformers models of several architectures, with random weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from lowbit_format.schema import Scheme

BCQ = Scheme("bcq", 3, 8, "F16", offset=True, nested=(2,))
RAGGED = Scheme("uniform", 4, 16, "BF16", row_bits=True, nested=(2,))
TABLE = Scheme("codebook", 2, 0, "F32")
IDS = torch.tensor([[5, 9, 2, 33, 17, 60, 1], [8, 8, 40, 3, 21, 4, 50]])

COMMON = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama_config(tied: bool) -> LlamaConfig:
    return LlamaConfig(**COMMON, intermediate_size=48, num_key_value_heads=2, tie_word_embeddings=tied)


def bert_config() -> BertConfig:
    return BertConfig(**COMMON, intermediate_size=48, max_position_embeddings=32)


def qwen3() -> PreTrainedModel:
    return Qwen3ForCausalLM(
        Qwen3Config(**COMMON, intermediate_size=48, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True)
    )


def opt() -> PreTrainedModel:
    return OPTForCausalLM(OPTConfig(**COMMON, ffn_dim=48, max_position_embeddings=32, word_embed_proj_dim=24))


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=1)
    )


def t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": gpt2,
    "opt": opt,
    "llama-tied": lambda: LlamaForCausalLM(llama_config(True)),
    "llama": lambda: LlamaForCausalLM(llama_config(False)).to(torch.bfloat16),
    "llama-base": lambda: LlamaModel(llama_config(True)),
    "qwen3": qwen3,
    "bert": lambda: BertForMaskedLM(bert_config()),
    "bert-base": lambda: BertModel(bert_config()),
    "t5": t5,
}


def mixed(path: str, module: nn.Module) -> Scheme:
    """Every codec somewhere."""
    if path.endswith(("k_proj", "key", ".k", "fc1", "c_fc")):
        return RAGGED
    return TABLE if path.endswith(("v_proj", "value", ".v")) else BCQ
