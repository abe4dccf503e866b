"""The task bundle: a base's scales, adapted to one task (spec/BUNDLE.md).

:func:`read_bundle` checks at the door all that needs no base, :func:`check_matches` the rest against one base, and
:func:`effective_params` does the arithmetic. Numpy only; the torch runtime does the same on its own tensors.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Container
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..codecs import CODECS
from ..container.atomic import atomic_file, files_together, write_json
from ..container.fingerprint import Fingerprint
from ..container.header import ITEM_BYTES, read_header
from ..container.writer import StoredTensor, write_safetensors
from ..dtypes import FLOATS, from_float32, round_to, stored, to_float32
from ..errors import BundleError, DigestError, FingerprintError, PrecisionError
from ..matrix import F32, Params, missing_precision
from ..schema import ModuleEntry, QuantizationConfig
from .bundle_config import (
    TASK_CONFIG_FILE as TASK_CONFIG_FILE,  # given on: who works with bundles needs this module alone
)
from .bundle_config import TaskConfig as TaskConfig
from .bundle_config import read_task_config as read_task_config

if TYPE_CHECKING:
    from ..container.reader import ModelReader

SCALES_FILE = "task_scales.safetensors"
CARD_FILE = "README.md"
OPERATIONS = ("scales.mul", "scales.add", "offsets.add", "zeros.add")  # TSK-6
SAVED = "modules_to_save."  # what names of whole tensors begin with (TSK-6)


@dataclass(frozen=True)
class TaskBundle:
    """A whole bundle in memory.

    Attributes:
        config: what it belongs to.
        deltas: float32 by name, ``"<module>.scales.mul"`` and the like, with the shapes of TSK-6.
        saved: tensors of ``config.modules_to_save``, named ``"<module>.<parameter>"`` (see :func:`saved_module`); read
            ones hold bytes, uint8.
    """

    config: TaskConfig
    deltas: dict[str, F32] = field(default_factory=dict)
    saved: tuple[StoredTensor, ...] = ()

    @property
    def delta_values(self) -> int:
        """Numbers in all deltas."""
        return sum(delta.size for delta in self.deltas.values())

    @property
    def saved_values(self) -> int:
        """Numbers in all tensors that are carried whole."""
        return sum(math.prod(tensor.shape) for tensor in self.saved)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, deltas in float32."""
        return sum(delta.nbytes for delta in self.deltas.values()) + sum(tensor.nbytes for tensor in self.saved)


@dataclass(frozen=True)
class Loss:
    """What rounding the deltas to a smaller dtype costs.

    Attributes:
        largest: absolute difference of the value that moves most.
        relative_rms: root mean square of the differences, relative to that of the deltas; 0 where these are all 0.
        changed: how many values do not survive as they are.
    """

    largest: float
    relative_rms: float
    changed: int


def read_bundle(directory: str | Path) -> TaskBundle:
    """The bundle in `directory`, checked by every rule that needs no base, digests included.

    Raises BundleError (TSK rules), VersionError, HeaderError (HDR rules) or DigestError (DIG rules).
    """
    config = read_task_config(Path(directory))
    path = Path(directory) / SCALES_FILE
    if not path.is_file():
        raise BundleError("TSK-6", "there is no such file; a task bundle has one", file=path)
    header = read_header(path)
    deltas, saved = dict[str, F32](), list[StoredTensor]()
    with open(path, "rb") as f:
        for info in header.tensors.values():
            f.seek(info.begin)
            content = f.read(info.nbytes)
            raw, digest = np.frombuffer(content, np.uint8), hashlib.sha256(content).hexdigest()
            if header.digests.get(info.name, digest) != digest:
                message = "the bytes do not have the digest that the header gives; the file is damaged, get it again"
                raise DigestError("DIG-3", message, file=path, tensor=info.name)
            if info.name.startswith(SAVED):
                saved.append(StoredTensor(info.name.removeprefix(SAVED), info.dtype, info.shape, raw))
            elif info.dtype in FLOATS:
                deltas[info.name] = to_float32(stored(raw, info.dtype, info.shape), info.dtype)
            else:
                message = f"is {info.dtype}, expected a delta in {', '.join(FLOATS)}"
                raise BundleError("TSK-6", message, file=path, tensor=info.name)
    bundle = TaskBundle(config, deltas, tuple(saved))
    check_bundle(bundle, path)
    return bundle


def write_bundle(directory: str | Path, bundle: TaskBundle, *, dtype: str = "F32", card: str | None = None) -> None:
    """Write `bundle` into `directory`, with digests; the same bytes whatever the dicts' order.

    A bundle that is there already is replaced: it stays as it was if anything fails. The files get their names when
    all are whole, ``task_config.json`` last.

    Args:
        directory: made where it is missing; other files in it stay.
        bundle: what to write.
        dtype: of the stored deltas, ``"F32"``, ``"F16"`` or ``"BF16"``; :func:`rounding_loss` says what it costs.
        card: text of ``README.md``; None leaves a card that is there.

    Raises:
        BundleError: a reader would refuse the bundle, or `dtype` cannot hold a delta.
        OutputError: the disk refuses.
    """
    directory = Path(directory)
    TaskConfig.from_dict(bundle.config.to_dict(), file=directory / TASK_CONFIG_FILE)
    check_bundle(bundle, directory / SCALES_FILE)
    tensors = [
        StoredTensor(name, dtype, delta.shape, from_float32(_rounded(name, delta, dtype), dtype))
        for name, delta in bundle.deltas.items()
    ]
    tensors += [replace(t, name=SAVED + t.name) for t in bundle.saved]
    with files_together(directory, [SCALES_FILE, *([] if card is None else [CARD_FILE]), TASK_CONFIG_FILE]) as work:
        write_safetensors(work / SCALES_FILE, sorted(tensors, key=lambda t: t.name))
        if card is not None:
            with atomic_file(work / CARD_FILE) as f:
                f.write(card.encode())
        write_json(work / TASK_CONFIG_FILE, bundle.config.to_dict())


def rounding_loss(bundle: TaskBundle, dtype: str) -> Loss:
    """What :func:`write_bundle` with this `dtype` would lose; raises BundleError where `dtype` cannot hold a delta."""
    largest, squares, total, changed = 0.0, 0.0, 0.0, 0
    for name, delta in bundle.deltas.items():
        exact = delta.astype(np.float64)
        error = _rounded(name, delta, dtype) - exact
        largest = max(largest, float(np.abs(error).max(initial=0)))
        squares, total = squares + float(np.square(error).sum()), total + float(np.square(exact).sum())
        changed += int(np.count_nonzero(error))
    return Loss(largest, math.sqrt(squares / total) if total else 0.0, changed)


def split_delta(name: str) -> tuple[str, str] | None:
    """Module and operation of a delta's name, such as ``("fc", "scales.mul")``; None if it is none (TSK-6)."""
    module, _, operation = name.rpartition(".")
    module, _, role = module.rpartition(".")
    return (module, f"{role}.{operation}") if module and f"{role}.{operation}" in OPERATIONS else None


def saved_module(name: str, listed: Container[str]) -> str | None:
    """The path of `listed` to which a saved tensor belongs: the longest that fits; None if none does (TSK-10)."""
    at = name.rfind(".", 0, max(len(name) - 1, 0))  # what is behind the dot is not empty
    while at > 0 and name[:at] not in listed:
        at = name.rfind(".", 0, at)
    return name[:at] if at > 0 else None


def modules_by_name(base: QuantizationConfig) -> dict[str, tuple[ModuleEntry, bool]]:
    """The base's modules by the names that bundles use, and whether each lies in the body (TSK-7)."""
    named = [(*base.canonical_path(m.path), m) for m in base]
    return {name: (m, in_body) for name, in_body, m in sorted(named, key=lambda n: n[1])}  # later wins: the body's


def check_matches(
    bundle: TaskBundle, base: QuantizationConfig, fingerprint: Fingerprint, bits: int | None = None
) -> None:
    """Refuse a bundle that does not belong to a base (TSK-7, TSK-10, MAT-1 to MAT-3).

    MAT-6 needs :func:`effective_params`, MAT-7 the model.

    Args:
        bundle: what to apply.
        base: the base's configuration.
        fingerprint: of the base.
        bits: precision at which the base is read; None is its own.

    Raises:
        FingerprintError: it was tuned on another base, or on another head and has deltas for it.
        PrecisionError: the base does not have the bundle's precision (NST-3).
        BundleError: another precision, a module that the base lacks, a delta that does not fit, or a quantized module
            that is carried whole.
    """
    config, modules = bundle.config, modules_by_name(base)
    if config.base_fingerprint != fingerprint.body:
        raise _other_base("MAT-1", config, config.base_fingerprint, fingerprint.body)
    for m in base:
        if config.bits is not None and config.bits < m.scheme.bits and config.bits not in m.scheme.nested:
            raise PrecisionError("NST-3", missing_precision(m.scheme, config.bits), tensor=m.path)
        if _planes(m, bits) != _planes(m, config.bits):
            tuned, read = (f"{b} bits" if b else "the base's own bits" for b in (config.bits, bits))
            how = f"load the base with bits={config.bits}"
            raise BundleError("MAT-3", f"was tuned at {tuned}, the base is read at {read}; {how}")
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
    prefix = f"{base.base_model_prefix}." if base.base_model_prefix else ""
    packed = {*modules, *(place.removeprefix(prefix) for place in base.tied)}
    above = {path for name in packed for path in _with_ancestors(name)}
    for listed in config.modules_to_save:
        path = listed.removeprefix(prefix)
        if path in above or not packed.isdisjoint(_with_ancestors(path)):
            message = "is, contains or lies in a quantized module of the base, which no bundle can carry whole"
            raise BundleError("TSK-10", message, tensor=listed)


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


def check_applies(bundle: TaskBundle, base: ModelReader) -> None:
    """Check a bundle against a base in a directory, all effective values included (MAT-1 to MAT-6).

    Raises what :func:`check_matches` and :func:`effective_params` raise.
    """
    check_matches(bundle, base.config, base.fingerprint(), bundle.config.bits)
    modules = modules_by_name(base.config)
    for name in sorted({(split_delta(delta) or ("", ""))[0] for delta in bundle.deltas}):
        effective_params(bundle, name, base_params(base, modules[name][0].path, bundle.config.bits))


def base_params(base: ModelReader, path: str, bits: int | None = None) -> Params:
    """Parameters of the module at `path` at precision `bits`, as :func:`effective_params` wants them."""
    module = base.module(path)
    if module.experts is None:
        return base.matrix(path).at(bits)[0]
    stack = [base.matrix(path, expert).at(bits)[0] for expert in range(module.experts)]
    shifts = [params.shift for params in stack if params.shift is not None]
    return Params(np.stack([params.scales for params in stack]), np.stack(shifts) if shifts else None)


def _rounded(name: str, delta: F32, dtype: str) -> F32:
    """`delta` rounded to `dtype`, in float32."""
    if dtype not in FLOATS:
        raise BundleError("TSK-6", f"deltas cannot be stored in {dtype!r}, expected one of {', '.join(FLOATS)}")
    rounded = round_to(np.asarray(delta, np.float32), dtype)
    if not np.isfinite(rounded).all():
        bf16_will_do = dtype == "F16" and np.isfinite(round_to(delta, "BF16")).all()
        wider = "BF16 (bfloat16), which has the range of F32" if bf16_will_do else "F32 (float32)"
        worst = float(np.abs(delta).max())
        raise BundleError("TSK-9", f"{worst:g} is too large for {dtype}; store the deltas in {wider}", tensor=name)
    return rounded


def check_bundle(bundle: TaskBundle, file: Path | None = None) -> None:
    """Raise BundleError for tensors that break a rule which needs no base (TSK-6, TSK-9 to TSK-11)."""

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
    listed, found, names = frozenset(bundle.config.modules_to_save), set[str](), set[str]()
    for tensor in bundle.saved:
        if tensor.name in names:
            raise fail("TSK-6", "another saved tensor has this name too", tensor.name)
        owner = saved_module(tensor.name, listed)
        if owner is None:
            raise fail("TSK-10", "belongs to no module of modules_to_save", tensor.name)
        if tensor.nbytes != math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]:
            raise fail("HDR-5", f"{tensor.nbytes} bytes are not {tensor.dtype} {list(tensor.shape)}", tensor.name)
        found.add(owner)
        names.add(tensor.name)
    for path in bundle.config.modules_to_save:
        if path not in found:
            raise fail("TSK-10", "modules_to_save lists this module, but it has no tensor of its own", path)


def _with_ancestors(path: str) -> set[str]:
    """`path` and the paths of all modules that contain it."""
    parts = path.split(".")
    return {".".join(parts[:n]) for n in range(1, len(parts) + 1)}


def _planes(module: ModuleEntry, bits: int | None) -> int:
    """Planes of a module that is read at `bits` (NST-3)."""
    return module.scheme.bits if bits is None else min(bits, module.scheme.bits)


def _fits(shape: tuple[int, ...], operation: str, module: ModuleEntry, bits: int | None) -> bool:
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
