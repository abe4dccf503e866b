"""How the weights of one module are distributed, and at which levels its codes lie."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bits import U8, pack_codes, plane_rows, unpack_codes
from ..container.reader import ModelReader
from ..differences import Side
from ..matrix import F32, Params, StoredMatrix
from ..reference import decode

STEPS = 80  # of a histogram
MOST_LEVELS = 64  # that are shown
_SEEN = 1 << 23  # weights that are looked at; of a larger matrix, rows at equal distances
_GROUPS = 1 << 15  # groups of which levels are computed
_TAIL = 0.0005  # part of the weights that a histogram leaves out at each end


@dataclass(frozen=True)
class Level:
    """What one code stands for.

    Attributes:
        code: the integer.
        low, middle, high: 5%, 50% and 95% quantile of its value over the module's groups.
        share: part of the weights that have it.
    """

    code: int
    low: float
    middle: float
    high: float
    share: float


@dataclass(frozen=True)
class Distribution:
    """The weights of one module.

    Attributes:
        path: of the module.
        why: it is shown.
        what: part of the module that was looked at, in words; empty for all of it.
        edges: of the histogram's steps, ascending, ``STEPS + 1`` numbers.
        quantized: part of the quantized weights in each step.
        original: part of the original weights in each step, if these are known.
        extremes: smallest and largest quantized weight.
        bits: of the codes whose levels these are.
        levels: ascending; empty if there are more than MOST_LEVELS.
    """

    path: str
    why: str
    what: str
    edges: tuple[float, ...]
    quantized: tuple[float, ...]
    original: tuple[float, ...]
    extremes: tuple[float, float]
    bits: int
    levels: tuple[Level, ...]


def distribution(reader: ModelReader, path: str, why: str, other: Side | None) -> Distribution:
    """The distribution of the module at `path`, beside that of the same module of `other`, the original.

    The original is left out if it is not finite. Of a stack of experts the first one is taken.
    Raises what :meth:`ModelReader.matrix` raises.
    """
    module = reader.module(path)
    expert = None if module.experts is None else 0
    matrix = reader.matrix(module.path, expert)
    every = -(-matrix.rows * matrix.cols // _SEEN)
    rows = np.arange(0, matrix.rows, every)
    weights = decode(matrix)[::every]
    original = None if other is None else other.decode(module.path, expert)[::every]
    if original is not None and not np.isfinite(original).all():
        original = None
    edges = _edges(weights if original is None else np.concatenate([weights, original]))
    bits = matrix.scheme.bits if matrix.row_bits is None else int(np.bincount(matrix.row_bits[rows]).argmax())
    what = [f"expert 0 of {module.experts}"] * (expert is not None) + [f"every {every}th row"] * (every > 1)
    return Distribution(
        module.path,
        why,
        ", ".join(what),
        tuple(edges.tolist()),
        _shares(weights, edges),
        () if original is None else _shares(original, edges),
        (float(weights.min()), float(weights.max())),
        bits,
        tuple(_levels(matrix, rows, bits)) if 2**bits <= MOST_LEVELS else (),
    )


def _edges(weights: F32) -> NDArray[np.float64]:
    low, high = np.quantile(weights, [_TAIL, 1 - _TAIL]).astype(np.float64)
    if low == high:
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, STEPS + 1)


def _shares(weights: F32, edges: NDArray[np.float64]) -> tuple[float, ...]:
    counts, _ = np.histogram(weights, edges)
    return tuple((counts / weights.size).tolist())


def _levels(matrix: StoredMatrix, rows: NDArray[np.int64], bits: int) -> list[Level]:
    """The levels of those of `rows` that have `bits` planes."""
    if matrix.row_bits is not None:
        rows = rows[matrix.row_bits[rows] == bits]
    shares = np.bincount(codes_of(matrix, rows, bits).ravel(), minlength=2**bits)
    values = level_values(matrix, rows, bits)
    low, middle, high = np.quantile(values, [0.05, 0.5, 0.95], axis=0)
    found = [
        Level(code, float(low[code]), float(middle[code]), float(high[code]), float(shares[code] / shares.sum()))
        for code in range(2**bits)
    ]
    return sorted(found, key=lambda level: level.middle)


def codes_of(matrix: StoredMatrix, rows: NDArray[np.int64], bits: int) -> U8:
    """The codes of `rows`, which have `bits` planes: uint8 ``[rows, cols]``."""
    if matrix.row_bits is None:
        return unpack_codes(matrix.planes[:, rows], matrix.cols)
    index = plane_rows(matrix.row_bits, matrix.scheme.bits)[:bits, rows]
    return unpack_codes(matrix.planes[index], matrix.cols)


def level_values(matrix: StoredMatrix, rows: NDArray[np.int64], bits: int) -> F32:
    """What each code stands for in each group of `rows`: float32 ``[groups, 2**bits]``.

    A matrix with a row for each group, in which every code appears once, decodes to just that.
    """
    scales = matrix.params.scales[: matrix.scheme.scale_planes(bits), rows]
    scales = scales.reshape(len(scales), -1)
    shift = None if matrix.params.shift is None else matrix.params.shift[rows].reshape(-1)
    chosen: Any = slice(None, None, -(-scales.shape[1] // _GROUPS))
    params = Params(
        np.ascontiguousarray(scales[:, chosen, None]),
        None if shift is None else np.ascontiguousarray(shift[chosen, None]),
    )
    groups, codes = params.scales.shape[1], np.arange(2**bits, dtype=np.uint8)
    planes = pack_codes(np.broadcast_to(codes, (groups, len(codes))), bits)
    scheme = replace(matrix.scheme, bits=bits, group_size=0, nested=(), row_bits=False)
    return decode(StoredMatrix(scheme, groups, len(codes), planes, params, codebook=matrix.codebook))
