"""Quantizing for outputs: each step lowers their error, whatever the codec, and the stored matrix has that error."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from lowbit_format.errors import NonFiniteWeightError, QuantizationError
from lowbit_format.quantize import Target, columns, quantize
from lowbit_format.quantize.calibrated import _Grid, _State, damped, output_error, quantize_for_outputs
from lowbit_format.reference import decode

TARGETS = {
    "bcq": Target(bits=3, group_size=32),
    "bcq without offset": Target(bits=2, group_size=32, offset=False),
    "bcq, whole rows": Target(bits=2, group_size=0),
    "bcq nested": Target(bits=4, group_size=32, nested=(2, 3)),
    "uniform": Target("uniform", bits=3, group_size=48),
    "uniform nested": Target("uniform", bits=4, group_size=32, nested=(2,)),
    "nf4": Target("codebook", group_size=64),
    "ternary": Target("codebook", group_size=32, table="ternary"),
    "float32 scales": Target(bits=2, group_size=32, scale_dtype="F32"),
}
every_target = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)


def layer(rows: int = 24, cols: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and the Hessian of inputs that are correlated, of unequal size, and partly always 0."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator) * 0.05
    mix = torch.randn(cols, cols, generator=generator) / cols**0.5 + torch.eye(cols)
    x = torch.randn(4 * cols, cols, generator=generator) @ mix * torch.linspace(0.1, 2.0, cols)
    x[:, [3, 17]] = 0
    return weight, x.T @ x / len(x)


@every_target
def test_each_step_lowers_the_error_and_the_matrix_has_it(target: Target) -> None:
    weight, hessian = layer()
    found = quantize_for_outputs(weight, target, hessian, sweeps=3)
    without = torch.from_numpy(decode(quantize(weight.numpy(), target).matrix))
    assert found.errors["descent"] < found.errors["feedback"]
    assert found.errors["feedback"] < 0.9 * output_error(weight, without, damped(hessian))
    for bits in (target.bits, *target.nested):
        key = "descent" if bits == target.bits else f"descent at {bits} bits"
        decoded = torch.from_numpy(decode(found.matrix, bits=bits))
        assert output_error(weight, decoded, damped(hessian)) == pytest.approx(found.errors[key], rel=1e-3)
    params = found.matrix.params
    stored = params.scales.astype(np.float16 if target.scale_dtype == "F16" else np.float32).astype(np.float32)
    assert np.array_equal(stored, params.scales)


@every_target
def test_no_sweep_makes_any_row_worse(target: Target) -> None:
    weight, hessian = layer()
    state = _State(weight, replace(target, nested=()), damped(hessian))
    state.feed_back()
    state.start_nested()

    def errors() -> Tensor:
        away = (state.decoded[target.bits] - weight).double()
        return ((away @ state.hessian.double()) * away).sum(1)

    before = errors()
    for _ in range(3):
        state.descend()
        after = errors()
        assert (after <= before * (1 + 1e-4)).all()
        before = after


def test_nested_precisions_are_better_than_those_of_codes_chosen_for_full_precision_alone() -> None:
    weight, hessian = layer()
    target = TARGETS["bcq nested"]
    found = quantize_for_outputs(weight, target, hessian, sweeps=3)
    alone = quantize_for_outputs(weight, target, hessian, sweeps=0)
    for bits in target.nested:
        assert found.errors[f"descent at {bits} bits"] < 0.8 * alone.errors[f"descent at {bits} bits"]


def test_scales_are_positive_and_descend() -> None:
    weight, hessian = layer(seed=1)
    scales = quantize_for_outputs(weight, TARGETS["bcq"], hessian).matrix.params.scales
    assert (scales >= 0).all()
    assert (np.diff(scales, axis=0) <= 0).all()


def test_a_weight_on_the_grid_of_its_target_stays_as_it_is() -> None:
    weight, hessian = layer()
    target = TARGETS["uniform"]
    on_grid = torch.from_numpy(decode(quantize_for_outputs(weight, target, hessian).matrix))
    found = quantize_for_outputs(on_grid, target, hessian)
    assert found.errors["descent"] < 1e-3


@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_parameters_that_the_dtype_cannot_hold_are_stored_in_float32(size: float) -> None:
    weight, hessian = layer()
    found = quantize_for_outputs(weight * size, TARGETS["bcq"], hessian)
    assert found.matrix.scheme.scale_dtype == "F32"
    assert found.errors["descent"] < 0.1


def test_without_any_input_the_weight_itself_counts() -> None:
    weight, hessian = layer()
    found = quantize_for_outputs(weight, TARGETS["bcq"], torch.zeros_like(hessian))
    without = quantize(weight.numpy(), TARGETS["bcq"])
    decoded = torch.from_numpy(decode(found.matrix))
    assert float((decoded - weight).square().sum()) <= 1.02 * without.squared_error


def test_bad_input() -> None:
    weight, hessian = layer()
    with pytest.raises(NonFiniteWeightError, match="gate: holds NaN"):
        quantize_for_outputs(weight.fill_(torch.nan), TARGETS["bcq"], hessian, name="gate")
    weight, hessian = layer()
    with pytest.raises(QuantizationError, match="200 x 200 finite numbers"):
        quantize_for_outputs(weight, TARGETS["bcq"], hessian[:100])
    with pytest.raises(QuantizationError, match="finite"):
        quantize_for_outputs(weight, TARGETS["bcq"], hessian.fill_(torch.inf))


# --- the innermost loops: compiled, and on tensors of any device -----------------------------------


@pytest.mark.parametrize("precisions", [1, 2])
def test_both_forms_of_descent_agree(precisions: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, cols = 9, 40
    mix = torch.randn(cols, 3 * cols, generator=generator)
    hessian = mix @ mix.T / cols
    levels = torch.randn(precisions, rows, 8, generator=generator)
    shares = torch.rand(precisions, generator=generator) + 0.1
    weight = torch.randn(rows, cols, generator=generator)
    codes = torch.randint(0, 8, (rows, cols), generator=generator)
    decoded = levels.gather(2, codes.expand(precisions, -1, -1))
    gradient = (decoded - weight) @ hessian
    one, two = ([t.clone() for t in (gradient, decoded, codes)] for _ in range(2))
    columns.descend(hessian, levels, shares, *one)
    columns._descend_together(hessian, levels, shares, *two)
    assert (one[2] == two[2]).float().mean() > 0.99  # a tie may fall either way
    same = (one[2] == two[2]).all(1)
    torch.testing.assert_close(one[0][:, same], two[0][:, same], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(one[1][:, same], two[1][:, same])
    assert not torch.equal(one[2], codes)


def test_both_forms_of_feedback_agree() -> None:
    weight, hessian = layer(rows=9, cols=40)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped(hessian)), upper=True)
    level, order = (torch.randn(9, 8, generator=torch.Generator().manual_seed(1)) * 0.05).sort(1)
    results = []
    for run in (columns.feed_back, columns.feed_back):
        decoded, codes, left = torch.empty_like(weight), torch.zeros(9, 40, dtype=torch.int64), weight.clone()
        if run is columns.feed_back and not results:
            errors = run(left, upper, level, order, decoded, codes)
        else:
            mids, errors = ((level[:, 1:] + level[:, :-1]) / 2).contiguous(), torch.empty_like(weight)
            columns._feed_back_together(left, upper, level, order, mids, decoded, codes, errors)
        results.append((errors, decoded, codes))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@every_target
def test_levels_are_features_times_coefficients(target: Target) -> None:
    generator = torch.Generator().manual_seed(0)
    for bits in (target.bits, *target.nested):
        grid = _Grid(target, bits, torch.device("cpu"))
        scales = torch.rand(bits if target.codec == "bcq" else 1, 5, generator=generator) + 0.5
        shifted = target.codec == "uniform" or (target.codec == "bcq" and target.offset)
        shift = torch.randn(5, generator=generator) if shifted else None
        levels = grid.levels(scales, shift)
        torch.testing.assert_close(grid.coefficients(scales, shift) @ grid.features.T, levels)
