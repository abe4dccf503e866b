"""Whether a bundle belongs to a base, and what the base's parameters become (spec/BUNDLE.md section 3, TSK-7, TSK-8).

Numpy only; the torch runtime does the same arithmetic on its own tensors.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ..container.fingerprint import Fingerprint
from ..errors import BundleError, FingerprintError
from ..matrix import Params
from ..schema import ModuleEntry, QuantizationConfig
from .bundle import TaskBundle
from .bundle_config import TaskConfig
from .operations import OPERATIONS, split_delta

if TYPE_CHECKING:
    from ..container.reader import ModelReader


def modules_by_name(base: QuantizationConfig) -> dict[str, tuple[ModuleEntry, bool]]:
    """The base's modules by the names that bundles use, and whether each lies in the body (TSK-7)."""
    named = [(*base.canonical_path(m.path), m) for m in base]
    return {name: (m, in_body) for name, in_body, m in sorted(named, key=lambda n: n[1])}  # later wins: the body's


def check_matches(
    bundle: TaskBundle, base: QuantizationConfig, fingerprint: Fingerprint, bits: int | None = None
) -> None:
    """Refuse a bundle that does not belong to a base (TSK-5, TSK-7, TSK-10, MAT-1 to MAT-3).

    MAT-6 needs :func:`effective_params`; MAT-7 the model, or :func:`check_saved`.

    Args:
        bundle: what to apply.
        base: the base's configuration.
        fingerprint: of the base.
        bits: precision at which the base is read; None is its own.

    Raises:
        FingerprintError: it was tuned on another base, or on another head and has deltas for it.
        PrecisionError: the base does not have the bundle's precision, or `bits` (NST-3).
        BundleError: another precision, a module that the base lacks, a delta that does not fit, a quantized module
            that is carried whole, or one thing that is carried twice.
    """
    config, modules = bundle.config, modules_by_name(base)
    if config.base_fingerprint != fingerprint.body:
        raise _other_base("MAT-1", config, config.base_fingerprint, fingerprint.body)
    base.check_precision(config.bits)
    for m in base:
        if m.scheme.planes_at(bits) != m.scheme.planes_at(config.bits):
            tuned, read = (f"{b} bits" if b else "the base's own bits" for b in (config.bits, bits))
            how = f"load the base with bits={config.bits}"
            raise BundleError("MAT-3", f"was tuned at {tuned}, the base is read at {read}; {how}")
    base.check_precision(bits)
    for name, delta in bundle.deltas.items():
        path, operation = split_delta(name)
        if path not in modules:
            raise BundleError("TSK-7", "the base has no such quantized module", tensor=name)
        module, in_body = modules[path]
        if not in_body and config.head_fingerprint != fingerprint.head:
            raise _other_base("MAT-2", config, config.head_fingerprint, fingerprint.head, name)
        if not operation.fits(delta.shape, module, config.bits):
            message = f"a delta of shape {list(delta.shape)} does not fit {module.path!r}, {list(module.shape)}"
            raise BundleError("TSK-7", f"{message} in {module.scheme.planes_at(config.bits)} bits", tensor=name)
    prefix = _prefix(base)
    _check_repeats([*config.modules_to_save], prefix, "modules_to_save lists this module")
    _check_repeats([tensor.name for tensor in bundle.saved], prefix, "this parameter is saved")
    # By both names: the prefix itself is above what lies in the body.
    quantized = {*modules, *(place.removeprefix(prefix) for place in base.tied), *base.modules, *base.tied}
    above = {path for name in quantized for path in _with_ancestors(name)}
    for listed in config.modules_to_save:
        path = listed.removeprefix(prefix)
        if path in above or not quantized.isdisjoint(_with_ancestors(path)):
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
    out = Params(params.scales.copy(), None if params.shift is None else params.shift.copy())
    with np.errstate(over="ignore"):
        for operation in OPERATIONS.values():
            delta = bundle.deltas.get(f"{name}.{operation.name}")
            if delta is not None:
                operation.apply(out, delta)
    if not all(np.isfinite(values).all() for values in (out.scales, out.shift) if values is not None):
        raise BundleError("MAT-6", "the deltas make a scale, offset or zero infinite", tensor=name)
    return out


def check_applies(bundle: TaskBundle, base: ModelReader, *, verify: bool = False) -> int:
    """Check a bundle against a base in a directory, all effective values included (MAT-1 to MAT-7).

    Args:
        bundle: what to apply.
        base: to what.
        verify: check the base's bytes too (FPR-5). Otherwise the fingerprint rests on the digests that its files give.

    Returns:
        How many saved parameters the files do not have: whether these fit, only a model can tell (MAT-7).

    Raises what :func:`check_matches`, :func:`effective_params` and :func:`check_saved` raise, and with `verify` what
    :meth:`ModelReader.verify` does.
    """
    if verify:
        base.verify()
    check_matches(bundle, base.config, base.fingerprint(), bundle.config.bits)
    modules = modules_by_name(base.config)
    for name in sorted({split_delta(delta)[0] for delta in bundle.deltas}):
        effective_params(bundle, name, base_params(base, modules[name][0].path, bundle.config.bits))
    return check_saved(bundle, base)


def without_prefix(bundle: TaskBundle, base: QuantizationConfig) -> TaskBundle:
    """A checked bundle with the base's prefix taken off the names of what it carries whole (TSK-5)."""
    prefix = _prefix(base)
    listed = tuple(path.removeprefix(prefix) for path in bundle.config.modules_to_save)
    saved = tuple(replace(tensor, name=tensor.name.removeprefix(prefix)) for tensor in bundle.saved)
    return replace(bundle, config=replace(bundle.config, modules_to_save=listed), saved=saved)


def check_saved(bundle: TaskBundle, base: ModelReader) -> int:
    """Refuse a saved parameter that the base's files have with another shape (MAT-7).

    Returns how many the files do not have. Raises BundleError.
    """
    prefix, names, unknown = _prefix(base.config), frozenset(base.names()), 0
    for tensor in bundle.saved:
        bare = tensor.name.removeprefix(prefix)
        own = next((name for name in (prefix + bare, bare) if name in names), None)  # in this order (TSK-5)
        if own is None:
            unknown += 1
        elif tuple(tensor.shape) != base.info(own).shape:
            found, expected = list(tensor.shape), list(base.info(own).shape)
            message = f"is saved with the shape {found}, {own!r} of the base has {expected}"
            raise BundleError("MAT-7", f"{message}; it belongs to a model with other options", tensor=tensor.name)
    return unknown


def base_params(base: ModelReader, path: str, bits: int | None = None) -> Params:
    """Parameters of the module at `path` at precision `bits`, as :func:`effective_params` wants them."""
    module = base.module(path)
    module.scheme.check_precision(bits, file=base.directory, tensor=path)
    if module.experts is None:
        return base.matrix(path, only=bits).params
    stack = [base.matrix(path, expert, only=bits).params for expert in range(module.experts)]
    shifts = [params.shift for params in stack if params.shift is not None]
    return Params(np.stack([params.scales for params in stack]), np.stack(shifts) if shifts else None)


def _prefix(base: QuantizationConfig) -> str:
    """What is taken off the paths of modules to save (TSK-5); empty if nothing is."""
    return f"{base.base_model_prefix}." if base.base_model_prefix else ""


def _check_repeats(names: list[str], prefix: str, what: str) -> None:
    """Raise BundleError if two names are the same without `prefix` (TSK-5)."""
    seen = dict[str, str]()
    for name in names:
        other = seen.setdefault(name.removeprefix(prefix), name)
        if other is not name:
            raise BundleError("TSK-5", f"{what} twice: {other!r} is the same with {prefix!r} in front", tensor=name)


def _with_ancestors(path: str) -> set[str]:
    """`path` and the paths of all modules that contain it."""
    parts = path.split(".")
    return {".".join(parts[:n]) for n in range(1, len(parts) + 1)}


def _other_base(rule: str, config: TaskConfig, tuned: str, found: str, tensor: str | None = None) -> FingerprintError:
    what, name = "base" if rule == "MAT-1" else "head", config.base_model_name_or_path or "unnamed"
    found = f"was tuned on a {what} with the fingerprint {tuned or '(none)'} ({name}); this one has {found or '(none)'}"
    return FingerprintError(rule, f"{found}. Load the {what} that it was tuned on", tensor=tensor)
