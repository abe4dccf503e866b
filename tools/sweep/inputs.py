"""Inputs that a model might take, made from its config and the names of its forward's arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_LENGTH = 8
_IMAGES = ("pixel_values", "pixel_values_videos", "flattened_patches")


def candidates(model: Any) -> Iterator[dict[str, Any]]:
    """Inputs to try, the likeliest first; a model takes the first that it raises no error for."""
    parameters = inspect.signature(model.forward).parameters
    named = model.main_input_name if isinstance(model.main_input_name, str) else model.main_input_name[0]
    main = named if named in parameters else next(iter(parameters), "")
    required = [n for n, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    sets = [
        [main, *required],
        [main, *required, *_present(parameters, "decoder_input_ids")],
        [main, *required, *_present(parameters, "pixel_values", "input_ids", "decoder_input_ids")],
        [
            main,
            *required,
            *_present(parameters, "flattened_patches", "visual_feats", "visual_pos", "decoder_input_ids"),
        ],
        [main, *required, *_present(parameters, "input_ids", "decoder_input_ids", "bbox", "input_values")],
        [*_present(parameters, "input_ids", "bbox", "pixel_values", "input_values", "input_features")],
        [*_present(parameters, "input_ids")],
        [n for n in parameters if n in _MAKERS and n not in ("inputs_embeds", "decoder_inputs_embeds")],
        [*_present(parameters, "inputs_embeds"), *required],
    ]
    tried = set[frozenset[str]]()
    for names in sets:
        chosen = frozenset(n for n in names if n in _MAKERS)
        if not chosen or chosen in tried:
            continue
        tried.add(chosen)
        order = sorted(chosen, key=lambda n: (n not in _SEVERAL, n))
        yield from _made(model, order, "grid_thw" in parameters or "image_grid_thw" in parameters)


def _present(parameters: Any, *names: str) -> list[str]:
    return [n for n in names if n in parameters]


def _made(model: Any, names: list[str], patches: bool) -> Iterator[dict[str, Any]]:
    """All shapes of the first input that has several, with the first shapes of the others."""
    config = model.config
    if patches and ("hidden_states" in names or "pixel_values" in names):
        yield {**{n: next(iter(_MAKERS[n](config))) for n in names}, **_patches(config, names)}
    first = next((n for n in names if n in _SEVERAL), names[0])
    decoder = "decoder_input_ids" if "decoder_input_ids" in names else names[-1]
    for value in _MAKERS[first](config):
        for other in _MAKERS[decoder](config):
            yield {**{n: next(iter(_MAKERS[n](config))) for n in names}, decoder: other, first: value}


def _patches(config: Any, names: list[str]) -> dict[str, Any]:
    """Sixteen patches of a picture, as Qwen's vision towers take them."""
    c, t, p = (
        _first(config, *n) or d for n, d in ((_CHANNELS, 3), (("temporal_patch_size",), 1), (("patch_size",), 8))
    )
    name = "hidden_states" if "hidden_states" in names else "pixel_values"
    return {name: _noise(16, c * t * p * p), "grid_thw": torch.tensor([[1, 4, 4]])}


# --- one maker for each name --------------------------------------------------------------------------


def _first(config: Any, *names: str) -> Any:
    """The first of the attributes that the config has, else of one of its parts."""
    parts = [config, *(v for v in vars(config).values() if hasattr(v, "model_type"))]
    return next((getattr(p, n) for p in parts for n in names if getattr(p, n, None) is not None), None)


_CHANNELS = ("num_channels", "in_channels", "in_chans", "num_image_channels")


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def _ids(config: Any) -> Iterator[Tensor]:
    vocabulary = _first(config, "vocab_size", "decoder_vocab_size") or 100
    most = min([vocabulary, 96] if isinstance(vocabulary, int) else [96])
    generator = torch.Generator().manual_seed(0)
    yield torch.randint(min(4, most - 1), most, (2, _LENGTH), generator=generator)
    books = _first(config, "num_codebooks", "n_codes_total", "num_rvq") or 4
    if isinstance(books, int):
        yield torch.randint(0, 16, (2, _LENGTH, books), generator=generator)
        yield torch.randint(0, 16, (2 * books, _LENGTH), generator=generator)


def _pixels(config: Any) -> Iterator[Tensor]:
    side = _first(config, "image_size", "input_size", "img_size") or 64
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    channels, frames = _first(config, *_CHANNELS) or 3, _first(config, "num_frames", "frames_per_clip") or 2
    yield _noise(2, channels, height, width)
    yield _noise(2, channels, 64, 64)
    yield _noise(2, 3, height, width)
    yield _noise(2, frames, channels, height, width)
    yield _noise(2, channels, 224, 224)


def _mels(config: Any) -> int:
    return (
        _first(config, "num_mel_bins", "feature_size", "input_feat_per_channel", "feature_projection_input_dim") or 80
    )


def _features(config: Any) -> Iterator[Tensor]:
    frames = 2 * (_first(config, "max_source_positions") or 64)
    yield _noise(2, _mels(config), frames)
    yield _noise(2, frames, _mels(config))
    yield _noise(2, 1, frames, _mels(config))


def _waves(config: Any) -> Iterator[Tensor]:
    yield _noise(2, 4000)
    yield _noise(2, 1, 4000)
    yield _noise(2, _first(config, "max_length") or 64, _mels(config))
    yield _noise(2, 24000)


def _states(config: Any) -> Iterator[Tensor]:
    width = _first(config, "hidden_size", "d_model", "embed_dim", "encoder_hidden_size") or 64
    yield _noise(2, _LENGTH, width if isinstance(width, int) else width[-1])


def _other_states(config: Any) -> Iterator[Tensor]:
    width = _first(config, "encoder_hidden_size", "cross_attention_hidden_size")
    yield _noise(2, _LENGTH, width) if isinstance(width, int) else next(_states(config))


def _constant(*value: Any) -> Callable[[Any], Iterator[Any]]:
    return lambda config: iter(value)


def _past(*shape: int) -> Callable[[Any], Iterator[Tensor]]:
    def make(config: Any) -> Iterator[Tensor]:
        length = (_first(config, "context_length") or 16) + max(getattr(config, "lags_sequence", None) or [0])
        channels = _first(config, "num_input_channels", "input_size") or 1
        yield _noise(2, length, channels).abs() if channels > 1 else _noise(2, length).abs()
        yield _noise(2, length, channels)

    return make


def _flat(config: Any) -> Iterator[Tensor]:
    """Patches behind their row and column."""
    places = torch.tensor([[row, column] for row in range(1, 4) for column in range(1, 4)])
    patches = _noise(2, 9, _first(config, "patch_embed_hidden_size") or 64)
    yield torch.cat([places.expand(2, 9, 2).float(), patches], 2)


_MAKERS: dict[str, Callable[[Any], Iterator[Any]]] = {
    "input_ids": _ids,
    "qformer_input_ids": _ids,
    "flattened_patches": _flat,
    "visual_feats": lambda config: iter([_noise(2, 4, _first(config, "visual_feat_dim") or 64)]),
    "visual_pos": lambda config: iter([_noise(2, 4, 4)]),
    "decoder_input_ids": _ids,
    "inputs": _ids,
    "pixel_values": _pixels,
    "input_features": _features,
    "input_values": _waves,
    "inputs_embeds": _states,
    "hidden_states": _states,
    "encoder_hidden_states": _other_states,
    "query_embeds": _other_states,
    "decoder_inputs_embeds": _states,
    "bbox": lambda config: iter([torch.zeros(2, _LENGTH, 4, dtype=torch.long)]),
    "past_values": _past(),
    "audio_codes": _ids,
    "codebook_idx": _constant(1),
    "spectrogram": lambda config: iter([_noise(2, 16, _first(config, "model_in_dim", "num_mel_bins") or 80)]),
}
_SEVERAL = ("pixel_values", "input_features", "input_values", "past_values", "input_ids")
