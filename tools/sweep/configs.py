"""Tiny configs of any architecture: two layers, narrow, few words, by the names of the config's fields."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_TOKENS = 128  # words; the last ones are special


@dataclass(frozen=True)
class Size:
    """How small a config gets.

    Attributes:
        width: of hidden states and all else that has a width.
        heads: of attention; key-value heads are half as many.
        image: side of a picture.
        layers_only: leave everything but the layers as it is by default.
    """

    width: int = 64
    heads: int = 4
    image: int = 32
    layers_only: bool = False

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


SIZES = (
    Size(),
    Size(heads=2, image=64),
    Size(width=48, heads=6),
    Size(128, 1),
    Size(layers_only=True),
)  # tried in this order

# Fields that no rule by names gets right: by the config's class, instead of what the rules give.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "BarkFineConfig": {"n_codes_total": 4, "n_codes_given": 1},
    "AutoformerConfig": {"prediction_length": 4, "context_length": 16, "lags_sequence": [1, 2, 3]},
    "BambaConfig": {"mamba_n_heads": 8, "mamba_d_head": 16},
    "BltConfig": {"encoder_hash_byte_group_vocab": 64},
    "BrosConfig": {"dim_bbox": 8},
    "ChameleonConfig": {"vocabulary_map": {"<image>": 100}},
    "CvtConfig": {"depth": [1, 2, 3]},
    "DbrxAttentionConfig": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    "DebertaConfig": {"pooler_hidden_size": 64},
    "Emu3Config": {"vocabulary_map": {"<image>": 100}},
    "EsmConfig": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "FalconH1Config": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "FunnelConfig": {"block_sizes": [1, 1], "d_head": 16, "num_decoder_layers": 1},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "Gemma3nTextConfig": {
        "intermediate_size": 128, "layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0, 0.0], "hidden_size_per_layer_input": 16, "laurel_rank": 8,
        "vocab_size_per_layer_input": 128,
    },
    "Glm4vMoeTextConfig": {
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]
        },
    },
    "GraniteMoeHybridConfig": {"mamba_n_heads": 8, "mamba_d_head": 16},
    "HunYuanMoEV1Config": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "HunYuanDenseV1Config": {"head_dim": 16},
    "HunYuanVLTextConfig": {"head_dim": 16},
    "LayoutLMv3Config": {"coordinate_size": 10, "shape_size": 12},
    "LEDConfig": {"attention_window": [4, 4]},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "LongformerConfig": {"attention_window": 4},
    "Mamba2Config": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "MarkupLMConfig": {"max_xpath_tag_unit_embeddings": 256, "max_xpath_subs_unit_embeddings": 1024},
    "InformerConfig": {"prediction_length": 4, "context_length": 16, "lags_sequence": [1, 2, 3]},
    "MimiConfig": {"upsample_groups": 64},
    "MinistralConfig": {"head_dim": 16},
    "MoshiConfig": {"audio_vocab_size": 128},
    "NemotronConfig": {"head_dim": 16, "num_key_value_heads": 2},
    "NemotronHConfig": {
        "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2, "num_hidden_layers": 3, "head_dim": 16,
        "layers_block_type": ["mamba", "attention", "moe"],
    },
    "Qwen3OmniMoeTalkerConfig": {"spatial_merge_size": 2},
    "Qwen3OmniMoeTalkerTextConfig": {"shared_expert_intermediate_size": 32},
    "ReformerConfig": {
        "axial_pos_shape": [4, 8], "axial_pos_embds_dim": [16, 48], "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "num_buckets": 2, "max_position_embeddings": 32,
    },
    "Speech2TextConfig": {"conv_channels": 32},
    "Step3p7TextConfig": {"sliding_window": 8},
    "XLNetConfig": {"d_head": 16},
}  # fmt: skip


def tiny_config(config_class: Any, size: Size) -> Any:
    """A config of `config_class` as small as `size`; its parts too. Raises whatever the class does."""
    default = config_class()
    known = {**vars(default), **{name: getattr(default, name, None) for name in default.attribute_map}}
    kwargs: dict[str, Any] = {}
    for name, parameter in inspect.signature(config_class.__init__).parameters.items():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY or name not in known:
            continue
        value = known[name]
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            kwargs[name] = tiny_config(type(value), size)
        elif "rope" in name and isinstance(value, dict) and not size.layers_only:
            kwargs[name] = _rope(value, size)
        elif parameter.default is not None and value is not None:  # what is None is derived from the rest
            kwargs[name] = _shrunk(name, value, size)
    if "use_cache" in kwargs:
        kwargs["use_cache"] = False  # caches of two layers of one kind are not always whole
    kwargs.update(EXCEPTIONS.get(config_class.__name__, {}) if not size.layers_only else {})
    if type(kwargs.get("backbone_config")).__name__ == "TimmBackboneConfig":  # timm need not be installed
        kwargs |= {"backbone_config": _resnet(), "use_timm_backbone": False, "backbone": None}
        kwargs = {name: value for name, value in kwargs.items() if name in vars(default)}
    if "encoder_in_channels" in kwargs and "backbone_config" in kwargs:
        kwargs |= {"backbone_config": _resnet(3), "encoder_in_channels": [16, 32, 32]}
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(kinds := kwargs.get(name, vars(default).get(name)), (list, tuple)) and kinds:
            kwargs[name] = _two_kinds(kinds)
    if not size.layers_only:
        kwargs |= _of_experts(vars(default), kwargs)
    return config_class(**kwargs)


def _of_experts(default: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What the rules by names leave out where the default is None, though the model needs it."""
    usual = {
        "n_routed_experts": _EXPERTS, "n_shared_experts": 1, "num_experts_per_tok": 2,
        "mlp_layer_types": ["dense", "sparse"],
    }  # fmt: skip
    found: dict[str, Any] = {name: value for name, value in usual.items() if default.get(name, 0) is None}
    if "kv_lora_rank" in kwargs and "num_key_value_heads" in default:  # latent attention has a key for each query
        found["num_key_value_heads"] = kwargs.get("num_attention_heads", default.get("num_attention_heads"))
    return found


def _resnet(outputs: int = 4) -> Any:
    """A backbone of four stages, the last of which have an output."""
    import transformers

    return transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[16, 16, 32, 32],
        depths=[1, 1, 1, 1],
        out_features=["stage1", "stage2", "stage3", "stage4"][-outputs:],
    )


def _shrunk(name: str, value: Any, size: Size) -> Any:
    """The value of a field in a tiny config."""
    if isinstance(value, bool) or not isinstance(value, (int, list, tuple, dict)):
        return value
    if isinstance(value, dict):
        return _rope(value, size) if "rope" in name else value
    for pattern, rule in _LAYER_RULES if size.layers_only else (*_LAYER_RULES, *_RULES):
        if pattern.search(name):
            if isinstance(value, int):
                return rule(value, size)
            if all(type(v) is int for v in value):
                return type(value)(rule(v, size) for v in value)
    return value


def _rope(value: dict[str, Any], size: Size) -> dict[str, Any]:
    sections = value.get("mrope_section")
    if not sections:
        return value
    pairs, total = size.head_dim // 2, sum(sections)
    new = [max(1, n * pairs // total) for n in sections]
    new[0] += pairs - sum(new)
    return {**value, "mrope_section": new}


def _two_kinds(kinds: Any) -> list[str]:
    """Two layers, of different kinds if there are some."""
    first = list(dict.fromkeys(kinds))
    return [*first, *kinds][:2] if len(first) > 1 else list(kinds)[:2]


Rule = Callable[[int, Size], int]


def _at_most(most: int) -> Rule:
    return lambda value, size: min(value, most)


def _width(value: int, size: Size) -> int:
    return min(value, size.width)


def _heads(value: int, size: Size) -> int:
    """As many as divide the width."""
    return next(n for n in range(min(value, size.heads), -1, -1) if n < 2 or size.width % n == 0)


def _inner(value: int, size: Size) -> int:
    return min(value, 2 * size.width)


def _token(value: int, size: Size) -> int:
    return value if value < _TOKENS - 28 else _TOKENS - 28 + value % 28


def _named(pattern: str, rule: Rule) -> tuple[re.Pattern[str], Rule]:
    return re.compile(pattern), rule


_EXPERTS = 4  # two groups of two

# The first whose pattern is found in a field's name decides.
_LAYER_RULES = (
    _named(r"experts_per_tok|moe_top_?k$|moe_k$|^n_group$|num_expert_group|zero_expert_num", _at_most(_EXPERTS // 2)),
    _named(r"^topk_group$|shared_experts$", _at_most(1)),
    _named(r"num_experts$|(num|n)_(local|routed)_experts$", _at_most(_EXPERTS)),
    _named(r"^depths$|layers_per|blocks_per|num_stages_layers", _at_most(1)),
    _named(r"first_k_dense|num_dense|max_window_layers", _at_most(1)),
    _named(r"(^|_)layers?$|^n_layers?$|(^|_)depth$|num_(hidden_)?(layers|blocks)|num_.*_layers$", _at_most(2)),
)  # fmt: skip
_RULES = (
    _named(r"experts_per_tok|moe_top_?k$|moe_k$|^n_group$|num_expert_group|zero_expert_num", _at_most(_EXPERTS // 2)),
    _named(r"^topk_group$|shared_experts$", _at_most(1)),
    _named(r"num_experts$|(num|n)_(local|routed)_experts$", _at_most(_EXPERTS)),
    _named(r"token_(id|index|idx)s?$|_(start|end)_id$", _token),
    _named(r"(key_value|kv|query_group).*heads?|n_head_kv|num_kv", lambda v, s: min(v, max(1, s.heads // 2))),
    _named(r"head_?dim|d_kv$|kv_channels|head_size|rotary_dim|d_head", lambda v, s: min(v, s.head_dim)),
    _named(r"heads?$|n_head", _heads),
    _named(r"vocab_size|vocabulary", _at_most(_TOKENS)),
    _named(r"intermediate|ffn|d_ff|n_inner|mlp_(dim|size|hidden)|feedforward|inner_dim", _inner),
    _named(r"image_size|input_size|img_size|^resolution", lambda v, s: min(v, s.image)),
    _named(r"^patch_size", _at_most(8)),
    _named(r"max_(source_|target_)?position|n_positions|n_ctx|max_seq|context_length|block_size", _at_most(_TOKENS)),
    _named(r"num_queries|num_query_tokens|num_latents|num_object", _at_most(8)),
    _named(r"num_mel|mel_bins", _at_most(80)),
    _named(
        r"hidden|d_model|n_embd|embed|(^|_)(dim|width|dims)$|proj(ection)?_|output_(dim|size)|out_dim|"
        r"d_latents|conv_dim|channels$|_channels|lora_rank|_rank$|state_size",
        _width,
    ),
)  # fmt: skip
