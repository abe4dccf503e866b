"""Reads a model directory: checked when it is opened, then memory-mapped views. Without torch.

:class:`ModelReader` checks config, index, headers and shapes when it opens. Rules about a tensor's values are checked
when that tensor is read, and :meth:`ModelReader.verify` checks every rule and every digest.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bits import padding_is_zero
from ..codecs import CODECS
from ..dtypes import stored, to_float32
from ..errors import ConfigError, DigestError, DirectoryError, TensorError
from ..matrix import Params, StoredMatrix
from ..schema import ModuleEntry, QuantizationConfig
from ..tensors import TensorSpec, all_roles, tensor_specs
from . import strict_json
from .fingerprint import Fingerprint, Identity
from .header import Header, TensorInfo, read_header

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_SAFE_FILE = re.compile(r"[^./\\\x00-\x1f\x7f\ud800-\udfff][^/\\\x00-\x1f\x7f\ud800-\udfff]*\.safetensors")  # DIR-3


class ModelReader:
    """A lowbit model directory, opened and checked.

    Args:
        directory: the model directory.

    Raises:
        FormatError: one of its subclasses, for a fault of config, index, headers or shapes.

    Attributes:
        directory: as given.
        config: the parsed ``quantization_config``.
        model_config: the whole of ``config.json``.
        headers: checked header of each weight file, by file name.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.model_config, self.config = read_config(self.directory)
        self.headers = read_headers(self.directory, self._header)
        self._file_of = {name: file for file, header in self.headers.items() for name in header.tensors}
        self._maps: dict[str, NDArray[np.uint8]] = {}
        self._specs = {m.path: tensor_specs(m) for m in self.config}
        _check_tensors(self)

    def _header(self, file: str) -> Header | None:
        """The checked header of a weight file, or None if there is no such file."""
        path = self.directory / file
        return read_header(path) if path.is_file() else None

    # --- names and shapes ---

    def names(self) -> Iterator[str]:
        """Names of all tensors, lowbit or not, in file order."""
        return iter(self._file_of)

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of tensor `name`; raises TensorError if the files have none of this name."""
        if name not in self._file_of:
            raise TensorError("TEN-1", "no such tensor in the model directory", file=self.directory, tensor=name)
        return self.headers[self._file_of[name]].tensors[name]

    def file_of(self, name: str) -> str:
        """Name of the file that holds tensor `name`."""
        self.info(name)
        return self._file_of[name]

    def specs(self, path: str) -> tuple[TensorSpec, ...]:
        """The tensors of the module entry for `path`."""
        return self._specs[self.module(path).path]

    def module(self, path: str) -> ModuleEntry:
        """The module entry for `path`, or for its owner if it is tied (TIE-1). Raises ConfigError if there is none."""
        path = self.config.tied.get(path, path)
        if path not in self.config.modules:
            raise ConfigError("CFG-4", "no such module in quantization_config", file=self.directory, tensor=path)
        return self.config.modules[path]

    def lowbit_names(self) -> frozenset[str]:
        """Names of all tensors of module entries."""
        return frozenset(spec.name for specs in self._specs.values() for spec in specs)

    # --- data ---

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The bytes of tensor `name`: uint8, read-only, memory-mapped."""
        info = self.info(name)
        return next(self.ranges(self._file_of[name], [(info.begin, info.end)]))

    def ranges(self, file: str, ranges: Sequence[tuple[int, int]]) -> Iterator[NDArray[np.uint8]]:
        """Bytes ``(begin, end)`` of a weight file, in ascending order: uint8, read-only, memory-mapped."""
        if file not in self._maps:
            self._maps[file] = _map(self.directory / file)
        for begin, end in ranges:
            yield self._maps[file][begin:end]

    def tensor(self, name: str) -> NDArray[Any]:
        """A U8, F16, BF16 or F32 tensor as an array: U8 as a view of the file, floats as float32."""
        info = self.info(name)
        values = stored(self.raw(name), info.dtype, info.shape)
        return values if info.dtype == "U8" else to_float32(values, info.dtype)

    def matrix(self, path: str, expert: int | None = None, *, only: int | None = None) -> StoredMatrix:
        """The quantized matrix of the module entry for `path` (of one `expert`, where it has experts).

        Planes are a view of the file; parameters are float32 copies. With `only`, a nested precision, the parameters
        of other precisions are not read, and the matrix is the one of fewer bits that the module is then (NST-1).
        Raises TensorError for values that the spec forbids (TEN-3, MIX-1, MIX-2).
        """
        module = self.module(path)
        if (module.experts is None) != (expert is None) or (
            expert is not None and not 0 <= expert < (module.experts or 0)
        ):
            raise ConfigError(
                "EXP-2",
                f"asked for expert {expert}, the module has {module.experts or 'none'}",
                file=self.directory,
                tensor=path,
            )
        at: Any = ... if expert is None else expert
        codec, scheme = CODECS[module.scheme.codec], module.scheme

        def params(suffix: str) -> Params:
            return Params(
                self._finite(module.tensor(f"scales{suffix}"))[at],
                self._finite(module.tensor(f"{scheme.shift}{suffix}"))[at] if scheme.shift else None,
            )

        planes = self.tensor(module.tensor("planes"))[at]
        row_bits = self.row_bits(path)
        codebook = self._finite(module.tensor("codebook")) if codec.codebook else None
        if only is None or only not in scheme.nested:
            nested = {k: params(f"_k{k}") for k in scheme.nested}
            return StoredMatrix(scheme, module.rows, module.cols, planes, params(""), nested, codebook, row_bits)
        if row_bits is not None:
            row_bits = np.minimum(row_bits, np.uint8(only))  # NST-2
        planes = planes[: only if row_bits is None else int(row_bits.sum(dtype=np.int64))]  # BIT-4
        lower = replace(scheme, bits=only, nested=())
        return StoredMatrix(lower, module.rows, module.cols, planes, params(f"_k{only}"), {}, codebook, row_bits)

    def row_bits(self, path: str) -> NDArray[np.uint8] | None:
        """Bits of each row of the module entry for `path`, ``[rows]``; None if its rows do not differ.

        Raises TensorError for numbers that the spec forbids (MIX-1), and planes of another number of rows (MIX-2).
        """
        module = self.module(path)
        return self._row_bits(module) if module.scheme.row_bits else None

    def decode(self, path: str, bits: int | None = None) -> NDArray[np.float32]:
        """Decoded weights of a module: float32 ``[rows, cols]`` or ``[experts, rows, cols]`` (section 6).

        Raises PrecisionError for a precision that the module does not have or that is above the base's (NST-3), and
        TensorError for forbidden values among those that the precision is read with (TEN-3).
        """
        from ..reference import decode

        module = self.module(path)
        self.check_precision(bits, [module])
        if module.experts is None:
            return decode(self.matrix(path, only=bits))
        return np.stack([decode(self.matrix(path, e, only=bits)) for e in range(module.experts)])

    def check_precision(self, bits: int | None, modules: list[ModuleEntry] | None = None) -> None:
        """Raise PrecisionError unless all modules, or these, can be read at `bits` (NST-3)."""
        self.config.check_precision(bits, modules, file=self.directory)

    # --- checks that need data ---

    def digest(self, name: str) -> str:
        """SHA-256 of the tensor's bytes, computed now, in lower-case hex."""
        return hashlib.sha256(self.raw(name).data).hexdigest()

    def stored_digest(self, name: str) -> str | None:
        """The tensor's digest in the header, or None if it has none (DIG-3)."""
        return self.headers[self.file_of(name)].digests.get(name)

    def check_digest(self, name: str) -> bool:
        """Whether the tensor has a digest; raises DigestError if its bytes do not match."""
        expected = self.stored_digest(name)
        if expected is None:
            return False
        found = self.digest(name)
        if found != expected:
            raise DigestError(
                "DIG-3",
                f"the bytes have SHA-256 {found}, the header says {expected}; the file is damaged, get it again",
                file=self.directory / self._file_of[name],
                tensor=name,
            )
        return True

    def check_module(self, path: str) -> None:
        """Check all rules about the values of one module entry (TEN-3, BIT-3, MIX-1 to MIX-3)."""
        module = self.module(path)
        for expert in [None] if module.experts is None else range(module.experts):
            matrix = self.matrix(path, expert)
            if not padding_is_zero(matrix.planes, module.cols):
                raise self._bad("BIT-3", "bits after the last column are not 0", module.tensor("planes"))
            self._check_unused_scales(module, matrix)

    def verify(self) -> int:
        """Check all rules for all module entries, and all digests; returns how many tensors have no digest."""
        for module in self.config:
            self.check_module(module.path)
        return sum(not self.check_digest(name) for name in self.names())

    def fingerprint(self, *, trust_digests: bool = True) -> Fingerprint:
        """Fingerprint of the base (FPR-1 to FPR-5).

        It uses the digests of the headers, which nothing has checked unless :meth:`check_digest` did; without
        `trust_digests`, or where one is missing, it computes them.
        """
        return self.identity(trust_digests=trust_digests).fingerprint()

    def identity(self, *, trust_digests: bool = True) -> Identity:
        """What :meth:`fingerprint` is computed from."""
        names = self.lowbit_names()
        digests = {n: (self.stored_digest(n) if trust_digests else None) or self.digest(n) for n in names}
        return Identity(self.config, digests, {n: self.info(n).shape for n in names})

    def has_lowbit_digests(self) -> bool:
        """Whether :meth:`fingerprint` would rest on a digest that a header gives (FPR-5)."""
        return any(self.stored_digest(name) is not None for name in self.lowbit_names())

    def _bad(self, rule: str, message: str, tensor: str) -> TensorError:
        return TensorError(rule, message, file=self.directory / self._file_of[tensor], tensor=tensor)

    def _check_unused_scales(self, module: ModuleEntry, matrix: StoredMatrix) -> None:
        """Scales of planes that a row does not have are +0.0 (MIX-3, NST-2)."""
        if matrix.row_bits is None or module.scheme.codec != "bcq":
            return
        for suffix, params in [("", matrix.params), *((f"_k{k}", p) for k, p in matrix.nested.items())]:
            unused = matrix.row_bits[None, :] <= np.arange(params.scales.shape[0])[:, None]
            if np.any(params.scales.view(np.uint32)[unused]):
                name = module.tensor(f"scales{suffix}")
                raise self._bad("MIX-3", "holds a scale for a plane that the row does not have", name)

    def _finite(self, name: str) -> NDArray[np.float32]:
        values: NDArray[np.float32] = self.tensor(name)
        if not np.isfinite(values).all():
            raise self._bad("TEN-3", "holds NaN or an infinity", name)
        return values

    def _row_bits(self, module: ModuleEntry) -> NDArray[np.uint8]:
        name = module.tensor("row_bits")
        values: NDArray[np.uint8] = self.tensor(name)
        if values.min() < 1 or values.max() > module.scheme.bits:
            raise self._bad(
                "MIX-1", f"holds {values.min()} to {values.max()}, expected 1 to {module.scheme.bits}", name
            )
        planes = module.tensor("planes")
        found, expected = self.info(planes).shape[0], int(values.sum(dtype=np.int64))
        if found != expected:
            raise self._bad("MIX-2", f"has {found} rows, row_bits add up to {expected}", planes)
        return values


def read_config(directory: Path) -> tuple[dict[str, Any], QuantizationConfig]:
    """``config.json`` and its parsed ``quantization_config`` (DIR-1, DIR-8, section 2)."""
    path = directory / CONFIG_FILE

    def fail(rule: str, message: str) -> DirectoryError:
        return DirectoryError("DIR-1" if rule == "JSON" else rule, message, file=path)

    if not path.is_file():
        raise fail("DIR-1", "no such file; expected a lowbit model directory")
    config = strict_json.load_file(path, fail, constants=True)
    if not isinstance(config, dict) or "quantization_config" not in config:
        raise fail("DIR-1", "has no quantization_config: this is not a lowbit model, convert it first")
    if not isinstance(config["quantization_config"], dict):
        raise fail("DIR-1", "quantization_config is not an object")
    if _has_constant(config["quantization_config"]):  # elsewhere in config.json transformers writes Infinity
        raise fail("DIR-8", "quantization_config holds NaN or Infinity, or a number that large, which is not JSON")
    return config, QuantizationConfig.from_dict(config["quantization_config"], file=path)


def _has_constant(value: object) -> bool:
    if isinstance(value, float):
        return not math.isfinite(value)
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, list) and any(_has_constant(v) for v in value)


def read_headers(directory: Path, header_of: Callable[[str], Header | None]) -> dict[str, Header]:
    """Checked headers of all weight files, by file name; index and shards must agree (DIR-2 to DIR-4).

    `header_of` gives the checked header of a file by its name, or None if there is no such file.
    """
    single, index = header_of(WEIGHTS_FILE), directory / INDEX_FILE
    if single is not None and index.is_file():
        raise DirectoryError("DIR-2", f"has both {WEIGHTS_FILE} and {INDEX_FILE}; remove the stale one", file=directory)
    if single is not None:
        return {WEIGHTS_FILE: single}
    if not index.is_file():
        raise DirectoryError("DIR-2", f"has neither {WEIGHTS_FILE} nor {INDEX_FILE}", file=directory)
    weight_map = _read_index(index)
    headers = {}
    for file in dict.fromkeys(weight_map.values()):
        header = header_of(file)
        if header is None:
            raise DirectoryError("DIR-4", f"names the shard {file}, which is missing", file=index)
        headers[file] = header
    for name, file in weight_map.items():
        if name not in headers[file].tensors:
            raise DirectoryError(
                "DIR-4", f"the index puts this tensor into {file}, which lacks it", file=index, tensor=name
            )
    for file, header in headers.items():
        for name in header.tensors:
            if weight_map.get(name) != file:
                raise DirectoryError(
                    "DIR-4", f"is in {file}, but the index does not list it for this file", file=index, tensor=name
                )
    return headers


def _read_index(path: Path) -> dict[str, str]:
    def fail(rule: str, message: str) -> DirectoryError:
        return DirectoryError("DIR-3" if rule == "JSON" else rule, message, file=path)

    index = strict_json.load_file(path, fail, constants=True)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise fail("DIR-3", "weight_map is not a non-empty object from tensor name to file name")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _SAFE_FILE.fullmatch(file):
            raise fail(
                "DIR-3", f"file name {str(file)[:80]!r} of {name[:80]!r} is not a plain name ending in .safetensors"
            )
    return weight_map


def _check_tensors(reader: ModelReader) -> None:
    """Every module has exactly its tensors, with their dtypes and shapes (TEN-1, TEN-2, TEN-4, TIE-2)."""
    config, known, roles = reader.config, reader.lowbit_names(), all_roles()
    for module in config:
        for spec in reader.specs(module.path):
            if spec.name not in reader._file_of:
                raise TensorError("TEN-1", "is missing", file=reader.directory, tensor=spec.name)
            info = reader.info(spec.name)
            shape_fits = len(info.shape) == len(spec.shape) and all(
                e in (-1, f) for e, f in zip(spec.shape, info.shape, strict=True)
            )
            if info.dtype != spec.dtype or not shape_fits:
                expected = str(list(spec.shape)).replace("-1", "sum of row_bits")
                raise reader._bad(
                    "TEN-1", f"is {info.dtype} {list(info.shape)}, expected {spec.dtype} {expected}", spec.name
                )
        if module.weight in reader._file_of:
            raise reader._bad("TEN-2", "is stored in addition to the planes that replace it", module.weight)
        for role in roles:
            if module.tensor(role) in reader._file_of and module.tensor(role) not in known:
                raise reader._bad("TEN-1", "the module's scheme does not call for this tensor", module.tensor(role))
    for place, owner in config.tied.items():
        for name in (place, f"{place}.weight", *(f"{place}{joint}{role}" for joint in "._" for role in sorted(roles))):
            if name in reader._file_of:  # whatever the kind of the owner
                raise reader._bad("TIE-2", f"this place is tied to {owner!r}", name)
    for name in reader.names():
        if name not in known and name.endswith((".planes", "_planes")):
            raise reader._bad("TEN-4", "belongs to no module of quantization_config", name)


def _map(path: Path) -> NDArray[np.uint8]:
    with open(path, "rb") as f:
        return np.frombuffer(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
