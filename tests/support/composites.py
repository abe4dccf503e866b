"""Tiny models with parts that have classes of their own, and what is asked of such a part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from lowbit_format import Recipe, Target, convert_hf_to_lowbit
from lowbit_format.container.reader import ModelReader
from lowbit_format.runtime.experts import LowbitExperts
from lowbit_format.runtime.modules import LowbitModule

_LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_TEXT = {**_LAYERS, "vocab_size": 64, "max_position_embeddings": 32}
_GROUPED = {**_TEXT, "num_key_value_heads": 2}
_IMAGE = {**_LAYERS, "image_size": 16, "patch_size": 8}
_TOKENS = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
_SECTIONS = {"rope_type": "default", "type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}


def clip() -> Any:
    text, vision = {**_TEXT, "projection_dim": 16}, {**_IMAGE, "projection_dim": 16}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


def siglip() -> Any:
    return hf.SiglipModel(hf.SiglipConfig(text_config=_TEXT, vision_config=_IMAGE))


def qwen2_5_vl() -> Any:
    vision = {"depth": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "num_heads": 4}
    vision |= {"patch_size": 4, "fullatt_block_indexes": [1], "window_size": 16}
    text = {**_GROUPED, "rope_parameters": _SECTIONS}
    return hf.Qwen2_5_VLForConditionalGeneration(hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_TOKENS))


def qwen3_5() -> Any:
    linear = {f"linear_{k}": n for k, n in (("num_key_heads", 2), ("num_value_heads", 2))}
    linear |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    text = {**_GROUPED, **linear, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
    vision = {"depth": 1, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "num_heads": 4}
    vision |= {"patch_size": 4, "num_position_embeddings": 16}
    return hf.Qwen3_5ForConditionalGeneration(hf.Qwen3_5Config(text_config=text, vision_config=vision, **_TOKENS))


def mllama() -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    text = {**_GROUPED, "cross_attention_layers": [1], "pad_token_id": 0, "rope_parameters": rope}
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 4}
    vision |= {"intermediate_size": 48, "image_size": 16, "patch_size": 8, "max_num_tiles": 1, "vision_output_dim": 64}
    vision |= {"intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]}
    return hf.MllamaForConditionalGeneration(hf.MllamaConfig(text_config=text, vision_config=vision))


def deepseek_ocr2() -> Any:
    text = {**_TEXT, "num_key_value_heads": 4, "bos_token_id": 1, "eos_token_id": 2, "moe_intermediate_size": 24}
    text |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
    text |= {"mlp_layer_types": ["dense", "sparse"]}
    eye = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sam = {**eye, "image_size": 32, "patch_size": 8, "mlp_dim": 16, "global_attn_indexes": [0], "output_channels": 8}
    sam |= {"downsample_channels": [8, 16], "window_size": 2}
    encoder = {**eye, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
    vision = {"sam_config": sam, "encoder_config": encoder}
    return hf.DeepseekOcr2ForConditionalGeneration(hf.DeepseekOcr2Config(text_config=text, vision_config=vision))


def instructblip() -> Any:
    text = {**_LAYERS, "model_type": "opt", "ffn_dim": 48, "vocab_size": 64, "max_position_embeddings": 32}
    text["word_embed_proj_dim"] = 32
    qformer = {**_TEXT, "encoder_hidden_size": 32}
    return hf.InstructBlipForConditionalGeneration(
        hf.InstructBlipConfig(
            vision_config=_IMAGE, qformer_config=qformer, text_config=text, num_query_tokens=4, image_token_index=63
        )
    )


COMPOSITES: dict[str, Callable[[], Any]] = {
    "clip": clip,
    "siglip": siglip,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_5": qwen3_5,
    "mllama": mllama,
    "deepseek_ocr2": deepseek_ocr2,
    "instructblip": instructblip,
}


def missing_classes(name: str) -> bool:
    """Whether the installed transformers is older than the architecture."""
    needed = {"qwen3_5": "Qwen3_5Config", "deepseek_ocr2": "DeepseekOcr2Config"}
    return name in needed and not hasattr(hf, needed[name])


def converted(model: Any, root: Path, recipe: Recipe | None = None) -> tuple[Path, Path]:
    """`model` with random weights as a lowbit directory, and as a float one whose quantized weights are the decoded."""
    hf.set_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.05 * torch.randn_like(parameter) + 0.01)
    source, out, decoded = root / "float", root / "lowbit", root / "decoded"
    model.save_pretrained(source)
    recipe = recipe or Recipe(default=Target(codec="uniform", bits=8, group_size=16))
    convert_hf_to_lowbit(str(source), out, recipe, min_coverage=0)
    reader = ModelReader(out)
    twin = type(model).from_pretrained(source)
    for entry in reader.config:
        weight = twin.get_parameter(entry.weight)
        weight.data = torch.from_numpy(reader.decode(entry.path)).reshape(weight.shape)
    twin.save_pretrained(decoded)
    return out, decoded


def assert_equal_to(decoded: Any, model: Any, missing: Any = ()) -> None:
    """All tensors of the lowbit `model` but the `missing` are those of its decoded float twin, bit for bit."""
    want = decoded.state_dict()
    found = {n: t for n, t in model.state_dict().items() if n in want}
    for path, module in model.named_modules():
        if isinstance(module, LowbitExperts):
            found[path] = module.float_parameter(torch.float32)
        elif isinstance(module, LowbitModule):
            found[f"{path}.weight"] = module.dequantize(torch.float32)
    assert found.keys() == want.keys()
    assert [n for n in want if n not in missing and not torch.equal(found[n], want[n])] == []
