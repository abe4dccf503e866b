"""Quantizers on torch tensors: as good as the compiled ones, and the same file format."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowbit_format.errors import NonFiniteWeightError, QuantizationError
from lowbit_format.quantize import Target, quantize
from lowbit_format.quantize.on_torch import quantize_tensor
from lowbit_format.reference import decode

TARGETS = [
    *(Target(bits=b) for b in (1, 2, 3, 4, 6)),
    Target(bits=3, offset=False),
    Target(bits=4, nested=(2,)),
    Target(bits=3, group_size=0),
    *(Target("uniform", 4, solver=s) for s in ("mse", "minmax", "symmetric")),
    Target("uniform", 1, solver="symmetric"),
]


def error(weight: np.ndarray, decoded: np.ndarray) -> float:
    return float(np.linalg.norm(decoded - weight) / np.linalg.norm(weight))


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_as_good_as_the_compiled_solver(target: Target) -> None:
    weight = np.random.default_rng(0).standard_normal((64, 300)).astype(np.float32)  # the last group is short
    made = quantize_tensor(torch.from_numpy(weight), target)
    compiled = quantize(weight, target)
    assert made.scheme == compiled.matrix.scheme
    for k in (None, *target.nested):
        assert error(weight, decode(made, k)) <= 1.02 * error(weight, decode(compiled.matrix, k)) + 1e-6


def test_half_precision_tensors_and_strides() -> None:
    weight = torch.randn(100, 48, dtype=torch.bfloat16).T
    made = quantize_tensor(weight, Target(bits=4, group_size=32))
    assert error(weight.float().numpy(), decode(made)) < 0.1


def test_importance_lowers_the_weighted_error() -> None:
    weight, importance = torch.randn(64, 128), torch.rand(128) ** 4
    plain, aware = (quantize_tensor(weight, Target(bits=2), importance=i) for i in (None, importance))

    def weighted(matrix: np.ndarray) -> float:
        return float((importance.numpy() * (matrix - weight.numpy()) ** 2).sum())

    assert weighted(decode(aware)) < weighted(decode(plain))


def test_constant_and_zero_groups_are_exact() -> None:
    weight = torch.cat([torch.full((4, 32), 0.75), torch.zeros(4, 32)], dim=1)
    for target in (Target(bits=2, group_size=32), Target("uniform", 2, 32)):
        assert np.array_equal(decode(quantize_tensor(weight, target)), weight.numpy())


def test_wider_scales_where_float16_cannot_hold_them() -> None:
    weight = torch.randn(8, 64) * 1e8
    made = quantize_tensor(weight, Target(bits=4, group_size=32))
    assert made.scheme.scale_dtype == "F32"
    assert error(weight.numpy(), decode(made)) < 0.1


def test_refusals_name_the_tensor() -> None:
    with pytest.raises(NonFiniteWeightError, match="up_proj"):
        quantize_tensor(torch.tensor([[1.0, torch.nan]]), Target(), name="up_proj")
    with pytest.raises(QuantizationError, match="codebook"):
        quantize_tensor(torch.ones(1, 2), Target("codebook"))
