"""Compiled kernels are cached on disk: a second process compiles nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import numpy as np
from lowbit_format import reference
from lowbit_format.quantize import Target, bcq, codebook, lanes, quantize, uniform
from numba.core.dispatcher import Dispatcher

weight = np.random.default_rng(0).normal(0, 1, (4, 40)).astype(np.float32)
for target in (Target("bcq", 2, 16), Target("uniform", 2, 16), Target("codebook", 4, 16, table="nf4")):
    reference.decode(quantize(weight, target).matrix)
for module in (reference, bcq, codebook, uniform, lanes):
    for name, value in sorted(vars(module).items()):
        if isinstance(value, Dispatcher) and value.__module__ == module.__name__ and value.signatures:
            hits, misses = value.stats.cache_hits, value.stats.cache_misses
            print(f"{module.__name__}.{name}", sum(hits.values()), sum(misses.values()))
"""

Counts = dict[str, tuple[int, int]]  # kernel -> cache hits, cache misses


def run(cache: Path) -> Counts:
    """Cache hits and misses of every kernel that one process used."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    return {name: (int(hits), int(misses)) for name, hits, misses in lines}


@pytest.mark.slow
def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    first, second = run(tmp_path), run(tmp_path)
    entries = {name for name, (_, misses) in first.items() if misses}
    assert {name.rsplit(".", 2)[-2] for name in entries} == {"reference", "bcq", "codebook", "uniform", "lanes"}
    assert {"lowbit_format.reference._decode_bcq", "lowbit_format.reference._decode_levels"} <= entries
    assert all(hits == 0 for hits, _ in first.values())
    assert {name: misses for name, (_, misses) in second.items() if misses} == {}
    # What is called from Python only is loaded from its file; what it calls comes with it.
    called = {name for name, (hits, _) in second.items() if hits}
    assert {f"lowbit_format.{n}" for n in ("reference._decode_bcq", "reference._decode_levels")} <= called
    assert {f"lowbit_format.quantize.{m}.fit" for m in ("bcq", "uniform", "codebook")} <= called
    assert {f"lowbit_format.quantize.{m}.assign" for m in ("bcq", "uniform", "codebook")} <= called
    assert "lowbit_format.quantize.lanes.pack_rows" in called
