"""Make the golden files in spec/vectors: models and task bundles to test any reader of the format with.

    python tools/make_vectors.py            # (re)create the files, delete those no longer made
    python tools/make_vectors.py --check    # compare with the files on disk, exit 1 if they differ

The script was written from spec/FORMAT.md and spec/BUNDLE.md alone and shares no code with the library, so it is a
second opinion on every number. It needs only the standard library and numpy. All data comes from SHAKE-256 of fixed
labels, so the files are the same on every machine and with every version of numpy.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import re
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil, prod
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent / "spec" / "vectors"

Json = dict[str, Any]
Files = dict[str, bytes]  # path below some directory -> content

ITEM_SIZE = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "C64": 8, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------- tensors and files


@dataclass(frozen=True)
class Tensor:
    """A dtype, a shape and the bytes, as a safetensors file holds them."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def __post_init__(self) -> None:
        assert len(self.data) == prod(self.shape) * ITEM_SIZE[self.dtype], (self.dtype, self.shape, len(self.data))

    def f32(self) -> np.ndarray:
        """The values in binary32. The conversion from F16 and BF16 is exact."""
        if self.dtype == "BF16":
            wide = np.frombuffer(self.data, "<u2").astype(np.uint32) << np.uint32(16)
            return wide.view(np.float32).reshape(self.shape)
        kind = {"F16": "<f2", "F32": "<f4"}[self.dtype]
        return np.frombuffer(self.data, kind).astype(np.float32).reshape(self.shape)

    def u8(self) -> np.ndarray:
        assert self.dtype == "U8"
        return np.frombuffer(self.data, np.uint8).reshape(self.shape)

    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


Tensors = dict[str, Tensor]


def hexed(dtype: str, shape: tuple[int, ...], text: str) -> Tensor:
    return Tensor(dtype, shape, bytes.fromhex(text))


def bytes_tensor(values: np.ndarray) -> Tensor:
    return Tensor("U8", values.shape, values.astype(np.uint8).tobytes())


def floats(values: Any, dtype: str = "F32") -> Tensor:
    """Values that `dtype` holds exactly."""
    array = np.asarray(values, dtype=np.float32)
    if dtype == "BF16":
        tensor = Tensor(dtype, array.shape, (array.view(np.uint32) >> 16).astype("<u2").tobytes())
    else:
        tensor = Tensor(dtype, array.shape, array.astype({"F16": "<f2", "F32": "<f4"}[dtype]).tobytes())
    assert np.array_equal(tensor.f32().view(np.uint32), array.view(np.uint32)), "the dtype does not hold these values"
    return tensor


def with_bytes(tensor: Tensor, at: int, text: str) -> Tensor:
    """The same tensor with the bytes from `at` on replaced by hexadecimal `text`."""
    new = bytes.fromhex(text)
    return Tensor(tensor.dtype, tensor.shape, tensor.data[:at] + new + tensor.data[at + len(new) :])


def compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def pretty(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()


def header_of(tensors: Tensors, metadata: dict[str, str] | None = None) -> Json:
    header: Json = {} if metadata is None else {"__metadata__": metadata}
    begin = 0
    for name, tensor in tensors.items():
        end = begin + len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    return header


def data_of(tensors: Tensors) -> bytes:
    return b"".join(tensor.data for tensor in tensors.values())


def file_of(header: str | bytes, data: bytes) -> bytes:
    raw = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(raw)) + raw + data


def padded(header: str) -> str:
    """The header with spaces to a multiple of 8 bytes, as most writers do; HDR-8 does not ask for it."""
    return header + " " * (-len(header.encode()) % 8)


def safetensors(tensors: Tensors, metadata: dict[str, str] | None = None) -> bytes:
    return file_of(padded(compact(header_of(tensors, metadata))), data_of(tensors))


def digests_of(tensors: Tensors) -> dict[str, str]:
    return {name: tensor.sha256() for name, tensor in tensors.items()}


def digest_metadata(digests: Json) -> dict[str, str]:
    return {"format": "pt", "lowbit.digests": compact(digests)}


# -------------------------------------------------------------------------------------------------- random values


def random_bytes(label: str, count: int) -> bytes:
    return hashlib.shake_256(label.encode()).digest(count)


def random_planes(label: str, lead: tuple[int, ...], cols: int) -> Tensor:
    """Random bits of `cols` columns in rows of B bytes; the bits behind the columns are 0 (BIT-3)."""
    width = 8 * ceil(cols / 64)
    mask = np.packbits(np.arange(8 * width) < cols, bitorder="little")
    raw = np.frombuffer(random_bytes(label, prod(lead) * width), np.uint8).reshape(*lead, width)
    return bytes_tensor(raw & mask)


FLOAT_FORMATS = {"F16": (10, 15, "<u2", 15), "BF16": (7, 127, "<u2", 15), "F32": (23, 127, "<u4", 31)}


def random_floats(label: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """Random finite values of both signs. One in eight has the exponent field 0: a subnormal."""
    mantissa_bits, bias, word, sign_at = FLOAT_FORMATS[dtype]
    raw = np.frombuffer(random_bytes(label, 8 * prod(shape)), "<u8")
    exponents = np.array([0, bias - 5, bias - 3, bias - 2, bias - 1, bias, bias + 2, bias + 5], np.uint64)
    exponent = exponents[(raw >> np.uint64(40)) & np.uint64(7)]
    sign = (raw >> np.uint64(48)) & np.uint64(1)
    mantissa = raw & np.uint64(2**mantissa_bits - 1)
    bits = (sign << np.uint64(sign_at)) | (exponent << np.uint64(mantissa_bits)) | mantissa
    return Tensor(dtype, shape, bits.astype(word).tobytes())


# --------------------------------------------------------------------------------------------------------- models


def scheme(codec: str, bits: int, group_size: int = 0, scale_dtype: str = "F16", **more: Any) -> Json:
    return {"codec": codec, "bits": bits, "group_size": group_size, "scale_dtype": scale_dtype, **more}


def group_count(cols: int, group_size: int) -> int:
    return 1 if group_size == 0 else ceil(cols / group_size)


def joint(kind: str) -> str:
    """What stands between a module's path and a role: EXP-1 or section 4."""
    return "_" if kind.startswith("experts") else "."


def random_module(label: str, way: Json, kind: str, shape: list[int], row_bits: list[int] | None) -> Tensors:
    """The tensors of one module by role, with random content."""
    *experts, rows, cols = shape
    lead = tuple(experts)
    bits, dtype, codec = way["bits"], way["scale_dtype"], way["codec"]
    groups = group_count(cols, way["group_size"])
    bias_role = "offsets" if way.get("offset") else "zeros" if codec == "uniform" else None
    roles: Tensors = {}

    def put(role: str, tensor_dtype: str, tensor_shape: tuple[int, ...]) -> None:
        roles[role] = random_floats(f"{label}/{role}", tensor_dtype, tensor_shape)

    def put_parameters(suffix: str, planes: int) -> None:
        put("scales" + suffix, dtype, (*lead, planes if codec == "bcq" else 1, rows, groups))
        if row_bits and codec == "bcq":
            roles["scales" + suffix] = without_unused(roles["scales" + suffix], row_bits)
        if bias_role:
            put(bias_role + suffix, dtype, (*lead, rows, groups))

    plane_lead = (sum(row_bits),) if row_bits else (*lead, bits, rows)
    roles["planes"] = random_planes(f"{label}/planes", plane_lead, cols)
    put_parameters("", bits)
    if codec == "codebook":
        put("codebook", "F32", (2**bits,))
    if row_bits:
        roles["row_bits"] = bytes_tensor(np.array(row_bits))
    for k in way.get("nested", []):
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
        way: Json,
        shape: list[int],
        kind: str = "linear",
        row_bits: list[int] | None = None,
        roles: Tensors | None = None,
    ) -> Model:
        """Put a module in, with random tensors or with those of `roles`."""
        schemes: Json = self.quant["schemes"]
        name = next((known for known, other in schemes.items() if other == way), None)
        if name is None:
            name = f"{way['codec']}-{way['bits']}-{len(schemes)}"
            schemes[name] = way
        self.quant["modules"][path] = {"scheme": name, "kind": kind, "shape": shape}
        if roles is None:
            roles = random_module(f"{self.label}/{path}", way, kind, shape, row_bits)
        self.tensors |= {path + joint(kind) + role: tensor for role, tensor in roles.items()}
        return self

    def plain(self, name: str, *shape: int, dtype: str = "F32") -> Model:
        """Put in a tensor of the model's own."""
        if dtype in FLOAT_FORMATS:
            self.tensors[name] = random_floats(f"{self.label}/{name}", dtype, shape)
        else:
            self.tensors[name] = Tensor(dtype, shape, random_bytes(name, prod(shape) * ITEM_SIZE[dtype]))
        return self

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


INDEX = "model.safetensors.index.json"


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


# ------------------------------------------------------------------------------------------------------- decoding


@dataclass(frozen=True)
class Module:
    """One module of a model as its configuration and tensors describe it."""

    way: Json
    kind: str
    shape: list[int]
    roles: Tensors

    @property
    def nested(self) -> list[int]:
        return self.way.get("nested", [])


ROLE = re.compile(r"planes|codebook|row_bits|(scales|offsets|zeros)(_k[1-9])?")


def module_of(model: Model, path: str) -> Module:
    entry = model.quant["modules"][path]
    start = path + joint(entry["kind"])
    roles = {name[len(start) :]: tensor for name, tensor in model.tensors.items() if name.startswith(start)}
    roles = {role: tensor for role, tensor in roles.items() if ROLE.fullmatch(role)}
    return Module(model.quant["schemes"][entry["scheme"]], entry["kind"], entry["shape"], roles)


def decode(module: Module, k: int | None = None) -> np.ndarray:
    """The weights in binary32, [rows, cols] or [experts, rows, cols], at full precision or at precision `k`."""
    suffix = "" if k is None else f"_k{k}"
    roles, way = module.roles, module.way
    planes = roles["planes"].u8()
    scales = roles["scales" + suffix].f32()
    bias_role = {"bcq": "offsets", "uniform": "zeros", "codebook": ""}[way["codec"]] + suffix
    bias = roles[bias_role].f32() if bias_role in roles else None
    table = roles["codebook"].f32() if "codebook" in roles else None
    if module.kind.startswith("experts"):
        per_expert = [
            decode_matrix(module, planes[e], scales[e], None if bias is None else bias[e], table, k)
            for e in range(module.shape[0])
        ]
        return np.stack(per_expert)
    return decode_matrix(module, planes, scales, bias, table, k)


def decode_matrix(
    module: Module,
    planes: np.ndarray,
    scales: np.ndarray,
    bias: np.ndarray | None,
    table: np.ndarray | None,
    k: int | None,
) -> np.ndarray:
    rows, cols = module.shape[-2:]
    size = module.way["group_size"]
    group = np.arange(cols) // size if size else np.zeros(cols, np.int64)
    depth = module.roles["row_bits"].u8() if "row_bits" in module.roles else np.full(rows, module.way["bits"])
    weights = np.empty((rows, cols), np.float32)
    for r in range(rows):
        n = int(depth[r]) if k is None else min(int(depth[r]), k)
        bits = np.stack([columns(plane_row(planes, depth, p, r), cols) for p in range(n)])
        row_bias = None if bias is None else bias[r][group]
        weights[r] = decode_row(module.way["codec"], bits, scales[:, r][:, group], row_bias, table)
    return weights


def plane_row(planes: np.ndarray, depth: np.ndarray, p: int, r: int) -> np.ndarray:
    """The bytes of plane `p` of row `r`. In two dimensions the rows without a plane `p` are left out (MIX-2)."""
    if planes.ndim == 3:
        return planes[p, r]
    before = sum(int(np.count_nonzero(depth > q)) for q in range(p))
    return planes[before + int(np.count_nonzero(depth[:r] > p))]


def columns(row: np.ndarray, cols: int) -> np.ndarray:
    """BIT-2: column 8k + j is the bit of value 2^j of byte k."""
    return np.unpackbits(row, bitorder="little")[:cols]


def code_of(bits: np.ndarray) -> np.ndarray:
    """BIT-1: plane 0 is the most significant bit."""
    n = len(bits)
    return sum((bits[p].astype(np.int64) << (n - 1 - p) for p in range(n)), np.zeros(bits.shape[1], np.int64))


def decode_row(
    codec: str, bits: np.ndarray, scales: np.ndarray, bias: np.ndarray | None, table: np.ndarray | None
) -> np.ndarray:
    """Section 6 for one row. numpy rounds each of these operations on float32 arrays to binary32 and fuses none."""
    with np.errstate(all="ignore"):
        if codec == "bcq":
            acc = np.zeros(bits.shape[1], np.float32) if bias is None else bias
            for p in range(len(bits)):
                acc = np.where(bits[p] == 1, acc + scales[p], acc - scales[p])
            return acc
        if codec == "uniform":
            assert bias is not None
            difference = code_of(bits).astype(np.float32) - bias
            return difference * scales[0]
        assert table is not None
        return table[code_of(bits)] * scales[0]


def decode_model(model: Model) -> Tensors:
    """All decoded weights, named as in expected.safetensors."""
    decoded: Tensors = {}
    for path in model.quant["modules"]:
        module = module_of(model, path)
        decoded[path] = floats(decode(module))
        for k in module.nested:
            decoded[f"{path}@k{k}"] = floats(decode(module, k))
    return decoded


# ---------------------------------------------------------------------------------------------------- fingerprint


def body_and_head(model: Model) -> tuple[dict[str, str], dict[str, str]]:
    """FPR-1: two maps from the name a module has in the fingerprint to its path."""
    prefix = model.quant.get("base_model_prefix", "")
    paths = list(model.quant["modules"])
    if not prefix or not any(path.startswith(prefix + ".") for path in paths):
        return {path: path for path in paths}, {}
    body = {path[len(prefix) + 1 :]: path for path in paths if path.startswith(prefix + ".")}
    return body, {path: path for path in paths if not path.startswith(prefix + ".")}


def fingerprint(model: Model, names: dict[str, str]) -> str:
    records: list[bytes] = []
    for name, path in names.items():
        module = module_of(model, path)
        for role, tensor in module.roles.items():
            shape = ",".join(map(str, tensor.shape))
            meaning = [module.way["codec"], str(module.way["bits"]), str(module.way["group_size"])]
            record = "\t".join([name, role, tensor.dtype, shape, tensor.sha256(), *meaning])
            records.append(record.encode() + b"\n")
    return hashlib.sha256(b"".join(sorted(records))).hexdigest()


def fingerprints(model: Model) -> dict[str, str]:
    body, head = body_and_head(model)
    return {"fingerprint": fingerprint(model, body), "head_fingerprint": fingerprint(model, head) if head else ""}


# ---------------------------------------------------------------------------------------------------- valid cases


@dataclass(frozen=True)
class Valid:
    name: str
    about: str
    model: Model
    files: Files | None = None  # the model directory, where it is not simply that of the model

    def outputs(self) -> Files:
        files = self.model.files() if self.files is None else self.files
        expected = {**fingerprints(self.model), "about": self.about}
        return {f"model/{path}": content for path, content in files.items()} | {
            "expected.safetensors": safetensors(decode_model(self.model)),
            "expected.json": pretty(expected),
        }


def assert_weights(model: Model, path: str, weights: list[list[float]]) -> None:
    got = decode_model(model)[path].f32()
    assert np.array_equal(got, np.array(weights, np.float32)), (path, got)


def bcq_example() -> Model:
    roles = {
        "planes": hexed("U8", (2, 1, 8), "0d 00 00 00 00 00 00 00 1b 00 00 00 00 00 00 00"),
        "scales": hexed("F16", (2, 1, 2), "00 3c 00 38 00 34 00 30"),
        "offsets": hexed("F16", (1, 2), "00 2c 00 bc"),
    }
    model = Model("bcq-example").add("fc", scheme("bcq", 2, 4, offset=True), [1, 5], roles=roles)
    assert roles["scales"] == floats([[[1.0, 0.5]], [[0.25, 0.125]]], "F16")
    assert roles["offsets"] == floats([[0.0625, -1.0]], "F16")
    assert_weights(model, "fc", [[1.3125, -0.6875, 0.8125, 1.3125, -1.375]])
    return model


def uniform_example() -> Model:
    roles = {
        "planes": hexed("U8", (3, 1, 8), "05 00000000000000 04 00000000000000 05 00000000000000"),
        "scales": hexed("F16", (1, 1, 1), "00 38"),
        "zeros": hexed("F16", (1, 1), "00 43"),
    }
    model = Model("uniform-example").add("fc", scheme("uniform", 3), [1, 3], roles=roles)
    assert roles["scales"] == floats([[[0.5]]], "F16")
    assert roles["zeros"] == floats([[3.5]], "F16")
    assert_weights(model, "fc", [[0.75, -1.75, 1.75]])
    return model


def codebook_example() -> Model:
    roles = {
        "planes": hexed("U8", (2, 2, 8), "01 00000000000000 02 00000000000000 00 00000000000000 01 00000000000000"),
        "scales": hexed("F32", (1, 2, 1), "00 00 00 40 00 00 00 3f"),
        "codebook": hexed("F32", (4,), "00 00 80 bf 00 00 00 00 00 00 80 3f 00 00 00 00"),
    }
    model = Model("codebook-example").add("fc", scheme("codebook", 2, scale_dtype="F32"), [2, 2], roles=roles)
    assert roles["scales"] == floats([[[2.0], [0.5]]])
    assert roles["codebook"] == floats([-1, 0, 1, 0])
    assert_weights(model, "fc", [[2.0, -2.0], [0.0, 0.5]])
    return model


def ragged_example() -> Model:
    roles = {
        "planes": hexed("U8", (6, 8), "".join(first + 7 * "00" for first in ("01", "03", "00", "02", "01", "01"))),
        "scales": floats([[[1], [2], [0.5]], [[0], [1], [0.25]], [[0], [0.5], [0]]]),
        "row_bits": hexed("U8", (3,), "01 03 02"),
    }
    model = Model("ragged-example").add("fc", scheme("bcq", 3, scale_dtype="F32", row_bits=True), [3, 2], roles=roles)
    assert_weights(model, "fc", [[1, -1], [1.5, 2.5], [-0.25, -0.75]])
    return model


def examples() -> Iterator[Valid]:
    yield Valid("bcq-example", "Section 15.1 of FORMAT.md.", bcq_example())
    yield Valid("uniform-example", "Section 15.2 of FORMAT.md.", uniform_example())
    yield Valid("codebook-example", "Section 15.3 of FORMAT.md.", codebook_example())
    yield Valid("ragged-example", "Section 15.4 of FORMAT.md.", ragged_example())


# (shape, group_size, scale_dtype): one for each number of bits, so that every odd width meets every dtype.
AWKWARD = [
    ([3, 1], 0, "F16"),
    ([1, 63], 16, "BF16"),
    ([2, 64], 64, "F32"),
    ([2, 65], 64, "F16"),
    ([1, 127], 50, "BF16"),
    ([3, 7], 100, "F32"),
    ([5, 8], 1, "F16"),
    ([2, 130], 128, "F16"),
]


def awkward_model(label: str, codec: str, widths: list[int], **more: Any) -> Model:
    model = Model(label)
    for bits in widths:
        shape, group_size, dtype = AWKWARD[bits - 1]
        model.add(f"layers.{bits}.fc", scheme(codec, bits, group_size, dtype, **more), shape)
    return model.plain("layers.1.fc.bias", 3).plain("norm.weight", 4, dtype="BF16")


def codec_cases() -> Iterator[Valid]:
    every = list(range(1, 9))
    shapes = "group size 0, short last groups, a group size above the columns, F16, BF16 and F32 with subnormals"
    yield Valid("bcq-bits", f"bcq, 1 to 8 bits, no offset; {shapes}.", awkward_model("bcq-bits", "bcq", every))
    yield Valid(
        "bcq-bits-offset",
        f"bcq, 1 to 8 bits, with offset; {shapes}.",
        awkward_model("bcq-bits-offset", "bcq", every, offset=True),
    )
    yield Valid(
        "uniform-bits",
        f"uniform, 1 to 8 bits, fractional zeros; {shapes}.",
        awkward_model("uniform-bits", "uniform", every),
    )
    yield Valid(
        "codebook-bits",
        f"codebook, 1 to 4 and 8 bits; {shapes}.",
        awkward_model("codebook-bits", "codebook", [1, 2, 3, 4, 8]),
    )
    largest = Model("largest-group-size").add("fc", scheme("uniform", 2, 2**31 - 1), [2, 9])
    yield Valid("largest-group-size", "The group size 2^31-1: one group.", largest)


def nested_cases() -> Iterator[Valid]:
    nested = (
        Model("nested")
        .add("a", scheme("bcq", 4, 16, offset=True, nested=[1, 2, 3]), [2, 37])
        .add("b", scheme("bcq", 3, 0, "BF16", nested=[2]), [3, 9])
        .add("c", scheme("uniform", 8, 32, "F32", nested=[2, 4, 7]), [2, 65])
        .add("d", scheme("uniform", 2, 0, nested=[1]), [2, 5])
        .add("e", scheme("codebook", 2, 0), [2, 5])
    )
    yield Valid("nested", "bcq and uniform with nested precisions beside a module that has none.", nested)
    ragged = (
        Model("ragged")
        .add("a", scheme("bcq", 4, 8, offset=True, row_bits=True), [5, 19], row_bits=[4, 1, 3, 2, 4])
        .add("b", scheme("uniform", 8, 0, "F32", row_bits=True), [4, 66], row_bits=[8, 1, 5, 3])
        .add("c", scheme("bcq", 4, 0, row_bits=True), [3, 4], row_bits=[1, 1, 1])
        .add("d", scheme("uniform", 2, 0, row_bits=True), [2, 4], row_bits=[2, 2])
    )
    yield Valid("ragged", "Rows with different bits; one module where no row has all bits, one where all have.", ragged)
    both = (
        Model("ragged-nested")
        .add("a", scheme("bcq", 4, 8, offset=True, row_bits=True, nested=[2, 3]), [5, 19], row_bits=[4, 1, 3, 2, 4])
        .add("b", scheme("uniform", 6, 0, "F32", row_bits=True, nested=[1, 4]), [4, 66], row_bits=[6, 1, 5, 3])
    )
    yield Valid("ragged-nested", "Rows with different bits that are also read at nested precisions.", both)


def kind_cases() -> Iterator[Valid]:
    experts = (
        Model("experts")
        .add("mlp.experts.gate_up_proj", scheme("bcq", 3, 8, offset=True), [3, 2, 17], "experts")
        .add("mlp.experts.down_proj", scheme("uniform", 4, 0, "BF16"), [3, 4, 5], "experts_transposed")
        .add("mlp.experts.lut", scheme("codebook", 2, 4, "F32"), [2, 1, 6], "experts")
        .add("mlp.experts.one", scheme("bcq", 1), [1, 1, 1], "experts_transposed")
        .add("mlp.experts.nested", scheme("bcq", 3, 4, offset=True, nested=[1, 2]), [2, 3, 6], "experts")
        .add("mlp.experts.nested_uniform", scheme("uniform", 3, 0, nested=[2]), [2, 2, 6], "experts_transposed")
        .plain("mlp.experts.gate_up_proj_bias", 3, 2)
    )
    yield Valid("experts", "Both kinds of experts for the three codecs, with one codebook for all experts.", experts)
    conv1d = (
        Model("conv1d").add("h.0.attn.c_attn", scheme("bcq", 2, 4), [6, 5], "conv1d").plain("h.0.attn.c_attn.bias", 6)
    )
    yield Valid("conv1d", "A module of kind conv1d; the expected weight is [rows, cols], not the parameter.", conv1d)
    embedding = Model("embedding").add("wte", scheme("uniform", 4, 4), [7, 6], "embedding").plain("ln_f.weight", 6)
    yield Valid("embedding", "A module of kind embedding.", embedding)
    tied = (
        Model("tied").add("model.embed_tokens", scheme("bcq", 3, 4), [5, 6], "embedding").plain("model.norm.weight", 6)
    )
    tied.quant["tied"] = {"lm_head": "model.embed_tokens"}
    yield Valid("tied", "An output head that uses the input embedding.", tied)
    prefix = head_model("base-model-prefix")
    yield Valid("base-model-prefix", "A body below base_model_prefix and a head beside it: two fingerprints.", prefix)
    unused = Model("prefix-unused").add("modelling.fc", scheme("bcq", 1), [2, 3]).add("model", scheme("bcq", 1), [2, 3])
    unused.quant["base_model_prefix"] = "model"
    yield Valid("prefix-unused", "No path begins with the prefix and a dot, so all paths are body.", unused)


def head_model(label: str) -> Model:
    model = (
        Model(label)
        .add("model.layers.0.fc", scheme("bcq", 2, 4), [3, 6])
        .add("model.model.fc", scheme("uniform", 2), [2, 3])
        .add("modelx.fc", scheme("bcq", 1), [2, 3])
        .add("score", scheme("bcq", 2, 4), [2, 6])
    )
    model.quant["base_model_prefix"] = "model"
    return model.plain("model.norm.weight", 6)


def container_cases() -> Iterator[Valid]:
    split = Model("sharded").add("a", scheme("bcq", 2, 4, offset=True), [2, 6]).add("b", scheme("codebook", 2), [2, 6])
    split.plain("norm.weight", 6)
    parts = (["a.planes", "b.scales", "norm.weight"], ["a.scales", "b.codebook"], ["b.planes", "a.offsets"])
    yield Valid(
        "sharded", "Three shards; the tensors of each module lie in different ones.", split, split.sharded(*parts)
    )

    odd = small("unaligned")
    files = odd.files()
    text = padded(compact(header_of(odd.tensors, odd.metadata))).rstrip(" ")
    text += " " * ((3 - len(text.encode())) % 8)
    files["model.safetensors"] = file_of(text, data_of(odd.tensors))
    yield Valid("unaligned", "The data begins at an odd byte.", odd, files)

    # The one-byte tensor in front puts every F16 and F32 tensor behind it at an odd address.
    inner = Model("unaligned-tensors").plain("first", 1, dtype="U8").add("fc", scheme("bcq", 2, 4, "F32"), [2, 6])
    yield Valid("unaligned-tensors", "A tensor of one byte in front leaves all others unaligned.", inner)

    spaces = small("padded")
    files = spaces.files()
    header = compact(header_of(spaces.tensors, spaces.metadata)) + " " * 100
    files["model.safetensors"] = file_of(header, data_of(spaces.tensors))
    yield Valid("padded", "A header with 100 spaces behind it.", spaces, files)

    order = small("header-order")
    files = order.files()
    listed = header_of(order.tensors, None)
    files["model.safetensors"] = file_of(compact(dict(sorted(listed.items(), reverse=True))), data_of(order.tensors))
    yield Valid(
        "header-order", "The header lists the tensors in another order than the data; no metadata.", order, files
    )

    other = small("other-dtypes")
    for dtype in ITEM_SIZE:
        other.plain(f"other.{dtype}", 3, dtype=dtype)
    other.plain("other.scalar", dtype="F32").plain("other.empty", 0, 4).plain("other.scales", 2)
    yield Valid("other-dtypes", "Other tensors of every dtype, a scalar, and an empty one.", other)

    yield from name_cases()
    yield from metadata_cases()


def name_cases() -> Iterator[Valid]:
    # U+FF5E sorts behind U+1F600 in UTF-16 and before it in UTF-8: FPR-3 sorts bytes.
    names = ["слой.0 fc", "a\uff5eb", "a\U0001f600b", "q\"'{}", "a", "a.b", "a-b", "a b"]
    model = Model("names")
    for name in names:
        model.add(name, scheme("bcq", 1), [1, 3])
    files = model.files()
    header = json.dumps(header_of(model.tensors, model.metadata))
    files["model.safetensors"] = file_of(header, data_of(model.tensors))
    yield Valid(
        "names", "Names outside ASCII, raw in config.json and escaped in the header; a sorting trap.", model, files
    )
    long = Model("long-name").add("m" * 512, scheme("bcq", 1), [1, 3]).plain("n" * 1024, 2)
    yield Valid("long-name", "A path of 512 and a tensor name of 1024 characters.", long)


def metadata_cases() -> Iterator[Valid]:
    full = small("digests")
    full.metadata = digest_metadata(digests_of(full.tensors))
    yield Valid("digests", "Every tensor has its digest.", full)
    part = small("digests-partial")
    some = {"fc.planes": part.tensors["fc.planes"].sha256(), "in.another.file": hashlib.sha256(b"").hexdigest()}
    part.metadata = digest_metadata(some)
    yield Valid("digests-partial", "One tensor has a digest; another digest is for a tensor not in this file.", part)

    newer = small("newer-minor")
    newer.quant |= {"format_version": "1.7", "made_by": {"tool": "example", "numbers": [1, 2.5, None]}}
    yield Valid("newer-minor", "format_version 1.7 and an unknown key beside schemes, which may be ignored.", newer)

    bare = Model("defaults").add("fc", scheme("bcq", 2), [2, 5])
    del bare.quant["tied"], bare.quant["base_model_prefix"]
    bare.metadata = None
    yield Valid("defaults", "Every optional key is absent.", bare)

    stated = Model("defaults-stated").add(
        "fc", scheme("bcq", 2, offset=False, row_bits=False, nested=[], label="two bits"), [2, 5]
    )
    yield Valid("defaults-stated", "Every optional key of a bcq scheme is present with its default.", stated)

    empty = Model("no-modules").plain("norm.weight", 4)
    yield Valid("no-modules", "No modules: the fingerprint is the SHA-256 of no bytes.", empty)


# --------------------------------------------------------------------------------------- values that test rounding


def nearest32(exact: Fraction) -> np.float32:
    """The binary32 value nearest to `exact`, ties to even, for normal values."""
    guess = np.float32(float(exact))
    around = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    return min(around, key=lambda y: (abs(Fraction(float(y)) - exact), int(y.view(np.uint32)) & 1))


def exactly(value: np.float32) -> Fraction:
    return Fraction(float(value))


def normal_floats(label: str, count: int) -> np.ndarray:
    """Positive normal values between 2^-4 and 2^4 with random mantissas."""
    raw = np.frombuffer(random_bytes(label, 8 * count), "<u4").reshape(count, 2)
    return (((123 + raw[:, 1] % 8) << 23) | (raw[:, 0] & (2**23 - 1))).astype(np.uint32).view(np.float32)


def bcq_in_other_ways(offset: np.float32, scales: np.ndarray, bits: list[int]) -> list[np.float32]:
    """What decoders compute that add the same numbers in another order or precision."""
    signed = [s if bit else -s for s, bit in zip(scales, bits, strict=True)]
    backwards = offset
    for term in reversed(signed):
        backwards = backwards + term
    offset_last = signed[0]
    for term in signed[1:]:
        offset_last = offset_last + term
    offset_last = offset_last + offset
    wide = nearest32(exactly(offset) + sum(map(exactly, signed)))
    return [backwards, offset_last, wide]


def bcq_by_the_rule(offset: np.float32, scales: np.ndarray, bits: list[int]) -> np.float32:
    acc = offset
    for s, bit in zip(scales, bits, strict=True):
        acc = acc + s if bit else acc - s
    return acc


def uniform_in_other_ways(code: int, zero: np.float32, scale: np.float32) -> list[np.float32]:
    """What decoders compute that multiply first, fuse, or round once."""
    product, shift = np.float32(code) * scale, zero * scale
    fused = nearest32(code * exactly(scale) - exactly(shift))
    wide = nearest32((code - exactly(zero)) * exactly(scale))
    return [product - shift, fused, wide]


def search(label: str, count: int, per_try: int, wanted: Callable[[np.ndarray], bool]) -> list[np.ndarray]:
    """The first `count` draws of `per_try` values that are wanted."""
    found: list[np.ndarray] = []
    for attempt in range(10_000):
        draw = normal_floats(f"{label}/{attempt}", per_try)
        if wanted(draw):
            found.append(draw)
        if len(found) == count:
            return found
    raise AssertionError(f"nothing found for {label}")


SENSITIVE_BITS = [1, 0, 1, 1]  # the column whose decoding is sensitive, plane 0 first
SENSITIVE_CODE = 11


def sensitive_bcq() -> tuple[Tensors, int]:
    rows = 4

    def wanted(draw: np.ndarray) -> bool:
        right = bcq_by_the_rule(draw[0], draw[1:], SENSITIVE_BITS)
        return all(other != right for other in bcq_in_other_ways(draw[0], draw[1:], SENSITIVE_BITS))

    found = np.stack(search("rounding/bcq", rows, 5, wanted))
    planes = np.zeros((4, rows, 8), np.uint8)
    for p, bit in enumerate(SENSITIVE_BITS):
        planes[p, :, 0] = 0b1010 | bit
    roles = {
        "planes": bytes_tensor(planes),
        "scales": floats(np.ascontiguousarray(found[:, 1:].T)[:, :, None]),
        "offsets": floats(np.ascontiguousarray(found[:, :1])),
    }
    return roles, rows


def sensitive_uniform() -> tuple[Tensors, int]:
    rows = 4

    def wanted(draw: np.ndarray) -> bool:
        right = (np.float32(SENSITIVE_CODE) - draw[0]) * draw[1]
        return all(other != right for other in uniform_in_other_ways(SENSITIVE_CODE, draw[0], draw[1]))

    found = np.stack(search("rounding/uniform", rows, 2, wanted))
    planes = np.zeros((4, rows, 8), np.uint8)
    for p in range(4):
        planes[p, :, 0] = 0b1010 | (SENSITIVE_CODE >> (3 - p) & 1)
    roles = {
        "planes": bytes_tensor(planes),
        "scales": floats(np.ascontiguousarray(found[:, 1])[None, :, None]),
        "zeros": floats(np.ascontiguousarray(found[:, :1])),
    }
    return roles, rows


def rounding_model() -> Model:
    bcq, bcq_rows = sensitive_bcq()
    uniform, uniform_rows = sensitive_uniform()
    model = (
        Model("rounding")
        .add("bcq", scheme("bcq", 4, 0, "F32", offset=True), [bcq_rows, 4], roles=bcq)
        .add("uniform", scheme("uniform", 4, 0, "F32"), [uniform_rows, 4], roles=uniform)
    )
    assert_sensitive(model)
    return model


def assert_sensitive(model: Model) -> None:
    """Column 0 of the stored model decodes to other bits in every way but the one of the specification."""
    weights = decode_model(model)
    bcq, uniform = module_of(model, "bcq").roles, module_of(model, "uniform").roles
    for r, weight in enumerate(weights["bcq"].f32()[:, 0]):
        offset, scales = bcq["offsets"].f32()[r, 0], bcq["scales"].f32()[:, r, 0]
        assert weight == bcq_by_the_rule(offset, scales, SENSITIVE_BITS)
        assert weight not in bcq_in_other_ways(offset, scales, SENSITIVE_BITS)
    for r, weight in enumerate(weights["uniform"].f32()[:, 0]):
        zero, scale = uniform["zeros"].f32()[r, 0], uniform["scales"].f32()[0, r, 0]
        assert weight not in uniform_in_other_ways(SENSITIVE_CODE, zero, scale)


def arithmetic_cases() -> Iterator[Valid]:
    about = "Values where fused operations, a wider sum or another order give other bits (column 0 of every row)."
    yield Valid("rounding", about, rounding_model())
    yield Valid("subnormal", "Weights that are subnormal in binary32 and must not become zero.", subnormal_model())
    yield Valid("signed-zero", "Scales, offsets and zeros of +0.0 and -0.0, and weights of either zero.", zero_model())
    yield Valid("overflow", "Finite parameters whose weights overflow to infinity in binary32.", overflow_model())
    negative = Model("negative-scales").add(
        "fc",
        scheme("bcq", 2, 2),
        [1, 4],
        roles={
            "planes": hexed("U8", (2, 1, 8), "05 00000000000000 03 00000000000000"),
            "scales": hexed("F16", (2, 1, 2), "00 bc 01 80 01 00 ff 83"),
        },
    )
    yield Valid("negative-scales", "Negative and subnormal F16 scales, the larger one in the last plane.", negative)


def subnormal_model() -> Model:
    tiny = float(np.float32(2.0**-126))
    table = floats([-1.0, 0.5, 0.25, 2.0**-23])
    model = (
        Model("subnormal")
        .add("sum", scheme("bcq", 2, 0, "F32"), [1, 4], roles={
            "planes": hexed("U8", (2, 1, 8), "03 00000000000000 05 00000000000000"),
            "scales": floats([[[tiny]], [[tiny * 0.75]]]),
        })
        .add("product", scheme("uniform", 2, 0, "F32"), [1, 4], roles={
            "planes": hexed("U8", (2, 1, 8), "03 00000000000000 05 00000000000000"),
            "scales": floats([[[tiny * 0.25]]]),
            "zeros": floats([[1.5]]),
        })
        .add("table", scheme("codebook", 2, 0, "BF16"), [1, 4], roles={
            "planes": hexed("U8", (2, 1, 8), "03 00000000000000 05 00000000000000"),
            "scales": floats([[[tiny]]], "BF16"),
            "codebook": table,
        })
    )  # fmt: skip
    for name, weight in decode_model(model).items():
        values = np.abs(weight.f32())
        assert np.any((values > 0) & (values < tiny)), name
    return model


def zero_model() -> Model:
    four = hexed("U8", (1, 4, 8), 4 * "01 00000000000000")
    model = (
        Model("signed-zero")
        .add("bcq", scheme("bcq", 1, 0, "F32", offset=True), [4, 2], roles={
            "planes": four,
            "scales": floats([[[0.0], [-0.0], [0.0], [-0.0]]]),
            "offsets": floats([[-0.0], [-0.0], [0.0], [0.0]]),
        })
        .add("plain", scheme("bcq", 1, 0, "F16"), [4, 2], roles={
            "planes": four,
            "scales": floats([[[0.0], [-0.0], [1.0], [-1.0]]], "F16"),
        })
        .add("uniform", scheme("uniform", 1, 0, "BF16"), [4, 2], roles={
            "planes": four,
            "scales": floats([[[1.0], [-1.0], [-0.0], [0.0]]], "BF16"),
            "zeros": floats([[1.0], [1.0], [0.0], [-0.0]], "BF16"),
        })
        .add("codebook", scheme("codebook", 1, 0, "F32"), [4, 2], roles={
            "planes": four,
            "scales": floats([[[1.0], [-1.0], [0.0], [-0.0]]]),
            "codebook": floats([-0.0, 1.0]),
        })
    )  # fmt: skip
    negative = sum(int(np.count_nonzero((t.f32() == 0) & np.signbit(t.f32()))) for t in decode_model(model).values())
    assert negative > 0
    return model


def overflow_model() -> Model:
    big = float(np.float32(3e38))
    planes = hexed("U8", (2, 1, 8), "03 00000000000000 05 00000000000000")
    model = (
        Model("overflow")
        .add("bcq", scheme("bcq", 2, 0, "F32"), [1, 4], roles={"planes": planes, "scales": floats([[[big]], [[big]]])})
        .add("uniform", scheme("uniform", 2, 0, "F32"), [1, 4], roles={
            "planes": planes, "scales": floats([[[big]]]), "zeros": floats([[1.5]]),
        })
        .add("codebook", scheme("codebook", 2, 0, "F32"), [1, 4], roles={
            "planes": planes, "scales": floats([[[big]]]), "codebook": floats([-2, -1, 1, 2]),
        })
    )  # fmt: skip
    with np.errstate(all="ignore"):
        assert all(np.isinf(tensor.f32()).any() for tensor in decode_model(model).values())
    return model


def small(label: str = "small", way: Json | None = None, shape: list[int] | None = None, **more: Any) -> Model:
    """One module `fc` with a bias and a norm beside it: the model that most invalid cases damage."""
    way = scheme("bcq", 2, 4, offset=True) if way is None else way
    model = Model(label).add("fc", way, [1, 5] if shape is None else shape, **more)
    return model.plain("fc.bias", 1).plain("norm.weight", 2)


def bundle_bases() -> Iterator[Valid]:
    yield Valid("bundle-example-base", "The base of section 4 of BUNDLE.md.", example_base())
    yield Valid(
        "bundle-base", "The base of the other bundles: all codecs, nested, experts, ragged, a head.", task_base()
    )
    yield Valid(
        "bundle-edge-base", "Parameters of -0.0, subnormal ones, and ones near the largest number.", edge_base()
    )
    yield Valid("bundle-names-base", "A module of the head named like one of the body, a tied place.", names_base())


def valid_cases() -> Iterator[Valid]:
    yield from examples()
    yield from codec_cases()
    yield from nested_cases()
    yield from kind_cases()
    yield from container_cases()
    yield from arithmetic_cases()
    yield from bundle_bases()


# -------------------------------------------------------------------------------------------------- invalid cases


@dataclass(frozen=True)
class Invalid:
    name: str
    rule: str
    about: str
    files: Files  # of the case's directory
    found_by: str = "open"

    def outputs(self) -> Files:
        about = {"rule": self.rule, "found_by": self.found_by, "about": self.about}
        return {**self.files, "expected.json": pretty(about)}


def refused(slug: str, rule: str, about: str, model: Model | Files, found_by: str = "open") -> Invalid:
    files = model.files() if isinstance(model, Model) else model
    name = f"{rule.lower()}-{slug}"
    return Invalid(name, rule, about, {f"model/{path}": content for path, content in files.items()}, found_by)


def replaced(content: bytes, old: str, new: str) -> bytes:
    """The text with the first occurrence of `old` replaced."""
    assert old.encode() in content, old
    return content.replace(old.encode(), new.encode(), 1)


def directory_cases() -> Iterator[Invalid]:
    good = small().files()
    config = good["config.json"]
    bare = {"model_type": "example"}
    yield refused("no-config", "DIR-1", "No config.json.", {"model.safetensors": good["model.safetensors"]})
    yield refused("not-json", "DIR-1", "config.json ends too early.", {**good, "config.json": config[:-3]})
    yield refused("array", "DIR-1", "config.json is a list.", {**good, "config.json": pretty([json.loads(config)])})
    yield refused("no-key", "DIR-1", "No quantization_config.", {**good, "config.json": pretty(bare)})
    listed = pretty({**bare, "quantization_config": []})
    yield refused("list", "DIR-1", "quantization_config is a list.", {**good, "config.json": listed})
    latin = config.replace(b"example", b"ex\xe4mple")
    yield refused("not-utf-8", "DIR-1", "config.json is not UTF-8.", {**good, "config.json": latin})

    names = list(small().tensors)
    both = {**small().sharded(names), "model.safetensors": good["model.safetensors"]}
    yield refused("both", "DIR-2", "An index beside model.safetensors.", both)
    yield refused("neither", "DIR-2", "No weights at all.", {"config.json": config})
    yield from index_cases(names)
    yield from agreement_cases(names)


def index_cases(names: list[str]) -> Iterator[Invalid]:
    """DIR-3. Where a file of the forbidden name can lie safely in a checkout, it does: a careless reader finds it."""
    config, content = small().files()["config.json"], small().files()["model.safetensors"]

    def named(shard: Any) -> Files:
        return {"config.json": config, INDEX: index_of(dict.fromkeys(names, shard))}

    outside = refused("traversal", "DIR-3", "A shard outside the directory.", named("../outside.safetensors"))
    yield Invalid(outside.name, outside.rule, outside.about, {**outside.files, "outside.safetensors": content})
    below = {**named("below/a.safetensors"), "below/a.safetensors": content}
    yield refused("subdirectory", "DIR-3", "A shard in a subdirectory.", below)
    hidden = {**named(".a.safetensors"), ".a.safetensors": content}
    yield refused("hidden", "DIR-3", "A shard whose name begins with a dot.", hidden)
    yield refused("suffix", "DIR-3", "A shard named .bin.", {**named("model.bin"), "model.bin": content})
    yield refused("absolute", "DIR-3", "An absolute path.", named("/model.safetensors"))
    yield refused("backslash", "DIR-3", "A backslash in the name.", named("..\\a.safetensors"))
    yield refused("control", "DIR-3", "A line feed in the name.", named("a\nb.safetensors"))
    yield refused("delete", "DIR-3", "The character U+007F in the name.", named("a\x7fb.safetensors"))
    yield refused("not-a-string", "DIR-3", "A file name that is a number.", named(1))
    shard = {"config.json": config, "a.safetensors": content}
    right = dict.fromkeys(names, "a.safetensors")
    yield refused("no-weight-map", "DIR-3", "No weight_map.", {**shard, INDEX: pretty({"metadata": {}})})
    pairs = index_of([list(item) for item in right.items()])
    yield refused("weight-map-list", "DIR-3", "weight_map is a list.", {**shard, INDEX: pairs})
    yield refused("array", "DIR-3", "The index is a list.", {**shard, INDEX: pretty([{"weight_map": right}])})


def agreement_cases(names: list[str]) -> Iterator[Invalid]:
    first, second = names[:3], names[3:]  # the second shard holds no tensor of the module
    shard = "model-00001-of-00002.safetensors"
    other = "model-00002-of-00002.safetensors"
    model = small()
    good = model.sharded(first, second)
    right = dict.fromkeys(first, shard) | dict.fromkeys(second, other)

    ghost = {**good, INDEX: index_of({**right, "ghost.weight": shard})}
    yield refused("ghost", "DIR-4", "The index names a tensor that its shard does not have.", ghost)
    unlisted = {**good, INDEX: index_of({name: file for name, file in right.items() if name != "norm.weight"})}
    yield refused("unlisted", "DIR-4", "A shard has a tensor that the index does not name.", unlisted)
    swapped = {**good, INDEX: index_of({**right, "norm.weight": shard})}
    yield refused("swapped", "DIR-4", "The index maps a tensor to the wrong shard.", swapped)
    twice = {**model.sharded([*first, "norm.weight"], second), INDEX: index_of(right)}
    yield refused("twice", "DIR-4", "A tensor is in two shards.", twice)
    missing = {path: content for path, content in good.items() if path != other}
    yield refused("missing-shard", "DIR-4", "A shard that the index names does not exist.", missing)
    # A lax reader that only follows the index would never look into the second shard's extra tensor.
    extra = copy.deepcopy(model).plain("extra", 1)
    more = {**extra.sharded(first, [*second, "extra"]), INDEX: index_of(right)}
    yield refused("extra", "DIR-4", "The second shard has one tensor more than the index.", more)


def json_cases() -> Iterator[Invalid]:
    """DIR-8: keys given twice, and constants that JSON does not have."""
    good = small().files()
    config = good["config.json"]

    def configured(old: str, new: str) -> Files:
        return {**good, "config.json": replaced(config, old, new)}

    def in_header(old: str, new: str, model: Model | None = None) -> Files:
        model = model or small()
        text = compact(header_of(model.tensors, model.metadata)).encode()
        return {**good, "model.safetensors": file_of(replaced(text, old, new), data_of(model.tensors))}

    kind = '"kind": "linear"'
    yield refused(
        "config-top",
        "DIR-8",
        "A key of config.json twice.",
        configured('"hidden_size"', '"model_type": "x", "hidden_size"'),
    )
    yield refused("config-module", "DIR-8", "A key of a module twice.", configured(kind, f"{kind}, {kind}"))
    yield refused("config-scheme", "DIR-8", "A key of a scheme twice.", configured('"bits": 2', '"bits": 3, "bits": 2'))
    entry = '"fc": {"scheme": "bcq-2-0", "kind": "linear", "shape": [1, 5]}'
    yield refused("config-path", "DIR-8", "A module twice.", configured('"modules": {', '"modules": {' + entry + ","))
    yield refused(
        "config-escape", "DIR-8", "A key twice, once escaped.", configured(kind, f'{kind}, "\\u006bind": "linear"')
    )
    for constant in ("NaN", "Infinity", "-Infinity"):
        new = configured('"tied": {}', f'"tied": {{}}, "note": {constant}')
        yield refused(constant.lower(), "DIR-8", f"The constant {constant} in quantization_config.", new)

    bias = compact({"fc.bias": header_of(small().tensors)["fc.bias"]})[1:-1]
    yield refused("header-tensor", "DIR-8", "A tensor twice in the header.", in_header(bias, f"{bias},{bias}"))
    yield refused(
        "header-field", "DIR-8", "A field of a tensor twice.", in_header('"dtype":"F32"', '"dtype":"F32","dtype":"F32"')
    )
    meta = '"__metadata__":{"format":"pt"}'
    yield refused("header-metadata", "DIR-8", "__metadata__ twice.", in_header(meta, f"{meta},{meta}"))
    yield refused(
        "header-metadata-key",
        "DIR-8",
        "A key of __metadata__ twice.",
        in_header('"format":"pt"', '"format":"pt","format":"pt"'),
    )

    indexed = small().sharded(list(small().tensors))
    item = '"fc.bias": "model-00001-of-00001.safetensors"'
    indexed[INDEX] = replaced(indexed[INDEX], item, f"{item}, {item}")
    yield refused("index", "DIR-8", "A tensor twice in the index.", indexed)

    hashed = small()
    pair = compact({"fc.bias": hashed.tensors["fc.bias"].sha256()})[1:-1]
    hashed.metadata = {"lowbit.digests": "{" + pair + "," + pair + "}"}
    yield refused("digests", "DIR-8", "A tensor twice in the digests.", hashed)


def config_cases() -> Iterator[Invalid]:
    def edited(slug: str, rule: str, about: str, edit: Callable[[Json], Any], model: Model | None = None) -> Invalid:
        model = model or small()
        edit(model.quant)
        return refused(slug, rule, about, model)

    def put(**values: Any) -> Callable[[Json], Any]:
        return lambda quant: quant.update(values)

    def drop(key: str) -> Callable[[Json], Any]:
        return lambda quant: quant.pop(key)

    yield edited("method", "CFG-1", "quant_method is another method.", put(quant_method="gptq"))
    yield edited("method-missing", "CFG-1", "No quant_method.", drop("quant_method"))
    yield edited("version-missing", "CFG-1", "No format_version.", drop("format_version"))
    for slug, version in {
        "number": 1.0, "short": "1", "long": "1.0.0", "leading-zero": "01.0", "minor-leading-zero": "1.00",
        "sign": "+1.0", "space": " 1.0", "line-feed": "1.0\n", "other-digits": "1.\u0663", "empty-minor": "1.",
    }.items():  # fmt: skip
        about = f"format_version is {json.dumps(version)}."
        yield edited(f"version-{slug}", "CFG-1", about, put(format_version=version))
    yield edited("major-2", "VER-1", "Another major version.", put(format_version="2.0"))
    yield edited("major-0", "VER-1", "Another major version.", put(format_version="0.9"))
    yield edited("major-10", "VER-1", "A major version that begins with 1.", put(format_version="10.0"))

    yield edited("schemes-missing", "CFG-2", "No schemes.", drop("schemes"))
    yield edited("schemes-list", "CFG-2", "schemes is a list.", lambda q: q.update(schemes=list(q["schemes"].values())))
    yield edited(
        "empty-name", "CFG-2", "A scheme with an empty name.", lambda q: q["schemes"].update({"": scheme("bcq", 1)})
    )
    yield edited("scheme-list", "CFG-3", "A scheme is a list.", lambda q: q["schemes"].update(other=["bcq"]))
    yield from scheme_cases()

    yield edited("modules-missing", "CFG-4", "No modules.", drop("modules"), Model("none").plain("norm.weight", 2))
    yield edited("modules-list", "CFG-4", "modules is a list.", put(modules=[]), Model("none").plain("norm.weight", 2))
    for slug, path in {
        "empty": "", "long": "m" * 513, "control": "a\tb", "delete": "a\x7fb", "slash": "a/b", "backslash": "a\\b"
    }.items():  # fmt: skip
        # The tensors' names are as the path asks, unless the header itself would then be wrong.
        model = Model(slug).add(path, scheme("bcq", 1), [1, 3])
        if slug in ("control", "delete"):
            model.tensors = {}
        yield refused(f"path-{slug}", "CFG-4", f"A path that is not allowed: {slug}.", model)

    def entry(slug: str, rule: str, about: str, edit: Callable[[Json], Any], model: Model | None = None) -> Invalid:
        return edited(slug, rule, about, lambda quant: edit(quant["modules"]["fc"]), model)

    yield entry("scheme-unknown", "CFG-4", "A module names a scheme that does not exist.", put(scheme="none"))
    yield entry("scheme-number", "CFG-4", "A module's scheme is a number.", put(scheme=0))
    for key in ("scheme", "kind", "shape"):
        yield entry(f"no-{key}", "CFG-4", f"A module without {key}.", drop(key))
    yield entry("extra-key", "CFG-4", "A module with a fourth key.", put(dtype="F32"))
    yield edited("entry-list", "CFG-4", "A module's entry is a list.", lambda q: q["modules"].update(fc=["bcq-2-0"]))

    yield entry("unknown", "CFG-5", "A kind that does not exist.", put(kind="conv2d"))
    yield entry("case", "CFG-5", "A kind in capital letters.", put(kind="Linear"))
    yield entry("number", "CFG-5", "A kind that is a number.", put(kind=1))
    yield entry("three-numbers", "CFG-5", "A linear module with three numbers in its shape.", put(shape=[1, 1, 5]))
    yield entry("one-number", "CFG-5", "A linear module with one number in its shape.", put(shape=[5]))
    two = Model("two").add("fc", scheme("bcq", 1), [1, 2, 3], "experts")
    yield entry("experts-two-numbers", "CFG-5", "Experts with two numbers in their shape.", put(shape=[2, 3]), two)

    for slug, shape in {
        "zero": [0, 5], "negative": [-1, 5], "too-large": [2**31, 5], "too-large-cols": [1, 2**31],
        "beyond-i64": [2**63, 5],
        "wraps-to-1": [2**64 + 1, 5], "fraction": [1.5, 5], "string": ["1", 5], "null": [None, 5], "boolean": [True, 5],
    }.items():  # fmt: skip
        yield entry(slug, "CFG-6", f"The shape {json.dumps(shape)}.", put(shape=shape))

    wrong_tied: Json = {"list": [], "null": None, "value": {"lm_head": 1}}
    for slug, tied in wrong_tied.items():
        yield edited(f"tied-{slug}", "CFG-7", f"tied is {json.dumps(tied)}.", put(tied=tied))
    for slug, prefix in {"null": None, "list": ["model"], "boolean": False}.items():
        yield edited(
            f"prefix-{slug}", "CFG-7", f"base_model_prefix is {json.dumps(prefix)}.", put(base_model_prefix=prefix)
        )


def scheme_cases() -> Iterator[Invalid]:
    """CFG-3. The tensors are what a reader without the check would expect, wherever there is such a thing."""

    def case(slug: str, about: str, built: Json, shape: list[int] | None = None, **changes: Any) -> Invalid:
        model = small(way=copy.deepcopy(built), shape=shape)
        (name,) = model.quant["schemes"]
        model.quant["schemes"][name].update(changes)
        return refused(slug, "CFG-3", about, model)

    plain, uniform, table = scheme("bcq", 2, 4), scheme("uniform", 2, 4), scheme("codebook", 2, 4)
    yield case("unknown-key", "A key that the scheme table does not have.", plain, rotation=True)
    yield case("codec", "An unknown codec.", plain, codec="int4")
    yield case("codec-case", "A codec in capital letters.", plain, codec="BCQ")
    yield case("dtype", "A scale_dtype that is not allowed.", plain, scale_dtype="F64")
    yield case("dtype-case", "A scale_dtype in small letters.", plain, scale_dtype="f16")
    for key in ("codec", "bits", "group_size", "scale_dtype"):
        model = small(way=copy.deepcopy(plain))
        del next(iter(model.quant["schemes"].values()))[key]
        yield refused(f"no-{key.replace('_', '-')}", "CFG-3", f"A scheme without {key}.", model)
    yield case("bits-0", "bits is 0.", plain, bits=0)
    yield case("bits-9", "bits is 9.", scheme("bcq", 9, 4))
    yield case("bits-negative", "bits is -1.", plain, bits=-1)
    yield case("bits-fraction", "bits is 2.5.", plain, bits=2.5)
    yield case("bits-string", "bits is a string.", plain, bits="2")
    yield case("bits-true", "bits is true, and the tensors are those of one bit.", scheme("bcq", 1, 4), bits=True)
    yield case("group-size-negative", "group_size is -1.", scheme("bcq", 2, 0), group_size=-1)
    yield case("group-size-large", "group_size is 2^31.", scheme("bcq", 2, 2**31))
    yield case("group-size-false", "group_size is false.", scheme("bcq", 2, 0), group_size=False)
    yield case("group-size-null", "group_size is null.", scheme("bcq", 2, 0), group_size=None)
    yield case("offset-number", "offset is 1.", scheme("bcq", 2, 4, offset=True), offset=1)
    yield case("offset-null", "offset is null.", plain, offset=None)
    yield case("row-bits-string", "row_bits is a string.", plain, row_bits="")
    yield case("label", "label is a number.", plain, label=7)
    yield case("offset-uniform", "offset for uniform.", uniform, offset=True)
    yield case("offset-codebook", "offset for codebook.", table, offset=True)
    yield case("nested-codebook", "nested for codebook.", table, nested=[1])
    model = small(way=scheme("codebook", 2), shape=[3, 2])
    next(iter(model.quant["schemes"].values()))["row_bits"] = True
    yield refused("row-bits-codebook", "CFG-3", "row_bits for codebook.", model)
    wide = scheme("bcq", 4, 4)
    yield case("nested-number", "nested is a number.", scheme("bcq", 4, 4, nested=[2]), nested=2)
    yield case("nested-null", "nested is null.", wide, nested=None)
    yield case("nested-order", "nested is not ascending.", scheme("bcq", 4, 4, nested=[2, 1]))
    yield case("nested-twice", "nested has a number twice.", scheme("bcq", 4, 4, nested=[2]), nested=[2, 2])
    yield case("nested-0", "nested has 0.", wide, nested=[0])
    yield case("nested-bits", "nested has the full number of bits.", scheme("bcq", 4, 4, nested=[4]))
    yield case("nested-true", "nested has true.", scheme("bcq", 4, 4, nested=[1]), nested=[True])
    yield case("nested-string", "nested has a string.", scheme("bcq", 4, 4, nested=[2]), nested=["2"])


def header_cases() -> Iterator[Invalid]:
    model = small()
    good, data = model.files(), data_of(model.tensors)
    content = good["model.safetensors"]
    text = compact(header_of(model.tensors, model.metadata))
    header_end = 8 + struct.unpack("<Q", content[:8])[0]

    def stored(slug: str, rule: str, about: str, content: bytes) -> Invalid:
        return refused(slug, rule, about, {**good, "model.safetensors": content})

    for count in (0, 7):
        yield stored(f"truncated-{count}", "HDR-1", f"A file of {count} bytes.", content[:count])
    yield stored("truncated-8", "HDR-1", "The file ends behind the header's length.", content[:8])
    yield stored("truncated-header", "HDR-1", "The file ends inside the header.", content[: header_end - 1])
    for slug, length in {
        "0": 0, "1": 1, "above-limit": 100_000_001, "past-end": len(content) - 7, "2-to-31": 2**31, "2-to-32": 2**32,
        "2-to-63": 2**63, "largest": 2**64 - 1, "wraps": 2**64 - 8,
    }.items():  # fmt: skip
        yield stored(
            f"length-{slug}", "HDR-1", f"A header's length of {length}.", struct.pack("<Q", length) + content[8:]
        )

    yield stored("leading-space", "HDR-2", "A space before the header.", file_of(" " + text, data))
    yield stored("byte-order-mark", "HDR-2", "A byte order mark before the header.", file_of("\ufeff" + text, data))
    yield stored("padding-zero", "HDR-2", "A zero byte as padding.", file_of(text + "\0", data))
    yield stored("padding-line-feed", "HDR-2", "A line feed as padding.", file_of(text + "\n", data))
    yield stored("text-behind", "HDR-2", "An object behind the header.", file_of(text + " {}", data))
    yield stored("array", "HDR-2", "The header is a list.", file_of("[" + text + "]", data))
    yield stored("not-json", "HDR-2", "The header ends too early.", file_of(text[:-1], data))
    yield stored("trailing-comma", "HDR-2", "A comma before the last brace.", file_of(text[:-1] + ",}", data))
    broken = text.encode().replace(b"norm.weight", b"norm\xff.weight")
    yield stored("not-utf-8", "HDR-2", "A byte that is not UTF-8.", file_of(broken, data))
    yield from entry_cases(good)
    yield from layout_cases(good, content, header_end)


def entry_cases(good: Files) -> Iterator[Invalid]:
    """HDR-3 to HDR-5 and HDR-7: what the header says of `norm.weight`, the last tensor, is wrong."""
    model = small()
    size = len(data_of(model.tensors))

    def edited(
        slug: str, rule: str, about: str, edit: Callable[[Json], Any], tensors: Tensors = model.tensors
    ) -> Invalid:
        header = header_of(tensors, model.metadata)
        edit(header)
        return refused(slug, rule, about, {**good, "model.safetensors": file_of(compact(header), data_of(tensors))})

    def renamed(name: str) -> Callable[[Json], Any]:
        return lambda header: header.update({name: header.pop("norm.weight")})

    def put(**values: Any) -> Callable[[Json], Any]:
        return lambda header: header["norm.weight"].update(values)

    def drop(key: str) -> Callable[[Json], Any]:
        return lambda header: header["norm.weight"].pop(key)

    yield edited("empty-name", "HDR-3", "A tensor with an empty name.", renamed(""))
    yield edited("long-name", "HDR-3", "A name of 1025 characters.", renamed("n" * 1025))
    yield edited("control", "HDR-3", "A line feed in a name.", renamed("norm\nweight"))
    yield edited("nul", "HDR-3", "The character U+0000 in a name.", renamed("norm\0weight"))
    yield edited("delete", "HDR-3", "The character U+007F in a name.", renamed("norm\x7fweight"))
    for key in ("dtype", "shape", "data_offsets"):
        slug = key.replace("_", "-")
        yield edited(f"no-{slug}", "HDR-3", f"A tensor without {key}.", drop(key))
    yield edited("extra-field", "HDR-3", "A fourth field.", put(stride=[1]))
    yield edited("list", "HDR-3", "A list for a tensor.", lambda h: h.update({"norm.weight": ["F32", [2], [32, 40]]}))
    yield edited("null", "HDR-3", "null for a tensor.", lambda h: h.update({"nothing": None}))

    yield edited("unknown", "HDR-4", "A dtype that does not exist.", put(dtype="F33"))
    yield edited("case", "HDR-4", "A dtype in small letters.", put(dtype="f32"))
    yield edited("number", "HDR-4", "A dtype that is a number.", put(dtype=32))

    begin = size - 8
    for slug, shape in {
        "longer": [3], "shorter": [1], "negative": [-1, -2], "fraction": [2.5], "string": ["2"], "number": 2,
        "null": None, "boolean": [True, 2],
    }.items():  # fmt: skip
        yield edited(f"shape-{slug}", "HDR-5", f"The shape {json.dumps(shape)} for two values.", put(shape=shape))
    for slug, offsets in {
        "three": [begin, size, size], "one": [begin], "number": begin, "fraction": [begin + 0.5, size],
        "backwards": [size, begin], "string": [str(begin), str(size)], "negative": [-8, 0],
    }.items():  # fmt: skip
        yield edited(f"offsets-{slug}", "HDR-5", f"The data_offsets {json.dumps(offsets)}.", put(data_offsets=offsets))

    def added(slug: str, about: str, dtype: str, shape: list[int]) -> Invalid:
        entry = {"dtype": dtype, "shape": shape, "data_offsets": [size, size]}
        return edited(slug, "HDR-5", about, lambda header: header.update(empty=entry))

    yield added("wraps-to-0", "A product that is 0 modulo 2^64, and no bytes.", "U8", [2**32, 2**32])
    yield added("bytes-wrap-to-0", "A size in bytes that is 0 modulo 2^64, and no bytes.", "F64", [2**61])
    yield added("wraps-to-0-32", "A product that is 0 modulo 2^32, and no bytes.", "U8", [2**16, 2**16])

    def metadata(value: Any) -> Callable[[Json], Any]:
        return lambda header: header.update(__metadata__=value)

    for slug, value in {
        "number": {"n": 1}, "nested": {"a": {"b": "c"}}, "null": {"a": None}, "list": ["a"], "string": "a",
        "top-null": None,
    }.items():  # fmt: skip
        yield edited(slug, "HDR-7", f"__metadata__ is {json.dumps(value)}.", metadata(value))


def layout_cases(good: Files, content: bytes, header_end: int) -> Iterator[Invalid]:
    """HDR-6: the tensors do not tile the file."""
    model = small()
    data = data_of(model.tensors)
    size = len(data)

    def moved(slug: str, about: str, data: bytes, edit: Callable[[Json], Any]) -> Invalid:
        header = header_of(model.tensors, model.metadata)
        edit(header)
        return refused(slug, "HDR-6", about, {**good, "model.safetensors": file_of(padded(compact(header)), data)})

    def place(name: str, begin: int, end: int, **more: Any) -> Callable[[Json], Any]:
        return lambda header: header.setdefault(name, {}).update(data_offsets=[begin, end], **more)

    def shift_all(header: Json) -> None:
        for name in model.tensors:
            header[name]["data_offsets"] = [offset + 4 for offset in header[name]["data_offsets"]]

    def stored(slug: str, about: str, content: bytes) -> Invalid:
        return refused(slug, "HDR-6", about, {**good, "model.safetensors": content})

    yield stored("no-data", "The file ends behind the header.", content[:header_end])
    yield stored("truncated-middle", "The file ends inside the first tensor.", content[: header_end + 5])
    yield stored("truncated-last", "The last byte is missing.", content[:-1])
    yield stored("byte-behind", "One byte behind the last tensor.", content + b"\0")
    yield stored("bytes-behind", "Sixteen bytes behind the last tensor.", content + bytes(16))
    yield moved(
        "hole",
        "Four bytes between two tensors.",
        data[:-8] + bytes(4) + data[-8:],
        place("norm.weight", size - 4, size + 4),
    )
    yield moved("hole-at-start", "Four bytes before the first tensor.", bytes(4) + data, shift_all)
    yield moved("overlap", "Two tensors share four bytes.", data[:-4], place("norm.weight", size - 12, size - 4))
    alias = place("alias", size - 8, size, dtype="F32", shape=[2])
    yield moved("alias", "Two tensors share all their bytes.", data, alias)
    whole = place("whole", 0, size, dtype="U8", shape=[size])
    yield moved("covering", "One tensor covers all others.", data, whole)
    for power in (31, 62, 63, 64):
        far = place("far", size, size + 2**power, dtype="U8", shape=[2**power])
        yield moved(f"far-2-to-{power}", f"A last tensor of 2^{power} bytes that the file does not have.", data, far)
    inside = place("nothing", size - 4, size - 4, dtype="F32", shape=[0])
    yield moved("empty-inside", "An empty tensor that begins inside another.", data, inside)


def tensor_cases() -> Iterator[Invalid]:
    def changed(slug: str, about: str, changes: Mapping[str, Tensor | None], model: Model | None = None) -> Invalid:
        return altered(slug, "TEN-1", about, changes, model)

    tensors = small().tensors
    for role in ("planes", "scales", "offsets"):
        yield changed(f"no-{role}", f"No {role}.", {f"fc.{role}": None})
    none = small()
    none.tensors = {name: tensor for name, tensor in none.tensors.items() if name in ("fc.bias", "norm.weight")}
    yield refused("no-tensors", "TEN-1", "A module without any tensor.", none)

    planes, scales, offsets = (tensors[f"fc.{role}"] for role in ("planes", "scales", "offsets"))
    yield changed("planes-dtype", "planes in I8.", {"fc.planes": Tensor("I8", planes.shape, planes.data)})
    yield changed(
        "scales-dtype",
        "scales in BF16 where the scheme says F16.",
        {"fc.scales": Tensor("BF16", scales.shape, scales.data)},
    )
    yield changed("offsets-dtype", "offsets in F32 where the scheme says F16.", {"fc.offsets": floats(offsets.f32())})
    yield changed("planes-flat", "planes without the axis of rows.", {"fc.planes": Tensor("U8", (2, 8), planes.data)})
    yield changed("planes-swapped", "planes as [rows, bits, B].", {"fc.planes": Tensor("U8", (1, 2, 8), planes.data)})
    yield changed(
        "planes-narrow", "planes with rows of one byte.", {"fc.planes": Tensor("U8", (2, 1, 1), planes.data[::8])}
    )
    yield changed("planes-wide", "planes with rows of 16 bytes.", {"fc.planes": Tensor("U8", (2, 1, 16), bytes(32))})
    yield changed("planes-more", "One plane too many.", {"fc.planes": Tensor("U8", (3, 1, 8), planes.data + bytes(8))})
    yield changed(
        "scales-one",
        "scales of one plane for bcq of two bits.",
        {"fc.scales": Tensor("F16", (1, 1, 2), scales.data[:4])},
    )
    yield changed(
        "scales-groups",
        "scales of one group where there are two.",
        {"fc.scales": Tensor("F16", (2, 1, 1), scales.data[:4])},
    )
    yield changed(
        "offsets-shape", "offsets with an axis too many.", {"fc.offsets": Tensor("F16", (1, 1, 2), offsets.data)}
    )
    yield changed("scales-k1", "scales_k1 that nested does not list.", {"fc.scales_k1": floats([[[1.0, 1.0]]], "F16")})
    yield changed("zeros-bcq", "zeros for bcq.", {"fc.zeros": offsets})
    yield changed("codebook-bcq", "A codebook for bcq.", {"fc.codebook": floats([0, 1, 2, 3])})
    yield changed(
        "row-bits-extra", "row_bits that the scheme does not call for.", {"fc.row_bits": hexed("U8", (1,), "02")}
    )
    huge = small()
    huge.quant["modules"]["fc"]["shape"] = [2**31 - 1, 2**31 - 1]
    yield refused("huge-shape", "TEN-1", "A shape of (2^31-1)^2: nothing may be allocated for it.", huge)
    more = Model("huge").add("fc", scheme("bcq", 8), [1, 1, 1], "experts")
    more.quant["modules"]["fc"]["shape"] = [2**31 - 1] * 3
    yield refused("huge-experts", "TEN-1", "Experts of (2^31-1)^3: the sizes do not fit in 64 bits.", more)
    yield from codec_tensor_cases(changed)
    yield from neighbour_cases()


def altered(
    slug: str,
    rule: str,
    about: str,
    changes: Mapping[str, Tensor | None],
    model: Model | None = None,
    found_by: str = "open",
) -> Invalid:
    """The small model, or another, with tensors put in, replaced or (None) taken out."""
    model = model or small()
    for name, tensor in changes.items():
        if tensor is None:
            del model.tensors[name]
        else:
            model.tensors[name] = tensor
    return refused(slug, rule, about, model, found_by)


def codec_tensor_cases(changed: Callable[..., Invalid]) -> Iterator[Invalid]:
    plain = scheme("bcq", 2, 4)
    yield changed("offsets-extra", "offsets without offset.", {"fc.offsets": floats([[1, 1]], "F16")}, small(way=plain))
    nested = scheme("bcq", 4, 4, offset=True, nested=[2])
    yield changed("no-scales-k2", "No scales_k2.", {"fc.scales_k2": None}, small(way=nested))
    yield changed("no-offsets-k2", "No offsets_k2.", {"fc.offsets_k2": None}, small(way=nested))
    three = random_floats("k3", "F16", (3, 1, 2))
    yield changed("scales-k3", "scales_k3 that nested does not list.", {"fc.scales_k3": three}, small(way=nested))
    four = random_floats("k2", "F16", (4, 1, 2))
    yield changed("scales-k2-shape", "scales_k2 of four planes.", {"fc.scales_k2": four}, small(way=nested))
    bare = scheme("bcq", 4, 4, nested=[2])
    extra = {"fc.offsets_k2": floats([[1, 1]], "F16")}
    yield changed("offsets-k2-extra", "offsets_k2 without offset.", extra, small(way=bare))
    uniform = scheme("uniform", 3, 4, nested=[2])
    yield changed("no-zeros", "uniform without zeros.", {"fc.zeros": None}, small(way=uniform))
    yield changed("no-zeros-k2", "uniform without zeros_k2.", {"fc.zeros_k2": None}, small(way=uniform))
    yield changed(
        "offsets-uniform", "offsets for uniform.", {"fc.offsets": floats([[1, 1]], "F16")}, small(way=uniform)
    )
    per_plane = {"fc.scales": random_floats("u", "F16", (3, 1, 2))}
    yield changed("scales-uniform", "uniform with scales for each plane.", per_plane, small(way=uniform))
    table = scheme("codebook", 2, 4)
    yield changed("no-codebook", "codebook without its table.", {"fc.codebook": None}, small(way=table))
    half = {"fc.codebook": floats([0, 1, 2, 3], "F16")}
    yield changed("codebook-dtype", "A table in scale_dtype and not in F32.", half, small(way=table))
    yield changed("codebook-short", "A table of three levels.", {"fc.codebook": floats([0, 1, 2])}, small(way=table))

    def ragged() -> Model:
        return small(way=scheme("bcq", 3, row_bits=True), shape=[3, 2], row_bits=[1, 3, 2])

    yield changed("no-row-bits", "No row_bits.", {"fc.row_bits": None}, ragged())
    yield changed("row-bits-dtype", "row_bits in I8.", {"fc.row_bits": Tensor("I8", (3,), b"\1\3\2")}, ragged())
    yield changed(
        "row-bits-shape", "row_bits as [rows, 1].", {"fc.row_bits": Tensor("U8", (3, 1), b"\1\3\2")}, ragged()
    )
    full = {"fc.planes": Tensor("U8", (3, 2, 8), bytes(48))}
    yield changed("ragged-planes-three-axes", "planes with three axes beside row_bits.", full, ragged())
    thin = {"fc.planes": Tensor("U8", (6, 1), bytes(6))}
    yield changed("ragged-planes-narrow", "planes with rows of one byte beside row_bits.", thin, ragged())

    def experts() -> Model:
        return Model("experts").add("fc", scheme("bcq", 2), [2, 1, 5], "experts")

    yield changed("experts-no-scales", "Experts without scales.", {"fc_scales": None}, experts())
    yield changed(
        "experts-zeros", "zeros for experts of bcq.", {"fc_zeros": random_floats("z", "F16", (2, 1, 1))}, experts()
    )
    one = {"fc_planes": Tensor("U8", (2, 2, 8), bytes(32))}
    yield changed("experts-planes-shape", "Experts' planes without an axis.", one, experts())
    own = Model("own-table").add("fc", scheme("codebook", 1), [2, 1, 5], "experts")
    tables = {"fc_codebook": floats([[-1, 1], [-1, 1]])}
    yield changed("experts-codebooks", "A table for each expert where there is one for all.", tables, own)


def neighbour_cases() -> Iterator[Invalid]:
    """TEN-2, TEN-4, TIE-2: tensors that may not stand beside others."""
    yield altered("weight", "TEN-2", "weight beside planes.", {"fc.weight": random_floats("w", "F16", (1, 5))})
    experts = Model("experts").add("mlp.w", scheme("bcq", 1), [2, 1, 5], "experts")
    dense = {"mlp.w": random_floats("w", "F16", (2, 1, 5))}
    yield altered("experts", "TEN-2", "The parameter itself beside its planes.", dense, experts)
    planes = small().tensors["fc.planes"]
    yield altered("orphan", "TEN-4", "planes of a module that is not listed.", {"other.planes": planes})
    yield altered("orphan-experts", "TEN-4", "planes of experts that are not listed.", {"other_planes": planes})
    inner = {"fc.inner.planes": planes}
    yield altered("orphan-below", "TEN-4", "planes of a module below a listed one.", inner)

    def tied(pairs: Json) -> Model:
        model = small()
        model.quant["tied"] = pairs
        return model

    yield refused("self", "TIE-2", "A key of tied that is in modules.", tied({"fc": "fc"}))
    yield refused("unknown", "TIE-2", "A value of tied that is not in modules.", tied({"lm_head": "embed"}))
    yield refused("chain", "TIE-2", "A value of tied that is itself tied.", tied({"lm_head": "fc", "other": "lm_head"}))
    scales = {"lm_head.scales": small().tensors["fc.scales"]}
    yield altered("tensors", "TIE-2", "scales under a key of tied.", scales, tied({"lm_head": "fc"}))


def data_cases() -> Iterator[Invalid]:
    """What only the tensors' data can show."""
    yield from finite_cases()
    yield from padding_cases()

    def ragged(row_bits: str, rows_of_planes: int) -> Model:
        model = small(way=scheme("uniform", 3, row_bits=True), shape=[3, 2], row_bits=[1, 3, 2])
        model.tensors["fc.row_bits"] = hexed("U8", (3,), row_bits)
        model.tensors["fc.planes"] = random_planes("ragged", (rows_of_planes,), 2)
        return model

    for slug, rule, about, row_bits, total in (
        ("zero", "MIX-1", "A row of 0 bits.", "00 03 02", 5),
        ("above", "MIX-1", "A row of more bits than the scheme has.", "01 04 02", 7),
        ("fewer", "MIX-2", "planes has one row fewer than the sum of row_bits.", "01 03 02", 5),
        ("more", "MIX-2", "planes has one row more than the sum of row_bits.", "01 03 02", 7),
    ):
        yield refused(slug, rule, about, ragged(row_bits, total), "verify")

    experts = Model("experts").add("fc", scheme("bcq", 2), [1, 2, 5], "experts")
    next(iter(experts.quant["schemes"].values()))["row_bits"] = True
    yield refused("row-bits", "EXP-2", "row_bits for experts.", experts)
    yield from digest_cases()


def finite_cases() -> Iterator[Invalid]:
    def spoilt(slug: str, about: str, role: str, at: int, text: str, way: Json, **more: Any) -> Invalid:
        model = small(way=way)
        tensor = with_bytes(model.tensors[f"fc.{role}"], at, text)
        return altered(slug, "TEN-3", about, {f"fc.{role}": tensor}, model, "verify")

    half = scheme("bcq", 3, 4, offset=True, nested=[2])
    yield spoilt("scales-nan", "NaN in F16 scales.", "scales", 2, "00 7e", half)
    yield spoilt("scales-inf", "Infinity in F16 scales.", "scales", 0, "00 7c", half)
    yield spoilt("scales-negative-inf", "Negative infinity in F16 scales.", "scales", 10, "00 fc", half)
    yield spoilt("scales-signalling-nan", "A signalling NaN in F16 scales.", "scales", 10, "01 7c", half)
    yield spoilt("offsets-nan", "NaN in offsets.", "offsets", 2, "00 fe", half)
    yield spoilt("scales-k2-nan", "NaN in scales_k2.", "scales_k2", 0, "00 7e", half)
    yield spoilt("offsets-k2-inf", "Infinity in offsets_k2.", "offsets_k2", 0, "00 7c", half)
    yield spoilt("scales-bf16-nan", "NaN in BF16 scales.", "scales", 0, "c0 7f", scheme("bcq", 2, 4, "BF16"))
    yield spoilt("scales-bf16-inf", "Infinity in BF16 scales.", "scales", 0, "80 7f", scheme("bcq", 2, 4, "BF16"))
    yield spoilt("scales-f32-nan", "NaN in F32 scales.", "scales", 4, "01 00 80 7f", scheme("bcq", 2, 4, "F32"))
    yield spoilt("zeros-inf", "Infinity in zeros.", "zeros", 0, "00 7c", scheme("uniform", 2, 4))
    yield spoilt("codebook-nan", "NaN in the codebook.", "codebook", 12, "00 00 c0 7f", scheme("codebook", 2, 4))


def padding_cases() -> Iterator[Invalid]:
    def dirty(slug: str, about: str, model: Model, name: str, at: int, value: int) -> Invalid:
        tensor = model.tensors[name]
        spoilt = with_bytes(tensor, at, f"{tensor.data[at] | value:02x}")
        assert spoilt != tensor
        return altered(slug, "BIT-3", about, {name: spoilt}, model, "verify")

    yield dirty("next-column", "The bit behind the last column is 1.", small(), "fc.planes", 0, 1 << 5)
    yield dirty("last-byte", "The last bit of a row is 1.", small(), "fc.planes", 7, 1 << 7)
    yield dirty("last-plane", "A bit behind the columns of the last plane is 1.", small(), "fc.planes", 9, 1)
    wide = small(way=scheme("bcq", 1), shape=[2, 65])
    yield dirty("second-word", "A bit behind column 64 of 65 is 1.", wide, "fc.planes", 8, 2)
    ragged = small(way=scheme("uniform", 3, row_bits=True), shape=[3, 2], row_bits=[1, 3, 2])
    yield dirty("ragged", "A bit behind the columns of a ragged module is 1.", ragged, "fc.planes", 40, 4)
    experts = Model("experts").add("fc", scheme("bcq", 2), [2, 1, 5], "experts")
    yield dirty("experts", "A bit behind the columns of the last expert is 1.", experts, "fc_planes", 30, 1)


def digest_cases() -> Iterator[Invalid]:
    def hashed(slug: str, rule: str, about: str, text: str, found_by: str = "open") -> Invalid:
        model = small()
        model.metadata = {"lowbit.digests": text}
        return refused(slug, rule, about, model, found_by)

    right = digests_of(small().tensors)
    bias = right["fc.bias"]
    assert bias != bias.upper()
    yield hashed("not-json", "DIG-1", "The digests are not JSON.", "sha256")
    yield hashed("array", "DIG-1", "The digests are a list.", compact(list(right.values())))
    for slug, value in {
        "upper-case": bias.upper(), "short": bias[:-1], "long": bias + "0", "line-feed": bias + "\n",
        "not-hex": "g" + bias[1:], "number": 1, "null": None, "empty": "",
    }.items():  # fmt: skip
        yield hashed(slug, "DIG-1", f"A digest that is ill-formed: {slug}.", compact({**right, "fc.bias": value}))
    absent = compact({**right, "in.another.file": "x"})
    yield hashed("absent-tensor", "DIG-1", "An ill-formed digest for a tensor not in this file.", absent)
    wrong = hashlib.sha256(b"other").hexdigest()
    for name in ("fc.planes", "norm.weight"):
        about = f"The digest of {name} differs."
        yield hashed(name.replace(".", "-"), "DIG-3", about, compact({**right, name: wrong}), "verify")


def invalid_cases() -> Iterator[Invalid]:
    yield from directory_cases()
    yield from json_cases()
    yield from config_cases()
    yield from header_cases()
    yield from tensor_cases()
    yield from data_cases()


# -------------------------------------------------------------------------------------------------------- bundles


def example_base() -> Model:
    roles = {
        "planes": random_planes("bundle-example-base", (2, 2), 3),
        "scales": floats([[[1.0], [2.0]], [[0.5], [0.25]]], "F16"),
    }
    return Model("bundle-example-base").add("fc", scheme("bcq", 2), [2, 3], roles=roles)


def task_base() -> Model:
    model = (
        Model("bundle-base")
        .add("model.layers.0.fc", scheme("bcq", 3, 4, offset=True, nested=[2]), [2, 6])
        .add("model.layers.0.up", scheme("uniform", 4, 0, "F32", nested=[2]), [3, 5])
        .add("model.layers.0.lut", scheme("codebook", 2, 4, "BF16"), [2, 6])
        .add("model.layers.0.ragged", scheme("bcq", 2, 0, row_bits=True), [3, 4], row_bits=[1, 2, 2])
        .add("model.experts.w", scheme("bcq", 2, 4, offset=True), [2, 3, 5], "experts")
        .add("score", scheme("bcq", 2), [2, 6])
    )
    model.quant["base_model_prefix"] = "model"
    return model


def edge_base() -> Model:
    """`big` and `zp` overflow where 2^127 is added once more, or a scale of 2^127 doubled."""
    big, small = 2.0**127, 2.0**-100
    model = Model("bundle-edge-base")
    zero = {"scales": floats([[[-0.0], [0.0]], [[-0.0], [1.0]]]), "offsets": floats([[-0.0], [0.0]])}
    tiny = {"scales": floats([[[2.0**-126], [-3 * 2.0**-149]]]), "zeros": floats([[2.0**-126], [1.0]])}
    huge = {"scales": floats([[[1.0], [big]]]), "offsets": floats([[big], [0.0]])}
    zp = {"scales": floats([[[small], [1.0]]]), "zeros": floats([[big], [-0.0]])}
    for path, way, roles in (
        ("zero", scheme("bcq", 2, 0, "F32", offset=True), zero),
        ("tiny", scheme("uniform", 2, 0, "F32"), tiny),
        ("huge", scheme("bcq", 1, 0, "F32", offset=True), huge),
        ("zp", scheme("uniform", 2, 0, "F32"), zp),
    ):
        planes = random_planes(f"bundle-edge-base/{path}", (way["bits"], 2), 3)
        model.add(path, way, [2, 3], roles={"planes": planes, **roles})
    return model


def names_base() -> Model:
    model = (
        Model("bundle-names-base")
        .add("model.fc", scheme("bcq", 2), [2, 3])
        .add("fc", scheme("bcq", 2), [2, 3])
        .add("model.embed", scheme("uniform", 3, nested=[2]), [3, 4], "embedding")
    )
    model.quant["base_model_prefix"] = "model"
    model.quant["tied"] = {"lm_head": "model.embed"}
    return model


@dataclass
class Bundle:
    """A task bundle in the making."""

    base: Valid
    deltas: Tensors
    changes: Json = field(default_factory=dict)
    metadata: dict[str, str] | None = None
    omitted: tuple[str, ...] = ()  # keys of task_config.json

    def config(self) -> Json:
        full = self.whole_config()
        return {key: value for key, value in full.items() if key not in self.omitted}

    def whole_config(self) -> Json:
        prints = fingerprints(self.base.model)
        return {
            "format": "lowbit-task",
            "format_version": "1.0",
            "base_model_name_or_path": "example/base",
            "revision": None,
            "base_fingerprint": prints["fingerprint"],
            "head_fingerprint": prints["head_fingerprint"],
            "method": "alphatuning",
            "bits": None,
            "modules_to_save": [],
            **self.changes,
        }

    def files(self) -> Files:
        scales = safetensors(self.deltas, self.metadata)
        return {"task_config.json": pretty(self.config()), "task_scales.safetensors": scales}

    def base_path(self) -> str:
        return f"valid/{self.base.name}/model"

    def effective(self) -> Tensors:
        """The scales, offsets and zeros, with the deltas applied, of every module that has a delta."""
        model, bits = self.base.model, self.whole_config()["bits"]
        body, head = body_and_head(model)
        names = body | {name: path for name, path in head.items() if name not in body}
        result: Tensors = {}
        for name, path in names.items():
            if not any(delta.rpartition(".")[0].rpartition(".")[0] == name for delta in self.deltas):
                continue
            module = module_of(model, path)
            suffix = "" if bits is None or module.way["bits"] <= bits else f"_k{bits}"
            for role in ("scales", "offsets", "zeros"):
                if role + suffix in module.roles:
                    value = module.roles[role + suffix].f32()
                    result[f"{name}.{role}"] = floats(adapted(value, f"{name}.{role}", self.deltas))
        return result


def adapted(value: np.ndarray, name: str, deltas: Tensors) -> np.ndarray:
    """The table of TSK-6. Planes are the third axis from the end, so experts need nothing of their own."""
    value = value.copy()
    if f"{name}.mul" in deltas:
        delta = deltas[f"{name}.mul"].f32()[..., None]
        p = delta.shape[-3]
        factor = np.float32(1) + delta
        value[..., :p, :, :] = value[..., :p, :, :] * factor
    if f"{name}.add" in deltas:
        delta = deltas[f"{name}.add"].f32()
        if name.endswith(".scales"):
            p = delta.shape[-3]
            value[..., :p, :, :] = value[..., :p, :, :] + delta
        else:
            value = value + delta
    return value


@dataclass(frozen=True)
class ValidBundle:
    name: str
    about: str
    bundle: Bundle
    at: int | str | None = "own"  # precision to apply it at

    def outputs(self) -> Files:
        bits = self.bundle.whole_config()["bits"] if self.at == "own" else self.at
        expected = {"base": self.bundle.base_path(), "bits": bits, "about": self.about}
        effective = self.bundle.effective()
        assert all(np.isfinite(tensor.f32()).all() for tensor in effective.values()), f"{self.name} breaks MAT-6"
        return {f"bundle/{path}": content for path, content in self.bundle.files().items()} | {
            "expected.safetensors": safetensors(effective),
            "expected.json": pretty(expected),
        }


@dataclass(frozen=True)
class InvalidBundle:
    name: str
    rule: str
    about: str
    base: str
    files: Files
    at: int | str | None = "own"  # precision to apply it at

    def outputs(self) -> Files:
        at = {} if self.at == "own" else {"bits": self.at}
        expected = {"rule": self.rule, "base": self.base, **at, "about": self.about}
        bundle = {f"bundle/{path}": content for path, content in self.files.items()}
        return {**bundle, "expected.json": pretty(expected)}


def random_delta(label: str, *shape: int, dtype: str = "F32") -> Tensor:
    return random_floats(f"delta/{label}", dtype, shape)


def sensitive_delta(base: Model) -> Tensor:
    """Deltas for `layers.0.up` where `scale + scale * delta`, fused or not, differs from the two steps of TSK-8."""
    scales = module_of(base, "model.layers.0.up").roles["scales"].f32()[0, :, 0]
    chosen: list[np.float32] = []
    for r, scale in enumerate(scales):

        def wanted(draw: np.ndarray, scale: np.float32 = scale) -> bool:
            right = scale * (np.float32(1) + draw[0])
            fused = nearest32(exactly(scale) + exactly(scale) * exactly(draw[0]))
            return right not in (fused, scale + scale * draw[0])

        chosen.append(search(f"bundle/rounding/{r}", 1, 1, wanted)[0][0])
    return floats(np.array(chosen, np.float32)[None, :])


def bundles() -> Iterator[ValidBundle]:
    example, base, edge, named = bundle_bases()
    delta = hexed("F32", (1, 2), "00 00 00 3e 00 00 80 be")
    worked = Bundle(example, {"fc.scales.mul": delta})
    assert np.array_equal(delta.f32(), np.array([[0.125, -0.25]], np.float32))
    assert np.array_equal(worked.effective()["fc.scales"].f32()[..., 0], np.array([[1.125, 1.5], [0.5, 0.25]]))
    yield ValidBundle("example", "Section 4 of BUNDLE.md.", worked)

    every = {
        "layers.0.fc.scales.mul": random_delta("fc", 3, 2),
        "layers.0.fc.offsets.add": random_delta("fc.offsets", 2, 2, dtype="F16"),
        "layers.0.up.scales.add": random_delta("up", 1, 3, 1, dtype="BF16"),
        "layers.0.up.zeros.add": random_delta("up.zeros", 3, 1),
        "layers.0.lut.scales.mul": random_delta("lut", 1, 2, dtype="BF16"),
        "layers.0.ragged.scales.mul": random_delta("ragged", 2, 3, dtype="F16"),
        "experts.w.scales.mul": random_delta("experts", 2, 1, 3),
        "experts.w.offsets.add": random_delta("experts.offsets", 2, 3, 2),
        "score.scales.add": random_delta("score", 1, 2, 1),
    }
    yield ValidBundle(
        "all-deltas", "Every kind of delta in every dtype, on every kind of module and the head.", Bundle(base, every)
    )
    added = {
        "layers.0.fc.scales.add": random_delta("fc.add", 2, 2, 2),
        "experts.w.scales.add": random_delta("e", 2, 2, 3, 2),
    }
    yield ValidBundle(
        "scales-add", "Added deltas for some planes of a module and for all planes of experts.", Bundle(base, added)
    )

    nested = {
        "layers.0.fc.scales.mul": random_delta("k2", 2, 2),
        "layers.0.fc.offsets.add": random_delta("k2.offsets", 2, 2),
        "layers.0.up.zeros.add": random_delta("k2.zeros", 3, 1),
        "score.scales.mul": random_delta("k2.score", 2, 2),
    }
    yield ValidBundle(
        "nested", "Tuned at precision 2; a module of 2 bits uses its own scales.", Bundle(base, nested, {"bits": 2})
    )

    rounding = {"layers.0.up.scales.mul": sensitive_delta(base.model)}
    yield ValidBundle(
        "rounding", "Deltas where a fused or other order of operations gives other bits.", Bundle(base, rounding)
    )

    zero = {"layers.0.fc.scales.mul": floats([[0.0, -0.0]]), "layers.0.up.zeros.add": floats([[0.0], [-0.0], [0.0]])}
    yield ValidBundle("zero", "Zero deltas of both signs: the base's own values.", Bundle(base, zero))

    elsewhere = Bundle(base, {"layers.0.fc.scales.mul": random_delta("x", 1, 2)}, {"head_fingerprint": "0" * 64})
    yield ValidBundle("other-head", "Another head's fingerprint, which no delta of this bundle needs.", elsewhere)

    saved = {
        "layers.0.fc.scales.mul": random_delta("saved", 1, 2),
        "modules_to_save.classifier.weight": random_delta("w", 2, 6, dtype="F16"),
        "modules_to_save.classifier.bias": random_delta("b", 2),
        "modules_to_save.layers.0.norm.weight": random_delta("n", 6),
    }
    extra = {
        "modules_to_save": ["classifier", "layers.0.norm"],
        "revision": "main",
        "format_version": "1.3",
        "note": [1],
    }
    bundle = Bundle(base, saved, extra, digest_metadata(digests_of(saved)))
    yield ValidBundle(
        "modules-to-save", "Two modules kept whole, digests, a newer minor version, an unknown key.", bundle
    )
    only = Bundle(
        base, {"modules_to_save.classifier.weight": random_delta("w", 2, 6)}, {"modules_to_save": ["classifier"]}
    )
    yield ValidBundle("only-modules-to-save", "No delta at all, only a module kept whole.", only)
    yield from config_bundles(base)
    yield from saved_bundles(base)
    yield from edge_bundles(edge)
    yield from named_bundles(base, named)


def config_bundles(base: Valid) -> Iterator[ValidBundle]:
    """TSK-1, TSK-5, MAT-3."""
    deltas = {"layers.0.fc.scales.mul": random_delta("config", 3, 2), "layers.0.up.zeros.add": random_delta("z", 3, 1)}
    optional = ("base_model_name_or_path", "revision", "head_fingerprint", "bits", "modules_to_save")
    bare = Bundle(base, deltas, {"method": ""}, omitted=optional)
    yield ValidBundle("required-keys", "No key but the required ones; method is the empty string.", bare)
    unknown: Json = {
        "peft_type": "LORA", "modules": {"layers.0.fc": None}, "tied": [], "Bits": 9, "": 1e300, "huge": 10**30,
        "base_model_prefix": "x", "quant_method": "lowbit", "created": "2024-01-01\n", "deep": [[[[{}]]]],
    }  # fmt: skip
    bundle = Bundle(base, deltas, unknown, {"format": "np", "made by": "someone"})
    yield ValidBundle("unknown-keys", "Unknown keys in task_config.json and in the header's metadata.", bundle)
    about = "Tuned at precision 4, which is the base's own: no module has more than 4 bits."
    yield ValidBundle("precision-4-at-own", about, Bundle(base, deltas, {"bits": 4}), at=None)
    about = "Tuned at the base's own bits, applied at precision 8, which is the same."
    yield ValidBundle("precision-own-at-8", about, Bundle(base, deltas), at=8)


def saved_bundles(base: Valid) -> Iterator[ValidBundle]:
    """TSK-6, TSK-10."""
    integers = {
        "modules_to_save.norm.num_batches_tracked": hexed("I64", (), "07 00 00 00 00 00 00 80"),
        "modules_to_save.norm.mask": hexed("BOOL", (3,), "01 00 01"),
        "modules_to_save.norm.table": hexed("F8_E4M3", (2, 1), "7f 80"),
        "modules_to_save.norm.empty": hexed("C64", (0, 2), ""),
    }
    about = "Saved tensors that are not floats, with no axis, and with no number."
    yield ValidBundle("saved-dtypes", about, Bundle(base, integers, {"modules_to_save": ["norm"]}))
    dotted = {
        "layers.0.fc.scales.mul": random_delta("dotted", 1, 2),
        "modules_to_save.a.weight": random_delta("a.weight", 2),
        "modules_to_save.a.b.weight": random_delta("a.b.weight", 3),
        "modules_to_save.a.bc.parametrizations.weight.original0": random_delta("a.bc", 1),
        "modules_to_save.c.d.e": random_delta("c.d.e", 2),
        "modules_to_save.modules_to_save.scales.mul": hexed("U8", (1,), "01"),
    }
    listed = {"modules_to_save": ["a", "a.b", "c", "modules_to_save"]}
    about = "Parameters with dots in their names, listed modules inside of one another, a parameter named like a delta."
    yield ValidBundle("saved-dots", about, Bundle(base, dotted, listed))


def edge_bundles(edge: Valid) -> Iterator[ValidBundle]:
    """MAT-5, TSK-8, and the edge of MAT-6."""
    added = {
        "zero.scales.add": floats([[[0.0], [-0.0]], [[-0.0], [0.0]]]),
        "zero.offsets.add": floats([[0.0], [-0.0]]),
        "zp.zeros.add": floats([[0.0], [0.0]]),
    }
    bundle = Bundle(edge, added)
    words = {name: tensor.f32().view(np.uint32).ravel() for name, tensor in bundle.effective().items()}
    assert words["zero.scales"].tolist() == [0, 0, 1 << 31, 127 << 23]
    assert words["zero.offsets"].tolist() == [0, 0]
    assert words["zp.zeros"][1] == 0
    yield ValidBundle("zero-add", "Zeros of both signs, added to zeros of both signs.", bundle)
    kept = {"zero.scales.mul": floats([[0.0, -0.0], [-0.0, 0.0]]), "zero.offsets.add": floats([[-0.0], [-0.0]])}
    yield ValidBundle("zero-kept", "Zero factors, and an added -0.0: -0.0 stays what it is.", Bundle(edge, kept))
    small = {
        "tiny.scales.mul": floats([[-0.75, 0.5]]),
        "tiny.zeros.add": floats([[-(2.0**-127)], [2.0**-149]]),
        "zero.scales.add": floats([[[2.0**-149], [-(2.0**-130)]]]),
    }
    bundle = Bundle(edge, small)
    assert bundle.effective()["tiny.scales"] == floats([[[2.0**-128], [-4 * 2.0**-149]]])
    yield ValidBundle("subnormal", "Subnormal deltas and effective values, which are kept; a tie to even.", bundle)
    most = {"huge.scales.mul": floats([[3.0, 1 - 2.0**-23]]), "huge.offsets.add": floats([[2.0**127 - 2.0**104], [0]])}
    bundle = Bundle(edge, most)
    largest = float(np.finfo(np.float32).max)
    assert bundle.effective()["huge.scales"] == floats([[[4.0], [largest]]])
    assert bundle.effective()["huge.offsets"] == floats([[largest], [0.0]])
    yield ValidBundle("largest", "Effective values that are the largest finite number.", bundle)


def named_bundles(base: Valid, named: Valid) -> Iterator[ValidBundle]:
    """TSK-7."""
    deltas = {"fc.scales.mul": random_delta("names", 2, 2)}
    bundle = Bundle(named, deltas, {"head_fingerprint": "0" * 64})
    yield ValidBundle("body-before-head", "A name that a module of the body has and one of the head.", bundle)
    tied = {"embed.scales.mul": random_delta("embed", 1, 3), "embed.zeros.add": random_delta("embed.zeros", 3, 1)}
    yield ValidBundle("tied", "Deltas on a matrix that is used in two places.", Bundle(named, tied))
    unused = {"layers.0.ragged.scales.add": floats([[[1.0], [2.0], [-4.0]], [[8.0], [0.5], [-0.25]]])}
    bundle = Bundle(base, unused)
    assert bundle.effective()["layers.0.ragged.scales"].f32()[1, 0, 0] == 8
    yield ValidBundle("unused-entries", "An added delta on a plane that the row does not have.", bundle)


def invalid_bundles() -> Iterator[InvalidBundle]:
    _, base, edge, named = bundle_bases()
    good: Tensors = {"layers.0.fc.scales.mul": random_delta("good", 1, 2)}
    prints = fingerprints(base.model)

    def wrong(slug: str, rule: str, about: str, bundle: Bundle | Files) -> InvalidBundle:
        files = bundle.files() if isinstance(bundle, Bundle) else bundle
        return InvalidBundle(f"{rule.lower()}-{slug}", rule, about, f"valid/{base.name}/model", files)

    def configured(slug: str, rule: str, about: str, **changes: Any) -> InvalidBundle:
        return wrong(slug, rule, about, Bundle(base, good, changes))

    def without(slug: str, rule: str, key: str) -> InvalidBundle:
        bundle = Bundle(base, good)
        config = {name: value for name, value in bundle.config().items() if name != key}
        return wrong(slug, rule, f"No {key}.", {**bundle.files(), "task_config.json": pretty(config)})

    def holding(slug: str, rule: str, about: str, deltas: Tensors, **changes: Any) -> InvalidBundle:
        return wrong(slug, rule, about, Bundle(base, deltas, changes))

    files = Bundle(base, good).files()
    yield configured("format", "TSK-1", "Another format.", format="peft")
    yield without("no-format", "TSK-1", "format")
    yield configured("version", "TSK-1", "format_version without a minor version.", format_version="1")
    yield configured("major", "TSK-1", "Another major version.", format_version="2.0")
    twice = replaced(files["task_config.json"], '"revision": null', '"revision": null, "revision": null')
    yield wrong("key-twice", "TSK-1", "A key twice.", {**files, "task_config.json": twice})
    array = pretty([Bundle(base, good).config()])
    yield wrong("array", "TSK-1", "task_config.json is a list.", {**files, "task_config.json": array})
    for name in ("NaN", "-Infinity"):
        constant = replaced(files["task_config.json"], '"revision": null', f'"revision": null, "note": {name}')
        yield wrong(name.lower(), "TSK-1", f"{name} under an unknown key.", {**files, "task_config.json": constant})
    marked = b"\xef\xbb\xbf" + files["task_config.json"]
    yield wrong("bom", "TSK-1", "A byte order mark.", {**files, "task_config.json": marked})
    latin = replaced(files["task_config.json"], "alphatuning", "m\u00e9thode").decode().encode("latin-1")
    yield wrong("latin-1", "TSK-1", "task_config.json is not UTF-8.", {**files, "task_config.json": latin})
    scales = {"task_scales.safetensors": files["task_scales.safetensors"]}
    yield wrong("no-file", "TSK-1", "No task_config.json.", scales)

    body = prints["fingerprint"]
    yield without("no-base", "TSK-2", "base_fingerprint")
    yield configured("base-short", "TSK-2", "A fingerprint of 63 digits.", base_fingerprint=body[:-1])
    yield configured("base-upper-case", "TSK-2", "A fingerprint in capital letters.", base_fingerprint=body.upper())
    yield configured("base-empty", "TSK-2", "An empty base_fingerprint.", base_fingerprint="")
    yield configured("base-null", "TSK-2", "base_fingerprint is null.", base_fingerprint=None)
    yield configured("head-null", "TSK-2", "head_fingerprint is null.", head_fingerprint=None)
    head = prints["head_fingerprint"].upper()
    yield configured("head-upper-case", "TSK-2", "A head_fingerprint in capital letters.", head_fingerprint=head)
    yield configured("head-number", "TSK-2", "head_fingerprint is a number.", head_fingerprint=0)
    yield configured("head-short", "TSK-2", "A head_fingerprint of one digit.", head_fingerprint="0")

    wrong_bits = {"string": "2", "true": True, "zero": 0, "fraction": 2.5, "list": [2], "negative": -2, "nine": 9}
    for slug, bits in {**wrong_bits, "float": 2.0}.items():
        yield configured(f"bits-{slug}", "TSK-3", f"bits is {json.dumps(bits)}.", bits=bits)
    yield configured("bundle-bits", "NST-3", "bits is 1, which the base does not have.", bits=1)
    about = "bits is 3, which the module with the delta has, and another module does not."
    yield configured("other-module", "NST-3", about, bits=3)
    yield configured("revision", "TSK-4", "revision is a number.", revision=7)
    yield configured("name", "TSK-4", "base_model_name_or_path is a list.", base_model_name_or_path=["example/base"])
    name = "example/base\u001b[31m"
    yield configured(
        "control", "TSK-4", "A control character in base_model_name_or_path.", base_model_name_or_path=name
    )
    surrogate = replaced(files["task_config.json"], '"revision": null', r'"revision": "\ud800"')
    yield wrong("surrogate", "TSK-4", "A lone surrogate in revision.", {**files, "task_config.json": surrogate})
    yield without("no-method", "TSK-5", "method")
    yield configured("method", "TSK-5", "method is a number.", method=1)
    yield configured("method-null", "TSK-5", "method is null.", method=None)
    yield configured("method-control", "TSK-5", "A control character in method.", method="alpha\u007f")
    yield configured("modules-string", "TSK-5", "modules_to_save is a string.", modules_to_save="classifier")
    yield configured("modules-number", "TSK-5", "modules_to_save holds a number.", modules_to_save=[1])
    yield configured("modules-null", "TSK-5", "modules_to_save is null.", modules_to_save=None)

    delta = good["layers.0.fc.scales.mul"]
    yield holding("name", "TSK-6", "A tensor without an operation.", {**good, "layers.0.fc.scales": delta})
    yield holding("operation", "TSK-6", "An unknown operation.", {**good, "layers.0.fc.scales.div": delta})
    yield holding(
        "offsets-mul", "TSK-6", "mul for offsets.", {**good, "layers.0.fc.offsets.mul": random_delta("o", 2, 2)}
    )
    yield holding("planes", "TSK-6", "Planes.", {**good, "layers.0.fc.planes": random_planes("p", (3, 2), 6)})
    doubles = {"layers.0.fc.scales.mul": Tensor("F64", (1, 2), bytes(16))}
    yield holding("dtype", "TSK-6", "A delta in F64.", doubles)
    integers = {"layers.0.fc.scales.mul": Tensor("I32", (1, 2), bytes(8))}
    yield holding("integers", "TSK-6", "A delta in I32.", integers)
    content = files["task_scales.safetensors"]
    yield wrong(
        "bundle", "HDR-6", "A byte behind the last delta.", {**files, "task_scales.safetensors": content + b"\0"}
    )
    yield wrong(
        "bundle", "HDR-1", "A file that ends inside the header.", {**files, "task_scales.safetensors": content[:20]}
    )
    spoilt = Bundle(base, good, metadata=digest_metadata({"layers.0.fc.scales.mul": "0" * 64}))
    yield wrong("bundle", "DIG-3", "The digest of a delta differs.", spoilt)
    config = {"task_config.json": files["task_config.json"]}
    yield wrong("no-file", "TSK-6", "No task_scales.safetensors.", config)

    yield from shape_bundles(holding, good)
    yield from matching_bundles(holding, good)
    yield from saved_refusals(holding, good)
    yield from precision_refusals(base, good)
    yield from edge_refusals(edge)
    yield from named_refusals(named)


def saved_refusals(holding: Callable[..., InvalidBundle], good: Tensors) -> Iterator[InvalidBundle]:
    """TSK-5, TSK-6, TSK-10: modules to save."""
    weight = random_delta("w", 2, 6)

    def saving(slug: str, rule: str, about: str, listed: list[str], *names: str) -> InvalidBundle:
        tensors = {f"modules_to_save.{name}": weight for name in names}
        return holding(slug, rule, about, {**good, **tensors}, modules_to_save=listed)

    yield saving("modules-twice", "TSK-5", "A module listed twice.", ["head", "head"], "head.weight")
    yield saving("modules-empty", "TSK-5", "An empty path.", ["head", ""], "head.weight", ".weight")
    yield saving("modules-part", "TSK-5", "A path with an empty part.", ["head..dense"], "head..dense.weight")
    yield saving("modules-slash", "TSK-5", "A path with a slash.", ["../head"], "../head.weight")
    about = "The only tensor belongs to the longer of two listed paths."
    yield saving("longest", "TSK-10", about, ["a", "a.b"], "a.b.weight")
    yield saving("no-parameter", "TSK-10", "A name without a parameter.", ["head"], "head.weight", "head.")
    yield saving("only-module", "TSK-10", "A name without a parameter and its dot.", ["head"], "head.weight", "head")
    yield saving("like-a-delta", "TSK-10", "A saved parameter named like a delta.", [], "layers.0.fc.scales.mul")
    fc = "layers.0.fc"
    yield saving("quantized", "TSK-10", "A quantized module.", [fc], f"{fc}.weight")
    yield saving("full-path", "TSK-10", "A quantized module by its whole path.", [f"model.{fc}"], f"model.{fc}.weight")
    yield saving(
        "above-quantized", "TSK-10", "A module with quantized ones in it.", ["layers.0"], "layers.0.norm.weight"
    )
    yield saving("below-quantized", "TSK-10", "A module inside of a quantized one.", [f"{fc}.x"], f"{fc}.x.weight")
    yield saving("experts", "TSK-10", "A module with quantized experts.", ["experts"], "experts.w")
    yield saving("quantized-head", "TSK-10", "A quantized module of the head.", ["score"], "score.weight")


def precision_refusals(base: Valid, good: Tensors) -> Iterator[InvalidBundle]:
    """MAT-3: what README.md calls the precision to apply at."""
    path = f"valid/{base.name}/model"
    for slug, bits, at in (("own-at-2", None, 2), ("2-at-own", 2, None), ("2-at-4", 2, 4), ("4-at-2", 4, 2)):
        about = f"Tuned at {bits or 'the own'} bits, applied at {at or 'the own'}."
        yield InvalidBundle(f"mat-3-{slug}", "MAT-3", about, path, Bundle(base, good, {"bits": bits}).files(), at)


def edge_refusals(edge: Valid) -> Iterator[InvalidBundle]:
    """MAT-6: finite deltas that make a finite parameter infinite."""
    big = 2.0**127
    for slug, about, name, delta in (
        ("mul", "A scale of 2^127, doubled.", "huge.scales.mul", floats([[0.0, 1.0]])),
        ("scales", "A scale of 2^127 and a delta of 2^127.", "huge.scales.add", floats([[[0.0], [big]]])),
        ("offsets", "An offset of 2^127 and a delta of 2^127.", "huge.offsets.add", floats([[big], [0.0]])),
        ("zeros", "A zero of 2^127 and a delta of 2^127 in BF16.", "zp.zeros.add", floats([[big], [0.0]], "BF16")),
        ("rounds-up", "Half a step above the largest number.", "huge.offsets.add", floats([[big - 2.0**103], [0.0]])),
    ):
        bundle = Bundle(edge, {name: delta})
        with np.errstate(over="ignore"):
            assert any(np.isinf(tensor.f32()).any() for tensor in bundle.effective().values()), slug
        yield InvalidBundle(f"mat-6-{slug}", "MAT-6", about, f"valid/{edge.name}/model", bundle.files())


def named_refusals(named: Valid) -> Iterator[InvalidBundle]:
    """TSK-7, TSK-10, MAT-2: tied places, and names of body and head."""
    path = f"valid/{named.name}/model"
    tied = Bundle(named, {"lm_head.scales.mul": random_delta("tied", 1, 3)}).files()
    yield InvalidBundle("tsk-7-tied", "TSK-7", "A delta on a tied place.", path, tied)
    saved = {"modules_to_save.lm_head.weight": random_delta("lm_head", 3, 4)}
    files = Bundle(named, saved, {"modules_to_save": ["lm_head"]}).files()
    yield InvalidBundle("tsk-10-tied", "TSK-10", "A tied place is saved.", path, files)


def shape_bundles(holding: Callable[..., InvalidBundle], good: Tensors) -> Iterator[InvalidBundle]:
    """TSK-7, TSK-9."""

    def mul(slug: str, about: str, name: str, *shape: int, **changes: Any) -> InvalidBundle:
        return holding(slug, "TSK-7", about, {name: random_delta("s", *shape)}, **changes)

    fc, up, experts = "layers.0.fc", "layers.0.up", "experts.w"
    yield mul("unknown-module", "A module that the base does not have.", "layers.9.fc.scales.mul", 1, 2)
    yield mul("full-path", "A path with the prefix, which is not canonical.", f"model.{fc}.scales.mul", 1, 2)
    yield mul("planes-4", "Four planes for a module of three.", f"{fc}.scales.mul", 4, 2)
    yield mul("planes-0", "No plane.", f"{fc}.scales.mul", 0, 2)
    yield mul("planes-k2", "Three planes at precision 2.", f"{fc}.scales.mul", 3, 2, bits=2)
    yield mul("planes-uniform", "Two planes for uniform.", f"{up}.scales.mul", 2, 3)
    yield mul("rows", "Three rows for a module of two.", f"{fc}.scales.mul", 1, 3)
    yield mul("groups", "One group for a module of two.", f"{fc}.scales.add", 1, 2, 1)
    yield mul("axes", "mul with an axis of groups.", f"{fc}.scales.mul", 1, 2, 2)
    yield mul("offsets-axes", "offsets with an axis of planes.", f"{fc}.offsets.add", 1, 2, 2)
    yield mul("zeros-rows", "zeros for the wrong number of rows.", f"{up}.zeros.add", 1, 3)
    yield mul("experts", "No axis of experts.", f"{experts}.scales.mul", 2, 3)
    yield mul("experts-fewer", "One expert of two.", f"{experts}.scales.mul", 1, 2, 3)
    yield mul("no-offsets", "offsets for a module without them.", "score.offsets.add", 2, 1)
    yield mul("no-zeros", "zeros for a module of bcq.", f"{fc}.zeros.add", 2, 2)

    both = {**good, f"{fc}.scales.add": random_delta("add", 1, 2, 2)}
    yield holding("both", "TSK-9", "mul and add for one module.", both)
    for slug, text in {"nan": "00 00 c0 7f", "inf": "00 00 80 7f"}.items():
        bad = with_bytes(good[f"{fc}.scales.mul"], 4, text)
        yield holding(slug, "TSK-9", f"A delta that is {slug}.", {f"{fc}.scales.mul": bad})
    for slug, text in {"inf-bf16": "00 00 80 ff", "nan-bf16": "00 00 81 7f"}.items():
        special = {f"{fc}.scales.mul": hexed("BF16", (1, 2), text)}
        yield holding(slug, "TSK-9", f"{slug[:3]} in a delta in BF16.", special)
    yield holding(
        "inf-f16", "TSK-9", "Infinity in a delta in F16.", {f"{fc}.scales.mul": hexed("F16", (1, 2), "00 00 00 fc")}
    )


def matching_bundles(holding: Callable[..., InvalidBundle], good: Tensors) -> Iterator[InvalidBundle]:
    """TSK-10, TSK-11, MAT-1, MAT-2."""
    saved = {"modules_to_save.classifier.weight": random_delta("w", 2, 6)}
    yield holding("unlisted", "TSK-10", "A saved tensor of a module that is not listed.", {**good, **saved})
    listed = ["classifier", "other"]
    yield holding("no-tensor", "TSK-10", "A listed module without a tensor.", {**good, **saved}, modules_to_save=listed)
    lookalike = {**good, "modules_to_save.classifiers.weight": random_delta("w", 2, 6), **saved}
    yield holding(
        "lookalike",
        "TSK-10",
        "A saved tensor whose module only begins like a listed one.",
        lookalike,
        modules_to_save=["classifier"],
    )
    yield holding("empty", "TSK-11", "No tensor.", {})
    yield holding("base", "MAT-1", "The bundle belongs to another base.", good, base_fingerprint="0" * 64)
    head = {"score.scales.mul": random_delta("h", 1, 2)}
    yield holding("head", "MAT-2", "A delta on the head, tuned on another head.", head, head_fingerprint="0" * 64)
    yield holding("no-head", "MAT-2", "A delta on the head, tuned on a base without one.", head, head_fingerprint="")


# --------------------------------------------------------------------------------------------------------- output

README = """\
# Test vectors

Files to test a reader of the lowbit model format with. `tools/make_vectors.py` makes them all; do not edit them by
hand. It shares no code with the library. `python tools/make_vectors.py --check` says whether they are current.

- `valid/<name>/model/` is a model directory that a reader must accept. `valid/<name>/expected.safetensors` holds the
  decoded weights in binary32: the tensor `<module>`, `[rows, cols]` or `[experts, rows, cols]` as in the configuration
  (not transposed for `conv1d` and `experts_transposed`), and `<module>@k2` for the module at the nested precision 2.
  A reader must give exactly these bits, the sign of zero included. `expected.json` holds `fingerprint`,
  `head_fingerprint` and `about`.
- `invalid/<name>/model/` is a directory that must be refused. `expected.json` holds the broken `rule`, `about`, and
  `found_by`: with `open` a reader must refuse when it opens the directory and has read the configuration, the index and
  the headers; with `verify` the fault is in the tensors' data. Section 2 is to be checked before the tensors:
  a wrong `shape` in the configuration seldom fits any tensor.
- `bundles/valid/<name>/bundle/` is a task bundle. `expected.json` names its `base`, a path below this directory, and
  the precision `bits` to apply it at. `expected.safetensors` holds, in binary32, `<module>.scales` and, where there are
  any, `<module>.offsets` and `<module>.zeros` of every module with a delta, as they are while the bundle is applied.
  `<module>` is the name that the bundle uses, also for experts.
- `bundles/invalid/<name>/bundle/` must be refused, at the latest when it is applied to `base` at its own `bits`, or at
  those of `expected.json` where that has the key `bits`; a digest, when it is verified.

Where a fault breaks several rules, `rule` is one of them; a reader may name another.

To test a reader: for each `valid` directory compare the decoded tensors byte for byte with the expected ones, and the
fingerprints as strings; for each `invalid` directory check that the reader reports an error, and not a crash, a
partial result or a large allocation.
"""


def collect() -> Files:
    """All files by their path below spec/vectors."""
    files: Files = {"README.md": README.encode()}
    for folder, cases in (
        ("valid", valid_cases()),
        ("invalid", invalid_cases()),
        ("bundles/valid", bundles()),
        ("bundles/invalid", invalid_bundles()),
    ):
        seen: set[str] = set()
        for case in cases:
            assert case.name not in seen, f"two cases named {folder}/{case.name}"
            seen.add(case.name)
            files |= {f"{folder}/{case.name}/{path}": content for path, content in case.outputs().items()}
    return files


def on_disk(root: Path) -> Files:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def differences(wanted: Files, present: Files) -> list[str]:
    lines = [f"missing: {path}" for path in wanted if path not in present]
    lines += [f"stale: {path}" for path in present if path not in wanted]
    lines += [f"differs: {path}" for path in wanted if path in present and wanted[path] != present[path]]
    return sorted(lines)


def write(root: Path, wanted: Files) -> None:
    present = on_disk(root)
    for path in set(present) - set(wanted):
        (root / path).unlink()
    for path, content in wanted.items():
        if present.get(path) != content:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(content)
    for folder in sorted((path for path in root.rglob("*") if path.is_dir()), reverse=True):
        if not any(folder.iterdir()):
            folder.rmdir()


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the golden files in spec/vectors.")
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 with a list if anything differs")
    arguments = parser.parse_args()
    wanted = collect()
    if arguments.check:
        lines = differences(wanted, on_disk(ROOT))
        print("\n".join(lines) or f"{len(wanted)} files are current")
        return 1 if lines else 0
    write(ROOT, wanted)
    print(f"{len(wanted)} files, {sum(map(len, wanted.values()))} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
