"""Codes in training: their neighbours, when they change, what gradients reach, and blocks that come nearer."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowbit_format.bits import pack_codes, unpack_codes
from lowbit_format.calibration.code_choice import CAUTION, CodeChoice, can_choose
from lowbit_format.calibration.effort import Effort
from lowbit_format.calibration.ladder import BlockResult, quantize_block
from lowbit_format.calibration.neighbours import levels, neighbours
from lowbit_format.calibration.trained_matrix import TrainedMatrix
from lowbit_format.matrix import StoredMatrix
from lowbit_format.quantize import Target, quantize
from lowbit_format.reference import decode_numpy
from lowbit_format.testing.strategies import schemes, stored_matrices

CPU = torch.device("cpu")
TARGETS = {
    "bcq": Target(bits=3, group_size=8),
    "bcq without offset": Target(bits=2, group_size=8, offset=False),
    "uniform": Target("uniform", bits=2, group_size=8),
    "codebook": Target("codebook", table="nf4", group_size=8),
    "codebook with equal levels": Target("codebook", table="ternary", group_size=0),
}


def with_codes(matrix: StoredMatrix, codes: Tensor | np.ndarray[Any, Any]) -> StoredMatrix:
    codes = np.asarray(codes, np.uint8)[:, : matrix.cols]
    return replace(matrix, planes=pack_codes(codes, matrix.scheme.bits))


def random_matrix(target: Target, seed: int = 0) -> tuple[Tensor, StoredMatrix]:
    """A weight with a short last group, and its matrix."""
    weight = torch.randn(6, 21, generator=torch.Generator().manual_seed(seed))
    return weight, quantize(weight.numpy(), replace(target, recognise=False)).matrix


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_neighbours_are_the_next_levels_of_the_group(data: st.DataObject) -> None:
    matrix = data.draw(stored_matrices(data.draw(schemes(ragged=False).filter(lambda s: s.bits < 5))))
    with np.errstate(all="ignore"):
        every = [
            decode_numpy(with_codes(matrix, np.full((matrix.rows, matrix.cols), c)))
            for c in range(2**matrix.scheme.bits)
        ]
    all_levels = np.stack(every)  # [codes, rows, cols]
    if not np.isfinite(all_levels).all():
        return
    near = neighbours(matrix, CPU)
    assert np.array_equal(near.codes[:, : matrix.cols], unpack_codes(matrix.planes, matrix.cols))
    assert not any(codes[:, matrix.cols :].any() for codes in near)
    own, below, above = (decode_numpy(with_codes(matrix, codes)) for codes in near)
    lower = np.where(all_levels < own, all_levels, -np.inf).max(0)
    higher = np.where(all_levels > own, all_levels, np.inf).min(0)
    assert np.array_equal(below, np.where(np.isinf(lower), own, lower))
    assert np.array_equal(above, np.where(np.isinf(higher), own, higher))
    assert ((below != own) | (near.below == near.codes)[:, : matrix.cols].numpy()).all()  # or it is the code itself
    first = levels(matrix, CPU)[:, 0].T.numpy()
    assert np.array_equal(first, all_levels[:, :, 0])


def decoded(matrix: StoredMatrix) -> Tensor:
    return torch.from_numpy(decode_numpy(matrix))


def see(trained: TrainedMatrix, gradient: Tensor) -> None:
    """Give the decoded weight a gradient."""
    (trained.weight() * gradient).sum().backward()


CURVATURE = 0.25


def probed(matrix: StoredMatrix) -> tuple[TrainedMatrix, CodeChoice]:
    """A matrix in training, with the same curvature everywhere."""
    trained = TrainedMatrix(matrix, CPU, codes=True)
    assert trained.choice is not None
    signs = torch.randint(0, 2, (matrix.rows, matrix.cols)) * 2 - 1
    see(trained, signs * CURVATURE**0.5)
    trained.choice.probe()
    return trained, trained.choice


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_a_code_changes_where_the_gain_is_large_enough(target: Target) -> None:
    _, matrix = random_matrix(target)
    near = neighbours(matrix, CPU)
    own, below, above = (decoded(with_codes(matrix, codes)) for codes in near)
    enough = CAUTION / 2 * CURVATURE
    for gap, codes in ((above - own, near.above), (below - own, near.below)):
        for part, expected in ((0.0, near.codes), (0.9, near.codes), (1.1, codes)):
            trained, choice = probed(matrix)
            assert torch.equal(choice.planes(), torch.from_numpy(matrix.planes))
            for step in range(matrix.cols):
                before = choice.codes.clone()
                see(trained, -part * enough * gap)
                trained.change_codes()
                changed = (choice.codes != before)[:, : matrix.scheme.group_columns(matrix.cols)].sum(1)
                assert changed.max() <= 1  # of a group
                assert step or part < 1 or changed.any()
            assert torch.equal(choice.codes, expected)
            assert np.array_equal(trained.stored().planes, pack_codes(expected[:, : matrix.cols].numpy(), target.bits))
    trained, choice = probed(matrix)
    for direction, expected in ((-1e3, near.above), (1e6, near.below)):  # to the one side, and all the way to the other
        for _ in range(2 * matrix.cols):
            see(trained, torch.full_like(own, direction))
            trained.change_codes()
        assert torch.equal(choice.codes, expected)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_gradients_are_seen_where_there_is_a_neighbour(target: Target) -> None:
    weight, matrix = random_matrix(target)
    flat = replace(matrix.params, scales=matrix.params.scales.copy())
    flat.scales[:, 0] = 0  # a row of which all levels are one
    trained = TrainedMatrix(replace(matrix, params=flat), CPU, codes=True)
    assert trained.choice is not None
    see(trained, weight)
    assert all(t.grad is not None and t.grad.any() for t in trained.tensors)
    gradient = trained.choice.gradient()
    assert not gradient[0].any()
    assert torch.equal(gradient[1:], weight[1:])
    assert not trained.choice.gradient().any()  # each is seen once
    see(trained, 1e6 * weight)
    trained.change_codes()
    assert torch.equal(trained.choice.planes(), torch.from_numpy(matrix.planes))  # without a curvature


def test_codes_that_precisions_share_stay() -> None:
    _, matrix = random_matrix(Target(bits=3, group_size=8, nested=(2,)))
    assert not can_choose(matrix)
    assert TrainedMatrix(matrix, CPU, codes=True).choice is None


# --- blocks -----------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 40), Conv1D(24, 40)
        nn.init.normal_(self.down.weight, std=0.2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.down(torch.tanh(self.up(x)))
        return found


class Calls:
    """See :class:`lowbit_format.calibration.hessians.Inputs`; the last tokens of each sample are padding.

    Args:
        block: with float weights.
        moved: how far quantized blocks before it have moved its inputs.
    """

    batches = 4

    def __init__(self, block: nn.Module, moved: float = 0.1) -> None:
        generator = torch.Generator().manual_seed(1)
        mix = torch.randn(24, 24, generator=generator)
        self._x = torch.randn(self.batches, 8, 12, 24, generator=generator) @ mix
        self._moved = self._x + moved * self._x @ torch.randn(24, 24, generator=generator)
        self._plain = copy.deepcopy(block)

    def arguments(self, batch: int, kind: str = "quantized") -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (self._x[batch] if kind == "float" else self._moved[batch],), {}

    def mask(self, batch: int) -> Tensor:
        return (torch.arange(12) < 9).long().expand(8, -1)

    def wanted(self, batch: int) -> Tensor:
        with torch.no_grad():
            found: Tensor = self._plain(self._x[batch])
        return torch.where(self.mask(batch)[..., None] > 0, found, -found)  # what is padding counts nothing


def trained(target: Target, moved: float = 0.1, **effort: float) -> BlockResult:
    torch.manual_seed(0)
    block = Block().requires_grad_(False)
    work = Effort(sweeps=2, steps=40, learning_rate=0.01, drift=False, samples=8)
    result = quantize_block(
        block,
        {"up": target, "down": target},
        Calls(block, moved),
        replace(work, **effort),
        path="block",  # type: ignore[arg-type]
    )
    for name, found in result.layers.items():  # what the block has now is what is stored
        layer = block.get_submodule(name)
        weight = layer.weight if name == "up" else layer.weight.T
        assert torch.equal(weight, decoded(found.matrix))
    return result


@pytest.mark.parametrize(
    "target", [Target(bits=2), Target("uniform", bits=2), Target("codebook", table="fp4-e2m1")], ids=lambda t: t.codec
)
def test_codes_bring_a_block_nearer_than_scales_alone(target: Target) -> None:
    before = trained(target, steps=0)
    scales, both = trained(target), trained(target, codes=True)
    assert both.errors["layer by layer"] == scales.errors["layer by layer"]
    assert np.array_equal(scales.layers["up"].matrix.planes, before.layers["up"].matrix.planes)
    assert not np.array_equal(both.layers["up"].matrix.planes, before.layers["up"].matrix.planes)
    errors = [measured(result) for result in (before, scales, both)]
    assert errors[1] < errors[0]
    assert errors[2] < 0.8 * errors[1]
    assert both.last == "scales and codes together"
    again = trained(target, codes=True)
    for name, found in both.layers.items():
        assert np.array_equal(found.matrix.planes, again.layers[name].matrix.planes)
        assert np.array_equal(found.matrix.params.scales, again.layers[name].matrix.params.scales)


def measured(result: BlockResult) -> float:
    """The error of a block with the matrices of a result, over the tokens that count."""
    torch.manual_seed(0)
    block = Block().requires_grad_(False)
    calls = Calls(block)
    block.up.weight.copy_(decoded(result.layers["up"].matrix))
    block.down.weight.copy_(decoded(result.layers["down"].matrix).T)
    total = 0.0
    for i in range(calls.batches):
        away = block(*calls.arguments(i)[0]) - calls.wanted(i)
        total += float(away[calls.mask(i) > 0].square().sum())
    return total


def test_where_other_codes_make_a_block_worse_they_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target(bits=3, group_size=8)
    monkeypatch.setattr("lowbit_format.calibration.code_choice.CAUTION", 0.0)  # too many change together
    wild, worse = trained(target, moved=0, codes=True), trained(target, moved=0, codes=True, learning_rate=100.0)
    before, scales = trained(target, moved=0, steps=0), trained(target, moved=0)
    assert (scales.last, wild.last) == ("scales together", "scales together")
    for name, found in wild.layers.items():
        assert np.array_equal(found.matrix.planes, before.layers[name].matrix.planes)
        assert np.array_equal(found.matrix.params.scales, scales.layers[name].matrix.params.scales)
        assert np.array_equal(worse.layers[name].matrix.params.scales, before.layers[name].matrix.params.scales)
