"""Weights looked up by their codes: the same bits as those that are decoded and rounded."""

from __future__ import annotations

import pytest
import torch

from lowbit_format.kernels import naive
from lowbit_format.kernels.cpu import backend, levels, many_rows
from lowbit_format.kernels.matrix import PlaneMatrix
from lowbit_format.machine.llvm import features
from lowbit_format.schema import SCALE_DTYPES, Scheme
from lowbit_format.testing.products import KINDS, drawn, random_call, same_bits

PLAIN = [kind for kind in KINDS if not kind.row_bits]
pytestmark = pytest.mark.skipif("avx512bw" not in features(), reason="no lookup of 32 entries here")


def looked_up(w: PlaneMatrix, first: int, stop: int, threads: int = 1) -> torch.Tensor:
    out = torch.full((stop - first, -(-w.cols // 32) * 32), torch.nan, dtype=torch.bfloat16)
    levels.decode(w, first, stop, threads, out)
    return out[:, : w.cols].contiguous()


@pytest.mark.parametrize("kind", PLAIN, ids=str)
@pytest.mark.parametrize("bits", range(1, levels.MOST_BITS + 1))
@pytest.mark.parametrize("dtype", SCALE_DTYPES)
def test_same_bits(kind: Scheme, bits: int, dtype: str) -> None:
    for group, rows, cols in ((0, 1, 1), (32, 81, 70), (64, 16, 330), (96, 33, 300), (128, 70, 600), (0, 20, 130)):
        w = drawn(kind, bits, group, rows, cols, seed=bits, dtype=dtype)
        tiled = backend.tile(w)
        assert levels.can_look_up(tiled)
        want = naive.decode(w).bfloat16()
        assert same_bits(looked_up(tiled, 0, rows), want)
        for first in range(16, rows, 16):
            assert same_bits(looked_up(tiled, first, min(rows, first + 16)), want[first : first + 16])


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levels, "ONE_THREAD_BELOW", 0)
    w = drawn(Scheme("bcq", offset=True), 4, 64, 203, 130)
    for threads in (1, 2, 5):
        assert same_bits(looked_up(backend.tile(w), 0, 203, threads), naive.decode(w).bfloat16())


@pytest.mark.parametrize(("bits", "group"), [(6, 32), (8, 64), (4, 16)])
def test_others_are_decoded(bits: int, group: int) -> None:
    assert not levels.can_look_up(backend.tile(drawn(Scheme("bcq"), bits, group, 20, 100)))


@pytest.mark.parametrize("kind", PLAIN, ids=str)
def test_products_of_many_rows(kind: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the same bits whichever way the weights are made, in chunks too."""
    w = backend.tile(drawn(kind, 4, 64, 120, 100))
    x = random_call(w, 90, dtype=torch.bfloat16).x
    monkeypatch.setattr(many_rows, "CHUNK", 48 * 128)
    found = many_rows.linear(x, w, None, None)
    monkeypatch.setattr(levels, "can_look_up", lambda w: False)
    assert same_bits(found, many_rows.linear(x, w, None, None))
