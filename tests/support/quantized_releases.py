"""Releases that are published only quantized, as their own tools write them: a tiny model with packed weights.

The encoders follow the published layouts, one value after the other, and have nothing in common with the importer.
Each takes a matrix's rows and columns and gives its tensors by role, and the weight that the release's own library
decodes them to.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
Encoder = Callable[[int, int], tuple[Tensors, torch.Tensor]]

_MATRICES = ("lm_head.weight", ".w1.weight", ".w2.weight", ".w3.weight")
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
    config, tensors = _float_model(model, dtype)
    tensors, expected = dict(tensors), {}
    torch.manual_seed(5)
    directory.mkdir()
    for name in [n for n in tensors if n.endswith((*_MATRICES, "_proj.weight"))]:
        path = name.removesuffix(".weight")
        if any(part in path for part in floats):
            continue
        parts, expected[path] = encode(*tensors.pop(name).shape)
        tensors |= {f"{path}.{role}": tensor.contiguous() for role, tensor in parts.items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    more = {under: {**config[under], "quantization_config": section}} if under else {"quantization_config": section}
    (directory / "config.json").write_text(json.dumps({**config, **more}))
    return expected


@cache
def _float_model(model: Callable[[], Any], dtype: torch.dtype) -> tuple[dict[str, Any], Tensors]:
    """The config and the tensors of a model, as transformers saves them; not to be changed."""
    hf.set_seed(5)
    with tempfile.TemporaryDirectory() as directory:
        model().to(dtype).save_pretrained(directory)
        return json.loads(Path(directory, "config.json").read_text()), load_file(Path(directory, "model.safetensors"))


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


def pack_padded_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """As :func:`pack_words`, ``32 // bits`` codes in each word."""
    per = 32 // bits
    return torch.cat([pack_words(part, bits) for part in codes.split(per, dim=1)], dim=1)


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


def auto_round(
    kind: tuple[Encoder, dict[str, Any]], packing: str = "auto_round:auto_gptq"
) -> tuple[Encoder, dict[str, Any]]:
    """As AutoRound says of a layout of others."""
    encode, section = kind
    own = {key: section[key] for key in ("bits", "group_size", "sym") if key in section}
    return encode, {**own, "quant_method": "auto-round", "data_type": "int", "packing_format": packing}


# --- compressed-tensors and FP8 ---------------------------------------------------------------------


def _compressed(form: str, weights: dict[str, Any], **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
        "config_groups": {"group_0": {**group, "format": form}}, "ignore": ["lm_head"], "version": "0.12.2", **more,
    }  # fmt: skip


def compressed_integers(
    bits: int = 4,
    group_size: int = 32,
    *,
    strategy: str = "group",
    symmetric: bool = True,
    packed: bool = True,
    padded: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Encoder, dict[str, Any]]:
    """pack-quantized, or int-quantized. `padded`: a word holds whole codes alone, as before version 0.20."""
    pack = pack_padded_words if padded else pack_words

    def encode(rows: int, cols: int) -> tuple[Tensors, torch.Tensor]:
        groups = cols // group_size if strategy == "group" else 1
        shape = (1,) if strategy == "tensor" else (rows, groups)
        middle = 2 ** (bits - 1)
        numbers, scales = random_codes(bits, rows, cols) - middle, random_scales(*shape, dtype=dtype)
        zeros = torch.zeros(shape, dtype=torch.int64) if symmetric else random_codes(bits, *shape) - middle
        weight = torch.empty(rows, cols, dtype=dtype)
        for c in range(cols):
            g = c // group_size if strategy == "group" else 0
            scale, zero = (scales, zeros) if strategy == "tensor" else (scales[:, g], zeros[:, g])
            weight[:, c] = (numbers[:, c] - zero) * scale
        parts = {"weight_scale": scales}
        if packed:
            parts["weight_packed"] = pack(numbers + middle, bits)
            parts["weight_shape"] = torch.tensor([rows, cols])
        else:
            parts["weight"] = numbers.to(torch.int8)
        if not symmetric and packed and strategy != "tensor":
            parts["weight_zero_point"] = pack((zeros + middle).T, bits).T
        elif not symmetric:
            parts["weight_zero_point"] = zeros.to(torch.int8)
        return parts, weight

    size = group_size if strategy == "group" else None
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "group_size": size}
    return encode, _compressed("pack-quantized" if packed else "int-quantized", weights)


def float8(
    block: tuple[int, int] | None,
    role: str,
    section: dict[str, Any],
    *,
    scale_dtype: torch.dtype = torch.float32,
    shape: Callable[[int, int], tuple[int, ...]] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Encoder, dict[str, Any]]:
    """E4M3 with scales of blocks, or of the matrix as a whole; every code but NaN occurs. `shape`: of the scales."""

    def encode(rows: int, cols: int) -> tuple[Tensors, torch.Tensor]:
        codes = torch.randint(0, 256, (rows, cols), dtype=torch.uint8)
        codes.view(-1)[:256] = torch.arange(256, dtype=torch.uint8)
        codes[(codes & 127) == 127] = 3
        numbers = codes.view(torch.float8_e4m3fn)
        height, width = block or (rows, cols)
        grid = (math.ceil(rows / height), math.ceil(cols / width))
        scales = (0.0002 + 0.0007 * torch.rand(grid)).to(scale_dtype)
        weight = torch.empty(rows, cols, dtype=dtype)
        for i in range(grid[0]):
            for j in range(grid[1]):
                at = (slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width))
                weight[at] = (numbers[at].float() * scales[i, j].float()).to(dtype)
        return {"weight": numbers, role: scales.reshape(shape(rows, cols) if shape else grid)}, weight

    return encode, section


def deepseek_fp8(block: tuple[int, int] = (64, 96), **more: Any) -> tuple[Encoder, dict[str, Any]]:
    section = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block),
    }  # fmt: skip
    return float8(block, "weight_scale_inv", section, **more)


def mistral_fp8() -> tuple[Encoder, dict[str, Any]]:
    """One scale for the matrix, a number without dimensions, and one for activations."""
    section = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    encode, _ = float8(None, "weight_scale_inv", section, scale_dtype=torch.bfloat16, shape=lambda rows, cols: ())

    def with_activations(rows: int, cols: int) -> tuple[Tensors, torch.Tensor]:
        parts, weight = encode(rows, cols)
        return {**parts, "activation_scale": torch.tensor(0.5)}, weight

    return with_activations, section


def fbgemm_fp8() -> tuple[Encoder, dict[str, Any]]:
    section = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}
    return float8((1, 10**6), "weight_scale", section, shape=lambda rows, cols: (rows, 1))


def compressed_fp8(strategy: str = "channel", **more: Any) -> tuple[Encoder, dict[str, Any]]:
    """float-quantized: by row, matrix, or block of 64 x 64."""
    block = {"channel": (1, 10**6), "tensor": None, "block": (64, 64)}[strategy]
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "group_size": None}
    if strategy == "block":
        weights["block_structure"] = [64, 64]
    return float8(block, "weight_scale", _compressed("float-quantized", weights), scale_dtype=torch.bfloat16, **more)


def modelopt_fp8() -> tuple[Encoder, dict[str, Any]]:
    """One scale for the matrix, which its library rounds to the model's dtype."""

    def encode(rows: int, cols: int) -> tuple[Tensors, torch.Tensor]:
        numbers, scale = torch.randn(rows, cols).to(torch.float8_e4m3fn), 0.01 + 0.02 * torch.rand(())
        parts = {"weight": numbers, "weight_scale": scale, "input_scale": torch.tensor(0.1)}
        return parts, numbers.to(torch.bfloat16) * scale.to(torch.bfloat16)

    return encode, {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}


# --- FP4 --------------------------------------------------------------------------------------------

_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def _pack_halves(codes: torch.Tensor) -> torch.Tensor:
    """uint8 of int64 ``[..., cols]``: two codes in a byte, the first in its lower half."""
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).to(torch.uint8)


def compressed_fp4(kind: str = "nvfp4", *, dtype: torch.dtype = torch.bfloat16) -> tuple[Encoder, dict[str, Any]]:
    """nvfp4-pack-quantized or mxfp4-pack-quantized."""
    size = 16 if kind == "nvfp4" else 32

    def encode(rows: int, cols: int) -> tuple[Tensors, torch.Tensor]:
        codes, groups = random_codes(4, rows, cols), cols // size
        if kind == "nvfp4":
            scales = (8 + 400 * torch.rand(rows, groups)).to(torch.float8_e4m3fn)
            whole = torch.tensor([2688 / (0.1 + torch.rand(()))])
            steps = scales.float() / whole
            parts = {"weight_scale": scales, "weight_global_scale": whole}
        else:
            exponents = torch.randint(117, 124, (rows, groups))
            steps = torch.ldexp(torch.ones(rows, groups), exponents - 127)
            parts = {"weight_scale": exponents.to(torch.uint8)}
        weight = (_E2M1[codes] * steps.repeat_interleave(size, dim=1)).to(dtype)
        return {**parts, "weight_packed": _pack_halves(codes)}, weight

    strategy = "tensor_group" if kind == "nvfp4" else "group"
    weights = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": strategy, "group_size": size}
    return encode, _compressed(f"{kind}-pack-quantized", weights)


def modelopt_nvfp4() -> tuple[Encoder, dict[str, Any]]:
    """As compressed-tensors', but for names, and a factor in place of a divisor; no zero is negative."""

    def encode(rows: int, cols: int) -> tuple[Tensors, torch.Tensor]:
        codes = random_codes(4, rows, cols)
        scales, factor = (8 + 400 * torch.rand(rows, cols // 16)).to(torch.float8_e4m3fn), 1e-4 * (1 + torch.rand(()))
        steps = (scales.float() * factor).repeat_interleave(16, dim=1)
        weight = ((_E2M1[codes] + 0.0) * steps).to(torch.bfloat16)
        return {"weight": _pack_halves(codes), "weight_scale": scales, "weight_scale_2": factor}, weight

    return encode, {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}


def tiny_gpt_oss() -> Any:
    return hf.GptOssForCausalLM(
        hf.GptOssConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            head_dim=32, vocab_size=96, num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=64,
            layer_types=["full_attention"],
        )
    )  # fmt: skip


def write_gpt_oss(directory: Path, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """A model with experts in MXFP4, each `[experts, rows, groups, 16]`; returns them as the model has them."""
    section = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    write_release(directory, gptq()[0], section, model=tiny_gpt_oss, dtype=dtype, floats=("",))
    expected = {}

    def pack(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
            experts, cols, rows = tensors.pop(name).shape
            codes = random_codes(4, experts, rows, cols // 32, 32)
            exponents = torch.randint(117, 124, (experts, rows, cols // 32))
            tensors[f"{name}_blocks"] = _pack_halves(codes)
            tensors[f"{name}_scales"] = exponents.to(torch.uint8)
            values = torch.ldexp(_E2M1[codes], exponents[..., None] - 127).to(dtype)
            expected[name] = values.reshape(experts, rows, cols).transpose(1, 2).contiguous()

    change(directory, pack)
    return expected


# --- bitsandbytes -----------------------------------------------------------------------------------

_NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
_BNB_FP4 = [0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, 0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0]


def bitsandbytes(
    kind: str = "nf4",
    block: int = 64,
    *,
    nested: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    storage: torch.dtype = torch.uint8,
) -> tuple[Encoder, dict[str, Any]]:
    """`nested`: the scales are quantized too, in blocks of 256. `storage`: the dtype of the packed bytes."""
    table = torch.tensor(_NF4) if kind == "nf4" else torch.tensor(_BNB_FP4) / 12

    def encode(rows: int, cols: int) -> tuple[Tensors, torch.Tensor]:
        codes, blocks = random_codes(4, rows * cols), math.ceil(rows * cols / block)
        state = {
            "quant_type": kind, "blocksize": block, "dtype": str(dtype).removeprefix("torch."), "shape": [rows, cols],
        }  # fmt: skip
        parts = {}
        if nested:
            scales, table8 = torch.randint(0, 256, (blocks,), dtype=torch.uint8), torch.linspace(-1, 1, 256)
            outer = 0.01 + 0.001 * torch.rand(math.ceil(blocks / 256))
            absmax = table8[scales.long()] * outer.repeat_interleave(256)[:blocks] + torch.tensor(0.02)
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": torch.tensor(0.02).item()}
            parts |= {"weight.absmax": scales, "weight.nested_absmax": outer, "weight.nested_quant_map": table8}
        else:
            absmax = parts["weight.absmax"] = 0.01 + 0.01 * torch.rand(blocks)
        weight = (table[codes] * absmax.repeat_interleave(block)[: rows * cols]).to(dtype).reshape(rows, cols)
        text = json.dumps(state).encode()
        parts |= {
            "weight": ((codes[0::2] << 4) | codes[1::2]).to(torch.uint8).view(storage)[:, None],
            "weight.quant_map": table,
            f"weight.quant_state.bitsandbytes__{kind}": torch.tensor(list(text), dtype=torch.uint8),
        }
        return {role: part.clone() for role, part in parts.items()}, weight

    section = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": nested, "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8",
    }  # fmt: skip
    return encode, section


# --- BitNet -----------------------------------------------------------------------------------------


def bitnet(linear_class: str = "autobitlinear", dtype: torch.dtype = torch.bfloat16) -> tuple[Encoder, dict[str, Any]]:
    def encode(rows: int, cols: int) -> tuple[Tensors, torch.Tensor]:
        numbers, scale = torch.randint(-1, 2, (rows, cols)), (0.02 + 0.01 * torch.rand(1)).to(dtype)
        packed, quarter = torch.zeros(rows // 4, cols, dtype=torch.int64), rows // 4
        for i in range(4):
            packed |= (numbers[i * quarter : (i + 1) * quarter] + 1) << (2 * i)
        weight = numbers * scale.float()
        if linear_class != "autobitlinear":
            scale = 1 / scale
            weight = numbers / scale.float()
        return {"weight": packed.to(torch.uint8), "weight_scale": scale}, weight.to(dtype)

    section = {"quant_method": "bitnet", "linear_class": linear_class, "quantization_mode": "offline"}
    return encode, section
