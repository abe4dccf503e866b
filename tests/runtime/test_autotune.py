"""Measured launch configurations: what is tried, what is kept, and that products use it from then on."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.modules import filled
from torch import nn

import lowbit_format as lb
from lowbit_format.errors import UnsupportedOperationError
from lowbit_format.kernels import operators
from lowbit_format.kernels.gpu import backend, launch, products
from lowbit_format.kernels.gpu.launch import ROW_STEP, Config
from lowbit_format.runtime.modules import LowbitEmbedding, LowbitLinear
from lowbit_format.schema import Scheme


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and modules that compute with the GPU's kernels on any device."""
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(operators, "BACKENDS", {"cpu": "gpu.backend", "cuda": "gpu.backend"})
    launch.forget()
    yield tmp_path / "cache" / "gpu.json"
    launch.forget()


def model() -> nn.Module:
    scheme = Scheme("bcq", 2, 32, "F32")
    return nn.Sequential(*(filled(LowbitLinear(scheme, 10, 32)) for _ in range(2)))


class Clock:
    """A timer that answers with what it was told for each launch; only products of one row of x run (interpreted)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, planes: Callable[[int, int], float], library: float) -> None:
        self.time = 0.0
        whole, by_decoding = products.multiply, backend.decoded_linear

        def multiply(x: Any, *args: Any) -> Any:
            self.time = planes(len(x), args[-1].warps)
            return whole(x, *args) if len(x) == 1 else None

        def decoding(*args: Any) -> Any:
            self.time = library
            return by_decoding(*args) if len(args[0]) == ROW_STEP else None

        monkeypatch.setattr(products, "multiply", multiply)
        monkeypatch.setattr(backend, "decoded_linear", decoding)

    def __call__(self, function: Callable[[], Any]) -> float:
        function()
        return self.time


def test_the_fastest_is_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four warps take least; straight from planes a row of x takes 1 ms, decoding takes 40."""
    clock = Clock(monkeypatch, lambda rows, warps: rows + abs(warps - 4), 40.0)
    lb.autotune(model(), timer=clock)
    (found,) = json.loads(cache.read_text()).values()  # two matrices of one shape
    assert found == [4, 32]
    assert launch.choose(backend.tile(model()[0].plane_matrix)) == Config(4, 32)


def test_other_entries_stay(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.parent.mkdir()
    cache.write_text('{"another device bcq 4 64x64": [8, 48]}')
    lb.autotune(model(), timer=Clock(monkeypatch, lambda rows, warps: 1.0, 0.5))
    kept = json.loads(cache.read_text())
    assert kept.pop("another device bcq 4 64x64") == [8, 48]
    assert [most for _, most in kept.values()] == [0]


def test_nothing_to_tune(cache: Path) -> None:
    embedding = filled(LowbitEmbedding(Scheme("bcq", 2, 32, "F32"), 20, 64))
    ragged_groups = filled(LowbitLinear(Scheme("bcq", 2, 24, "F32"), 20, 64))
    times = itertools.count()
    for nothing in (nn.Linear(2, 2), nn.Sequential(embedding, ragged_groups)):
        with pytest.raises(UnsupportedOperationError, match="model\\.to"):
            lb.autotune(nothing, timer=lambda f: float(next(times)))
    assert not cache.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_model_on_a_cpu_is_refused() -> None:
    with pytest.raises(UnsupportedOperationError, match="nothing to tune"):
        lb.autotune(model())
