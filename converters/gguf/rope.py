"""Rotary positions of a GGUF file, as a config has them. transformers' own loading leaves them out.

A file has the factors of single frequencies (Llama 3.1 and later, where the config says how they come about), or a kind
of scaling in its metadata; and there how many columns of a head are rotated at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import SourceError

Factors = NDArray[np.float32] | None
FACTORS = "rope_freqs.weight"
ROPE = "rope."
_SCALING = "scaling."
_KINDS = {  # rope.scaling.type -> metadata behind _SCALING, and the key of the config
    "linear": {"factor": "factor"},
    "yarn": {"factor": "factor", "original_context_length": "original_max_position_embeddings"},
}
_WITHOUT_MEANING = ("type", "finetuned")
_DEFAULTS = {"attn_factor": 1, "yarn_ext_factor": 1, "yarn_attn_factor": 1, "yarn_beta_fast": 32, "yarn_beta_slow": 1}
_BASE = 10000.0  # llama.cpp's, where a file does not say it


def scaled_rope(config: Any, given: Mapping[str, Any], factors: Factors, where: object) -> Any:
    """``rope_parameters`` of the config, with what the file asks for; None if the model has no rotary positions.

    Args:
        config: as transformers makes it of the file, with its sizes.
        given: metadata of the file behind the architecture and :data:`ROPE`.
        factors: float32 ``[head dim / 2]``, the file's tensor :data:`FACTORS`, or None.
        where: the file, for messages.

    Raises:
        SourceError: it asks for what is not known.
    """
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict):
        if given or factors is not None:
            found = ", ".join([*(f"{ROPE}{key}" for key in given), *([] if factors is None else [FACTORS])])
            raise SourceError(
                f"{where}: has {found}, but {config.model_type!r} in transformers has no rotary positions; convert the "
                "original checkpoint"
            )
        return None
    # By kind of attention where a model has several (Gemma 3): those of the whole context are scaled.
    by_kind = isinstance(parameters.get("full_attention"), dict)
    own = dict(parameters["full_attention"] if by_kind else parameters)
    base = given.get("freq_base", _BASE)
    if not _is_positive(base):
        raise SourceError(f"{where}: {ROPE}freq_base is {base!r}, expected a number above 0; download the file again")
    own["rope_theta"] = float(base)
    _set_rotated(own, given.get("dimension_count"), head_size(config), where)
    kind, scaling = _scaling(given, where)
    if factors is not None:
        if kind != "none":
            raise SourceError(
                f"{where}: has both {FACTORS} and {ROPE}{_SCALING}type {kind!r}, expected one of them; convert the "
                "original checkpoint"
            )
        own |= _of_factors(factors, own["rope_theta"], head_size(config), where)
    elif kind != "none":
        own |= {"rope_type": kind, **scaling}
    if not by_kind:
        return own
    local = {**parameters["sliding_attention"], "rope_theta": float(given.get("freq_base_swa", _BASE))}
    return {**parameters, "full_attention": own, "sliding_attention": local}


def head_size(config: Any) -> int:
    """Columns of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _set_rotated(own: dict[str, Any], count: object, size: int, where: object) -> None:
    """How many columns of a head are rotated: all, or as many as the file says, where the model can have that."""
    count = size if count is None else count
    if isinstance(count, int) and 0 < count <= size and count % 2 == 0 and "partial_rotary_factor" in own:
        part = count / size
        own["partial_rotary_factor"] = part if int(size * part) == count else float(np.nextafter(part, 1))
    elif count != size:
        raise SourceError(
            f"{where}: {ROPE}dimension_count is {count!r}, but this model in transformers rotates all {size} columns "
            "of a head; convert the original checkpoint"
        )


def _scaling(given: Mapping[str, Any], where: object) -> tuple[str, dict[str, Any]]:
    """The kind of scaling, perhaps "none", and the config's parameters of it, as llama.cpp reads the metadata."""
    other = ("freq_base", "freq_base_swa", "dimension_count")
    rest = {key: value for key, value in given.items() if key not in other}
    values = {key.removeprefix(_SCALING): value for key, value in rest.items() if key.startswith(_SCALING)}
    if "scale_linear" in rest:  # the old name of scaling.factor
        values.setdefault("factor", rest["scale_linear"])
    unknown = {key for key in rest if not key.startswith(_SCALING) and key != "scale_linear"}
    kind = values.get("type", "linear")
    if not unknown and (kind == "none" or ("type" not in values and values.get("factor", 0) in (0, 1))):
        return "none", {}
    keys = _KINDS.get(kind, {}) if isinstance(kind, str) else {}
    kept = {key: v for key, v in values.items() if key not in _WITHOUT_MEANING and v != _DEFAULTS.get(key)}
    if kind == "linear":
        kept.pop("original_context_length", None)  # which only yarn looks at
    if unknown or not keys or kept.keys() != keys.keys() or not all(_is_positive(v) for v in kept.values()):
        found = ", ".join(f"{key} {value!r}" for key, value in sorted({**rest, **values}.items()) if "." not in key)
        raise SourceError(
            f"{where}: scales rotary positions by {found}, which is not known (known are {', '.join(_KINDS)}); convert "
            "the original checkpoint"
        )
    return kind, {attribute: kept[key] for key, attribute in keys.items()}


def _of_factors(factors: NDArray[np.float32], base: float, head_dim: int, where: object) -> dict[str, Any]:
    """The parameters that give these factors of frequencies; raises SourceError if none that are known do."""
    lengths = 2 * np.pi * base ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)  # of a turn, in positions
    for factor, low, high, context in ((8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192)):
        smooth = (context / lengths - low) / (high - low)
        between = 1 / ((1 - smooth) / factor + smooth)
        own = np.where(lengths < context / high, 1.0, np.where(lengths > context / low, factor, between))
        if own.shape == factors.shape and np.allclose(own, factors, rtol=1e-4):
            return {
                "rope_type": "llama3", "rope_theta": base, "factor": factor, "low_freq_factor": low,
                "high_freq_factor": high, "original_max_position_embeddings": context,
            }  # fmt: skip
    raise SourceError(
        f"{where}: {FACTORS} has factors of rotary frequencies that no known parameters of a config give; convert the "
        "original checkpoint"
    )
