"""The main job over many shapes of model: convert, load, and compute what the dequantized checkpoint computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import lowbit_format
from lowbit_format.container.reader import ModelReader
from lowbit_format.converters import Recipe, Rule, convert_hf_to_lowbit
from lowbit_format.export import dequantize_directory
from lowbit_format.quantize import Target

LAYERS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
GATED = {**LAYERS, "intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 64}
EXPERTS = {**GATED, "num_experts_per_tok": 2}
BOTH_SIDES = {
    "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "vocab_size": 96,
}  # fmt: skip
IDS = torch.arange(1, 13).reshape(2, 6)
TEXT = {"input_ids": IDS}
PAIR = {**TEXT, "decoder_input_ids": IDS}
SOUND = {"input_features": torch.linspace(-1, 1, 2 * 16 * 40).reshape(2, 16, 40), "decoder_input_ids": IDS}
PICTURE = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)}


def llava() -> Any:
    eye = hf.CLIPVisionConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, image_size=16, patch_size=8
    )
    return hf.LlavaForConditionalGeneration(hf.LlavaConfig(vision_config=eye, text_config=hf.LlamaConfig(**GATED)))


MODELS: dict[str, tuple[Callable[[], Any], dict[str, torch.Tensor]]] = {
    "mixtral": (lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**EXPERTS, num_local_experts=4)), TEXT),
    "qwen3-moe": (
        lambda: hf.Qwen3MoeForCausalLM(
            hf.Qwen3MoeConfig(**EXPERTS, num_experts=4, moe_intermediate_size=32, head_dim=16)
        ),
        TEXT,
    ),
    "gemma2": (lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**GATED, head_dim=16)), TEXT),
    "phi3": (lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**GATED, pad_token_id=0)), TEXT),
    "gpt-neox": (
        lambda: hf.GPTNeoXForCausalLM(
            hf.GPTNeoXConfig(**LAYERS, intermediate_size=96, max_position_embeddings=64)
        ),
        TEXT,
    ),
    "electra": (
        lambda: hf.ElectraForPreTraining(
            hf.ElectraConfig(**LAYERS, embedding_size=32, intermediate_size=96, max_position_embeddings=64)
        ),
        TEXT,
    ),
    "bart": (lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BOTH_SIDES, max_position_embeddings=64)), PAIR),
    "whisper": (
        lambda: hf.WhisperForConditionalGeneration(
            hf.WhisperConfig(
                **BOTH_SIDES, max_source_positions=20, max_target_positions=40, num_mel_bins=16, pad_token_id=0,
                bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
            )
        ),
        SOUND,
    ),
    "vit": (
        lambda: hf.ViTForImageClassification(
            hf.ViTConfig(
                hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96, image_size=32,
                patch_size=8,
            )
        ),
        PICTURE,
    ),
    "llava": (llava, TEXT),
}  # fmt: skip


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model.eval()(**inputs).logits
    return out


@pytest.mark.parametrize("everything", [False, True], ids=["default", "embeddings-and-head"])
@pytest.mark.parametrize("name", MODELS)
def test_computes_what_the_dequantized_checkpoint_computes(name: str, everything: bool, tmp_path: Path) -> None:
    """Embeddings and head are quantized only on request."""
    make, inputs = MODELS[name]
    hf.set_seed(0)
    make().save_pretrained(tmp_path / "source")
    target = Target(bits=3, group_size=32)
    recipe = Recipe(target, (Rule("*", target),) if everything else ())
    done = convert_hf_to_lowbit(str(tmp_path / "source"), tmp_path / "lowbit", recipe)
    reader = ModelReader(tmp_path / "lowbit")
    assert reader.verify() == 0
    dequantize_directory(reader, tmp_path / "float")
    model = lowbit_format.from_pretrained(tmp_path / "lowbit", verify=True)
    expected = logits(getattr(hf, done.plan.architecture).from_pretrained(tmp_path / "float"), inputs)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-5)  # sums in another order
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(lowbit_format.from_pretrained(tmp_path / "saved"), inputs), logits(model, inputs))
    assert ModelReader(tmp_path / "saved").fingerprint() == reader.fingerprint()
