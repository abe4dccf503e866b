"""The task bundle: a base's scales, adapted to one task (spec/BUNDLE.md).

:func:`read_bundle` checks at the door all that needs no base, :func:`check_matches` the rest against one base, and
:func:`effective_params` does the arithmetic. Numpy only; the torch runtime does the same on its own tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from .codecs import CODECS
from .container import strict_json
from .container.dtypes import FLOATS, stored, to_float32
from .container.fingerprint import Fingerprint
from .container.header import ITEM_BYTES, read_header
from .container.writer import Tensor, atomic_file, disk_errors, write_safetensors
from .errors import BundleError, DigestError, FingerprintError, FormatError, PrecisionError, VersionError
from .packed import F32, Params, missing_precision
from .schema import FORMAT_VERSION, Module, QuantizationConfig, check_path, check_version, is_int

CONFIG_FILE = "task_config.json"
SCALES_FILE = "task_scales.safetensors"
FORMAT = "lowbit-task"
OPERATIONS = ("scales.mul", "scales.add", "offsets.add", "zeros.add")  # TSK-6
SAVED = "modules_to_save."  # what names of whole tensors begin with (TSK-6)

_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class TaskConfig:
    """``task_config.json``: which base the deltas belong to (TSK-1 to TSK-5).

    Attributes:
        base_fingerprint, head_fingerprint: of the base that the deltas were tuned on; the second may be empty.
        method: how they were tuned; informative.
        base_model_name_or_path, revision: where people may find the base.
        bits: nested precision at which they were tuned, or None for the base's own bits.
        modules_to_save: paths of modules that the bundle carries whole.
        format_version: of the bundle.
    """

    base_fingerprint: str
    head_fingerprint: str = ""
    method: str = "alphatuning"
    base_model_name_or_path: str | None = None
    revision: str | None = None
    bits: int | None = None
    modules_to_save: tuple[str, ...] = ()
    format_version: str = FORMAT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """JSON object, every key written out."""
        return {"format": FORMAT, **asdict(self), "modules_to_save": list(self.modules_to_save)}

    @classmethod
    def from_dict(cls, obj: object, *, file: object = None) -> TaskConfig:
        """Parse and check the object; raises BundleError, or VersionError for another major version."""

        def fail(rule: str, message: str) -> BundleError:
            return BundleError(rule, message, file=file)

        if not isinstance(obj, Mapping) or obj.get("format") != FORMAT:
            raise fail("TSK-1", f"is not an object with format {FORMAT!r}: this is no task bundle")
        try:
            check_version(obj.get("format_version"), file=None, rule="TSK-1")
        except FormatError as e:
            kind = VersionError if isinstance(e, VersionError) else BundleError
            raise kind("TSK-1", str(e), file=file) from e
        base, head = obj.get("base_fingerprint"), obj.get("head_fingerprint", "")
        if not isinstance(base, str) or not _HEX.fullmatch(base):
            raise fail("TSK-2", f"base_fingerprint is {base!r}, expected 64 lower-case hexadecimal digits")
        if not isinstance(head, str) or not (head == "" or _HEX.fullmatch(head)):
            raise fail("TSK-2", f"head_fingerprint is {head!r}, expected 64 lower-case hexadecimal digits, or none")
        bits = obj.get("bits")
        if bits is not None and not (is_int(bits) and 1 <= bits <= 8):
            raise fail("TSK-3", f"bits is {bits!r}, expected an integer from 1 to 8, or null")
        for key in ("base_model_name_or_path", "revision"):
            if not isinstance(obj.get(key), str | None):
                raise fail("TSK-4", f"{key} is {obj[key]!r}, expected a string or null")
        method, saved = obj.get("method"), obj.get("modules_to_save", [])
        if not isinstance(method, str):
            raise fail("TSK-5", f"method is {method!r}, expected a string")
        if not isinstance(saved, list) or not all(map(_is_path, saved)):
            raise fail("TSK-5", f"modules_to_save is {saved!r}, expected a list of module paths")
        place, revision = obj.get("base_model_name_or_path"), obj.get("revision")
        return cls(base, head, method, place, revision, bits, tuple(saved), obj["format_version"])


@dataclass(frozen=True)
class TaskBundle:
    """A whole bundle in memory.

    Attributes:
        config: what it belongs to.
        deltas: float32 by name, ``"<module>.scales.mul"`` and the like, with the shapes of TSK-6.
        saved: tensors of ``config.modules_to_save``, named ``"<module>.<parameter>"``; read ones hold bytes, uint8.
    """

    config: TaskConfig
    deltas: dict[str, F32] = field(default_factory=dict)
    saved: tuple[Tensor, ...] = ()


def read_bundle(directory: str | Path) -> TaskBundle:
    """The bundle in `directory`, checked by every rule that needs no base, digests included.

    Raises BundleError (TSK rules), VersionError, HeaderError (HDR rules) or DigestError (DIG rules).
    """
    config = _read_config(Path(directory) / CONFIG_FILE)
    path = Path(directory) / SCALES_FILE
    if not path.is_file():
        raise BundleError("TSK-6", "there is no such file; a task bundle has one", file=path)
    header = read_header(path)
    deltas, saved = dict[str, F32](), list[Tensor]()
    with open(path, "rb") as f:
        for info in header.tensors.values():
            f.seek(info.begin)
            content = f.read(info.nbytes)
            raw, digest = np.frombuffer(content, np.uint8), hashlib.sha256(content).hexdigest()
            if header.digests.get(info.name, digest) != digest:
                message = "the bytes do not have the digest that the header gives; the file is damaged, get it again"
                raise DigestError("DIG-3", message, file=path, tensor=info.name)
            if info.name.startswith(SAVED):
                saved.append(Tensor(info.name.removeprefix(SAVED), info.dtype, info.shape, raw))
            elif info.dtype in FLOATS:
                deltas[info.name] = to_float32(stored(raw, info.dtype, info.shape), info.dtype)
            else:
                message = f"is {info.dtype}, expected a delta in {', '.join(FLOATS)}"
                raise BundleError("TSK-6", message, file=path, tensor=info.name)
    bundle = TaskBundle(config, deltas, tuple(saved))
    _check(bundle, path)
    return bundle


def write_bundle(directory: str | Path, bundle: TaskBundle) -> None:
    """Write `bundle` into `directory`, deltas in F32, with digests; the same bytes whatever the dicts' order.

    The two files get their names one after the other when both are whole, ``task_config.json`` last.
    Raises BundleError for a bundle that a reader would refuse, OutputError where the disk does.
    """
    directory = Path(directory)
    TaskConfig.from_dict(bundle.config.to_dict(), file=directory / CONFIG_FILE)
    _check(bundle, directory / SCALES_FILE)
    tensors = [Tensor(name, "F32", v.shape, v.astype("<f4")) for name, v in bundle.deltas.items()]
    tensors += [replace(t, name=SAVED + t.name) for t in bundle.saved]
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    with atomic_file(directory / CONFIG_FILE) as f:
        f.write((json.dumps(bundle.config.to_dict(), indent=2, ensure_ascii=False) + "\n").encode())
        write_safetensors(directory / SCALES_FILE, sorted(tensors, key=lambda t: t.name))


def split_delta(name: str) -> tuple[str, str] | None:
    """Module and operation of a delta's name, such as ``("fc", "scales.mul")``; None if it is none (TSK-6)."""
    module, _, operation = name.rpartition(".")
    module, _, role = module.rpartition(".")
    return (module, f"{role}.{operation}") if module and f"{role}.{operation}" in OPERATIONS else None


def modules_by_name(base: QuantizationConfig) -> dict[str, tuple[Module, bool]]:
    """The base's modules by the names that bundles use, and whether each lies in the body (TSK-7)."""
    named = [(*base.canonical_path(m.path), m) for m in base]
    return {name: (m, in_body) for name, in_body, m in sorted(named, key=lambda n: n[1])}  # later wins: the body's


def check_matches(
    bundle: TaskBundle, base: QuantizationConfig, fingerprint: Fingerprint, bits: int | None = None
) -> None:
    """Refuse a bundle that does not belong to a base (TSK-7, MAT-1 to MAT-3; MAT-6 needs :func:`effective_params`).

    Args:
        bundle: what to apply.
        base: the base's configuration.
        fingerprint: of the base.
        bits: precision at which the base is read; None is its own.

    Raises:
        FingerprintError: it was tuned on another base, or on another head and has deltas for it.
        PrecisionError: the base does not have the bundle's precision (NST-3).
        BundleError: another precision, a module that the base lacks, or a delta that does not fit.
    """
    config, modules = bundle.config, modules_by_name(base)
    if config.base_fingerprint != fingerprint.body:
        raise _other_base("MAT-1", config, config.base_fingerprint, fingerprint.body)
    for m in base:
        if config.bits is not None and config.bits < m.scheme.bits and config.bits not in m.scheme.nested:
            raise PrecisionError("NST-3", missing_precision(m.scheme, config.bits), tensor=m.path)
        if _planes(m, bits) != _planes(m, config.bits):
            tuned, read = (f"{b} bits" if b else "the base's own bits" for b in (config.bits, bits))
            raise BundleError("MAT-3", f"was tuned at {tuned}, the base is read at {read}; load it with the bundle's")
    for name, delta in bundle.deltas.items():
        path, operation = split_delta(name) or ("", "")
        if path not in modules:
            raise BundleError("TSK-7", "the base has no such quantized module", tensor=name)
        module, in_body = modules[path]
        if not in_body and config.head_fingerprint != fingerprint.head:
            raise _other_base("MAT-2", config, config.head_fingerprint, fingerprint.head, name)
        if not _fits(delta.shape, operation, module, config.bits):
            message = f"a delta of shape {list(delta.shape)} does not fit {module.path!r}, {list(module.shape)}"
            raise BundleError("TSK-7", f"{message} in {_planes(module, config.bits)} bits", tensor=name)


def effective_params(bundle: TaskBundle, name: str, params: Params) -> Params:
    """Parameters of one module while the bundle is applied, with the arithmetic of TSK-8; `params` stay as they are.

    Args:
        bundle: checked by :func:`check_matches`.
        name: the module's name in the bundle, see :func:`modules_by_name`.
        params: the base's, at the bundle's precision; for experts stacked, with the axis of experts in front.

    Raises BundleError where a value would become infinite (MAT-6).
    """
    scales, shift = params.scales.copy(), None if params.shift is None else params.shift.copy()
    deltas = {op: bundle.deltas[f"{name}.{op}"] for op in OPERATIONS if f"{name}.{op}" in bundle.deltas}
    with np.errstate(over="ignore"):
        for operation, delta in deltas.items():
            if operation == "scales.mul":
                scales[..., : delta.shape[-2], :, :] *= (np.float32(1) + delta)[..., None]
            elif operation == "scales.add":
                scales[..., : delta.shape[-3], :, :] += delta
            elif shift is not None:
                shift += delta
    if not np.isfinite(scales).all() or (shift is not None and not np.isfinite(shift).all()):
        raise BundleError("MAT-6", "the deltas make a scale, offset or zero infinite", tensor=name)
    return Params(scales, shift)


def _read_config(path: Path) -> TaskConfig:
    def fail(rule: str, message: str) -> BundleError:
        return BundleError("TSK-1", message, file=path)

    if not path.is_file():
        raise fail("TSK-1", "there is no such file; expected a task bundle's directory")
    return TaskConfig.from_dict(strict_json.load_file(path, fail), file=path)


def _check(bundle: TaskBundle, file: Path) -> None:
    """The rules about tensors that need no base (TSK-6, TSK-9 to TSK-11)."""

    def fail(rule: str, message: str, tensor: str | None = None) -> BundleError:
        return BundleError(rule, message, file=file, tensor=tensor)

    if not bundle.deltas and not bundle.saved:
        raise fail("TSK-11", "holds no tensor")
    for name, delta in bundle.deltas.items():
        parts = split_delta(name)
        if name.startswith(SAVED) or parts is None:
            raise fail("TSK-6", f"expected <module>.{{{', '.join(OPERATIONS)}}} or {SAVED}<module>.<parameter>", name)
        if parts[1] == "scales.add" and f"{parts[0]}.scales.mul" in bundle.deltas:
            raise fail("TSK-9", "the module has scales.mul too", name)
        if not np.isfinite(delta).all():
            raise fail("TSK-9", "holds NaN or an infinity", name)
    listed = bundle.config.modules_to_save
    for tensor in bundle.saved:
        if not any(_belongs(tensor.name, path) for path in listed):
            raise fail("TSK-10", "belongs to no module of modules_to_save", tensor.name)
        if tensor.nbytes != math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]:
            raise fail("HDR-5", f"{tensor.nbytes} bytes are not {tensor.dtype} {list(tensor.shape)}", tensor.name)
    for path in listed:
        if not any(_belongs(tensor.name, path) for tensor in bundle.saved):
            raise fail("TSK-10", "modules_to_save lists this module, but it has no tensor", path)


def _belongs(name: str, path: str) -> bool:
    return name.startswith(f"{path}.") and name != f"{path}."


def _is_path(value: object) -> bool:
    try:
        return bool(check_path(value, file=None))
    except FormatError:
        return False


def _planes(module: Module, bits: int | None) -> int:
    """Planes of a module that is read at `bits` (NST-3)."""
    return module.scheme.bits if bits is None else min(bits, module.scheme.bits)


def _fits(shape: tuple[int, ...], operation: str, module: Module, bits: int | None) -> bool:
    """Whether the base's module takes a delta of this shape (TSK-7)."""
    codec, scheme = CODECS[module.scheme.codec], module.scheme
    stack = () if module.experts is None else (module.experts,)
    rows_groups = (module.rows, scheme.groups(module.cols))
    role = operation.split(".")[0]
    if role != "scales":
        return role == codec.shift and codec.has_shift(scheme) and shape == (*stack, *rows_groups)
    most = _planes(module, bits) if codec.scale_per_plane else 1
    tail = rows_groups if operation == "scales.add" else rows_groups[:1]
    return any(shape == (*stack, p, *tail) for p in range(1, most + 1))


def _other_base(rule: str, config: TaskConfig, tuned: str, found: str, tensor: str | None = None) -> FingerprintError:
    what, name = "base" if rule == "MAT-1" else "head", config.base_model_name_or_path or "unnamed"
    found = f"was tuned on a {what} with the fingerprint {tuned or '(none)'} ({name}); this one has {found or '(none)'}"
    return FingerprintError(rule, f"{found}. Load the {what} that it was tuned on", tensor=tensor)
