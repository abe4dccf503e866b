"""Small GGUF files, written with the package gguf: models of random blocks with a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

VOCABULARY = 264
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
# Where a block has float16 numbers, or (MXFP4) an exponent: what random bytes must not decide.
_HALVES = {
    "Q4_0": (0,), "Q5_0": (0,), "Q8_0": (0,), "Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,), "TQ1_0": (52,), "TQ2_0": (64,),
    "IQ2_XXS": (0,),
}  # fmt: skip

Shapes = dict[str, tuple[int, ...]]
Choose = Callable[[str, tuple[int, ...]], str]  # the type of a tensor
Fields = Mapping[str, Any]


def blocks(kind: str, rows: int, cols: int, seed: int = 0) -> NDArray[np.uint8]:
    """Random blocks of a type, uint8 ``[rows, bytes of a row]``, with scales of about 0.01 of either sign."""
    rng = np.random.default_rng(seed)
    size, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    raw = rng.integers(0, 256, (rows * cols // size, nbytes)).astype(np.uint8)
    for at in _HALVES.get(kind, ()):
        values = rng.normal(0, 0.01 if "K" not in kind and "X" not in kind else 0.001, len(raw)).astype("<f2")
        raw[:, at : at + 2] = values.view(np.uint8).reshape(-1, 2)
    if kind == "MXFP4":
        raw[:, 0] = rng.integers(110, 122, len(raw))
    return raw.reshape(rows, -1)


def tensor(kind: str, shape: tuple[int, ...], seed: int = 0) -> NDArray[Any]:
    """Random numbers, or blocks, of a type."""
    if kind in ("F32", "F16", "BF16"):
        values = np.random.default_rng(seed).normal(0, 0.05, shape).astype(np.float32)
        if len(shape) == 1:
            values += 1
        if kind == "BF16":
            return gguf.quants.quantize(values, GGMLQuantizationType.BF16)
        return values.astype(np.float16) if kind == "F16" else values
    *lead, rows, cols = shape
    whole = blocks(kind, int(np.prod([*lead, rows])), cols, seed)
    return whole.reshape(*lead, rows, -1)


def write_gguf(file: Path, architecture: str, shapes: Shapes, fields: Fields, choose: Choose, parts: int = 1) -> None:
    """Write a model.

    Args:
        file: the file; with `parts` above 1, such as ``model-00001-of-00002.gguf``, its name.
        architecture: as llama.cpp names it.
        shapes: of the tensors, by their names in such files.
        fields: metadata without the architecture in front; a key that begins with ``general.`` is one as it is.
        choose: the type of each tensor; vectors are F32 whatever it says.
        parts: number of files.
    """
    names = list(shapes)
    kinds = ["F32" if len(shapes[name]) == 1 else choose(name, shapes[name]) for name in names]
    for part in range(parts):
        path = file if parts == 1 else file.with_name(file.name.replace("00001-of", f"{part + 1:05}-of"))
        writer = gguf.GGUFWriter(path, architecture)
        if part == 0:
            _write_metadata(writer, architecture, fields)
        for i, name in enumerate(names):
            if i % parts == part:
                kind = GGMLQuantizationType[kinds[i]]
                writer.add_tensor(name, tensor(kind.name, shapes[name], seed=i), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _write_metadata(writer: gguf.GGUFWriter, architecture: str, fields: Fields) -> None:
    for key, value in fields.items():
        adders = {float: writer.add_float32, str: writer.add_string, bool: writer.add_bool, list: writer.add_array}
        add = adders.get(type(value), writer.add_uint32)
        add(key if key.startswith("general.") else f"{architecture}.{key}", value)
    letters = list(dict(_bytes_to_letters()).values())
    tokens = [*letters, "th", "he", "<s>", "</s>", *(f"<extra{i}>" for i in range(VOCABULARY - 260))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 258 + [3] * (VOCABULARY - 258))
    writer.add_token_merges(["t h", "h e"])
    writer.add_bos_token_id(258)
    writer.add_eos_token_id(259)
    writer.add_pad_token_id(259)
    writer.add_chat_template(TEMPLATE)


def _bytes_to_letters() -> Iterator[tuple[int, str]]:
    """The letter that stands for each byte in GPT-2's vocabulary."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    extra = 0
    for byte in range(256):
        if byte in plain:
            yield byte, chr(byte)
        else:
            yield byte, chr(256 + extra)
            extra += 1


_ARCHITECTURES = {"qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "gemma3_text": "gemma3"}  # others as transformers


_MORE = {  # what llama.cpp writes too
    "attention.key_length": "head_dim",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}


def of_config(config: Any) -> tuple[str, Shapes, dict[str, Any]]:
    """Architecture, shapes and metadata of the file that llama.cpp would make of a causal model of this config."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    architecture = _ARCHITECTURES.get(config.model_type, config.model_type)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    state, shapes = model.state_dict(), Shapes()
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
    for name, place in get_gguf_hf_weights_map(model, processor).items():
        if place not in state or (name == "output.weight" and config.tie_word_embeddings):
            continue
        shape = tuple(state[place].shape)
        if "_exps" in name:
            name = f"{name}.weight"
            shape = (shape[0], shape[1] // 2, shape[2]) if "down" not in name else shape
        if "shexp" in name and shape[0] == 1:
            shape = shape[1:]
        shapes[name] = shape
    keys = GGUF_CONFIG_MAPPING.get(config.model_type) or GGUF_CONFIG_MAPPING[architecture]
    rope = getattr(config, "rope_parameters", None) or {}
    keys = {**{key: attribute for key, attribute in keys.items() if attribute}, **_MORE}
    values = {key: rope.get(attribute, getattr(config, attribute, None)) for key, attribute in keys.items()}
    return architecture, shapes, {key: v for key, v in values.items() if isinstance(v, (int, float))}
