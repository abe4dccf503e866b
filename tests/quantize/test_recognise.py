"""Exact recognition (ENC-3): weights on a grid are stored without loss; no others are reported as lossless."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.quantizing import spread_matrix

from lowbit_format.bits import pack_codes
from lowbit_format.dtypes import round_to
from lowbit_format.matrix import Params, StoredMatrix
from lowbit_format.quantize import Quantized, Target, quantize
from lowbit_format.quantize.codebook import TABLES, padded
from lowbit_format.reference import decode, decode_numpy
from lowbit_format.schema import Scheme

ROWS, COLS = 24, 256
DTYPES = ("F32", "BF16", "F16")


def grid(kind: str, group: int, scale_dtype: str = "F16", seed: int = 0) -> np.ndarray:
    """Weights on a grid of `kind` with parameters for each `group` columns: float32 ``[ROWS, COLS]`` as decoded."""
    rng = np.random.default_rng(seed)
    groups = COLS // group

    def codes(n: int) -> np.ndarray:
        found = rng.integers(0, n, (ROWS, groups, group))
        found[:, :, :n] = rng.permutation(n)  # every code occurs in every group
        return found.reshape(ROWS, COLS).astype(np.uint8)

    scales = (0.02 * np.exp(0.3 * rng.standard_normal((1, ROWS, groups)))).astype(np.float32)
    shift, table, offset = None, None, "offset" in kind
    if kind.startswith("bcq"):
        codec, n = "bcq", 2 ** int(kind[3])
        scales = scales * np.float32(0.55) ** np.arange(int(kind[3]), dtype=np.float32)[:, None, None]
        shift = (rng.standard_normal((ROWS, groups)) * 0.01).astype(np.float32) if offset else None
    elif kind.startswith("int"):
        codec, n = "uniform", 2 ** int(kind[3])
        zeros = rng.integers(0, n, (ROWS, groups)) if "zero" in kind else np.full((ROWS, groups), n // 2)
        shift = zeros.astype(np.float32)
    else:
        codec, values = "codebook", USER if kind == "user" else TABLES[kind]
        n, table = len(values), padded(list(values))
    bits = (n - 1).bit_length()
    params = Params(round_to(scales, scale_dtype), None if shift is None else round_to(shift, scale_dtype))
    scheme = Scheme(codec, bits, 0 if groups == 1 else group, scale_dtype, offset=offset)
    return decode_numpy(StoredMatrix(scheme, ROWS, COLS, pack_codes(codes(n), bits), params, {}, table))


USER = (-3.0, -0.75, 0.125, 1.25, 2.875)
KINDS = {  # kind of grid: most bits a weight of it may take
    "bcq1": 1, "ternary": 2, "bcq2": 2, "bcq3": 3, "bcq3 offset": 3, "int3": 3, "int4": 4, "int4 zero": 4,
    "fp4-e2m1": 4, "fp4-e3m0": 4, "fp4-e1m2": 4, "nf4": 4, "user": 3,
}  # fmt: skip
CODECS = {"ternary": "codebook", "nf4": "codebook", "user": "codebook", "fp4-e3m0": "codebook"}


def storable(kind: str, scale_dtype: str, dtype: str) -> bool:
    """Whether grids of `kind` are recognised: sums of float32 scales are rounded, so that they lie on no exact grid."""
    return not (kind in ("bcq2", "bcq3", "bcq3 offset") and scale_dtype == dtype == "F32")


@pytest.mark.parametrize(
    ("kind", "scale_dtype", "dtype"), [c for c in itertools.product(KINDS, ("F16", "F32"), DTYPES) if storable(*c)]
)
@pytest.mark.parametrize("group", [COLS, 64])
def test_a_grid_is_stored_without_loss(kind: str, group: int, scale_dtype: str, dtype: str) -> None:
    weight = round_to(grid(kind, group, scale_dtype), dtype)
    target = Target("codebook", group_size=64, table=USER) if kind == "user" else Target(group_size=64)
    result = quantize(weight, target, source_dtype=dtype)
    assert_lossless(result, weight, dtype)
    scheme = result.matrix.scheme
    assert scheme.bits <= KINDS[kind]
    assert scheme.group_size in ((0,) if group == COLS else (64, 32))
    assert scheme.codec == CODECS.get(kind, scheme.codec)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_one_value_off_the_grid_is_not_lossless(kind: str, dtype: str) -> None:
    """Values that differ from the grid's by a rounding would need another level."""
    weight = round_to(grid(kind, COLS), dtype)
    weight[ROWS - 1, COLS - 1] = round_to(np.float32(0.37) * np.abs(weight[ROWS - 1]).max(keepdims=True), dtype)[0]
    result = quantize(weight, Target(bits=KINDS[kind], group_size=64), source_dtype=dtype)
    if result.lossless:
        assert_lossless(result, weight, dtype)  # smaller groups may hold the odd value: then nothing is lost
    else:
        assert not np.array_equal(round_to(decode(result.matrix), dtype), weight)


def test_one_value_off_a_full_table_is_not_lossless() -> None:
    weight = grid("nf4", 32)
    weight[-1, -1] = np.nextafter(weight[-1, -1], np.float32(9))
    result = quantize(weight, Target())
    assert not result.lossless
    assert result.squared_error > 0


@pytest.mark.parametrize("codec", ["bcq", "uniform", "codebook"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(24, 256), (3, 1024), (200, 40)])
def test_random_weights_are_not_recognised(codec: str, dtype: str, shape: tuple[int, int]) -> None:
    weight = round_to(spread_matrix(*shape), dtype)
    result = quantize(weight, Target(codec), source_dtype=dtype)
    assert not result.lossless
    assert result.relative_error > 0.05


def test_recognition_can_be_left_out() -> None:
    weight = grid("ternary", COLS)
    assert quantize(weight, Target()).lossless
    result = quantize(weight, Target(recognise=False))
    assert not result.lossless
    assert result.matrix.scheme.codec == "bcq"


@pytest.mark.parametrize("kind", ["int4", "nf4"])
def test_a_grid_with_more_codes_than_asked_for_is_not_taken(kind: str) -> None:
    result = quantize(grid(kind, COLS), Target(bits=3))
    assert not result.lossless
    assert result.matrix.scheme.bits == 3


def test_float64_is_never_called_lossless() -> None:
    """What rounding to float32 has lost cannot be restored."""
    assert not quantize(grid("ternary", COLS), Target(), source_dtype="F64").lossless


def test_nested_precisions_hold_for_recognised_weights_too() -> None:
    """NST-3: a matrix without scales of its own for k must have at most k bits."""
    ternary, int4 = (grid(kind, COLS) for kind in ("ternary", "int4"))
    target = Target(bits=4, nested=(2, 3))
    found = quantize(ternary, target)
    assert_lossless(found, ternary, "F32")
    assert found.matrix.scheme.bits <= 2
    assert np.array_equal(decode(found.matrix, 2), decode(found.matrix))
    solved = quantize(int4, target)
    assert not solved.lossless
    assert set(solved.matrix.nested) == {2, 3}


def test_scales_take_the_narrowest_dtype_that_is_exact() -> None:
    signs = np.sign(grid("bcq1", COLS))
    for scale, dtype in [(2.0**-5, "F16"), (2.0**-40, "BF16"), (0.1, "F32")]:
        weight = (signs * scale).astype(np.float32)
        result = quantize(weight, Target())
        assert_lossless(result, weight, "F32")
        assert result.matrix.scheme.scale_dtype == dtype


@pytest.mark.parametrize("value", [0.0, 0.25, -1.5])
def test_a_constant_weight_takes_one_bit(value: float) -> None:
    weight = np.full((ROWS, COLS), value, np.float32)
    result = quantize(weight, Target())
    assert_lossless(result, weight, "F32")
    assert result.matrix.scheme.bits == 1


def test_a_grid_whose_first_rows_are_zero_is_recognised() -> None:
    weight = grid("ternary", COLS)
    weight[:10] = 0
    assert_lossless(quantize(weight, Target()), weight, "F32")


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 20), cols=st.integers(1, 90), values=st.integers(1, 20), dtype=st.sampled_from(DTYPES),
    codec=st.sampled_from(["bcq", "uniform", "codebook"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_lossless_is_never_a_false_claim(rows: int, cols: int, values: int, dtype: str, codec: str, seed: int) -> None:
    """Weights with few distinct values, on no grid in particular."""
    rng = np.random.default_rng(seed)
    pool = round_to(rng.standard_normal(values).astype(np.float32), dtype)
    weight = pool[rng.integers(0, values, (rows, cols))]
    result = quantize(weight, Target(codec), source_dtype=dtype)
    if result.lossless:
        assert_lossless(result, weight, dtype)


def assert_lossless(result: Quantized, weight: np.ndarray, dtype: str) -> None:
    assert result.lossless
    assert np.array_equal(round_to(decode(result.matrix), dtype), weight)
    scheme, params = result.matrix.scheme, result.matrix.params
    assert np.array_equal(round_to(params.scales, scheme.scale_dtype), params.scales)
