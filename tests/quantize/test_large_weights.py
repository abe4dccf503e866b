"""From 4 bits on and without importance, BCQ counts errors by the size of their weights: large weights shrink less."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.quantizing import sized_error, spread_matrix

from lowbit_format.machine.llvm import LANES
from lowbit_format.matrix import StoredMatrix
from lowbit_format.quantize import Target, bcq, quantize
from lowbit_format.quantize.on_torch import quantize_tensor
from lowbit_format.reference import decode

TARGETS = [Target(bits=4), Target(bits=5), Target(bits=4, group_size=0, offset=False)]


@pytest.fixture(scope="module")
def weight() -> np.ndarray:
    return spread_matrix(64, 320)  # with groups of 128 the last one is short


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_large_weights_shrink_less_than_by_least_squares(weight: np.ndarray, target: Target) -> None:
    sized, squares = quantize(weight, target), quantize(weight, target, importance=np.ones(320, np.float32))
    assert 2 * abs(_shrinkage(weight, sized.matrix)) < _shrinkage(weight, squares.matrix)
    assert sized_error(weight, sized.matrix) < sized_error(weight, squares.matrix)
    assert sized.relative_error < 1.05 * squares.relative_error


@pytest.mark.parametrize("target", [Target(bits=3), Target("uniform", 4), Target("codebook")], ids=str)
def test_elsewhere_all_errors_count_the_same(weight: np.ndarray, target: Target) -> None:
    plain, ones = (quantize(weight[:8], target, importance=i).matrix for i in (None, np.ones(320, np.float32)))
    assert np.array_equal(plain.planes, ones.planes)
    assert np.array_equal(plain.params.scales, ones.params.scales)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_torch_has_the_same_objective(weight: np.ndarray, target: Target) -> None:
    made, compiled = quantize_tensor(torch.from_numpy(weight), target), quantize(weight, target).matrix
    assert sized_error(weight, made) <= 1.02 * sized_error(weight, compiled)
    assert 0.8 < _shrinkage(weight, made) / _shrinkage(weight, compiled) < 1.25


def test_importance_is_one_and_the_square_relative_to_the_mean() -> None:
    """Also of groups of zeros and of one weight; columns behind a short group weigh nothing."""
    x = np.random.default_rng(0).uniform(-1, 1, (24, LANES)).astype(np.float32)
    x[:, 0] = 0
    x[1:, 1] = 0
    w = np.ones_like(x)
    w[20:] = 0
    got_w, got_wx = w.copy(), w * x
    bcq._weigh_by_size(x, got_w, got_wx)
    squares = x.astype(np.float64) ** 2
    mean = squares[:20].mean(axis=0)
    np.testing.assert_allclose(got_w, w * (1 + squares / np.where(mean > 0, mean, np.inf)), rtol=1e-5)
    assert np.array_equal(got_wx, got_w * x)


def _shrinkage(weight: np.ndarray, matrix: StoredMatrix) -> float:
    """By what part the largest hundredth of the weights is too small after decoding."""
    large = np.abs(weight) > np.quantile(np.abs(weight), 0.99)
    return 1 - float((decode(matrix) * weight)[large].sum() / (weight[large] ** 2).sum())
