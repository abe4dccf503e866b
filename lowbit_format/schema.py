"""``quantization_config``: what the stored bits mean (spec/FORMAT.md sections 2, 9, 10, 14).

Frozen dataclasses, parsed strictly from JSON and written back to it; no tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from .codecs import CODECS
from .dtypes import FLOATS
from .errors import ConfigError, PrecisionError, VersionError

QUANT_METHOD = "lowbit"
FORMAT_VERSION = "1.1"  # the newest that is known; files say the lowest that has what they use (VER-3)
MAX_DIMENSION = 2**31 - 1  # CFG-6
MAX_PATH = 512  # CFG-4

SCALE_DTYPES = FLOATS  # CFG-2
KINDS = {"linear": 2, "conv1d": 2, "embedding": 2, "experts": 3, "experts_transposed": 3}  # kind -> dimensions

_SCHEME_KEYS = {"codec", "bits", "group_size", "scale_dtype", "offset", "row_bits", "nested", "label"}
_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # lone surrogates too: no UTF-8 has them
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Scheme:
    """How one matrix is stored (CFG-2).

    Attributes:
        codec: ``"bcq"``, ``"uniform"``, ``"affine"`` or ``"codebook"``.
        bits: number of planes, 1 to 8.
        group_size: number of consecutive columns that share parameters; 0 is the whole row.
        scale_dtype: safetensors dtype of scales, offsets and zeros.
        offset: the matrix has an offset tensor (bcq).
        row_bits: rows have different numbers of bits (not of a codebook).
        nested: precisions below ``bits`` that have their own parameters (not of a codebook), ascending.
        label: a name for people; readers ignore it.
    """

    codec: str = "bcq"
    bits: int = 4
    group_size: int = 128
    scale_dtype: str = "F16"
    offset: bool = False
    row_bits: bool = False
    nested: tuple[int, ...] = ()
    label: str | None = None

    def groups(self, cols: int) -> int:
        """Groups in a row of `cols` columns; the last one may be short."""
        return 1 if self.group_size == 0 else -(-cols // self.group_size)

    def group_columns(self, cols: int) -> int:
        """Columns of a full group: ``group_size``, or `cols` where ``group_size`` is 0 or larger than `cols`."""
        return cols if self.group_size == 0 else min(self.group_size, cols)

    @property
    def shift(self) -> str | None:
        """Role of the shift that a matrix of this scheme has: that of its codec; of bcq, only on request."""
        codec = CODECS[self.codec]
        return None if codec.optional_shift and not self.offset else codec.shift

    def scale_planes(self, bits: int) -> int:
        """First dimension of the scales of a matrix with `bits` planes."""
        return bits if CODECS[self.codec].scale_per_plane else 1

    def planes_at(self, bits: int | None) -> int:
        """Planes that are read at precision `bits`; None is the scheme's own."""
        return self.bits if bits is None else min(bits, self.bits)

    def has_precision(self, bits: int | None) -> bool:
        """Whether a matrix of this scheme can be read at `bits` (NST-3); None is the scheme's own.

        More bits than the scheme has are its own: another module of the base may have them.
        """
        return bits is None or bits >= self.bits or bits in self.nested

    def check_precision(self, bits: int | None, *, file: object = None, tensor: str | None = None) -> None:
        """Raise PrecisionError, which names `file` and `tensor`, unless :meth:`has_precision`."""
        if not self.has_precision(bits):
            have = ", ".join(str(k) for k in (*self.nested, self.bits))
            message = f"asked for {bits} bits, but the file has scales for {have} only"
            advice = f"convert with --nested {bits} to store them"
            raise PrecisionError("NST-3", f"{message}; {advice}", file=file, tensor=tensor)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object, without defaults (CFG-2)."""
        out: dict[str, Any] = {
            "codec": self.codec,
            "bits": self.bits,
            "group_size": self.group_size,
            "scale_dtype": self.scale_dtype,
        }
        if self.offset:
            out["offset"] = True
        if self.row_bits:
            out["row_bits"] = True
        if self.nested:
            out["nested"] = list(self.nested)
        if self.label is not None:
            out["label"] = self.label
        return out

    @classmethod
    def from_dict(cls, obj: object, *, where: str = "scheme", file: object = None) -> Scheme:
        """Parse and check one scheme; raises ConfigError (CFG-2, CFG-3)."""

        def fail(message: str) -> ConfigError:
            return ConfigError("CFG-3", f"{where}: {message}", file=file)

        if not isinstance(obj, Mapping):
            raise fail(f"found {_kind_of(obj)}, expected an object")
        if unknown := sorted(set(obj) - _SCHEME_KEYS):
            raise fail(f"unknown key {unknown[0]!r}; a newer lowbit_format may know it")
        for key in ("codec", "bits", "group_size", "scale_dtype"):
            if key not in obj:
                raise fail(f"key {key!r} is missing")
        codec, bits, group_size = obj["codec"], obj["bits"], obj["group_size"]
        if not isinstance(codec, str) or codec not in CODECS:
            raise fail(f"unknown codec {codec!r}, expected one of {', '.join(CODECS)}")
        if not is_int(bits) or not 1 <= bits <= 8:
            raise fail(f"bits is {bits!r}, expected an integer from 1 to 8")
        if not is_int(group_size) or not 0 <= group_size <= MAX_DIMENSION:
            raise fail(f"group_size is {group_size!r}, expected an integer from 0 to {MAX_DIMENSION}")
        if obj["scale_dtype"] not in SCALE_DTYPES:
            raise fail(f"scale_dtype is {obj['scale_dtype']!r}, expected one of {', '.join(SCALE_DTYPES)}")
        for key in ("offset", "row_bits"):
            if not isinstance(obj.get(key, False), bool):
                raise fail(f"{key} is {obj[key]!r}, expected true or false")
        nested = obj.get("nested", [])
        if not isinstance(nested, list) or not all(is_int(k) and 1 <= k < bits for k in nested):
            raise fail(f"nested is {nested!r}, expected a list of integers from 1 to bits - 1")
        if nested != sorted(set(nested)):
            raise fail(f"nested is {nested!r}, expected ascending integers without repetition")
        if obj.get("offset") and not CODECS[codec].optional_shift:
            raise fail(f"offset is for bcq, not for {codec}")
        if CODECS[codec].codebook and (nested or obj.get("row_bits")):
            raise fail("a codebook has neither row_bits nor nested precisions")
        label = obj.get("label")
        if "label" in obj and not isinstance(label, str):
            raise fail(f"label is {label!r}, expected a string")
        return cls(
            codec,
            bits,
            group_size,
            obj["scale_dtype"],
            bool(obj.get("offset", False)),
            bool(obj.get("row_bits", False)),
            tuple(nested),
            label,
        )


@dataclass(frozen=True)
class ModuleEntry:
    """One quantized matrix (or stack of expert matrices) of the model (CFG-4, CFG-5).

    Attributes:
        path: dotted path of the module (for expert kinds: of the parameter).
        scheme: how the matrix is stored.
        kind: how the decoded matrix relates to the model's parameter.
        shape: ``(rows, cols)`` or ``(experts, rows, cols)``.
    """

    path: str
    scheme: Scheme
    kind: str
    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        return self.shape[-2]

    @property
    def cols(self) -> int:
        return self.shape[-1]

    @property
    def experts(self) -> int | None:
        """Number of experts, or None for a single matrix."""
        return self.shape[0] if len(self.shape) == 3 else None

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.rows * self.cols * (self.experts or 1)

    def tensor(self, role: str) -> str:
        """Name in the file of the tensor with role `role` (TEN-1, EXP-1)."""
        return f"{self.path}{'.' if self.experts is None else '_'}{role}"

    @property
    def weight(self) -> str:
        """Name of the model's parameter that the matrix replaces (CFG-5)."""
        return self.path if self.experts is not None else f"{self.path}.weight"


@dataclass(frozen=True)
class QuantizationConfig:
    """The whole ``quantization_config`` object.

    Attributes:
        modules: module entries by path.
        tied: path of a module without a matrix in the file -> path of the owner of its matrix (TIE-1).
        base_model_prefix: path of the base model inside the model with its head, or the empty string.
        format_version: ``"major.minor"``; if not given, the lowest that has all schemes (VER-3).
    """

    modules: dict[str, ModuleEntry]
    tied: dict[str, str] = field(default_factory=dict)
    base_model_prefix: str = ""
    format_version: str = ""

    def __post_init__(self) -> None:
        if not self.format_version:
            object.__setattr__(self, "format_version", lowest_version(m.scheme for m in self))

    def __iter__(self) -> Iterator[ModuleEntry]:
        return iter(self.modules.values())

    def canonical_path(self, path: str) -> tuple[str, bool]:
        """`path` without the base model's prefix, and whether it belongs to the body (FPR-1)."""
        prefix = f"{self.base_model_prefix}."
        if not self.base_model_prefix or not any(p.startswith(prefix) for p in self.modules):
            return path, True
        return (path[len(prefix) :], True) if path.startswith(prefix) else (path, False)

    def precisions(self) -> list[int]:
        """Every number of bits at which the base can be read, ascending (NST-3); the last is its own."""
        schemes = {m.scheme for m in self}
        most = max((s.bits for s in schemes), default=0)
        return [k for k in range(1, most + 1) if all(s.has_precision(k) for s in schemes)]

    def check_precision(
        self, bits: int | None, modules: Iterable[ModuleEntry] | None = None, *, file: object = None
    ) -> None:
        """Raise PrecisionError unless the base can be read at `bits` (NST-3); None is its own.

        Args:
            bits: a precision, at most the largest number of bits of any module.
            modules: only these have to have it; None is all.
            file: for messages.
        """
        most = max((m.scheme.bits for m in self), default=8)
        if bits is not None and not (is_int(bits) and 1 <= bits <= most):
            raise PrecisionError("NST-3", f"asked for {bits!r} bits, expected 1 to {most}", file=file)
        for module in self if modules is None else modules:
            module.scheme.check_precision(bits, file=file, tensor=module.path)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object; equal schemes share one named entry. Deterministic."""
        names = scheme_names(m.scheme for m in self)
        return {
            "quant_method": QUANT_METHOD,
            "format_version": self.format_version,
            "base_model_prefix": self.base_model_prefix,
            "schemes": {name: scheme.to_dict() for scheme, name in names.items()},
            "modules": {
                m.path: {"scheme": names[m.scheme], "kind": m.kind, "shape": list(m.shape)}
                for m in sorted(self, key=lambda m: m.path)
            },
            "tied": dict(sorted(self.tied.items())),
        }

    @classmethod
    def from_dict(cls, obj: object, *, file: object = None) -> QuantizationConfig:
        """Parse and check the object; raises ConfigError or VersionError."""
        if not isinstance(obj, Mapping):
            raise ConfigError("CFG-1", f"quantization_config is {_kind_of(obj)}, expected an object", file=file)
        check_version(obj.get("format_version"), file=file, rule="CFG-1")
        if obj.get("quant_method") != QUANT_METHOD:
            raise ConfigError(
                "CFG-1", f"quant_method is {obj.get('quant_method')!r}, expected {QUANT_METHOD!r}", file=file
            )
        schemes_obj = obj.get("schemes")
        if not isinstance(schemes_obj, Mapping) or "" in schemes_obj:
            raise ConfigError("CFG-2", "schemes is not an object from non-empty names to schemes", file=file)
        schemes = {n: Scheme.from_dict(s, where=f"scheme {n!r}", file=file) for n, s in schemes_obj.items()}
        modules_obj = obj.get("modules")
        if not isinstance(modules_obj, Mapping):
            raise ConfigError("CFG-4", "modules is not an object", file=file)
        modules = {path: _parse_module(path, entry, schemes, file) for path, entry in modules_obj.items()}
        prefix, tied = obj.get("base_model_prefix", ""), obj.get("tied", {})
        if not isinstance(prefix, str):
            raise ConfigError("CFG-7", f"base_model_prefix is {prefix!r}, expected a string", file=file)
        if not isinstance(tied, Mapping) or not all(isinstance(v, str) for v in tied.values()):
            raise ConfigError("CFG-7", "tied is not an object from path to path", file=file)
        for place, owner in tied.items():
            check_path(place, file=file)
            if place in modules:
                raise ConfigError(
                    "TIE-2", "is tied to another module and must not be in modules", file=file, tensor=place
                )
            if owner not in modules:
                raise ConfigError("TIE-2", f"is tied to {owner!r}, which is not in modules", file=file, tensor=place)
        return cls(modules, dict(tied), prefix, obj["format_version"])


def lowest_version(schemes: Iterable[Scheme]) -> str:
    """The lowest version of the format that has everything that these schemes use (VER-3)."""
    versions = {CODECS[scheme.codec].version for scheme in schemes}
    return max(versions, key=lambda v: tuple(map(int, v.split("."))), default="1.0")


def scheme_names(schemes: Any) -> dict[Scheme, str]:
    """A short, unique name for each distinct scheme, such as ``bcq-4-g128``; deterministic."""
    names: dict[Scheme, str] = {}
    for scheme in sorted(set(schemes), key=lambda s: (str(s.to_dict()),)):
        base = f"{scheme.label or scheme.codec}-{scheme.bits}" + (f"-g{scheme.group_size}" if scheme.group_size else "")
        base += "" if scheme.scale_dtype == "F16" else f"-{scheme.scale_dtype.lower()}"
        name, n = base, 1
        while name in names.values():
            n += 1
            name = f"{base}-{n}"
        names[scheme] = name
    return names


def check_version(version: object, *, file: object, rule: str) -> None:
    """Raise ConfigError (CFG-1) for an ill-formed version string, VersionError (VER-1) for another major version."""
    if not isinstance(version, str) or not re.fullmatch(r"(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)", version):
        raise ConfigError(
            rule, f"format_version is {version!r}, expected a string such as {FORMAT_VERSION!r}", file=file
        )
    if version.split(".")[0] != FORMAT_VERSION.split(".")[0]:
        raise VersionError(
            "VER-1",
            f"format_version is {version}, this reader knows {FORMAT_VERSION.split('.')[0]}.x; update lowbit_format",
            file=file,
        )


def check_path(path: object, *, file: object, rule: str = "CFG-4") -> str:
    """`path`; raises ConfigError if it is empty, too long, or has a separator or control character (CFG-4)."""
    if not is_text(path) or not 1 <= len(path) <= MAX_PATH or set(path) & {"/", "\\"} or "" in path.split("."):
        raise ConfigError(
            rule, f"module path {str(path)[:80]!r} is empty, too long or has a forbidden character", file=file
        )
    return path


def is_text(value: object) -> TypeGuard[str]:
    """Whether `value` is a string without control characters and lone surrogates, which no terminal should be sent."""
    return isinstance(value, str) and not _CONTROL.search(value)


def is_name(value: object) -> TypeGuard[str]:
    """Whether `value` is such a string and not empty."""
    return is_text(value) and value != ""


def is_sha256(value: object) -> TypeGuard[str]:
    """Whether `value` is 64 lower-case hexadecimal digits."""
    return isinstance(value, str) and bool(_SHA256.fullmatch(value))


def is_int(value: object) -> TypeGuard[int]:
    """Whether `value` is a JSON integer: a bool is an int in Python, but not in the spec (CFG-3)."""
    return isinstance(value, int) and not isinstance(value, bool)


def _parse_module(name: object, entry: object, schemes: Mapping[str, Scheme], file: object) -> ModuleEntry:
    path = check_path(name, file=file)

    def fail(rule: str, message: str) -> ConfigError:
        return ConfigError(rule, message, file=file, tensor=path)

    if not isinstance(entry, Mapping) or set(entry) != {"scheme", "kind", "shape"}:
        raise fail("CFG-4", "the module's entry must have exactly the keys scheme, kind and shape")
    if not isinstance(entry["scheme"], str) or entry["scheme"] not in schemes:
        raise fail("CFG-4", f"scheme {entry['scheme']!r} is not defined")
    kind, shape, scheme = entry["kind"], entry["shape"], schemes[entry["scheme"]]
    if not isinstance(kind, str) or kind not in KINDS:
        raise fail("CFG-5", f"unknown kind {kind!r}, expected one of {', '.join(KINDS)}")
    if not isinstance(shape, list) or len(shape) != KINDS[kind]:
        raise fail("CFG-5", f"shape is {shape!r}, expected a list of {KINDS[kind]} integers for kind {kind}")
    if not all(is_int(n) and 1 <= n <= MAX_DIMENSION for n in shape):
        raise fail("CFG-6", f"shape is {shape!r}, expected integers from 1 to {MAX_DIMENSION}")
    if scheme.row_bits and KINDS[kind] == 3:
        raise fail("EXP-2", f"a scheme with row_bits cannot be used for kind {kind}")
    return ModuleEntry(path, scheme, kind, tuple(shape))


def _kind_of(value: object) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"
