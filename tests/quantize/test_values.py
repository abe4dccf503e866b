"""All quantizers: constant, zero, huge, tiny and non-finite values, odd shapes, and options that make no scheme."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from support.quantizing import spread_matrix

from lowbit_format.dtypes import round_to
from lowbit_format.errors import NonFiniteWeightError, QuantizationError, SchemeError
from lowbit_format.quantize import Target, quantize
from lowbit_format.reference import decode


@pytest.mark.parametrize("codec", ["bcq", "uniform", "codebook"])
@pytest.mark.parametrize("value", [0.0, 0.3, -0.3, 7.5, -1e-3])
def test_constant_groups_are_kept_within_the_rounding_of_the_scale(codec: str, value: float) -> None:
    weight = np.full((3, 70), value, np.float32)
    result = quantize(weight, Target(codec, 4, 32, recognise=False))
    np.testing.assert_allclose(decode(result.matrix), weight, rtol=2.0**-11)
    assert result.widened is None


@pytest.mark.parametrize("codec", ["bcq", "uniform", "codebook"])
def test_all_zero_groups_stay_zero_beside_others(codec: str) -> None:
    weight = spread_matrix(4, 96)
    weight[:, 32:64] = 0
    assert not decode(quantize(weight, Target(codec, 4, 32)).matrix)[:, 32:64].any()


@pytest.mark.parametrize("codec", ["bcq", "uniform", "codebook"])
def test_a_single_column(codec: str) -> None:
    weight = spread_matrix(9, 1)
    np.testing.assert_allclose(
        decode(quantize(weight, Target(codec, 4 if codec == "codebook" else 2)).matrix), weight, rtol=2.0**-9
    )


@pytest.mark.parametrize("codec", ["bcq", "uniform", "codebook"])
@pytest.mark.parametrize("solver", ["mse", "minmax", "symmetric"])
@pytest.mark.parametrize("size", [3e38, 1e6, 1e-6, 1e-9, 1e-40])
def test_huge_and_tiny_values_get_wider_scales_and_say_so(codec: str, solver: str, size: float) -> None:
    """ENC-4: the relative error is about that of the same weight at an ordinary size."""
    weight = spread_matrix(8, 96)
    weight /= np.abs(weight).max()
    target = Target(codec, 4, 32, solver=solver, recognise=False)
    result, ordinary = quantize(weight * np.float32(size), target), quantize(weight, target)
    assert ordinary.widened is None
    assert result.widened == "F16 cannot hold its parameters, F32 can"
    assert result.matrix.scheme.scale_dtype == "F32"
    assert np.isfinite(decode(result.matrix)).all()
    assert result.relative_error < 1.15 * ordinary.relative_error


@pytest.mark.parametrize("codec", ["bcq", "uniform", "codebook"])
def test_bf16_scales_hold_what_f16_cannot(codec: str) -> None:
    result = quantize(spread_matrix(8, 96) * np.float32(1e6), Target(codec, 4, 32, scale_dtype="BF16"))
    assert result.widened is None
    assert result.matrix.scheme.scale_dtype == "BF16"
    scales = result.matrix.params.scales
    assert np.array_equal(round_to(scales, "BF16"), scales)


@pytest.mark.parametrize("codec", ["bcq", "uniform", "codebook"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_refused_by_name(codec: str, bad: float) -> None:
    """ENC-4."""
    weight = spread_matrix(5, 40)
    weight[2, 33] = weight[4, 0] = bad
    with pytest.raises(NonFiniteWeightError, match=r"layers\.0\.fc1\.weight: holds 2 NaN or infinite values"):
        quantize(weight, Target(codec), name="layers.0.fc1.weight")


@pytest.mark.parametrize("shape", [(4,), (0, 4), (4, 0), (2, 2, 2)])
def test_what_is_no_matrix_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(QuantizationError, match="expected \\[rows, cols\\]"):
        quantize(np.zeros(shape, np.float32), Target())


@pytest.mark.parametrize(
    "options",
    [
        {"codec": "gptq"}, {"bits": 0}, {"bits": 9}, {"bits": True}, {"group_size": -1}, {"group_size": 2.5},
        {"scale_dtype": "F64"}, {"solver": "best"}, {"rounds": -1}, {"nested": (4,)}, {"nested": (0,)},
        {"codec": "codebook", "nested": (1,)}, {"codec": "codebook", "table": "nf5"},
        {"codec": "codebook", "table": (1.0,)}, {"codec": "codebook", "table": (1.0, 1.0)},
        {"codec": "codebook", "table": (1.0, float("nan"))}, {"codec": "codebook", "table": tuple(range(257))},
        {"codec": "codebook", "bits": 3}, {"codec": "codebook", "bits": 4, "table": "ternary"},
    ],
)  # fmt: skip
def test_options_that_make_no_scheme_are_refused(options: dict) -> None:
    with pytest.raises(SchemeError):
        Target(**options)


def test_bits_left_out_are_those_of_the_table_or_four() -> None:
    """Also after ``replace``; bits that were given stay, and contradict a table."""
    nf4, three = Target("codebook"), Target(bits=3)
    assert (Target().bits, nf4.bits, replace(nf4, table="ternary").bits) == (4, 4, 2)
    assert replace(Target(), codec="codebook", table="ternary") == Target("codebook", 2, table="ternary")
    assert replace(three, group_size=32).bits == Target(**asdict(three)).bits == 3
    assert Target(**asdict(nf4)) == Target(**json.loads(json.dumps(asdict(nf4)))) == copy.deepcopy(nf4) == nf4
    with pytest.raises(SchemeError, match="bits is 3, and a codebook has the bits of its table, 4: leave bits out"):
        replace(three, codec="codebook")


def test_bits_left_out_make_the_same_matrix() -> None:
    weight = spread_matrix(5, 40)
    for codec in ("bcq", "uniform", "codebook"):
        left_out, given = (quantize(weight, Target(codec, **bits)).matrix for bits in ({}, {"bits": 4}))
        assert left_out.scheme.to_dict() == given.scheme.to_dict()
        np.testing.assert_array_equal(left_out.planes, given.planes)
