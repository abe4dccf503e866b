"""Small lowbit directories out of small random models, for tests of the runtime. Codes are drawn at random."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lowbit_format.bits import pack_codes, to_ragged
from lowbit_format.codecs import CODECS
from lowbit_format.container.atomic import write_json
from lowbit_format.container.writer import StoredTensor, module_tensors, shard_name, write_index, write_safetensors
from lowbit_format.dtypes import round_to
from lowbit_format.matrix import Params, StoredMatrix
from lowbit_format.schema import ModuleEntry, QuantizationConfig, Scheme

KINDS: dict[type, str] = {nn.Linear: "linear", Conv1D: "conv1d", nn.Embedding: "embedding"}
FLOATS = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}

Choice = Callable[[str, nn.Module], Scheme | None]


def random_matrix(scheme: Scheme, rows: int, cols: int, seed: int = 0) -> StoredMatrix:
    """A matrix of random codes and parameters of about the size that real ones have."""
    rng, codec, groups = np.random.default_rng(seed), CODECS[scheme.codec], scheme.groups(cols)
    codes = rng.integers(0, 2**scheme.bits, (rows, cols)).astype(np.uint8)
    row_bits = rng.integers(1, scheme.bits + 1, rows).astype(np.uint8) if scheme.row_bits else None

    def params(bits: int) -> Params:
        scales = rng.uniform(0.01, 0.1, (bits if codec.scale_per_plane else 1, rows, groups)).astype(np.float32)
        if row_bits is not None and codec.scale_per_plane:
            scales[row_bits[None, :] <= np.arange(bits)[:, None]] = 0
        shift = rng.normal(0, 0.1, (rows, groups)).astype(np.float32) if scheme.shift else None
        shift = None if shift is None else round_to(shift, scheme.scale_dtype)
        return Params(round_to(scales, scheme.scale_dtype), shift)

    planes = pack_codes(codes, scheme.bits)
    return StoredMatrix(
        scheme,
        rows,
        cols,
        planes if row_bits is None else to_ragged(planes, row_bits),
        params(scheme.bits),
        {k: params(k) for k in scheme.nested},
        rng.normal(0, 1, 2**scheme.bits).astype(np.float32) if codec.codebook else None,
        row_bits,
    )


def write_model(model: PreTrainedModel, directory: Path, choose: Choice, *, shards: int = 1) -> Path:
    """Write `model` as a lowbit directory: modules that `choose` gives a scheme get random planes, the rest is kept."""
    modules, tied, lowbit = dict[str, ModuleEntry](), dict[str, str](), list[StoredTensor]()
    ties = {t.removesuffix(".weight"): s.removesuffix(".weight") for t, s in model.all_tied_weights_keys.items()}
    for path, module in model.named_modules():
        scheme = choose(path, module) if type(module) in KINDS and path not in ties else None
        if scheme is not None:
            shape = tuple(module.weight.t().shape if type(module) is Conv1D else module.weight.shape)
            modules[path] = ModuleEntry(path, scheme, KINDS[type(module)], shape)
            lowbit += module_tensors(modules[path], random_matrix(scheme, *shape, seed=len(modules)))
    tied = {place: owner for place, owner in ties.items() if owner in modules}
    dropped = {f"{path}.weight" for path in (*modules, *tied)} | set(model.all_tied_weights_keys)
    plain = [_plain(name, t) for name, t in model.state_dict().items() if name not in dropped]

    directory.mkdir(parents=True)
    model.config.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    config["architectures"], config["dtype"] = [type(model).__name__], str(model.dtype).removeprefix("torch.")
    config["quantization_config"] = QuantizationConfig(modules, tied, model.base_model_prefix).to_dict()
    write_json(directory / "config.json", config)
    tensors = lowbit + plain
    files = {shard_name(i + 1, shards): tensors[i::shards] for i in range(shards)}
    for name, part in files.items():
        write_safetensors(directory / name, part)
    if shards > 1:
        write_index(directory, {n: [t.name for t in p] for n, p in files.items()}, sum(t.nbytes for t in tensors))
    return directory


def _plain(name: str, tensor: torch.Tensor) -> StoredTensor:
    dtype = FLOATS.get(tensor.dtype, "I64")
    data = tensor.detach().contiguous()
    return StoredTensor(name, dtype, tuple(data.shape), (data.view(torch.uint16) if dtype == "BF16" else data).numpy())
