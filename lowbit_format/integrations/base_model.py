"""What a loaded model remembers of its base: task bundles are bound to the base's fingerprint (FPR, MAT rules)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..container.fingerprint import Fingerprint, Identity, fingerprint
from ..schema import ModuleEntry, QuantizationConfig
from ..tensors import tensor_specs


@dataclass(frozen=True)
class Base:
    """A base as its files describe it.

    Attributes:
        config: paths and precisions of the files; the model's own config may differ (another head, fewer bits).
        fingerprint: of the files, even if the model uses only some of their modules.
        bits: precision at which the model was read, or None for full precision.
    """

    config: QuantizationConfig
    fingerprint: Fingerprint
    bits: int | None = None


def base_of_files(identity: Identity, files: Mapping[str, ModuleEntry], prefix: str, bits: int | None) -> Base:
    """The base of a model that was read at `bits` from a directory.

    A part whose modules have other names than in the whole model, also without the base model's prefix, is a base of
    its own: bundles name modules, so that tasks of the whole do not fit it.

    Args:
        identity: of the directory.
        files: path of a module in the model -> its entry in the directory.
        prefix: the model's ``base_model_prefix``.
        bits: as in :class:`Base`.
    """
    whole, paths = identity.config, {path: entry.path for path, entry in files.items()}
    config = QuantizationConfig({p: replace(whole.modules[e], path=p) for p, e in paths.items()}, {}, prefix)
    if all(config.canonical_path(p)[0] == whole.canonical_path(e)[0] for p, e in paths.items()):
        return Base(whole, identity.fingerprint(), bits)
    digests, shapes = {}, {}
    for path, stored in paths.items():
        for spec in tensor_specs(whole.modules[stored]):
            name = config.modules[path].tensor(spec.role)
            digests[name], shapes[name] = identity.digests[spec.name], identity.shapes[spec.name]
    return Base(config, fingerprint(config, digests, shapes), bits)


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
