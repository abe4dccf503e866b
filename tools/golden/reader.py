"""An example reader of lowbit models, to be read beside spec/FORMAT.md. It needs numpy and nothing else.

    python tools/golden/reader.py MODEL_DIR

prints every module with its scheme, its shape and a digest of its decoded weights, then the fingerprint of the base.

The reader was written from the specification alone and shares no code with the package ``lowbit_format``. It is a
second opinion: the expected weights in spec/vectors are its results, and the package has to give the same bits.

It is made to be understood, so it is slow (it decodes row by row), it reads whole files into memory, and it trusts
them. A reader for other people's files also has to refuse what the specification forbids; spec/vectors/invalid has a
model for every such rule.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

Json = dict[str, Any]

# Bytes of one value of every dtype that a safetensors file may hold (HDR-4).
ITEM_SIZE = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "C64": 8, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """A tensor as a safetensors file holds it: a dtype, a shape and the bytes in row-major order (TEN-5)."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def __post_init__(self) -> None:
        if len(self.data) != prod(self.shape) * ITEM_SIZE[self.dtype]:  # HDR-5
            raise ValueError(f"{len(self.data)} bytes are not a {self.dtype} tensor of the shape {self.shape}")

    def f32(self) -> np.ndarray:
        """The values of an F16, BF16 or F32 tensor in binary32, which is exact (DEC-1)."""
        if self.dtype == "BF16":  # the upper half of a binary32 value
            wide = np.frombuffer(self.data, "<u2").astype(np.uint32) << np.uint32(16)
            return wide.view(np.float32).reshape(self.shape)
        numpy_dtype = {"F16": "<f2", "F32": "<f4"}[self.dtype]
        return np.frombuffer(self.data, numpy_dtype).astype(np.float32).reshape(self.shape)

    def u8(self) -> np.ndarray:
        """The values of a U8 tensor."""
        if self.dtype != "U8":
            raise ValueError(f"the dtype is {self.dtype}, not U8")
        return np.frombuffer(self.data, np.uint8).reshape(self.shape)

    def sha256(self) -> str:
        """The digest of the bytes, in hexadecimal."""
        return hashlib.sha256(self.data).hexdigest()


Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Module:
    """One entry of ``modules`` in the configuration, with its tensors.

    Attributes:
        scheme: the scheme that the entry names (section 2).
        kind: ``"linear"``, ``"experts"``, … (CFG-5).
        shape: of the decoded weight: ``[rows, cols]``, or ``[experts, rows, cols]``.
        roles: tensors by role: ``planes``, ``scales``, ``scales_k2``, … (section 4).
    """

    scheme: Json
    kind: str
    shape: list[int]
    roles: Tensors

    @property
    def nested(self) -> list[int]:
        """Precisions below the full one at which the module can be read as well (section 8)."""
        return self.scheme.get("nested", [])


# ------------------------------------------------------------------------------------------- sections 1 to 4: files


def read_model(directory: Path) -> tuple[Json, Tensors]:
    """The object ``quantization_config``, and all tensors of the directory by name."""
    # Python's own limit on the digits of an integer would refuse a number that DIR-9 lets pass.
    config = json.loads((directory / "config.json").read_text("utf-8"), parse_int=number)["quantization_config"]
    if config["quant_method"] != "lowbit" or config["format_version"].split(".")[0] != "1":  # CFG-1, VER-1
        raise ValueError(f"{directory} is not a lowbit model of version 1")
    index = directory / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.exists():  # DIR-2, DIR-3: the model is divided into several files
        names = set(json.loads(index.read_text("utf-8"), parse_int=number)["weight_map"].values())
    tensors: Tensors = {}
    for name in sorted(names):
        tensors |= read_safetensors(directory / name)
    return config, tensors


def number(digits: str) -> int | float:
    """An integer in JSON; one without a finite binary64 value counts as Infinity (DIR-9)."""
    return int(digits) if len(digits) < 309 else float(digits)


def read_safetensors(path: Path) -> Tensors:
    """All tensors of one file by name."""
    content = path.read_bytes()
    begin_of_data = 8 + int.from_bytes(content[:8], "little")  # HDR-1
    header = json.loads(content[8:begin_of_data])  # HDR-2
    header.pop("__metadata__", None)  # HDR-7
    tensors: Tensors = {}
    for name, entry in header.items():
        begin, end = (begin_of_data + offset for offset in entry["data_offsets"])  # HDR-5
        tensors[name] = Tensor(entry["dtype"], tuple(entry["shape"]), content[begin:end])
    return tensors


# What may stand behind a module's path in the name of one of its tensors (section 4).
ROLE = re.compile(r"planes|codebook|row_bits|(scales|offsets|zeros)(_k[1-9])?")


def modules_of(config: Json, tensors: Tensors) -> dict[str, Module]:
    """All modules by path."""
    return {path: module_of(config, tensors, path) for path in config["modules"]}


def module_of(config: Json, tensors: Tensors, path: str) -> Module:
    """The module at `path`. Tensors that only begin with its path, like a bias, are not the module's (TEN-1)."""
    entry = config["modules"][path]
    start = path + separator(entry["kind"])
    named = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
    roles = {role: tensor for role, tensor in named.items() if ROLE.fullmatch(role)}
    return Module(config["schemes"][entry["scheme"]], entry["kind"], entry["shape"], roles)


def separator(kind: str) -> str:
    """What stands between a module's path and a role: section 4, or EXP-1."""
    return "_" if kind.startswith("experts") else "."


# -------------------------------------------------------------------------------------- sections 5 to 9: decoding


def precisions(modules: Iterable[Module]) -> list[int]:
    """All precisions at which a base of these modules can be read; a reader refuses others (NST-3)."""
    modules = list(modules)
    most = max((module.scheme["bits"] for module in modules), default=8)
    return [k for k in range(1, most + 1) if all(k >= m.scheme["bits"] or k in m.nested for m in modules)]


def decode(module: Module, k: int | None = None) -> np.ndarray:
    """The weight in binary32, ``[rows, cols]`` or ``[experts, rows, cols]``.

    It is decoded from all planes, or from the first `k` of them (section 8). Whether the base has the precision `k` is
    for :func:`precisions` to say.
    """
    if k is not None and k >= module.scheme["bits"]:  # NST-4
        k = None
    if k is not None and k not in module.nested:  # NST-3
        raise ValueError(f"the module cannot be read at {k} bit(s)")
    suffix = "" if k is None else f"_k{k}"  # NST-1
    shift_role = {"bcq": "offsets", "uniform": "zeros", "affine": "offsets", "codebook": ""}[
        module.scheme["codec"]
    ] + suffix
    roles = module.roles
    planes = roles["planes"].u8()
    scales = roles["scales" + suffix].f32()
    shift = roles[shift_role].f32() if shift_role in roles else None
    if not module.kind.startswith("experts"):
        return decode_matrix(module, planes, scales, shift, k)
    experts = range(module.shape[0])  # EXP-2
    return np.stack(
        [decode_matrix(module, planes[e], scales[e], None if shift is None else shift[e], k) for e in experts]
    )


def decode_matrix(
    module: Module, planes: np.ndarray, scales: np.ndarray, shift: np.ndarray | None, k: int | None
) -> np.ndarray:
    """One matrix, ``[rows, cols]``. `shift` is its ``offsets`` or ``zeros``, ``[rows, groups]``."""
    rows, cols = module.shape[-2:]
    group_size = module.scheme["group_size"]
    group = np.arange(cols) // group_size if group_size else np.zeros(cols, np.int64)  # of each column (section 4)
    full = np.full(rows, module.scheme["bits"])
    row_bits = module.roles["row_bits"].u8() if "row_bits" in module.roles else full  # MIX-1
    codebook = module.roles["codebook"].f32() if "codebook" in module.roles else None
    weight = np.empty((rows, cols), np.float32)
    for r in range(rows):
        n = int(row_bits[r]) if k is None else min(int(row_bits[r]), k)  # NST-2
        bits = np.stack([unpacked(plane_row(planes, row_bits, p, r), cols) for p in range(n)])
        row_shift = None if shift is None else shift[r][group]
        weight[r] = decode_row(module.scheme["codec"], bits, scales[:, r][:, group], row_shift, codebook)
    return weight


def plane_row(planes: np.ndarray, row_bits: np.ndarray, p: int, r: int) -> np.ndarray:
    """The bytes of row `r` in plane `p`."""
    if planes.ndim == 3:  # [bits, rows, B]
        return planes[p, r]
    earlier = sum(int(np.count_nonzero(row_bits > q)) for q in range(p))  # MIX-2: rows of the planes before
    return planes[earlier + int(np.count_nonzero(row_bits[:r] > p))]


def unpacked(row: np.ndarray, cols: int) -> np.ndarray:
    """The bits of `cols` columns. Column ``8k + j`` is the bit of value ``2^j`` of byte `k` (BIT-2, BIT-3)."""
    return np.unpackbits(row, bitorder="little")[:cols]


def decode_row(
    codec: str, bits: np.ndarray, scales: np.ndarray, shift: np.ndarray | None, codebook: np.ndarray | None
) -> np.ndarray:
    """Section 6 for one row.

    numpy rounds every operation on float32 arrays to binary32 and fuses none, as DEC-1 asks.

    Args:
        bits: ``[n, cols]``, plane 0 first.
        scales: ``[n, cols]`` (one row for all but ``bcq``): for each column those of its group.
        shift: ``[cols]``: offsets or zeros, for each column that of its group.
        codebook: ``[2^bits]``.
    """
    with np.errstate(all="ignore"):  # finite parameters may give an infinite weight
        if codec == "bcq":  # DEC-2
            acc = np.zeros(bits.shape[1], np.float32) if shift is None else shift
            for p in range(len(bits)):
                acc = np.where(bits[p] == 1, acc + scales[p], acc - scales[p])
            return acc
        if codec == "uniform":  # DEC-3
            difference = codes_of(bits).astype(np.float32) - shift
            return difference * scales[0]
        if codec == "affine":  # DEC-7
            product = codes_of(bits).astype(np.float32) * scales[0]
            return product + shift
        return codebook[codes_of(bits)] * scales[0]  # DEC-4


def codes_of(bits: np.ndarray) -> np.ndarray:
    """The code of every column. Plane 0 is the most significant bit (BIT-1)."""
    n = len(bits)
    return sum((bits[p].astype(np.int64) << (n - 1 - p) for p in range(n)), np.zeros(bits.shape[1], np.int64))


# ---------------------------------------------------------------------------------------- section 12: fingerprint


def fingerprints(prefix: str, modules: Mapping[str, Module]) -> tuple[str, str]:
    """The fingerprint and the head fingerprint of a base. `prefix` is its ``base_model_prefix``."""
    body, head = body_and_head(prefix, modules)
    of_head = {name: modules[path] for name, path in head.items()}
    return fingerprint({name: modules[path] for name, path in body.items()}), fingerprint(of_head) if head else ""


def body_and_head(prefix: str, paths: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """FPR-1: which modules are body and which are head. Both map the name in the fingerprint to the path."""
    paths = list(paths)
    start = prefix + "."
    if not prefix or not any(path.startswith(start) for path in paths):
        return {path: path for path in paths}, {}
    body = {path.removeprefix(start): path for path in paths if path.startswith(start)}
    return body, {path: path for path in paths if not path.startswith(start)}


def fingerprint(modules: Mapping[str, Module]) -> str:
    """FPR-2, FPR-3. Every digest is computed from the bytes (FPR-5)."""
    records: list[bytes] = []
    for name, module in modules.items():
        meaning = [str(module.scheme[key]) for key in ("codec", "bits", "group_size")]
        for role, tensor in module.roles.items():
            shape = ",".join(map(str, tensor.shape))
            record = "\t".join([name, role, tensor.dtype, shape, tensor.sha256(), *meaning])
            records.append(record.encode() + b"\n")
    return hashlib.sha256(b"".join(sorted(records))).hexdigest()


def main() -> None:
    """Print what a model directory holds."""
    if len(sys.argv) != 2:
        sys.exit("usage: python tools/golden/reader.py MODEL_DIR")
    config, tensors = read_model(Path(sys.argv[1]))
    modules = modules_of(config, tensors)
    for path, module in modules.items():
        scheme = module.scheme
        print(f"{path}: {module.kind}, {scheme['codec']}, group size {scheme['group_size']}")
        for k in [scheme["bits"], *module.nested]:
            weight = decode(module, k)
            digest = hashlib.sha256(weight.astype("<f4").tobytes()).hexdigest()
            print(f"    {k} bit{'s' * (k > 1)}, float32 {list(weight.shape)}, SHA-256 {digest}")
    print(f"precisions: {', '.join(map(str, precisions(modules.values())))}")
    body, head = fingerprints(config.get("base_model_prefix", ""), modules)
    print(f"fingerprint: {body}\nhead fingerprint: {head or 'none'}")


if __name__ == "__main__":
    main()
