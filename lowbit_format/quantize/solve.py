"""From a float32 matrix and a target to a stored matrix: fit parameters, round them, assign codes, make planes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numba
import numpy as np

from ..bits import U8, row_bytes
from ..dtypes import round_to
from ..errors import NonFiniteWeightError, QuantizationError
from ..machine.llvm import LANES
from ..machine.threads import parallel_rows
from ..matrix import F32, Params, StoredMatrix
from ..reference import decode
from . import bcq, codebook, uniform
from .group_lanes import pack
from .recognise import recognise
from .rows import quantize_rows
from .target import Target

_NO_IMPORTANCE: F32 = np.empty(0, np.float32)  # to kernels: all columns count the same
_DECODED_AT_ONCE = 1 << 20  # weights; 4 MB, which stays in the cache
_SLACK = 2.0**-6  # of a step: a wider dtype is used where rounding the parameters would move a level further


@dataclass(frozen=True)
class Quantized:
    """A quantized matrix and its error.

    Attributes:
        matrix: the result.
        squared_error: sum of squared differences between the weight and the reference decoder's result.
        squared_norm: sum of the squared weights.
        lossless: the weight was on a grid and is stored exactly (ENC-3).
        widened: why parameters are wider than the target's, or None.
    """

    matrix: StoredMatrix
    squared_error: float
    squared_norm: float
    lossless: bool = False
    widened: str | None = None

    @property
    def relative_error(self) -> float:
        """``||decoded - weight|| / ||weight||``; 0 for an all-zero weight."""
        return (self.squared_error / self.squared_norm) ** 0.5 if self.squared_norm > 0 else 0.0


def quantize(
    weight: F32, target: Target, *, importance: F32 | None = None, source_dtype: str = "F32", name: str = "weight"
) -> Quantized:
    """Quantize one matrix.

    Args:
        weight: float32 ``[rows, cols]``.
        target: codec, bits and other options.
        importance: float32 ``[cols]``, >= 0: how much each column's error counts, such as the mean squared activation;
            None: all columns count the same, and with bcq from 4 bits on large weights count more than small ones.
        source_dtype: dtype of the weight in its checkpoint; "lossless" means equal after rounding to it (ENC-3).
        name: tensor name for messages.

    Raises:
        NonFiniteWeightError: the weight holds NaN or an infinity (ENC-4).
        QuantizationError: `importance` has a wrong shape or value, or the weight's range overflows float32.
    """
    weight = np.ascontiguousarray(weight, np.float32)
    if weight.ndim != 2 or 0 in weight.shape:
        raise QuantizationError(f"{name}: has shape {list(weight.shape)}, expected [rows, cols] without a zero")
    norm, bad = _sum_of_squares(weight)
    if bad:
        raise NonFiniteWeightError(
            f"{name}: holds {bad} NaN or infinite values; mend the checkpoint, or keep this module in full precision"
        )
    if importance is not None:
        importance = np.ascontiguousarray(importance, np.float32)
        if importance.shape != (weight.shape[1],) or not np.isfinite(importance).all() or (importance < 0).any():
            raise QuantizationError(f"{name}: importance must be {weight.shape[1]} finite numbers >= 0")
    if target.row_bits is not None:
        return _by_rows(weight, target, importance, norm, source_dtype, name)
    if target.recognise:
        found = recognise(weight, target, source_dtype)
        if found is not None:
            return Quantized(found, _squared_error(weight, found), norm, lossless=True)
    solver = SOLVERS[target.codec]
    exact = solver.fit(weight, target, importance)
    matrix = round_and_assign(weight, target, exact, target.scale_dtype)
    widened = None
    if matrix is None:
        widened = f"{target.scale_dtype} cannot hold its parameters, F32 can"
        matrix = round_and_assign(weight, target, exact, "F32")
    if matrix is None:
        raise QuantizationError(f"{name}: its parameters overflow float32; keep this module in full precision")
    error = _squared_error(weight, matrix)
    if not np.isfinite(error):
        raise QuantizationError(f"{name}: its levels overflow float32; keep this module in full precision")
    return Quantized(matrix, error, norm, widened=widened)


def _by_rows(
    weight: F32, target: Target, importance: F32 | None, norm: float, source_dtype: str, name: str
) -> Quantized:
    """Quantize a matrix whose rows have different bits; no grid is looked for."""
    widened = list[str]()

    def fit(rows: F32, own: Target) -> StoredMatrix:
        own = replace(own, recognise=False)
        result = quantize(rows, own, importance=importance, source_dtype=source_dtype, name=name)
        widened.extend([result.widened] if result.widened else [])
        return result.matrix

    matrix = quantize_rows(weight, target, fit, name)
    return Quantized(matrix, _squared_error(weight, matrix), norm, widened=widened[0] if widened else None)


def round_and_assign(weight: F32, target: Target, exact: Params, dtype: str) -> StoredMatrix | None:
    """The matrix with parameters rounded to `dtype`, or None if that moves a level too far (ENC-4)."""
    solver, (rows, cols) = SOLVERS[target.codec], weight.shape
    params = rounded(exact, dtype)
    if not is_close(exact, params, target):
        return None
    codes = np.zeros((rows, 8 * row_bytes(cols)), np.uint8)
    solver.assign(weight, params, target, codes)
    nested = {}
    for k in target.nested:  # fitted to the first k planes of the final codes
        exact_k = solver.refit(weight, codes, target, k)
        nested[k] = rounded(exact_k, dtype)
        if not is_close(exact_k, nested[k], target):
            return None
    table = codebook.padded(target.values()) if target.codec == "codebook" else None
    return StoredMatrix(target.scheme(dtype), rows, cols, pack(codes, target.bits), params, nested, table)


def rounded(params: Params, dtype: str) -> Params:
    """Parameters with the values that `dtype` stores."""
    return Params(round_to(params.scales, dtype), None if params.shift is None else round_to(params.shift, dtype))


def is_close(exact: Params, stored: Params, target: Target) -> bool:
    """Whether rounding moves no level further than `_SLACK` of a step; an offset may move by about F16's precision."""
    if not np.isfinite(stored.scales).all() or (stored.shift is not None and not np.isfinite(stored.shift).all()):
        return False
    step = np.abs(exact.scales).max(axis=0)
    if (np.abs(exact.scales - stored.scales) > _SLACK * step).any():
        return False
    if exact.shift is None or stored.shift is None:
        return True
    moved = np.abs(exact.shift - stored.shift)
    if target.codec == "uniform":  # zero points count in steps
        return bool((moved <= 4 * _SLACK).all())
    return bool((moved <= np.maximum(_SLACK * step, 2.0**-10 * np.abs(exact.shift))).all())


# --- the solvers, one for each codec ---------------------------------------------------------------


@dataclass(frozen=True)
class Solver:
    """The three steps of a codec.

    Attributes:
        fit: finds the parameters of a weight.
        assign: writes the nearest codes, uint8 ``[rows, >= cols]``.
        refit: finds parameters for the first k planes of given codes.
    """

    fit: Callable[[F32, Target, F32 | None], Params]
    assign: Callable[[F32, Params, Target, U8], None]
    refit: Callable[[F32, U8, Target, int], Params]


def _shape(weight: F32, target: Target) -> tuple[int, int, int]:
    """Groups in a row, columns of a full group, and number of blocks of LANES groups."""
    scheme = target.scheme()
    groups = scheme.groups(weight.shape[1])
    return groups, scheme.group_columns(weight.shape[1]), -(-weight.shape[0] * groups // LANES)


def _fit_bcq(weight: F32, target: Target, importance: F32 | None) -> Params:
    rows, (groups, size, blocks) = weight.shape[0], _shape(weight, target)
    scales, offsets = np.empty((target.bits, rows * groups), np.float32), np.empty(rows * groups, np.float32)
    rounds = bcq.ROUNDS if target.rounds is None else target.rounds
    column_weights = _NO_IMPORTANCE if importance is None else importance
    parallel_rows(bcq.fit, blocks, weight, column_weights, scales, offsets, target.offset, size, rounds)
    return Params(scales.reshape(target.bits, rows, groups), offsets.reshape(rows, groups) if target.offset else None)


def _assign_bcq(weight: F32, params: Params, target: Target, codes: U8) -> None:
    _, size, blocks = _shape(weight, target)
    scales = params.scales.reshape(params.scales.shape[0], -1)
    offsets = np.zeros(scales.shape[1], np.float32) if params.shift is None else params.shift.ravel()
    parallel_rows(bcq.assign, blocks, weight, scales, offsets, size, codes)


def _refit_bcq(weight: F32, codes: U8, target: Target, k: int) -> Params:
    groups, size, _ = _shape(weight, target)
    scales = np.empty((k, weight.shape[0], groups), np.float32)
    offsets = np.zeros((weight.shape[0], groups), np.float32)
    parallel_rows(bcq.refit, weight.shape[0], weight, codes, scales, offsets, target.offset, size, target.bits)
    return Params(scales, offsets if target.offset else None)


def _fit_uniform(weight: F32, target: Target, importance: F32 | None) -> Params:
    rows, (groups, size, blocks) = weight.shape[0], _shape(weight, target)
    scales, zeros = np.empty((2, rows * groups), np.float32)
    rounds = uniform.ROUNDS if target.rounds is None else target.rounds
    column_weights = _NO_IMPORTANCE if importance is None else importance
    parallel_rows(
        uniform.fit,
        blocks,
        weight,
        column_weights,
        scales,
        zeros,
        target.bits,
        size,
        uniform.SOLVERS[target.solver],
        rounds,
    )
    return Params(scales.reshape(1, rows, groups), zeros.reshape(rows, groups))


def _assign_uniform(weight: F32, params: Params, target: Target, codes: U8) -> None:
    _, size, blocks = _shape(weight, target)
    assert params.shift is not None  # noqa: S101 - uniform always has zeros; tells the type checker
    parallel_rows(uniform.assign, blocks, weight, params.scales.ravel(), params.shift.ravel(), target.bits, size, codes)


def _refit_uniform(weight: F32, codes: U8, target: Target, k: int) -> Params:
    groups, size, _ = _shape(weight, target)
    scales, zeros = np.empty((2, weight.shape[0], groups), np.float32)
    parallel_rows(uniform.refit, weight.shape[0], weight, codes, scales, zeros, size, target.bits - k)
    return Params(scales[None], zeros)


def _fit_codebook(weight: F32, target: Target, importance: F32 | None) -> Params:
    rows, (groups, size, blocks) = weight.shape[0], _shape(weight, target)
    scales = np.empty(rows * groups, np.float32)
    table, _ = codebook.sorted_table(codebook.padded(target.values()))
    rounds = codebook.ROUNDS if target.rounds is None else target.rounds
    column_weights = _NO_IMPORTANCE if importance is None else importance
    parallel_rows(codebook.fit, blocks, weight, column_weights, scales, table, size, rounds)
    return Params(scales.reshape(1, rows, groups))


def _assign_codebook(weight: F32, params: Params, target: Target, codes: U8) -> None:
    _, size, blocks = _shape(weight, target)
    table, table_codes = codebook.sorted_table(codebook.padded(target.values()))
    parallel_rows(codebook.assign, blocks, weight, params.scales.ravel(), table, table_codes, size, codes)


def _no_refit(weight: F32, codes: U8, target: Target, k: int) -> Params:
    raise QuantizationError("a codebook has no nested precisions")


SOLVERS = {
    "bcq": Solver(_fit_bcq, _assign_bcq, _refit_bcq),
    "uniform": Solver(_fit_uniform, _assign_uniform, _refit_uniform),
    "codebook": Solver(_fit_codebook, _assign_codebook, _no_refit),
}


def measured(weight: F32, matrix: StoredMatrix, *, lossless: bool = False) -> Quantized:
    """A matrix that was made of a float32 weight ``[rows, cols]``, with its error."""
    return Quantized(matrix, _squared_error(weight, matrix), _sum_of_squares(weight)[0], lossless)


# --- measuring --------------------------------------------------------------------------------------


def _squared_error(weight: F32, matrix: StoredMatrix) -> float:
    """Sum of squared differences between the weight and the decoded matrix.

    It decodes a few rows at a time: the whole decoded matrix is never in memory.
    """
    rows, cols = weight.shape
    step = max(1, _DECODED_AT_ONCE // cols)
    decoded, errors = np.empty((min(step, rows), cols), np.float32), np.zeros(rows, np.float64)
    for a in range(0, rows, step):
        b = min(rows, a + step)
        part = decode(matrix.row_slice(a, b), out=decoded[: b - a])
        parallel_rows(_row_errors, b - a, weight[a:b], part, errors[a:b])
    return float(errors.sum())


def _sum_of_squares(weight: F32) -> tuple[float, int]:
    """Sum of squares, and the number of values that are not finite."""
    sums, bad = np.zeros(weight.shape[0], np.float64), np.zeros(weight.shape[0], np.int64)
    parallel_rows(_row_norms, weight.shape[0], weight, sums, bad)
    return float(sums.sum()), int(bad.sum())


@numba.njit(nogil=True, cache=True)
def _row_errors(start, stop, a, b, out):
    lanes = np.zeros(LANES, np.float64)
    for r in range(start, stop):
        lanes[:] = 0
        x, y = a[r], b[r]
        whole = x.shape[0] // LANES * LANES
        for c in range(0, whole, LANES):
            for j in range(LANES):
                d = np.float64(x[c + j]) - np.float64(y[c + j])
                lanes[j] += d * d
        for c in range(whole, x.shape[0]):
            d = np.float64(x[c]) - np.float64(y[c])
            lanes[0] += d * d
        out[r] = lanes.sum()


@numba.njit(nogil=True, cache=True)
def _row_norms(start, stop, a, sums, bad):
    lanes = np.zeros(LANES, np.float64)
    for r in range(start, stop):
        lanes[:] = 0
        x = a[r]
        whole = x.shape[0] // LANES * LANES
        for c in range(0, whole, LANES):
            for j in range(LANES):
                lanes[j] += np.float64(x[c + j]) * np.float64(x[c + j])
        for c in range(whole, x.shape[0]):
            lanes[0] += np.float64(x[c]) * np.float64(x[c])
        sums[r] = lanes.sum()
        if not np.isfinite(sums[r]):  # squares of float32 cannot overflow float64, so the row holds a bad value
            bad[r] = (~np.isfinite(x)).sum()
