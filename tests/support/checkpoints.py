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
# Models of several parts and of special kinds, for tests that build a few of them.
_PLAIN = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 128, "intermediate_size": 48,
    "max_position_embeddings": 64,
}  # fmt: skip
_SMALL = {**_PLAIN, "num_key_value_heads": 2}
_MROPE = {**_SMALL, "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
_EYE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
_BOTH_SIDES = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
}  # fmt: skip
_QWEN_EYE = {"depth": 1, "hidden_size": 32, "num_heads": 2, "patch_size": 4}
_SPEAKER = {
    "num_layers": 1, "num_heads": 2, "hidden_size": 32, "input_vocab_size": 64, "output_vocab_size": 64,
    "block_size": 32,
}  # fmt: skip


def _rt_detr() -> Any:
    return hf.RTDetrV2ForObjectDetection(
        hf.RTDetrV2Config(
            backbone_config=hf.RTDetrResNetConfig(
                embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic",
                out_features=["stage2", "stage3", "stage4"],
            ),
            encoder_in_channels=[8, 16, 16], encoder_hidden_dim=32, d_model=32, decoder_in_channels=[32, 32, 32],
            decoder_layers=2, encoder_layers=1, num_queries=5, decoder_ffn_dim=32, encoder_ffn_dim=32,
            decoder_attention_heads=2, encoder_attention_heads=2,
        )
    )  # fmt: skip


def _detr() -> Any:
    return hf.DetrForSegmentation(
        hf.DetrConfig(
            **_BOTH_SIDES | {"d_model": 64, "encoder_attention_heads": 8, "decoder_attention_heads": 8},
            use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, num_queries=5,
            backbone_config=hf.ResNetConfig(
                embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1],
                out_features=["stage1", "stage2", "stage3", "stage4"],
            ),
        )
    )  # fmt: skip


SPECIAL: dict[str, Callable[[], Any]] = {
    "gemma3": lambda: hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(
            text_config=hf.Gemma3TextConfig(**_SMALL, head_dim=8),
            vision_config=hf.SiglipVisionConfig(**_EYE),
            mm_tokens_per_image=4,
        )
    ),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**_SMALL, head_dim=8)),
    "qwen2-vl": lambda: hf.Qwen2VLForConditionalGeneration(
        hf.Qwen2VLConfig(text_config=_MROPE, vision_config={**_QWEN_EYE, "embed_dim": 32, "mlp_ratio": 2})
    ),
    "qwen2.5-vl": lambda: hf.Qwen2_5_VLForConditionalGeneration(
        hf.Qwen2_5_VLConfig(
            text_config=_MROPE, vision_config={**_QWEN_EYE, "intermediate_size": 48, "out_hidden_size": 32}
        )
    ),
    "llava-onevision": lambda: hf.LlavaOnevisionForConditionalGeneration(
        hf.LlavaOnevisionConfig(text_config=hf.Qwen2Config(**_SMALL), vision_config=hf.SiglipVisionConfig(**_EYE))
    ),
    "internvl": lambda: hf.InternVLForConditionalGeneration(
        hf.InternVLConfig(
            text_config=hf.Qwen2Config(**_SMALL), vision_config={**_EYE, "image_size": [16, 16], "patch_size": [8, 8]}
        )
    ),
    "dinov3": lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**_EYE)),
    "qwen2.5-omni": lambda: hf.Qwen2_5OmniThinkerForConditionalGeneration(
        hf.Qwen2_5OmniThinkerConfig(
            text_config=_MROPE,
            vision_config={**_QWEN_EYE, "intermediate_size": 48, "out_hidden_size": 32},
            audio_config={
                "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 48,
                "output_dim": 32, "num_mel_bins": 16,
            },
        )
    ),
    "bark": lambda: hf.BarkModel(
        hf.BarkConfig(
            semantic_config=_SPEAKER, coarse_acoustics_config=_SPEAKER, fine_acoustics_config=_SPEAKER,
            codec_config={
                "hidden_size": 16, "num_filters": 4, "codebook_size": 16, "codebook_dim": 16,
                "upsampling_ratios": [2, 2],
            },
        )
    ),
    "parakeet": lambda: hf.ParakeetForTDT(
        hf.ParakeetTDTConfig(
            vocab_size=64, decoder_hidden_size=32, num_decoder_layers=1,
            encoder_config={
                "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48,
                "subsampling_conv_channels": 8, "num_mel_bins": 16,
            },
        )
    ),
    "rt-detr": _rt_detr,
    "detr": _detr,
    "mamba": lambda: hf.MambaForCausalLM(
        hf.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1, state_size=4)
    ),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=96, hidden_size=32, n_layer=1, n_head=4)),
    "bloom-exact": lambda: hf.BloomForCausalLM(
        hf.BloomConfig(vocab_size=96, hidden_size=32, n_layer=1, n_head=4, slow_but_exact=True, pretraining_tp=2)
    ),
    "falcon": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    ),
    "mbart": lambda: hf.MBartForConditionalGeneration(
        hf.MBartConfig(**_BOTH_SIDES, vocab_size=96, max_position_embeddings=32, scale_embedding=True)
    ),
    "wav2vec2": lambda: hf.Wav2Vec2ForCTC(
        hf.Wav2Vec2Config(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, vocab_size=32,
            conv_dim=(16,) * 7, num_conv_pos_embedding_groups=4, num_conv_pos_embeddings=16,
        )
    ),
    "wavlm": lambda: hf.WavLMModel(
        hf.WavLMConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, conv_dim=(16,) * 7,
            num_conv_pos_embedding_groups=4, num_conv_pos_embeddings=16,
        )
    ),
    "mpnet": lambda: hf.MPNetModel(hf.MPNetConfig(**_PLAIN)),
    "bert-without-pooler": lambda: hf.BertModel(hf.BertConfig(**_PLAIN), add_pooling_layer=False),
}  # fmt: skip
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
    model = {**ARCHITECTURES, **SPECIAL}[name]().to(dtype)
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
