"""Small lowbit directories out of small random models, for tests of the runtime. Codes are drawn at random."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from support.directories import write_directory
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lowbit_format.container.writer import StoredTensor, module_tensors
from lowbit_format.schema import ModuleEntry, QuantizationConfig, Scheme
from lowbit_format.testing.matrices import random_matrix

KINDS: dict[type, str] = {nn.Linear: "linear", Conv1D: "conv1d", nn.Embedding: "embedding"}
FLOATS = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}

Choice = Callable[[str, nn.Module], Scheme | None]


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
    quantization = QuantizationConfig(modules, tied, model.base_model_prefix)
    write_directory(directory, quantization, [[t] for t in lowbit + plain], shards, config)
    return directory


def _plain(name: str, tensor: torch.Tensor) -> StoredTensor:
    dtype = FLOATS.get(tensor.dtype, "I64")
    data = tensor.detach().contiguous()
    return StoredTensor(name, dtype, tuple(data.shape), (data.view(torch.uint16) if dtype == "BF16" else data).numpy())
