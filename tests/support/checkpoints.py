"""Tiny Hugging Face checkpoints with random weights, one for each architecture that the converter is tested on."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import save_file

_LAYERS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
_GATED = {**_LAYERS, "intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 64}
_EXPERTS = {**_GATED, "num_local_experts": 4, "num_experts_per_tok": 2}

ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=96, n_positions=64, n_embd=64, n_layer=2, n_head=4)),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(**_LAYERS, ffn_dim=96, max_position_embeddings=64, word_embed_proj_dim=64)
    ),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GATED, tie_word_embeddings=False)),
    "llama-tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GATED, tie_word_embeddings=True)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_GATED, head_dim=16, tie_word_embeddings=False)),
    "bert": lambda: hf.BertModel(hf.BertConfig(**_LAYERS, intermediate_size=96, max_position_embeddings=64)),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=96, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4)
    ),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**_EXPERTS)),
}
DENSE = tuple(name for name in ARCHITECTURES if name != "mixtral")


def build(
    name: str, directory: Path, *, dtype: torch.dtype = torch.float32, shard: str = "1GB", pickled: bool = False
) -> Path:
    """Write a checkpoint of architecture `name` as transformers does; its weights depend on the name alone.

    Args:
        directory: to make.
        dtype: of all weights.
        shard: largest size of a file, such as ``"100KB"``.
        pickled: write ``pytorch_model.bin`` instead of safetensors.
    """
    seed = zlib.crc32(name.encode())
    hf.set_seed(seed)
    model = ARCHITECTURES[name]().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, so that a mix-up of two tensors shows
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(directory, max_shard_size=shard)
    if pickled:
        (directory / "model.safetensors").unlink()
        torch.save(model.state_dict(), directory / "pytorch_model.bin")
    return directory


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint's safetensors files, by name."""
    from safetensors.torch import load_file

    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def edit_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Let `change` edit the tensors of an unsharded checkpoint in place."""
    tensors = weights(directory)
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def with_tokenizer(directory: Path) -> Path:
    """Add a tokenizer to a checkpoint; its words are ``w0`` to ``w91``."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "<pad>", *(f"w{i}" for i in range(92))])}
    tokenizer = Tokenizer(models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(directory)
    return directory
