"""What a loaded model remembers of its base: task bundles are bound to the base's fingerprint (FPR, MAT rules)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..container.fingerprint import Fingerprint, fingerprint
from ..schema import QuantizationConfig
from ..tensors import tensor_specs


@dataclass(frozen=True)
class Base:
    """A base as its files describe it.

    Attributes:
        config: paths and precisions of the files; the model's own config may differ (another head, fewer bits).
        fingerprint: of the files, even if the model uses only a part of them.
        bits: precision at which the model was read, or None for full precision.
    """

    config: QuantizationConfig
    fingerprint: Fingerprint
    bits: int | None = None


def base_of_tensors(model: Any, config: QuantizationConfig) -> Base:
    """A base that exists only in memory: `config` describes the modules of `model` by the model's paths."""
    digests, shapes = {}, {}
    for entry in config:
        module = model.get_submodule(entry.path)
        for spec in tensor_specs(entry):
            tensor: Tensor = module.get_parameter(spec.role)
            digests[spec.name], shapes[spec.name] = digest(tensor), tuple(tensor.shape)
    return Base(config, fingerprint(config, digests, shapes))


def digest(tensor: Tensor) -> str:
    """SHA-256 of the tensor's bytes as a file holds them, in lower-case hex (DIG-1)."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().data).hexdigest()
