"""Whole lowbit directories of random content, for tests of the container. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from lowbit_format.container.atomic import write_json
from lowbit_format.container.reader import CONFIG_FILE, WEIGHTS_FILE
from lowbit_format.container.writer import StoredTensor, module_tensors, shard_name, write_index, write_safetensors
from lowbit_format.matrix import StoredMatrix
from lowbit_format.schema import ModuleEntry, QuantizationConfig, Scheme
from lowbit_format.testing.matrices import extreme_matrix

Matrices = dict[str, list[StoredMatrix]]  # by path of the module: one, or one for each expert


def sample_modules() -> list[ModuleEntry]:
    """Small modules of every codec and kind, nested, ragged, with experts."""
    return [
        ModuleEntry("model.fc", Scheme("bcq", 3, 4, "F16", True, nested=(1, 2)), "linear", (3, 10)),
        ModuleEntry("model.up", Scheme("uniform", 4, 0, "BF16"), "conv1d", (2, 70)),
        ModuleEntry("model.lut", Scheme("codebook", 2, 5, "F32"), "embedding", (4, 9)),
        ModuleEntry("model.mixed", Scheme("bcq", 4, 0, "F16", row_bits=True, nested=(2,)), "linear", (5, 6)),
        ModuleEntry("model.experts.w", Scheme("uniform", 2, 4, "F16"), "experts", (2, 3, 5)),
        ModuleEntry("head", Scheme("bcq", 1, 0, "F32"), "linear", (2, 3)),
    ]


def random_matrices(modules: Iterable[ModuleEntry], seed: int = 0) -> Matrices:
    """Random content of modules; experts share one codebook (EXP-1)."""
    out: Matrices = {}
    for i, m in enumerate(modules):
        stack = [extreme_matrix(m.scheme, m.rows, m.cols, seed + 100 * i + e) for e in range(m.experts or 1)]
        out[m.path] = [replace(matrix, codebook=stack[0].codebook) for matrix in stack]
    return out


def tensors_of(modules: Iterable[ModuleEntry], matrices: Matrices) -> list[list[StoredTensor]]:
    """The tensors of each module."""
    return [module_tensors(m, matrices[m.path] if m.experts else matrices[m.path][0]) for m in modules]


def write_directory(
    directory: Path,
    config: QuantizationConfig,
    groups: list[list[StoredTensor]],
    shards: int = 1,
    model_config: Mapping[str, Any] = MappingProxyType({"model_type": "example"}),
) -> None:
    """A model directory; groups of tensors are dealt out to `shards` files."""
    directory.mkdir(parents=True, exist_ok=True)
    files: dict[str, list[str]] = {}
    for i in range(shards):
        tensors = [t for group in groups[i::shards] for t in group]
        write_safetensors(directory / shard_name(i + 1, shards), tensors)
        files[shard_name(i + 1, shards)] = [t.name for t in tensors]
    if shards > 1:
        write_index(directory, files, sum(t.nbytes for group in groups for t in group))
    write_json(directory / CONFIG_FILE, {**model_config, "quantization_config": config.to_dict()})


def sample_model(directory: Path, shards: int = 1) -> tuple[QuantizationConfig, Matrices]:
    """:func:`sample_modules` with a norm, a bias and a tied place, on disk."""
    modules = sample_modules()
    config = QuantizationConfig({m.path: m for m in modules}, {"tied": "model.lut"}, "model")
    matrices = random_matrices(modules)
    plain = [
        StoredTensor("model.norm.weight", "F32", (3,), np.arange(3, dtype="<f4")),
        StoredTensor("model.fc.bias", "F16", (3,), np.ones(3, "<f2")),
        StoredTensor("model.step", "I64", (), np.array(7, "<i8")),
        StoredTensor("model.nothing", "F32", (0, 4), np.empty((0, 4), "<f4")),
    ]
    write_directory(directory, config, [*tensors_of(modules, matrices), plain], shards)
    return config, matrices


def tiny_model(directory: Path) -> None:
    """A model of a few hundred bytes with digests: one bcq and one uniform matrix, and a norm."""
    modules = [
        ModuleEntry("a", Scheme("bcq", 2, 4, "F16", True), "linear", (2, 6)),
        ModuleEntry("b", Scheme("uniform", 1, 0, "F32"), "linear", (1, 3)),
    ]
    config = QuantizationConfig({m.path: m for m in modules})
    groups = tensors_of(modules, random_matrices(modules))
    write_directory(directory, config, [*groups, [StoredTensor("norm", "F32", (2,), np.ones(2, "<f4"))]])


def tiny_stacks(directory: Path) -> None:
    """As :func:`tiny_model`, with stacks of two experts of every codec, one of them nested and transposed."""
    modules = [
        ModuleEntry("e.up", Scheme("bcq", 2, 4, "F16", True, nested=(1,)), "experts_transposed", (2, 3, 6)),
        ModuleEntry("e.down", Scheme("uniform", 2, 0, "F32"), "experts", (2, 2, 9)),
        ModuleEntry("f.lut", Scheme("codebook", 2, 0, "F16"), "experts", (2, 2, 3)),
    ]
    config = QuantizationConfig({m.path: m for m in modules})
    router = StoredTensor("gate", "F32", (2, 3), np.ones((2, 3), "<f4"))
    write_directory(directory, config, [*tensors_of(modules, random_matrices(modules)), [router]])


def weights(directory: Path) -> Path:
    return directory / WEIGHTS_FILE
