"""What the metadata of a GGUF file say of the model, as a config of transformers has it.

transformers takes a part of these keys and leaves the others to the defaults of its configs, which would be another
model. Here every key behind the architecture's name is set, or known to change nothing, or refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ...errors import SourceError
from .container import Array, GgufFile
from .rope import ROPE, Factors, head_size, scaled_rope

# Key -> attributes of configs that have it; a config has one of them at most.
_ATTRIBUTES = {
    "vocab_size": ("vocab_size",),
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "block_count": ("num_hidden_layers",),
    "feed_forward_length": ("intermediate_size", "ffn_hidden_size"),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps"),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "expert_count": ("num_experts",),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
}
_HEAD = ("attention.key_length", "attention.value_length")
_OFF_AT_ZERO = ("attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
# Values that change nothing in a model without such a setting.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_feed_forward_length": (0,),
    "expert_shared_feed_forward_length": (0,),
    "expert_shared_count": (0, 1),  # the number itself is that of the tensors
    "expert_weights_scale": (0, 1),
    "expert_gating_func": (0, 1),  # softmax
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "leading_dense_block_count": (0,),
    "logit_scale": (0, 1),
    "embedding_scale": (0, 1),
    "residual_scale": (0, 1),
    "attention.scale": (0,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.causal": (True,),
}
_OF_ARCHITECTURE: dict[str, dict[str, tuple[object, ...]]] = {  # further ones, of what the class always does
    "bloom": {"attention.max_alibi_bias": (8,)},
    "falcon": {"attention.head_count_kv": (1,)},  # rows of several groups stand in an order that is not undone
    "gemma2": {"attention.sliding_window_pattern": (2,)},
    "gemma3": {"attention.sliding_window_pattern": (6,)},
    "qwen2moe": {"expert_weights_norm": (False,)},
    "qwen3moe": {"expert_weights_norm": (True,)},
}
_WITHOUT_MEANING = (
    "tensor_data_layout",  # a note
    "pooling_type",  # what becomes of the last layer's output in an embedding
)
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}  # by which llama.cpp knows the model that scales queries otherwise


def settings_of(file: GgufFile, architecture: str) -> dict[str, Any]:
    """Numbers and strings by key behind the architecture's name.

    Raises SourceError for NaN, infinity, or an array, which has a number for each layer.
    """
    front = f"{architecture}."
    given = {key.removeprefix(front): value for key, value in file.metadata.items() if key.startswith(front)}
    for key, value in given.items():
        if isinstance(value, Array):
            raise SourceError(
                f"{file.path}: {front}{key} is an array of {value.count} values, expected one for all layers; convert "
                "the original checkpoint"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise SourceError(
                f"{file.path}: {front}{key} is {value}, expected a finite number; download the file again"
            )
    return given


def apply_settings(config: Any, given: Mapping[str, Any], architecture: str, factors: Factors, where: object) -> None:
    """Set in a config what the metadata say.

    Args:
        config: as transformers makes it of the file.
        given: see :func:`settings_of`.
        architecture: of the file.
        factors: float32 ``[head dim / 2]``, those of rotary frequencies, or None.
        where: the file, for messages.

    Raises:
        SourceError: a key is not known, or has a value that the config cannot say.
    """
    plain = type(config)()  # what the class has: transformers sets attributes that it has not
    _set_sizes(config, plain, given, where)
    for key, value in given.items():
        if key.startswith(ROPE) or key in _WITHOUT_MEANING or _fits(config, plain, architecture, key, value):
            continue
        raise SourceError(
            f"{where}: {architecture}.{key} is {value!r}, which is not known for "
            f"{config.model_type!r} in transformers, or which its config cannot say; convert the original checkpoint"
        )
    if (layers := _LAYERS_OF_27B.get(architecture)) is not None:
        of_model = config.hidden_size // config.num_attention_heads
        config.query_pre_attn_scalar = of_model if config.num_hidden_layers == layers else config.head_dim
    rope = {key.removeprefix(ROPE): value for key, value in given.items() if key.startswith(ROPE)}
    if (found := scaled_rope(config, rope, factors, where)) is not None:
        config.rope_parameters = found


def _set_sizes(config: Any, plain: Any, given: Mapping[str, Any], where: object) -> None:
    """Set heads, which llama.cpp derives where a file does not say them; configs take them from their own defaults."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    if not (_is_size(hidden) and _is_size(heads) and heads <= hidden):
        raise SourceError(
            f"{where}: has embedding_length {hidden!r} and attention.head_count {heads!r}, expected numbers of which "
            "the first is the larger; download the file again"
        )
    for key, attribute, derived in (
        ("attention.head_count_kv", "num_key_value_heads", heads),
        ("attention.key_length", "head_dim", hidden // heads),
    ):
        if _settable(plain, attribute):
            value = given.get(key, derived)
            if not _is_size(value):
                raise SourceError(f"{where}: has {key} {value!r}, expected a number above 0; download the file again")
            setattr(config, attribute, value)


def _fits(config: Any, plain: Any, architecture: str, key: str, value: Any) -> bool:
    """Set a value, or find that the model has it anyway; False if neither."""
    if isinstance(value, str):
        return False
    if key in _HEAD:
        return bool(value == head_size(config))
    if key == "use_parallel_residual" and architecture == "stablelm":
        return True  # the tensors say it
    if architecture == "bloom":  # its class has these sizes fixed, and positions without end
        fixed = {
            "feed_forward_length": 4 * config.hidden_size, "attention.head_count_kv": config.num_attention_heads,
            "context_length": value,
        }  # fmt: skip
        if key in fixed:
            return bool(value == fixed[key])
    attribute = next((a for a in _ATTRIBUTES.get(key, ()) if _settable(plain, a)), None)
    if attribute is None or (attribute == "sliding_window" and hasattr(plain, "use_sliding_window")):
        return value in (*_NEUTRAL.get(key, ()), *_OF_ARCHITECTURE.get(architecture, {}).get(key, ()))
    default = getattr(plain, attribute)
    if key in _OFF_AT_ZERO and not value:
        if attribute == "sliding_window" and default is not None:
            return False  # some layers of the class always have one
        value = None
    elif isinstance(default, int) and not _is_size(value):
        return False
    if getattr(config, attribute) != value:
        setattr(config, attribute, value)
    return True


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _settable(plain: Any, attribute: str) -> bool:
    return hasattr(plain, attribute) and not isinstance(getattr(type(plain), attribute, None), property)
