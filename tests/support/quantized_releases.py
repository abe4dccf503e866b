"""Releases that are published only quantized, as their own tools write them: a tiny model with packed weights.

The encoders follow the published layouts, one value after the other, and have nothing in common with the importer.
Each takes a matrix's rows and columns and gives its tensors by role, and the weight that the release's own library
decodes them to.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
Encoder = Callable[[int, int], tuple[Tensors, torch.Tensor]]

HIDDEN, INNER = 128, 256


def tiny_llama() -> Any:
    """One layer; its matrices are 128 x 128, 64 x 128, 256 x 128 and 128 x 256."""
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(
            hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, vocab_size=96, max_position_embeddings=64, tie_word_embeddings=False,
        )
    )  # fmt: skip


def write_release(
    directory: Path,
    encode: Encoder,
    section: dict[str, Any],
    *,
    model: Callable[[], Any] = tiny_llama,
    dtype: torch.dtype = torch.float16,
    floats: tuple[str, ...] = ("lm_head",),
    under: str = "",
) -> Tensors:
    """Write a model whose Linear layers are packed by `encode`, but for those with one of `floats` in their path.

    Args:
        directory: to make.
        section: ``quantization_config``.
        model: makes the model.
        dtype: of what is not packed.
        under: the part of the config that has the section, such as ``text_config``; empty for the top.

    Returns:
        The decoded weight of every packed layer, by path.
    """
    hf.set_seed(5)
    made = model().to(dtype)
    made.save_pretrained(directory)
    tensors, expected = load_file(directory / "model.safetensors"), {}
    for name in [n for n in tensors if n.endswith("_proj.weight") or n == "lm_head.weight"]:
        path = name.removesuffix(".weight")
        if any(part in path for part in floats):
            continue
        parts, expected[path] = encode(*tensors.pop(name).shape)
        tensors |= {f"{path}.{role}": tensor.contiguous() for role, tensor in parts.items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    file = directory / "config.json"
    config = json.loads(file.read_text())
    (config[under] if under else config)["quantization_config"] = section
    file.write_text(json.dumps(config))
    return expected


def change(directory: Path, edit: Callable[[Tensors], object]) -> Path:
    """Let `edit` change the tensors of a release."""
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def random_codes(bits: int, *shape: int) -> torch.Tensor:
    """int64; every code occurs."""
    codes = torch.randint(0, 2**bits, shape)
    codes.view(-1)[: 2**bits] = torch.arange(2**bits)[: codes.numel()]
    return codes


def random_scales(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return (0.002 + 0.02 * torch.rand(shape)).to(dtype)


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 ``[n, ceil(count * bits / 32)]`` of codes ``[n, count]``: one number,
    the first code its lowest digit."""
    rows = []
    for row in codes.tolist():
        number = sum(code << (bits * i) for i, code in enumerate(row))
        words = [(number >> (32 * w)) & 0xFFFFFFFF for w in range(math.ceil(len(row) * bits / 32))]
        rows.append([word - (1 << 32) if word >> 31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


# --- GPTQ -------------------------------------------------------------------------------------------


def gptq(
    bits: int = 4,
    group_size: int = 32,
    *,
    sym: bool = False,
    minus_one: bool = True,
    order: bool = False,
    dtype: torch.dtype = torch.float16,
) -> tuple[Encoder, dict[str, Any]]:
    """An encoder and its section. `order`: columns are in the order of their activations."""

    def encode(rows: int, cols: int) -> tuple[Tensors, torch.Tensor]:
        size = cols if group_size == -1 else group_size
        groups = math.ceil(cols / size)
        codes, scales = random_codes(bits, rows, cols), random_scales(rows, groups, dtype=dtype)
        zeros = torch.randint(1, 2**bits, (rows, groups)) if not sym else torch.full((rows, groups), 2 ** (bits - 1))
        group = torch.arange(cols) // size
        if order:
            group = group[torch.randperm(cols)]
        weight = torch.empty(rows, cols, dtype=dtype)
        for c, g in enumerate(group.tolist()):
            weight[:, c] = scales[:, g] * (codes[:, c] - zeros[:, g])
        parts = {
            "qweight": pack_words(codes, bits).T,
            "qzeros": pack_words((zeros - int(minus_one)).T, bits),
            "scales": scales.T,
            "g_idx": group.int(),
        }
        return parts, weight

    section = {
        "quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": order, "sym": sym,
        "checkpoint_format": "gptq" if minus_one else "gptq_v2", "damp_percent": 0.01, "true_sequential": True,
    }  # fmt: skip
    return encode, section


# --- AWQ --------------------------------------------------------------------------------------------


def awq(group_size: int = 32, *, dtype: torch.dtype = torch.float16) -> tuple[Encoder, dict[str, Any]]:
    """In the order of the gemm kernel."""

    def pack(codes: torch.Tensor) -> torch.Tensor:
        """int32 ``[n, rows / 8]`` of ``[n, rows]``."""
        out = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int64)
        for word in range(out.shape[1]):
            for i, at in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                out[:, word] |= codes[:, 8 * word + at] << (4 * i)
        return torch.where(out >= 2**31, out - 2**32, out).int()

    def encode(rows: int, cols: int) -> tuple[Tensors, torch.Tensor]:
        size = cols if group_size == -1 else group_size
        codes, zeros = random_codes(4, rows, cols), random_codes(4, rows, cols // size)
        scales = random_scales(rows, cols // size, dtype=dtype)
        spread = [t.repeat_interleave(size, dim=1) for t in (zeros, scales)]
        return {"qweight": pack(codes.T), "qzeros": pack(zeros.T), "scales": scales.T}, (codes - spread[0]) * spread[1]

    section = {"quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemm", "zero_point": True}
    return encode, section
