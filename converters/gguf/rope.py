"""Rotary positions that a GGUF file scales, as a config has them. transformers' own loading leaves them out.

A file has the factors of single frequencies (Llama 3.1 and later, where the config says how they come about), or a kind
of scaling in its metadata.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import SourceError

FACTORS = "rope_freqs.weight"
_SCALING = "rope.scaling."
_KNOWN = {  # rope.scaling.type -> metadata behind _SCALING, and the key of the config
    "linear": {"factor": "factor"},
    "yarn": {"factor": "factor", "original_context_length": "original_max_position_embeddings"},
}
_WITHOUT_MEANING = ("type", "finetuned")


def scaled_rope(
    config: Any, metadata: Mapping[str, Any], architecture: str, factors: NDArray[np.float32] | None, where: object
) -> Any:
    """``rope_parameters`` of the config, with the scaling that the file asks for.

    Args:
        config: as transformers makes it of the file.
        metadata: of the file.
        architecture: that the metadata have in front of their keys.
        factors: float32 ``[head dim / 2]``, the file's tensor :data:`FACTORS`, or None.
        where: the file, for messages.

    Raises:
        SourceError: it scales in a way that is not known.
    """
    parameters = getattr(config, "rope_parameters", None)
    front = f"{architecture}.{_SCALING}"
    given = {key.removeprefix(front): value for key, value in metadata.items() if key.startswith(front)}
    kind = given.get("type", "none")
    if factors is None and kind == "none":
        return parameters
    if not isinstance(parameters, dict):
        raise SourceError(f"{where}: scales rotary positions, which {config.model_type!r} in transformers has not")
    # By kind of attention where a model has several (Gemma 3): those of the whole context are scaled.
    by_kind = isinstance(parameters.get("full_attention"), dict)
    own = parameters["full_attention"] if by_kind else parameters
    if factors is not None:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        own = _of_factors(factors, own["rope_theta"], head_dim, where)
    else:
        keys = _KNOWN.get(kind, {})
        unknown = given.keys() - keys.keys() - {*_WITHOUT_MEANING}
        if kind not in _KNOWN or unknown or not keys.keys() <= given.keys():
            found = ", ".join(f"{key} {value!r}" for key, value in sorted(given.items()))
            raise SourceError(
                f"{where}: scales rotary positions by {found}, which "
                f"is not known (known are {', '.join(_KNOWN)}); convert the original checkpoint"
            )
        own = {**own, "rope_type": kind, **{attribute: given[key] for key, attribute in keys.items()}}
    return {**parameters, "full_attention": own} if by_kind else own


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
