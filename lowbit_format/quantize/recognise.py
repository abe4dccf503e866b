"""Exact recognition: a weight that is on a grid already is stored on that grid, without loss (ENC-3).

Each recogniser guesses the parameters of a group from its distinct values. The reference decoder judges: a guess is
accepted only if the decoded matrix, rounded to the source's dtype, equals the source bit for bit. The test costs almost
no time for ordinary weights: their first group has too many distinct values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..bits import row_bytes
from ..dtypes import FLOATS, round_to
from ..matrix import F32, Params, StoredMatrix
from ..reference import decode
from ..schema import Scheme
from . import codebook
from .group_lanes import pack
from .target import Target

_PROBES = (
    1,
    8,
)  # rows tried before the rest: most weights fail in the first, those that resemble a grid in the first few
_AT_ONCE = 1 << 20  # weights in one block of rows
_MULTIPLES = 4  # the smallest gap between values may be up to this many steps of the grid
_REFLECTIONS = 400  # most corrections of scales until every value is within its bounds
_PRECISION = {"F16": (10, -14), "BF16": (7, -126), "F32": (23, -126)}  # bits of the mantissa, least exponent
_GROUP_SIZES = (0, 128, 64, 32)  # tried besides the target's; 0 is the whole row, which needs the fewest scales


def recognise(weight: F32, target: Target, source_dtype: str) -> StoredMatrix | None:
    """The matrix that stores `weight` exactly in at most the target's bits, or None if no known grid fits.

    Args:
        weight: float32 ``[rows, cols]``, finite.
        target: its bits are the upper limit; its group size is tried after whole rows.
        source_dtype: dtype to which decoded values are rounded before they are compared.
    """
    if source_dtype not in FLOATS:  # F64: float32 has lost some of its bits already
        return None
    # A recognised matrix has no nested scales: a nested precision can be read only if it has no more bits (NST-3).
    target = replace(target, bits=min(target.nested, default=target.bits), nested=())
    for size in dict.fromkeys(s for s in (0, target.group_size, *_GROUP_SIZES) if s < weight.shape[1]):
        probes = [weight[:rows] for rows in _PROBES]
        if any(len(np.unique(row)) > 2**target.bits for row in probes[-1][:, : size or None]):
            continue
        for grid in _grids(target):
            if all(_on_grid(probe, grid, size, source_dtype) is not None for probe in probes):
                found = _on_grid(weight, grid, size, source_dtype)
                if found is not None:
                    return found
    return None


F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Grid:
    """A kind of grid to try.

    Attributes:
        codec: of the matrix.
        bits: of a code.
        label: name of a codebook's table.
        table: float32 ``[2**bits]``, of a codebook.
    """

    codec: str
    bits: int
    label: str | None = None
    table: F32 | None = None


@dataclass(frozen=True)
class Fit:
    """A guess.

    Attributes:
        codes: uint8 ``[rows, cols]``.
        scales: float64 ``[planes of scales, rows, groups]``.
        shift: float64 ``[rows, groups]``, or None.
    """

    codes: NDArray[np.uint8]
    scales: F64
    shift: F64 | None = None


def _grids(target: Target) -> Iterator[Grid]:
    """Grids to try, smallest first: by bits, then the target's codec before the others."""
    tables = {name: codebook.padded(table) for name, table in codebook.TABLES.items()}
    if target.codec == "codebook" and not isinstance(target.table, str):
        tables = {"table": codebook.padded(target.values()), **tables}
    for bits in range(1, target.bits + 1):
        for codec in sorted(_RECOGNISERS, key=lambda c: c != target.codec):
            if codec != "codebook":
                yield Grid(codec, bits)
                continue
            yield from (Grid(codec, bits, n, t) for n, t in tables.items() if codebook.table_bits(t) == bits)


def _on_grid(weight: F32, grid: Grid, size: int, source_dtype: str) -> StoredMatrix | None:
    """The exact matrix on this grid with groups of `size` columns (0: the whole row), or None.

    It guesses one block of rows at a time: a guess takes many times the memory of its rows.
    """
    rows, cols = weight.shape
    codes, fits = np.zeros((rows, 8 * row_bytes(cols)), np.uint8), list[Fit]()
    blocks = [slice(r, min(rows, r + max(1, _AT_ONCE // cols))) for r in range(0, rows, max(1, _AT_ONCE // cols))]
    width = size or cols
    for block in blocks:
        groups = [weight[block, c : c + width] for c in range(0, cols, width)]
        fit = _RECOGNISERS[grid.codec](groups, [_bounds(group, source_dtype) for group in groups], grid)
        if fit is None:
            return None
        codes[block, :cols] = fit.codes
        fits.append(replace(fit, codes=codes[block]))
    scales = np.concatenate([f.scales for f in fits], axis=1).astype(np.float32)
    shifts = [f.shift for f in fits if f.shift is not None]
    shift = np.concatenate(shifts).astype(np.float32) if shifts else None
    if grid.codec == "bcq" and shift is not None and not shift.any():
        shift = None
    scheme = Scheme(
        grid.codec, grid.bits, size, "F32", offset=grid.codec == "bcq" and shift is not None, label=grid.label
    )
    planes = pack(codes, grid.bits)
    for dtype in FLOATS:  # the narrowest parameters that decode to the weight exactly
        params = Params(round_to(scales, dtype), None if shift is None else round_to(shift, dtype))
        matrix = StoredMatrix(replace(scheme, scale_dtype=dtype), rows, cols, planes, params, {}, grid.table)
        if all(_is_exact(weight[b], matrix.row_slice(b.start, b.stop), source_dtype) for b in blocks):
            return matrix
    return None


def _is_exact(weight: F32, matrix: StoredMatrix, source_dtype: str) -> bool:
    """Whether the parameters are finite and decode to `weight`; -0.0 may become 0.0 (ENC-3)."""
    params = matrix.params
    finite = np.isfinite(params.scales).all() and (params.shift is None or np.isfinite(params.shift).all())
    return bool(finite) and np.array_equal(round_to(decode(matrix), source_dtype), weight)


# --- bounds of a value before its rounding ---------------------------------------------------------


@dataclass(frozen=True)
class Bounds:
    """For each value of a group, the interval of values that the source's dtype rounds to it.

    Attributes:
        low, high: float64 ``[rows, columns]``.
        epsilon: relative spacing of the dtype's values.
    """

    low: F64
    high: F64
    epsilon: float


def _bounds(group: F32, source_dtype: str) -> Bounds:
    """Half a unit in the last place on each side; the unit below a power of two is half as large."""
    mantissa, lowest = _PRECISION[source_dtype]
    magnitude = np.abs(group.astype(np.float64))
    fraction, exponent = np.frexp(magnitude)
    unit = 2.0 ** (np.maximum(exponent - 1, lowest) - mantissa)
    sign = np.where(group < 0, -1.0, 1.0)
    inner = sign * (magnitude - np.where((fraction == 0.5) & (exponent - 1 > lowest), unit / 4, unit / 2))
    outer = sign * (magnitude + unit / 2)
    low, high = np.minimum(inner, outer), np.maximum(inner, outer)
    zero = group == 0
    low[zero], high[zero] = -unit[zero] / 2, unit[zero] / 2
    return Bounds(low, high, 2.0**-mantissa)


def _common_scales(factors: F64, bounds: Bounds) -> F32 | None:
    """For each row a scale with ``factors * scale`` within the bounds of every column, or None if a row has none.

    All scales are values of the narrowest dtype in which every row has one.
    """
    magnitude = np.abs(factors)
    flip = factors < 0
    low, high = np.where(flip, -bounds.high, bounds.low), np.where(flip, -bounds.low, bounds.high)
    with np.errstate(divide="ignore", invalid="ignore"):
        least = np.where(magnitude > 0, low / magnitude, -np.inf).max(axis=1)
        most = np.where(magnitude > 0, high / magnitude, np.inf).min(axis=1)
    free = ~(magnitude > 0).any(axis=1)  # any scale fits an all-zero row
    least[free], most[free] = 0.5, 1.5
    if (least > most).any():
        return None
    middle: F32 = ((least + most) / 2).astype(np.float32)
    for dtype in FLOATS:
        near = round_to(middle, dtype)
        if ((near > least) & (near < most)).all():  # on a bound, a tie might round away from the value
            return near
    return middle


# --- codebooks: FP4, NF4, ternary, and the user's table ---------------------------------------------


def _tables(groups: list[F32], bounds: list[Bounds], grid: Grid) -> Fit | None:
    if grid.table is None:
        return None
    codes, scales = [], []
    for group, b in zip(groups, bounds, strict=True):
        found = _table_group(group, b, grid.table)
        if found is None:
            return None
        codes.append(found[0])
        scales.append(found[1])
    return Fit(np.concatenate(codes, axis=1), np.stack(scales, axis=1)[None].astype(np.float64))


def _table_group(group: F32, bounds: Bounds, table: F32) -> tuple[NDArray[np.uint8], F32] | None:
    """Codes and scales of a group: the largest magnitude of a row is one of the table's magnitudes; all are tried."""
    values, codes_of_values = codebook.sorted_table(table)
    mids = (values[1:].astype(np.float64) + values[:-1]) / 2
    largest = np.abs(group).max(axis=1).astype(np.float64)
    out, scale = np.zeros(group.shape, np.uint8), np.zeros(group.shape[0], np.float32)
    left = np.ones(group.shape[0], bool)
    for magnitude in np.unique(np.abs(values[values != 0]))[::-1]:
        guess = np.where(largest > 0, largest / magnitude, 1.0)[:, None]
        index = np.searchsorted(mids, group / guess, side="right")
        error = np.abs(values[index] * guess - group).max(axis=1)
        fits = left & (error <= 2 * bounds.epsilon * largest)
        if fits.any():
            some = Bounds(bounds.low[fits], bounds.high[fits], bounds.epsilon)
            found = _common_scales(values[index[fits]].astype(np.float64), some)
            if found is not None:
                out[fits], scale[fits] = codes_of_values[index[fits]], found
                left &= ~fits
        if not left.any():
            return out, scale
    return None


# --- uniform grids: integer multiples of a step -----------------------------------------------------


def _uniform(groups: list[F32], bounds: list[Bounds], grid: Grid) -> Fit | None:
    codes, scales, zeros = [], [], []
    for group, b in zip(groups, bounds, strict=True):
        found = [_multiples(row, grid.bits, b.epsilon) for row in group]
        multiples = [f for f in found if f is not None]
        if len(multiples) < len(found):
            return None
        k = np.stack(multiples)
        common = _common_scales(k, b)
        if common is None:
            return None
        zero = -k.min(axis=1, keepdims=True).clip(max=0)
        codes.append((k + zero).astype(np.uint8))
        scales.append(common)
        zeros.append(zero[:, 0])
    return Fit(
        np.concatenate(codes, axis=1), np.stack(scales, axis=1)[None].astype(np.float64), np.stack(zeros, axis=1)
    )


def _multiples(row: F32, bits: int, epsilon: float) -> F64 | None:
    """Integers k with ``row = k * step`` for some step; None if no step keeps their range below 2^bits.

    Zero is a value of the grid, whether or not it occurs. The gap between two neighbours is one step, or a few.
    """
    values = np.unique(np.append(row, np.float32(0.0))).astype(np.float64)
    if len(values) == 1:
        return np.zeros(len(row))
    slack = 2 * epsilon * np.abs(values).max()
    gaps = np.diff(values)
    smallest = np.abs(values[values != 0]).min()  # the closer to zero, the less a value was rounded
    for start in (smallest, gaps[gaps > slack].min(initial=np.inf)):
        for multiple in range(1, _MULTIPLES + 1):
            step = start / multiple
            for _ in range(3):  # one gap is a rough estimate of the step, all values together a better one
                k = np.rint(values / step)
                if not k.any():
                    break
                step = float(values @ k / (k @ k))
            fits = np.abs(values - k * step).max() <= slack and len(np.unique(k)) == len(k)
            if fits and np.ptp(k) < 2**bits:
                multiples: F64 = np.rint(row.astype(np.float64) / step)
                return multiples
    return None


# --- BCQ grids: an offset plus or minus scales ------------------------------------------------------


def _bcq(groups: list[F32], bounds: list[Bounds], grid: Grid) -> Fit | None:
    rows = len(groups[0])
    codes, scales = [np.empty(g.shape, np.uint8) for g in groups], np.empty((grid.bits, rows, len(groups)))
    offsets = np.empty((rows, len(groups)))
    for g, (group, b) in enumerate(zip(groups, bounds, strict=True)):
        for r, row in enumerate(group):
            found = _bcq_row(row, b.low[r], b.high[r], grid.bits, b.epsilon)
            if found is None:
                return None
            codes[g][r], scales[:, r, g], offsets[r, g] = found
    return Fit(np.concatenate(codes, axis=1), scales, offsets)


def _bcq_row(row: F32, low: F64, high: F64, bits: int, epsilon: float) -> tuple[NDArray[np.uint8], F64, float] | None:
    """Codes, scales and offset of values ``z ± s0 ± s1 …``; every level must occur.

    The differences to the smallest level are the sums of subsets of the doubled scales. The smallest difference is a
    doubled scale; without its sums, the smallest remaining difference is the next.
    """
    values = np.unique(row).astype(np.float64)
    if len(values) > 2**bits:
        return None
    slack = 4 * epsilon * np.abs(values).max()
    rest, sums, doubled = values[1:] - values[0], np.zeros(1), list[float]()
    while len(rest) and len(doubled) < bits:
        doubled.append(float(rest[0]))
        sums = np.concatenate([sums, sums + doubled[-1]])
        rest = rest[np.abs(rest[:, None] - sums).min(axis=1) > slack]
    if len(rest):
        return None
    scales = np.array(sorted(doubled, reverse=True) + [0.0] * (bits - len(doubled))) / 2
    offset = float((values[0] + values[-1]) / 2)
    signs = 2.0 * ((np.arange(2**bits)[:, None] >> np.arange(bits - 1, -1, -1)) & 1) - 1
    used = scales > 0
    for centre in (0.0, offset) if abs(offset) <= slack else (offset,):  # a small offset may be an effect of rounding
        levels = centre + signs @ scales
        order = np.argsort(levels, kind="stable")
        mids = (levels[order][1:] + levels[order][:-1]) / 2
        codes = order[np.searchsorted(mids, row, side="right")]
        design = np.concatenate([signs[codes][:, used], np.ones((len(row), 0 if centre == 0 else 1))], axis=1)
        solution = _within(design, row.astype(np.float64), low, high)
        if solution is not None:
            scales[used] = solution[: int(used.sum())]
            return codes.astype(np.uint8), scales, 0.0 if centre == 0 else float(solution[-1])
    return None


def _within(design: F64, target: F64, low: F64, high: F64) -> F64 | None:
    """Parameters whose ``design @ parameters`` is within the bounds, or None if none are found.

    Starting from least squares, each step moves across the bound that is violated most, a little further than onto it.
    This converges if the set of solutions has an interior (Motzkin and Schoenberg 1954, "The relaxation method for
    linear inequalities").
    """
    solution = np.linalg.pinv(design) @ target
    rows, first = np.unique(design, axis=0, return_index=True)
    low, high = low[first], high[first]
    for _ in range(_REFLECTIONS):
        made = rows @ solution
        outside = np.maximum(low - made, made - high)
        worst = int((outside / (high - low)).argmax())
        if outside[worst] <= 0:
            return solution
        step = -outside[worst] if made[worst] > high[worst] else outside[worst]
        solution = solution + 1.5 * step * rows[worst] / rows.shape[1]  # every entry is 1 or -1: the squared length
    return None


_RECOGNISERS: dict[str, Callable[[list[F32], list[Bounds], Grid], Fit | None]] = {
    "bcq": _bcq,
    "codebook": _tables,
    "uniform": _uniform,
}
