"""What a loaded model remembers of the base it came from, for bundles to be bound to (FPR, MAT rules)."""

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
    """A base as its files have it.

    Attributes:
        config: with the paths and all precisions of the files; the model's own may differ (another head, fewer bits).
        fingerprint: of the files, whatever part of them the model uses.
        bits: precision at which the model was read, or None for the files' own.
    """

    config: QuantizationConfig
    fingerprint: Fingerprint
    bits: int | None = None


def base_of_tensors(model: Any, config: QuantizationConfig) -> Base:
    """A base that is nowhere but in memory: `config` describes the modules of `model` by its own paths."""
    digests, shapes = {}, {}
    for entry in config:
        module = model.get_submodule(entry.path)
        for spec in tensor_specs(entry):
            tensor: Tensor = module.get_parameter(spec.role)
            digests[spec.name], shapes[spec.name] = digest(tensor), tuple(tensor.shape)
    return Base(config, fingerprint(config, digests, shapes))


def digest(tensor: Tensor) -> str:
    """SHA-256 of the bytes that a file would hold, in lower-case hex (DIG-1)."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().data).hexdigest()
