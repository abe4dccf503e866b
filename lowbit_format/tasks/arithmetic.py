"""Arithmetic on task bundles: weighted sums, and how far two are apart. Numpy only.

A delta that a bundle lacks is zero, and so are the planes that it leaves alone (TSK-7, MAT-5); so bundles of one base
are vectors, and can be added and compared as such.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..container.writer import StoredTensor
from ..errors import BundleError, FingerprintError
from ..matrix import F32
from .bundle import TaskBundle
from .bundle_config import TaskConfig
from .layer_scaling import layer_factors
from .operations import OPERATIONS, split_delta

F64 = NDArray[np.float64]

TOTAL = "total"  # stands for module and operation in a sum over all


@dataclass(frozen=True)
class ModuleDifference:
    """How two bundles differ in one delta.

    Attributes:
        module, operation: which; both :data:`TOTAL` for all deltas together.
        values: numbers in the delta, of the larger one where the number of planes differs.
        rms_a, rms_b, rms: root mean square of each one's delta, and of their difference.
        largest: the largest absolute difference.
        where: its index in the delta; empty where there is no difference, and in a total.
        cosine: between the two deltas as vectors; None where one is all zeros.
    """

    module: str
    operation: str
    values: int
    rms_a: float
    rms_b: float
    rms: float
    largest: float
    where: tuple[int, ...] = ()
    cosine: float | None = None

    @property
    def row(self) -> int | None:
        """Row of the largest difference; None where there is no difference, and in a total."""
        axis = OPERATIONS[self.operation].axis("rows") if self.where else None
        return None if axis is None else self.where[axis]


def merge_bundles(
    bundles: Sequence[TaskBundle],
    weights: Sequence[float] | None = None,
    *,
    saved_from: int | None = None,
    lines: float | None = None,
) -> TaskBundle:
    """The weighted sum of the bundles' deltas, computed in float64 and rounded once to float32.

    Args:
        bundles: at least one, all tuned on the same base at the same precision.
        weights: one for each bundle; None is their mean.
        saved_from: index of the bundle whose `modules_to_save` are kept. None will do where only one bundle has any,
            or all that have them have the same, bit for bit.
        lines: of the first layer only this part (0 to 1) is taken, of the last one all, and evenly more between
            (LiNeS, :mod:`.layer_scaling`); None: of each layer all.

    Returns:
        A bundle with the method ``"merge"``.

    Raises:
        FingerprintError: the bundles belong to different bases or heads.
        BundleError: precisions, operations or shapes that do not go together, modules to save that nobody chose, or
            a sum that float32 cannot hold; `lines` without layers.
    """
    if not bundles:
        raise BundleError("TSK-11", "there is nothing to merge; give at least one bundle")
    if weights is None:
        weights = [1 / len(bundles)] * len(bundles)
    if len(weights) != len(bundles) or not all(map(math.isfinite, weights)):
        raise BundleError("TSK-9", f"the weights are {list(weights)}, expected {len(bundles)} finite numbers")
    head = _common_head(bundles)
    names = _common_names(bundles)
    parts = {} if lines is None else layer_factors((split_delta(name)[0] for name in names), lines)
    scaled = {name: [w * parts.get(split_delta(name)[0], 1.0) for w in weights] for name in names}
    deltas = {name: _weighted_sum(name, bundles, scaled[name]) for name in names}
    keeper = bundles[_saved_index(bundles, saved_from)]
    place = next((b.config for b in bundles if b.config.base_model_name_or_path), bundles[0].config)
    config = TaskConfig(
        bundles[0].config.base_fingerprint,
        head,
        "merge",
        place.base_model_name_or_path,
        place.revision,
        bundles[0].config.bits,
        keeper.config.modules_to_save,
        keeper.config.task and replace(keeper.config.task, metrics={}),  # what its head's outputs mean
    )
    return TaskBundle(config, deltas, keeper.saved)


def compare_bundles(a: TaskBundle, b: TaskBundle | None = None) -> list[ModuleDifference]:
    """How the deltas of two bundles differ, by module and operation, sorted by name.

    Args:
        a: a bundle.
        b: another one; None is the base itself, whose deltas are all zero.

    Raises:
        BundleError: deltas of one name have shapes that do not go together.
    """
    named = [(*split_delta(name), x, y) for name, x, y in _pairs(a, b)]
    return [_difference(module, operation.name, x, y) for module, operation, x, y in named]


def total_difference(a: TaskBundle, b: TaskBundle | None = None) -> ModuleDifference:
    """:func:`compare_bundles` for all deltas together, as one vector."""
    pairs = _pairs(a, b)
    x = np.concatenate([x.reshape(-1) for _, x, _ in pairs] or [np.zeros(0)])
    y = np.concatenate([y.reshape(-1) for _, _, y in pairs] or [np.zeros(0)])
    return _difference(TOTAL, TOTAL, x, y)


def same_saved(a: TaskBundle, b: TaskBundle) -> bool:
    """Whether both carry the same modules whole, bit for bit."""
    return _saved_facts(a) == _saved_facts(b)


# --- merging ---------------------------------------------------------------------------------------


def _common_head(bundles: Sequence[TaskBundle]) -> str:
    """The head fingerprint of the sum, after a check that base and precision are one and the same (MAT-1 to MAT-3).

    A bundle without a head fingerprint has no delta for the head of any base (MAT-2), so it goes with every head.
    """
    first = bundles[0].config
    for i, config in enumerate(b.config for b in bundles):
        if config.base_fingerprint != first.base_fingerprint:
            raise _apart("MAT-1", FingerprintError, "was tuned on the base", bundles, i, lambda c: c.base_fingerprint)
        if config.bits != first.bits:
            raise _apart("MAT-3", BundleError, "was tuned at", bundles, i, _precision)
    heads = {b.config.head_fingerprint: i for i, b in reversed(list(enumerate(bundles))) if b.config.head_fingerprint}
    if len(heads) > 1:
        one, two = sorted(heads.values())[:2]
        what = "was tuned under the head"
        raise _apart("MAT-2", FingerprintError, what, bundles, two, lambda c: c.head_fingerprint, one)
    return next(iter(heads), "")


def _precision(config: TaskConfig) -> str:
    return f"{config.bits} bits" if config.bits else "the base's own bits"


def _apart(
    rule: str,
    kind: type[BundleError],
    what: str,
    bundles: Sequence[TaskBundle],
    index: int,
    fact: Callable[[TaskConfig], str],
    first: int = 0,
) -> BundleError:
    """The error about two bundles, `first` and `index`, that do not go together."""

    def named(i: int) -> str:
        config = bundles[i].config
        return f"bundle {i} {what} {fact(config)} ({config.base_model_name_or_path or 'unnamed'})"

    return kind(rule, f"{named(first)}, {named(index)}; only bundles of one base and precision can be merged")


def _common_names(bundles: Sequence[TaskBundle]) -> list[str]:
    """Names of all deltas, sorted; refused where one module's scales are multiplied here and added to there."""
    names = sorted({name for b in bundles for name in b.deltas})
    for name in names:
        module, operation = split_delta(name)
        if operation.name == "scales.add" and (other := f"{module}.scales.mul") in names:
            add, mul = (next(i for i, b in enumerate(bundles) if n in b.deltas) for n in (name, other))
            message = f"bundle {mul} has scales.mul for this module, bundle {add} has scales.add"
            raise BundleError("TSK-9", f"{message}; a merged bundle cannot have both", tensor=module)
    return names


def _weighted_sum(name: str, bundles: Sequence[TaskBundle], weights: Sequence[float]) -> F32:
    having = [(w, b.deltas[name]) for w, b in zip(weights, bundles, strict=True) if name in b.deltas]
    shape = _common_shape(name, [delta for _, delta in having])
    total: F64 | None = None  # and not zeros: 0 + -0.0 is +0.0, and a bundle merged alone is to stay as it is
    with np.errstate(over="ignore", invalid="ignore"):
        for weight, delta in having:
            term = weight * _padded(delta, shape)
            total = term if total is None else total + term
        rounded = np.asarray(total, np.float32)
    if not np.isfinite(rounded).all():
        raise BundleError("TSK-9", "the weighted sum is too large for float32; use smaller weights", tensor=name)
    return rounded


def _saved_index(bundles: Sequence[TaskBundle], saved_from: int | None) -> int:
    """Index of the bundle whose whole modules the sum carries."""
    if saved_from is not None:
        if not 0 <= saved_from < len(bundles):
            raise BundleError("TSK-10", f"saved_from is {saved_from}, expected 0 to {len(bundles) - 1}")
        return saved_from
    having = [i for i, b in enumerate(bundles) if b.saved]
    for i in having[1:]:
        if not same_saved(bundles[having[0]], bundles[i]):
            message = f"bundles {having[0]} and {i} carry different modules to save"
            raise BundleError("TSK-10", f"{message}; choose one bundle's with saved_from=<index> (--saved-from)")
    return having[0] if having else 0


def _saved_facts(bundle: TaskBundle) -> tuple[list[str], list[tuple[str, str, tuple[int, ...], bytes]]]:
    def fact(t: StoredTensor) -> tuple[str, str, tuple[int, ...], bytes]:
        return t.name, t.dtype, tuple(t.shape), t.data.tobytes()

    return sorted(bundle.config.modules_to_save), sorted(map(fact, bundle.saved))


# --- comparing -------------------------------------------------------------------------------------


def _pairs(a: TaskBundle, b: TaskBundle | None) -> list[tuple[str, F64, F64]]:
    """Both bundles' deltas by name, in float64, with zeros for what one lacks."""
    out, theirs = list[tuple[str, F64, F64]](), {} if b is None else b.deltas
    for name in sorted({*a.deltas, *theirs}):
        both = [a.deltas.get(name), theirs.get(name)]
        shape = _common_shape(name, [delta for delta in both if delta is not None])
        x, y = (np.zeros(shape) if delta is None else _padded(delta, shape) for delta in both)
        out.append((name, x, y))
    return out


def _difference(module: str, operation: str, x: F64, y: F64) -> ModuleDifference:
    apart = np.abs(x - y)
    norm_x, norm_y = float(np.linalg.norm(x)), float(np.linalg.norm(y))
    largest, where = float(apart.max(initial=0)), tuple[int, ...]()
    if largest and operation != TOTAL:
        where = tuple(int(i) for i in np.unravel_index(int(apart.argmax()), apart.shape))
    cosine = float(np.vdot(x / norm_x, y / norm_y)) if norm_x and norm_y else None
    root = math.sqrt(max(x.size, 1))
    rms = float(np.linalg.norm(apart)) / root
    return ModuleDifference(module, operation, x.size, norm_x / root, norm_y / root, rms, largest, where, cosine)


# --- shapes ----------------------------------------------------------------------------------------


def _common_shape(name: str, deltas: Sequence[F32]) -> tuple[int, ...]:
    """The shape with the most planes; refused where the deltas differ in more than their planes (TSK-7)."""
    axis = split_delta(name)[1].axis("planes")
    shapes = [list(delta.shape) for delta in deltas]
    if axis is not None and all(len(shape) >= -axis for shape in shapes):
        most = max(shape[axis] for shape in shapes)
        shapes = [[most if i == len(shape) + axis else n for i, n in enumerate(shape)] for shape in shapes]
    if any(shape != shapes[0] for shape in shapes):
        found = " and ".join(sorted({str(list(delta.shape)) for delta in deltas}))
        raise BundleError("TSK-7", f"shapes {found} do not go together: these are of different bases", tensor=name)
    return tuple(shapes[0])


def _padded(delta: F32, shape: tuple[int, ...]) -> F64:
    """`delta` in float64, with planes of zeros behind its own."""
    behind = [(0, most - n) for n, most in zip(delta.shape, shape, strict=True)]
    return np.pad(delta.astype(np.float64), behind) if any(n for _, n in behind) else delta.astype(np.float64)
