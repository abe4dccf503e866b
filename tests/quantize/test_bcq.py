"""The BCQ solver: quality, canonical form, nearest codes, nested precisions."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.quantizing import assert_nearest, assert_padding_is_zero, distance, sized_error, spread_matrix

from lowbit_format.bits import unpack_codes
from lowbit_format.errors import QuantizationError
from lowbit_format.matrix import Params
from lowbit_format.quantize import Quantized, Target, quantize
from lowbit_format.quantize.solve import _assign_bcq
from lowbit_format.reference import decode, decode_numpy

BCQ = Target("bcq", 3, 32, recognise=False)
BOUNDS = {1: 0.595, 2: 0.330, 3: 0.182, 4: 0.100}  # relative error of groups of 128 with offset on spread_matrix


@pytest.fixture(scope="module")
def weight() -> np.ndarray:
    return spread_matrix(128, 1024)


# --- quality ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BOUNDS)
def test_error_of_default_settings_is_within_bounds(weight: np.ndarray, bits: int) -> None:
    assert quantize(weight, Target(bits=bits)).relative_error <= BOUNDS[bits]


@pytest.mark.parametrize("offset", [True, False])
def test_every_plane_lowers_the_error(weight: np.ndarray, offset: bool) -> None:
    errors = [quantize(weight[:16], Target(bits=bits, offset=offset)).relative_error for bits in range(1, 9)]
    assert all(more < 0.8 * fewer for fewer, more in itertools.pairwise(errors))


def test_an_offset_helps_where_weights_are_not_centred(weight: np.ndarray) -> None:
    shifted = weight[:16] + np.float32(0.01)
    assert error(shifted, replace(BCQ, offset=True)) < 0.9 * error(shifted, replace(BCQ, offset=False))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("offset", [True, False])
def test_more_rounds_are_never_worse(weight: np.ndarray, bits: int, offset: bool) -> None:
    target = Target(bits=bits, offset=offset, scale_dtype="F32")
    matrices = (quantize(weight[:16], replace(target, rounds=rounds)).matrix for rounds in (0, 1, 2, 4, 8))
    errors = [sized_error(weight[:16], m) for m in matrices]
    assert all(more <= fewer * (1 + 1e-6) for fewer, more in itertools.pairwise(errors))


def test_reported_error_is_that_of_the_decoded_weights(weight: np.ndarray) -> None:
    result = quantize(weight, BCQ)
    difference = decode_numpy(result.matrix).astype(np.float64) - weight
    assert result.squared_error == pytest.approx((difference**2).sum())
    assert result.squared_norm == pytest.approx((weight.astype(np.float64) ** 2).sum())


def test_importance_lowers_the_error_of_the_columns_that_matter(weight: np.ndarray) -> None:
    importance = np.where(np.arange(1024) % 4 == 0, 20, 1).astype(np.float32)
    plain, weighted = quantize(weight, BCQ), quantize(weight, BCQ, importance=importance)
    assert weighted_error(weight, weighted, importance) < 0.95 * weighted_error(weight, plain, importance)
    assert weighted.squared_error > plain.squared_error


def test_importance_of_zero_everywhere_is_importance_of_one(weight: np.ndarray) -> None:
    nothing = quantize(weight[:4], BCQ, importance=np.zeros(1024, np.float32))
    same(nothing, quantize(weight[:4], BCQ, importance=np.ones(1024, np.float32)))


@pytest.mark.parametrize("bad", [np.ones(3), np.full(1024, -1.0), np.full(1024, np.nan)])
def test_importance_that_does_not_fit_is_refused(weight: np.ndarray, bad: np.ndarray) -> None:
    with pytest.raises(QuantizationError, match=r"up_proj: importance must be 1024 finite numbers >= 0"):
        quantize(weight, BCQ, importance=bad.astype(np.float32), name="up_proj")


# --- form -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("offset", [True, False])
def test_scales_are_canonical(weight: np.ndarray, bits: int, offset: bool) -> None:
    """ENC-2: not negative, and descending over the planes."""
    scales = quantize(weight[:16], Target(bits=bits, offset=offset)).matrix.params.scales
    assert (scales >= 0).all()
    assert (np.diff(scales, axis=0) <= 0).all()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 20), cols=st.integers(1, 200), bits=st.integers(1, 8), group=st.integers(0, 70),
    offset=st.booleans(), dtype=st.sampled_from(["F16", "BF16", "F32"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape_gets_nearest_codes(
    rows: int, cols: int, bits: int, group: int, offset: bool, dtype: str, seed: int
) -> None:
    """ENC-1 by brute force over all levels, BIT-3, and the shapes of TEN-1."""
    weight = spread_matrix(rows, cols, seed)
    target = Target("bcq", bits, group, offset, scale_dtype=dtype, recognise=False)
    matrix = quantize(weight, target).matrix
    groups = 1 if group == 0 else -(-cols // group)
    assert matrix.scheme.group_size == group
    assert matrix.params.scales.shape == (bits, rows, groups)
    assert (matrix.params.shift is not None) == offset
    assert_nearest(weight, matrix)
    assert_padding_is_zero(matrix)


@pytest.mark.parametrize(("value", "code"), [(-2.0, 0), (-1.0, 1), (0.0, 2), (1.0, 3), (-0.0, 2), (5.0, 3)])
def test_a_tie_takes_the_larger_level(value: float, code: int) -> None:
    """ENC-1: levels -1.5, -0.5, 0.5, 1.5; a whole number lies exactly between two of them."""
    codes = np.zeros((1, 8), np.uint8)
    params = Params(np.array([1.0, 0.5], np.float32).reshape(2, 1, 1))
    _assign_bcq(np.full((1, 8), value, np.float32), params, Target("bcq", 2, 0, offset=False), codes)
    assert (codes == code).all()


def test_of_codes_with_one_level_the_larger_is_taken() -> None:
    """ENC-1: with equal scales, codes 01 and 10 both mean 0.0."""
    codes = np.zeros((1, 8), np.uint8)
    params = Params(np.ones((2, 1, 1), np.float32))
    _assign_bcq(np.zeros((1, 8), np.float32), params, Target("bcq", 2, 0, offset=False), codes)
    assert (codes == 2).all()


def test_number_of_threads_does_not_change_the_result(weight: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for threads in ("1", "2", "5"):
        monkeypatch.setenv("LOWBIT_NUM_THREADS", threads)
        results.append(quantize(weight, replace(BCQ, nested=(1, 2))))
    same(results[0], results[1])
    same(results[0], results[2])


def test_rows_do_not_depend_on_each_other(weight: np.ndarray) -> None:
    whole, part = quantize(weight, BCQ).matrix, quantize(weight[5:9], BCQ).matrix
    assert np.array_equal(decode(whole)[5:9], decode(part))


# --- nested precisions ------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_nested_parameters_are_least_squares(weight: np.ndarray, k: int, offset: bool) -> None:
    """NST-1: no other parameters for the same first k planes come closer to the weight."""
    weight = weight[:8]
    matrix = quantize(weight, Target(bits=4, nested=(k,), offset=offset, scale_dtype="F32")).matrix
    nested, codes = matrix.nested[k], unpack_codes(matrix.planes, 1024)
    for row in (0, 7):
        for g in (0, 7):
            part = slice(128 * g, 128 * (g + 1))
            signs = 2.0 * ((codes[row, part, None] >> np.arange(3, 3 - k, -1)) & 1) - 1
            design = np.concatenate([signs, np.ones((128, int(offset)))], axis=1)
            best = np.linalg.lstsq(design, weight[row, part].astype(np.float64), rcond=None)[0]
            stored = list(nested.scales[:, row, g]) + ([nested.shift[row, g]] if nested.shift is not None else [])
            np.testing.assert_allclose(stored, best, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("codec", ["bcq", "uniform"])
def test_nested_precisions_beat_the_full_scales(weight: np.ndarray, codec: str) -> None:
    matrix = quantize(weight, Target(codec, 4, 128, nested=(2, 3), recognise=False)).matrix
    assert set(matrix.nested) == {2, 3}
    if codec == "bcq":
        for k in (2, 3):
            full = replace(matrix.params, scales=matrix.params.scales[:k])
            reused = decode(replace(matrix, nested={k: full}), k)
            assert distance(decode(matrix, k), weight) < distance(reused, weight)
    assert distance(decode(matrix, 2), weight) > distance(decode(matrix, 3), weight) > distance(decode(matrix), weight)


def test_nested_precisions_leave_full_precision_as_it_is(weight: np.ndarray) -> None:
    plain, nested = quantize(weight, BCQ).matrix, quantize(weight, replace(BCQ, nested=(1, 2))).matrix
    assert np.array_equal(decode(plain), decode(nested))


# --- helpers ----------------------------------------------------------------------------------------


def error(weight: np.ndarray, target: Target) -> float:
    return quantize(weight, target).relative_error


def weighted_error(weight: np.ndarray, result: Quantized, importance: np.ndarray) -> float:
    return float((importance * (decode(result.matrix).astype(np.float64) - weight) ** 2).sum())


def same(a: Quantized, b: Quantized) -> None:
    """Equal planes and parameters, bit for bit."""
    assert np.array_equal(a.matrix.planes, b.matrix.planes)
    for k in (None, *a.matrix.nested):
        (p, _), (q, _) = a.matrix.at(k), b.matrix.at(k)
        assert np.array_equal(p.scales, q.scales)
        assert np.array_equal(p.shift, q.shift)
