"""The base of a tuning: its tokenizer, the class for the task, the method for its codec."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import nn

from ..errors import LowbitError, TuningError
from ..integrations.placement import lowbit_modules
from ..loading import HEADS, from_pretrained, outputs_of
from ..runtime.modules import LowbitEmbedding
from ..tasks.bundle_config import Description
from ..tasks.tuning import METHODS, Tuning, prepare_scale_tuning
from .columns import LANGUAGE, REGRESSION

METHOD_OF = {"bcq": "alphatuning", "uniform": "peqa"}


def load_tokenizer(place: str, *, words: bool) -> Any:
    """The base's tokenizer, which can pad.

    Args:
        place: the base.
        words: it gets lists of words.

    Raises TuningError if there is none.
    """
    options = {"add_prefix_space": True} if words else {}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, **options)
    except Exception as e:  # of many kinds, by what is missing
        raise TuningError(
            f"{place}: has no tokenizer that transformers can load; copy the original's files: {e}"
        ) from e
    if tokenizer.vocab_size <= len(tokenizer.all_special_tokens):  # made of the config alone, without files
        raise TuningError(f"{place}: has no tokenizer, or one without words; copy the original's files")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise TuningError(f"{place}: its tokenizer has no token to pad with, and none that ends a text")
    tokenizer.padding_side = "right"
    return tokenizer


def longest(place: str, tokenizer: Any, wanted: int | None, usual: int) -> int:
    """Most tokens of an example: as `wanted`, or else `usual`, or what the model takes.

    Raises TuningError if the model takes fewer than are wanted.
    """
    config = transformers.AutoConfig.from_pretrained(place).get_text_config()
    limits = [tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or 1 << 30]
    if wanted is not None and wanted > limits[1]:
        raise TuningError(f"examples of {wanted} tokens are wanted, and {place} takes {limits[1]} at most")
    return wanted or int(min(*limits, usual))


def load(
    place: str, about: Description, *, method: str | None, bits: int | None, seed: int, name: str
) -> tuple[Any, Tuning, str]:
    """The base with the outputs of the task, ready to train; what is trained, and by which method.

    Raises:
        TuningError: the base cannot do the task. LoadError: it is no lowbit model.
    """
    config = transformers.AutoConfig.from_pretrained(place)
    if about.kind == LANGUAGE and (config.is_encoder_decoder or _is_encoder(config)):
        raise TuningError(
            f"{place}: {config.model_type} does not write a text from left to right, so it cannot learn language "
            "modelling; take a causal model, or give labels for a classification"
        )
    if method is not None and method not in METHODS:
        raise TuningError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    torch.manual_seed(seed)  # of a fresh head
    auto = getattr(transformers, HEADS[about.kind])
    try:
        model = from_pretrained(place, bits=bits, model_class=auto, dtype=torch.float32, **outputs_of(about))
    except LowbitError:
        raise
    except (ValueError, RuntimeError) as e:  # no such class, or a head of another size
        raise TuningError(f"{place}: {config.model_type} cannot be loaded for {about.kind}: {e}") from e
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    chosen = method or _method_for(model)
    return model, prepare_scale_tuning(model, chosen, name=name or "task"), chosen


def settle(model: Any, tokenizer: Any, about: Description, labels: Sequence[Any]) -> None:
    """Let a classifier find the end of a padded text, and a fresh regression begin at the mean of its labels."""
    if model.config.get_text_config().pad_token_id is None:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if about.kind != REGRESSION:
        return
    fresh = {name.rpartition(".")[0] for name in model.lowbit_fresh if name.endswith(".bias")}
    for path in fresh:
        module = model.get_submodule(path)
        if isinstance(module, nn.Linear) and module.out_features == 1:
            nn.init.constant_(module.bias, statistics.fmean(labels))


def _is_encoder(config: Any) -> bool:
    """Whether a model sees a text in both directions, as those do that fill in masks."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as masked

    return config.model_type in masked and not getattr(config, "is_decoder", False)


def _method_for(model: Any) -> str:
    """What the codec of the matrices to train wants, if it is one codec; ``scales`` trains all.

    Embeddings, what is tied to them, and output heads are not trained by default, and often have a codec of their own.
    """
    modules = [module for _, module in lowbit_modules(model)]
    heads = {id(m.get_output_embeddings()) for m in model.modules() if hasattr(m, "get_output_embeddings")}
    left_out = {m.matrix_id for m in modules if isinstance(m, LowbitEmbedding) or id(m) in heads}
    codecs = {m.scheme.codec for m in modules if m.matrix_id not in left_out}
    return METHOD_OF.get(codecs.pop(), "scales") if len(codecs) == 1 else "scales"
