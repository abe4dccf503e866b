"""Model directories in the making: modules with random or given tensors, still open to damage."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil, prod
from typing import Any

import numpy as np

from .files import (
    FLOAT_FORMATS,
    Files,
    bytes_tensor,
    floats,
    pretty,
    random_bytes,
    random_floats,
    random_planes,
    safetensors,
)
from .reader import (
    ITEM_SIZE,
    Json,
    Module,
    Tensor,
    Tensors,
    body_and_head,
    decode,
    fingerprints,
    module_of,
    modules_of,
    separator,
)

INDEX = "model.safetensors.index.json"


def scheme(codec: str, bits: int, group_size: int = 0, scale_dtype: str = "F16", **more: Any) -> Json:
    """A scheme of the configuration (CFG-2)."""
    return {"codec": codec, "bits": bits, "group_size": group_size, "scale_dtype": scale_dtype, **more}


def group_count(cols: int, group_size: int) -> int:
    return 1 if group_size == 0 else ceil(cols / group_size)


def random_module(label: str, scheme: Json, kind: str, shape: list[int], row_bits: list[int] | None) -> Tensors:
    """The tensors of one module by role, with random content."""
    *experts, rows, cols = shape
    lead = tuple(experts)
    bits, dtype, codec = scheme["bits"], scheme["scale_dtype"], scheme["codec"]
    groups = group_count(cols, scheme["group_size"])
    has_offsets = scheme.get("offset") or codec == "affine"
    shift_role = "offsets" if has_offsets else "zeros" if codec == "uniform" else None
    roles: Tensors = {}

    def put(role: str, tensor_dtype: str, tensor_shape: tuple[int, ...]) -> None:
        roles[role] = random_floats(f"{label}/{role}", tensor_dtype, tensor_shape)

    def put_parameters(suffix: str, planes: int) -> None:
        put("scales" + suffix, dtype, (*lead, planes if codec == "bcq" else 1, rows, groups))
        if row_bits and codec == "bcq":
            roles["scales" + suffix] = without_unused(roles["scales" + suffix], row_bits)
        if shift_role:
            put(shift_role + suffix, dtype, (*lead, rows, groups))

    plane_lead = (sum(row_bits),) if row_bits else (*lead, bits, rows)
    roles["planes"] = random_planes(f"{label}/planes", plane_lead, cols)
    put_parameters("", bits)
    if codec == "codebook":
        put("codebook", "F32", (2**bits,))
    if row_bits:
        roles["row_bits"] = bytes_tensor(np.array(row_bits))
    for k in scheme.get("nested", []):
        put_parameters(f"_k{k}", k)
    return roles


def without_unused(scales: Tensor, row_bits: list[int]) -> Tensor:
    """MIX-3, NST-2: the entries of planes that a row does not have are +0.0."""
    used = np.arange(scales.shape[0])[:, None, None] < np.array(row_bits)[None, :, None]
    words = np.frombuffer(scales.data, "<u4" if scales.dtype == "F32" else "<u2").reshape(scales.shape)
    return Tensor(scales.dtype, scales.shape, np.where(used, words, 0).astype(words.dtype).tobytes())


@dataclass
class Model:
    """A model directory in the making. Everything in it can still be damaged before `files` is called."""

    label: str
    quant: Json = field(default_factory=lambda: new_quant())
    tensors: Tensors = field(default_factory=dict)
    metadata: dict[str, str] | None = field(default_factory=lambda: {"format": "pt"})

    def add(
        self,
        path: str,
        scheme: Json,
        shape: list[int],
        kind: str = "linear",
        row_bits: list[int] | None = None,
        roles: Tensors | None = None,
    ) -> Model:
        """Put a module in, with random tensors or with those of `roles`."""
        schemes: Json = self.quant["schemes"]
        name = next((known for known, other in schemes.items() if other == scheme), None)
        if name is None:
            name = f"{scheme['codec']}-{scheme['bits']}-{len(schemes)}"
            schemes[name] = scheme
        if scheme["codec"] == "affine":  # VER-3
            self.quant["format_version"] = "1.1"
        self.quant["modules"][path] = {"scheme": name, "kind": kind, "shape": shape}
        if roles is None:
            roles = random_module(f"{self.label}/{path}", scheme, kind, shape, row_bits)
        self.tensors |= {path + separator(kind) + role: tensor for role, tensor in roles.items()}
        return self

    def plain(self, name: str, *shape: int, dtype: str = "F32") -> Model:
        """Put in a tensor that belongs to no module."""
        if dtype in FLOAT_FORMATS:
            self.tensors[name] = random_floats(f"{self.label}/{name}", dtype, shape)
        else:
            self.tensors[name] = Tensor(dtype, shape, random_bytes(name, prod(shape) * ITEM_SIZE[dtype]))
        return self

    def module(self, path: str) -> Module:
        return module_of(self.quant, self.tensors, path)

    def decoded(self) -> Tensors:
        """All decoded weights, named as in expected.safetensors."""
        found: Tensors = {}
        for path, module in modules_of(self.quant, self.tensors).items():
            found[path] = floats(decode(module))
            for k in module.nested:
                found[f"{path}@k{k}"] = floats(decode(module, k))
        return found

    def body_and_head(self) -> tuple[dict[str, str], dict[str, str]]:
        return body_and_head(self.quant.get("base_model_prefix", ""), self.quant["modules"])

    def fingerprints(self) -> dict[str, str]:
        prefix = self.quant.get("base_model_prefix", "")
        body, head = fingerprints(prefix, modules_of(self.quant, self.tensors))
        return {"fingerprint": body, "head_fingerprint": head}

    def config(self) -> Json:
        return {"model_type": "example", "hidden_size": 8, "quantization_config": self.quant}

    def files(self) -> Files:
        return {"config.json": pretty(self.config()), "model.safetensors": safetensors(self.tensors, self.metadata)}

    def sharded(self, *parts: list[str]) -> Files:
        """The same model as an index and one shard for each list of tensor names."""
        files: Files = {"config.json": pretty(self.config())}
        weight_map: dict[str, str] = {}
        for number, names in enumerate(parts, 1):
            shard = f"model-{number:05}-of-{len(parts):05}.safetensors"
            files[shard] = safetensors({name: self.tensors[name] for name in names}, self.metadata)
            weight_map |= dict.fromkeys(names, shard)
        files[INDEX] = index_of(weight_map)
        return files


def index_of(weight_map: Any) -> bytes:
    return pretty({"metadata": {"total_size": 0}, "weight_map": weight_map})


def new_quant() -> Json:
    return {
        "quant_method": "lowbit",
        "format_version": "1.0",
        "base_model_prefix": "",
        "schemes": {},
        "modules": {},
        "tied": {},
    }


def small(stored: Json | None = None, shape: list[int] | None = None, label: str = "small", **more: Any) -> Model:
    """One module `fc` of the scheme `stored`, a bias and a norm: the model that most invalid cases damage."""
    stored = scheme("bcq", 2, 4, offset=True) if stored is None else stored
    model = Model(label).add("fc", stored, [1, 5] if shape is None else shape, **more)
    return model.plain("fc.bias", 1).plain("norm.weight", 2)
