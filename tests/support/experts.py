"""Tiny models with experts, one for each way in which transformers stacks them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf

_SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96,
    "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
_FEW = {**_SMALL, "num_experts_per_tok": 2}
_LOCAL = {**_FEW, "num_local_experts": 4}
_DEEP = {
    **_FEW, "num_key_value_heads": 4, "n_routed_experts": 4, "moe_intermediate_size": 40, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "n_group": 2, "topk_group": 1,
}  # fmt: skip
_LINEAR = {
    "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
_MAMBA = {"mamba_d_state": 4, "mamba_d_conv": 2, "mamba_expand": 2}

FAMILIES: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**_LOCAL)),
    "qwen2-moe": lambda: hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(**_FEW, num_experts=4, moe_intermediate_size=40, shared_expert_intermediate_size=40)
    ),
    "qwen3-moe": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**_FEW, num_experts=4, moe_intermediate_size=40, head_dim=8)
    ),
    "qwen3.5-moe": lambda: hf.Qwen3_5MoeForCausalLM(
        hf.Qwen3_5MoeTextConfig(
            **_FEW, **_LINEAR, num_experts=4, moe_intermediate_size=40, head_dim=8, shared_expert_intermediate_size=40,
            layer_types=["linear_attention", "full_attention"],
        )
    ),
    "olmoe": lambda: hf.OlmoeForCausalLM(hf.OlmoeConfig(**_FEW, num_experts=4)),
    "deepseek-v2": lambda: hf.DeepseekV2ForCausalLM(hf.DeepseekV2Config(**_DEEP, topk_method="greedy")),
    "deepseek-v3": lambda: hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**_DEEP)),
    "glm4-moe": lambda: hf.Glm4MoeForCausalLM(
        hf.Glm4MoeConfig(
            **_FEW, n_routed_experts=4, moe_intermediate_size=40, n_shared_experts=1, first_k_dense_replace=1,
            head_dim=8, n_group=1, topk_group=1,
        )
    ),
    "gpt-oss": lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**_LOCAL, head_dim=8, sliding_window=16)),
    "llama4": lambda: hf.Llama4ForCausalLM(
        hf.Llama4TextConfig(
            **{**_LOCAL, "num_experts_per_tok": 1}, head_dim=8, intermediate_size_mlp=48, interleave_moe_layer_step=1,
        )
    ),
    "granite-moe": lambda: hf.GraniteMoeForCausalLM(hf.GraniteMoeConfig(**_LOCAL)),
    "phimoe": lambda: hf.PhimoeForCausalLM(hf.PhimoeConfig(**_LOCAL)),
    "jamba": lambda: hf.JambaForCausalLM(
        hf.JambaConfig(
            **_FEW, **_MAMBA, num_experts=4, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
            expert_layer_offset=1, mamba_dt_rank=4, use_mamba_kernels=False,
        )
    ),
    "nemotron-h": lambda: hf.NemotronHForCausalLM(
        hf.NemotronHConfig(
            **{**_FEW, "num_hidden_layers": 2}, layers_block_type=["attention", "moe"], n_routed_experts=4,
            moe_intermediate_size=40, moe_shared_expert_intermediate_size=40, n_shared_experts=1, head_dim=8,
            n_group=1, topk_group=1,
        )
    ),
    "jetmoe": lambda: hf.JetMoeForCausalLM(
        hf.JetMoeConfig(
            **{k: v for k, v in _LOCAL.items() if k != "num_attention_heads"} | {"num_hidden_layers": 1}, kv_channels=8
        )
    ),
    "longcat-flash": lambda: hf.LongcatFlashForCausalLM(
        hf.LongcatFlashConfig(
            **{k: v for k, v in _SMALL.items() if k not in ("intermediate_size", "num_key_value_heads")},
            n_routed_experts=4, zero_expert_num=2, moe_topk=3, expert_ffn_hidden_size=40, ffn_hidden_size=48,
            q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, head_dim=8,
            num_layers=1,
        )
    ),
    "minimax-m2": lambda: hf.MiniMaxM2ForCausalLM(hf.MiniMaxM2Config(**_LOCAL, head_dim=8)),
}  # fmt: skip

OTHERWISE = {  # in transformers 5.0
    "granite-moe": "computes the experts of GraniteMoE in a way of its own",
    "phimoe": "gives the experts of PhiMoE weights of a wrong shape, with float weights too",
}


def build(name: str) -> Any:
    """A model of one family with random weights that depend on the name alone, biases and norms too.

    Skips the test if the installed transformers is too old for the family, or for experts in a known form.
    """
    if name in OTHERWISE and hf.__version__ == "5.0.0":
        pytest.skip(f"transformers 5.0.0 {OTHERWISE[name]}; it is refused")
    hf.set_seed(sum(name.encode()))
    try:
        model = FAMILIES[name]()
    except AttributeError:
        pytest.skip(f"transformers {hf.__version__} has no {name}")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()
