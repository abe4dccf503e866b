"""The codebook solver: tables, quality, nearest codes."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.quantizing import assert_nearest, assert_padding_is_zero, spread_matrix

from lowbit_format.bits import unpack_codes
from lowbit_format.errors import QuantizationError
from lowbit_format.matrix import Params
from lowbit_format.quantize import Target, quantize
from lowbit_format.quantize.codebook import TABLES, padded, sorted_table
from lowbit_format.quantize.solve import _assign_codebook
from lowbit_format.reference import decode

BOUNDS = {"nf4": 0.094, "fp4-e2m1": 0.107, "fp4-e3m0": 0.187, "fp4-e1m2": 0.114, "ternary": 0.44}
NF4 = Target("codebook", group_size=32, recognise=False)

tables = st.lists(st.floats(-2, 2, width=32), min_size=2, max_size=20).filter(
    lambda t: len(set(t)) > 1 and max(map(abs, t)) > 1e-30
)


@pytest.fixture(scope="module")
def weight() -> np.ndarray:
    return spread_matrix(16, 1024)


def test_every_table_has_a_bound() -> None:
    assert set(BOUNDS) == set(TABLES)


@pytest.mark.parametrize("table", sorted(BOUNDS))
def test_error_of_default_settings_is_within_bounds(weight: np.ndarray, table: str) -> None:
    assert quantize(weight, Target("codebook", table=table)).relative_error <= BOUNDS[table]


def test_fp4_values_are_those_of_the_formats() -> None:
    """E2M1 as in OCP Microscaling Formats v1.0, table 5; E3M0 and E1M2 by their definition."""
    positive = {
        "fp4-e2m1": [0, 0.5, 1, 1.5, 2, 3, 4, 6],
        "fp4-e3m0": [0, 0.25, 0.5, 1, 2, 4, 8, 16],
        "fp4-e1m2": [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5],
    }
    for name, values in positive.items():
        assert TABLES[name] == values + [-v for v in values]


def test_nf4_is_ascending_holds_zero_and_reaches_both_ends() -> None:
    table = TABLES["nf4"]
    assert table == sorted(table)
    assert len(set(table)) == 16
    assert (table[0], table[7], table[15]) == (-1.0, 0.0, 1.0)


@pytest.mark.parametrize("table", sorted(TABLES))
def test_more_rounds_are_never_worse(weight: np.ndarray, table: str) -> None:
    target = replace(NF4, table=table, scale_dtype="F32")
    errors = [quantize(weight, replace(target, rounds=rounds)).relative_error for rounds in (0, 1, 2, 4, 8)]
    assert all(more <= fewer * (1 + 1e-6) for fewer, more in itertools.pairwise(errors))


def test_importance_lowers_the_error_of_the_columns_that_matter(weight: np.ndarray) -> None:
    importance = np.where(np.arange(1024) % 8 == 0, 50, 1).astype(np.float32)
    target = replace(NF4, table="ternary")
    plain, weighted = (quantize(weight, target, importance=i).matrix for i in (None, importance))
    errors = [float((importance * (decode(m) - weight) ** 2).sum()) for m in (plain, weighted)]
    assert errors[1] < 0.98 * errors[0]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 20), cols=st.integers(1, 100), group=st.integers(0, 70),
    table=st.sampled_from(sorted(TABLES)) | tables.map(tuple), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_table_and_shape_gets_nearest_codes(rows: int, cols: int, group: int, table: str, seed: int) -> None:
    """ENC-1 by brute force over all levels, BIT-3."""
    weight = spread_matrix(rows, cols, seed)
    matrix = quantize(weight, Target("codebook", group_size=group, table=table, recognise=False)).matrix
    assert matrix.codebook is not None
    assert len(matrix.codebook) == 2**matrix.scheme.bits
    assert_nearest(weight, matrix)
    assert_padding_is_zero(matrix)


def test_a_table_of_numbers_too_small_to_scale_is_refused() -> None:
    table = (0.0, float(np.nextafter(np.float32(0), np.float32(1))))
    with pytest.raises(QuantizationError, match="its parameters overflow float32"):
        quantize(np.full((1, 1), 0.01, np.float32), Target("codebook", group_size=0, table=table, recognise=False))


@pytest.mark.parametrize(("value", "code"), [(-1.0, 2), (-0.5, 1), (0.5, 3), (0.25, 1), (2.0, 3)])
def test_a_tie_takes_the_larger_level(value: float, code: int) -> None:
    """ENC-1: the table 1, 0, -1 stands in codes 3, 1, 2; halves lie exactly between two levels."""
    codes = np.zeros((1, 8), np.uint8)
    target = Target("codebook", group_size=0, table=(0.0, 0.0, -1.0, 1.0))
    _assign_codebook(np.full((1, 8), value, np.float32), Params(np.ones((1, 1, 1), np.float32)), target, codes)
    # Codes 0 and 1 both mean 0.0: either decodes the same, so the level is what is compared.
    table = padded(target.values())
    assert (table[codes] == table[code]).all()


def test_a_table_is_padded_with_its_first_value_and_sorted_without_repetition() -> None:
    table = padded([0.5, -1.0, 0.5, -0.0, 2.0])
    assert table.tolist() == [0.5, -1.0, 0.5, 0.0, 2.0, 0.5, 0.5, 0.5]
    values, codes = sorted_table(table)
    assert values.tolist() == [-1.0, 0.0, 0.5, 2.0]
    assert codes.tolist() == [1, 3, 0, 4]


def test_ternary_does_not_use_its_fourth_code(weight: np.ndarray) -> None:
    matrix = quantize(weight, Target("codebook", table="ternary")).matrix
    assert set(np.unique(unpack_codes(matrix.planes, 1024))) == {0, 1, 2}


def test_a_table_of_positive_values_only_fits_them() -> None:
    weight = np.abs(spread_matrix(4, 64)) + np.float32(0.01)
    assert quantize(weight, Target("codebook", group_size=0, table=(0.25, 0.5, 0.75, 1.0))).relative_error < 0.5
