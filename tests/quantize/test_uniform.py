"""The uniform solver: ranges, least error, zero points, nearest codes, nested precisions."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.quantizing import assert_nearest, assert_padding_is_zero, spread_matrix

from lowbit_format.bits import unpack_codes
from lowbit_format.matrix import Params
from lowbit_format.quantize import Target, quantize
from lowbit_format.quantize.solve import _assign_uniform
from lowbit_format.quantize.uniform import SOLVERS
from lowbit_format.reference import decode

UNIFORM = Target("uniform", 4, 32, recognise=False)


@pytest.fixture(scope="module")
def weight() -> np.ndarray:
    return spread_matrix(16, 1024)


@pytest.mark.parametrize(("bits", "bound"), [(2, 0.345), (3, 0.185), (4, 0.094), (8, 0.006)])
def test_error_of_default_settings_is_within_bounds(weight: np.ndarray, bits: int, bound: float) -> None:
    assert quantize(weight, Target("uniform", bits)).relative_error <= bound


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group", [16, 128, 0])
def test_least_error_is_no_worse_than_either_range(weight: np.ndarray, bits: int, group: int) -> None:
    errors = {
        s: quantize(weight, replace(UNIFORM, bits=bits, group_size=group, solver=s)).relative_error for s in SOLVERS
    }
    assert errors["mse"] <= errors["minmax"]
    assert errors["mse"] <= errors["symmetric"]


def test_more_rounds_are_never_worse(weight: np.ndarray) -> None:
    target = replace(UNIFORM, scale_dtype="F32")
    errors = [quantize(weight, replace(target, rounds=rounds)).relative_error for rounds in (0, 1, 2, 4, 8)]
    assert all(more <= fewer * (1 + 1e-6) for fewer, more in itertools.pairwise(errors))


def test_minmax_puts_both_ends_of_the_range_on_a_level() -> None:
    weight = np.array([[-1.0, 0.1, 0.2, 2.0]], np.float32)
    matrix = quantize(weight, replace(UNIFORM, solver="minmax")).matrix
    assert (unpack_codes(matrix.planes, 4)[0, [0, 3]] == [0, 15]).all()
    np.testing.assert_allclose(decode(matrix)[0, [0, 3]], [-1, 2], rtol=2.0**-9)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_keeps_zero_as_a_level(weight: np.ndarray, bits: int) -> None:
    weight = weight.copy()
    weight[:, ::7] = 0
    matrix = quantize(weight, replace(UNIFORM, bits=bits, solver="symmetric")).matrix
    assert (matrix.params.shift == 2 ** (bits - 1)).all()
    assert not decode(matrix)[:, ::7].any()


def test_importance_lowers_the_error_of_the_columns_that_matter(weight: np.ndarray) -> None:
    importance = np.where(np.arange(1024) % 4 == 0, 20, 1).astype(np.float32)
    target = replace(UNIFORM, bits=3)
    plain, weighted = (quantize(weight, target, importance=i).matrix for i in (None, importance))
    errors = [float((importance * (decode(m) - weight) ** 2).sum()) for m in (plain, weighted)]
    assert errors[1] < 0.95 * errors[0]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 20), cols=st.integers(1, 200), bits=st.integers(1, 8), group=st.integers(0, 70),
    solver=st.sampled_from(sorted(SOLVERS)), dtype=st.sampled_from(["F16", "BF16", "F32"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape_gets_nearest_codes(
    rows: int, cols: int, bits: int, group: int, solver: str, dtype: str, seed: int
) -> None:
    """ENC-1 by brute force over all levels, BIT-3, and the shapes of TEN-1."""
    weight = spread_matrix(rows, cols, seed)
    matrix = quantize(weight, Target("uniform", bits, group, solver=solver, scale_dtype=dtype, recognise=False)).matrix
    groups = 1 if group == 0 else -(-cols // group)
    assert matrix.params.scales.shape == (1, rows, groups)
    assert matrix.params.shift is not None
    assert matrix.params.shift.shape == (rows, groups)
    assert_nearest(weight, matrix)
    assert_padding_is_zero(matrix)


@pytest.mark.parametrize(("value", "code"), [(-9.0, 0), (-0.25, 1), (0.25, 2), (0.5, 2), (0.75, 3), (9.0, 3)])
def test_a_tie_takes_the_larger_level(value: float, code: int) -> None:
    """ENC-1: levels -0.5, 0.0, 0.5, 1.0; odd quarters lie exactly between two of them."""
    codes = np.zeros((1, 8), np.uint8)
    params = Params(np.full((1, 1, 1), 0.5, np.float32), np.ones((1, 1), np.float32))
    _assign_uniform(np.full((1, 8), value, np.float32), params, Target("uniform", 2, 0), codes)
    assert (codes == code).all()


@pytest.mark.parametrize("k", [1, 2, 3])
def test_nested_parameters_are_least_squares(weight: np.ndarray, k: int) -> None:
    """NST-1: a straight line through the first k bits of the codes and the weights."""
    matrix = quantize(weight, replace(UNIFORM, nested=(k,), scale_dtype="F32")).matrix
    nested, codes = matrix.nested[k], unpack_codes(matrix.planes, 1024) >> (4 - k)
    assert nested.shift is not None
    for row, g in [(0, 0), (15, 31), (7, 3)]:
        part = slice(32 * g, 32 * (g + 1))
        slope, start = np.polyfit(codes[row, part].astype(np.float64), weight[row, part].astype(np.float64), 1)
        assert nested.scales[0, row, g] == pytest.approx(slope, rel=1e-4)
        assert nested.shift[row, g] == pytest.approx(-start / slope, rel=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.5, -0.5])
def test_nested_precisions_of_constant_groups_are_exact(value: float) -> None:
    matrix = quantize(np.full((2, 40), value, np.float32), replace(UNIFORM, nested=(1, 2, 3))).matrix
    for k in (1, 2, 3):
        assert (decode(matrix, k) == value).all()
