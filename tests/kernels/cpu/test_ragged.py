"""Rows of different bits on a CPU: sorted by their bits, multiplied as a few ordinary matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit_format.bits import to_ragged
from lowbit_format.kernels import naive, operators
from lowbit_format.kernels.batch import Factor
from lowbit_format.kernels.cpu import backend, tiles
from lowbit_format.kernels.matrix import PlaneMatrix
from lowbit_format.schema import Scheme
from lowbit_format.testing.products import drawn, random_call, same_bits

BITS, COLS = 4, 100
CODECS = ["bcq", "uniform", "affine"]
ROW_BITS = {
    "any": [4, 1, 3, 2, 1, 1, 4, 3] * 11,
    "ones": [1] * 20,  # bits that no row has: read at a lower precision than the scheme's
    "one row of each": [2, 4, 1, 3],
    "whole tiles": [3, 2] * 64,
    "a long row": [1] * 79 + [4],
}


def ragged(codec: str, row_bits: list[int], group_size: int = 32) -> PlaneMatrix:
    """A matrix of these bits, in the file's layout."""
    full = drawn(Scheme(codec, offset=codec != "uniform"), BITS, group_size, len(row_bits), COLS)
    bits = torch.tensor(row_bits, dtype=torch.uint8)
    scales = full.scales.clone()
    if codec == "bcq":
        scales[bits[None, :] <= torch.arange(BITS)[:, None]] = 0  # MIX-3
    planes = torch.from_numpy(to_ragged(full.planes.numpy(), bits.numpy()))
    return full._replace(planes=planes, scales=scales, row_bits=bits)


@pytest.mark.parametrize("name", ROW_BITS)
@pytest.mark.parametrize("codec", CODECS)
def test_as_the_naive_backend(codec: str, name: str) -> None:
    """All operators, with and without tasks that change every plane, for few and many rows of x."""
    w = ragged(codec, ROW_BITS[name])
    tiled = backend.tile(w)
    assert torch.equal(backend.untile(tiled).planes, w.planes)
    assert same_bits(backend.dequantize(tiled, None, torch.float32), naive.decode(w))
    ids = torch.tensor([0, -1, len(ROW_BITS[name]) // 2, 0])
    for tasks in (None, "mul", "add"):
        for batch in (1, 5, 130):
            call = random_call(w, batch, tasks=tasks, seed=w.scales.shape[0] - 1)  # deltas of all planes
            x, _, bias, deltas, task_ids = call
            near(backend.linear(x, tiled, bias, deltas, task_ids), naive.linear(x, w, bias, deltas, task_ids))
            grad = torch.randn(batch, w.rows)
            found = backend.linear_input_grad(grad, tiled, deltas, task_ids)
            near(found, naive.linear_input_grad(grad, w, deltas, task_ids))
            pairs = zip(
                backend.linear_param_grads(grad, x, tiled, deltas, task_ids),
                naive.linear_param_grads(grad, x, w, deltas, task_ids),
                strict=True,
            )
            for mine, theirs in pairs:
                assert (mine is None) == (theirs is None)
                if mine is not None and theirs is not None:
                    near(mine, theirs)
        some = None if tasks is None else torch.tensor([0, 1, -1, 2])
        deltas = None if tasks is None else deltas
        found = backend.embedding(ids, tiled, deltas, some, torch.float32)
        near(found, naive.embedding(ids, w, deltas, some, torch.float32))


def near(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * max(1.0, float(wanted.abs().max())))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("group_size", [0, 16, 64])
def test_rows_of_equal_bits_are_an_ordinary_matrix(codec: str, group_size: int) -> None:
    """To the last bit, since it is the same kernel."""
    w = ragged(codec, [BITS] * 40, group_size)
    plain = backend.tile(w._replace(row_bits=None, planes=w.planes.view(BITS, 40, -1)))
    tiled = backend.tile(w)
    assert torch.equal(tiled.planes, plain.planes.flatten())
    for batch in (1, 6, 64, 200):
        x = torch.randn(batch, COLS)
        assert same_bits(operators.linear(x, tiled), operators.linear(x, plain))


def test_a_lower_precision_cuts_long_rows() -> None:
    """Read at 2 bits, rows of 3 and 4 are rows of 2 (NST-2), and the file's first planes are all that is needed."""
    w = ragged("uniform", ROW_BITS["any"])
    assert w.row_bits is not None
    own = w.row_bits.clamp(max=2)
    low = w._replace(planes=w.planes[: int(own.sum())], bits=2)
    tiled = backend.tile(low)
    assert [part.bits for part in tiles.parts(tiled)] == [2, 1]
    assert torch.equal(backend.untile(tiled).planes, low.planes)
    x = torch.randn(3, COLS)
    near(operators.linear(x, tiled), naive.linear(x, low, None, None, None))


def test_with_others_in_one_launch() -> None:
    """A ragged matrix beside ordinary ones, for one x."""
    ordinary, mixed = drawn(Scheme("bcq"), 3, 32, 50, COLS), ragged("bcq", ROW_BITS["any"])
    bias = torch.randn(mixed.rows)
    x = torch.randn(3, COLS)
    found = operators.linear_together(
        x, [Factor(backend.tile(ordinary)), Factor(backend.tile(mixed), bias), Factor(backend.tile(ordinary))]
    )
    wanted = [naive.linear(x, ordinary, None, None, None), naive.linear(x, mixed, bias, None, None)]
    for mine, theirs in zip(found, [*wanted, wanted[0]], strict=True):
        near(mine, theirs)


@pytest.mark.parametrize("rows", [[88], [-89], [0, 1000]])
def test_rows_that_do_not_exist(rows: list[int]) -> None:
    w = backend.tile(ragged("bcq", ROW_BITS["any"]))
    with pytest.raises(IndexError):
        operators.embedding(torch.tensor(rows), w)


def test_parameters_of_inference_mode_that_change() -> None:
    """torch does not count their changes, so nothing that was made of them is used again."""
    with torch.inference_mode():
        w = ragged("bcq", ROW_BITS["any"])
        tiled, x = backend.tile(w._replace(scales=w.scales.clone())), torch.randn(2, COLS)
        before = operators.linear(x, tiled)
        tiled.scales.mul_(2)
        assert same_bits(operators.linear(x, tiled), operators.linear(x, w._replace(scales=tiled.scales.clone())))
        assert not torch.equal(operators.linear(x, tiled), before)
