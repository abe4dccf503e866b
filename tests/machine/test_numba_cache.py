"""Compiled kernels are cached on disk: a second process compiles nothing.

Compiling all kernels takes minutes. So tests of all kernels share one cache with the rest of the tests, and their first
process compiles what is not there yet. A few quick kernels begin with an empty cache, and show that what is counted as
a hit is none in the first process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import END

SCRIPT = """
import numpy as np
from lowbit_format import reference
from lowbit_format.quantize import Target, bcq, codebook, group_lanes, quantize, uniform
from numba.core.dispatcher import Dispatcher

weight = np.random.default_rng(0).normal(0, 1, (4, 40)).astype(np.float32)
for target in (Target("bcq", 2, 16), Target("uniform", 2, 16), Target("codebook", 4, 16, table="nf4")):
    reference.decode(quantize(weight, target).matrix)
for module in (reference, bcq, codebook, uniform, group_lanes):
    for name, value in sorted(vars(module).items()):
        if isinstance(value, Dispatcher) and value.__module__ == module.__name__ and value.signatures:
            hits, misses = value.stats.cache_hits, value.stats.cache_misses
            print(f"{module.__name__}.{name}", sum(hits.values()), sum(misses.values()))
"""

CPU_SCRIPT = """
import torch
from lowbit_format.kernels import operators
from lowbit_format.kernels.cpu import backend, decoding, products, tiles
from lowbit_format.kernels.cpu.parallel import Kernel
from lowbit_format.kernels.matrix import PlaneMatrix
from numba.core.dispatcher import Dispatcher

def random(*shape): return torch.randint(0, 256, shape, dtype=torch.uint8)
for codec, bits in (("bcq", 2), ("uniform", 2), ("codebook", 4)):
    plain = PlaneMatrix(random(bits, 40, 16), torch.rand(bits if codec == "bcq" else 1, 40, 4), None,
                   torch.rand(40, 4) if codec == "uniform" else None,
                   torch.rand(16) if codec == "codebook" else None, None, codec, bits, 32, 128)
    w = operators.tile(plain)
    operators.linear(torch.rand(2, 128), w)
    operators.dequantize(w)
    operators.untile(w)
    scales = w._replace(scales=w.scales.clone().requires_grad_())
    operators.linear(torch.rand(2, 128), scales).sum().backward()
for module in (backend, decoding, products, tiles):
    for name, value in sorted(vars(module).items()):
        if isinstance(value, Kernel) and value.function.__module__ == module.__name__:
            hit = value.compiled.cache_hits
            print(f"{module.__name__}.{name}", hit, 1 - hit)
        elif isinstance(value, Dispatcher) and value.__module__ == module.__name__ and value.targetoptions.get("nogil"):
            print(f"{module.__name__}.{name}", *(sum(c.values()) for c in value.stats[1:]))
"""

QUICK_SCRIPT = """
import numpy as np
import torch
from lowbit_format.kernels.cpu import backend, decoding, tiles
from lowbit_format.kernels.matrix import PlaneMatrix
from lowbit_format.quantize import group_lanes

group_lanes.pack(np.zeros((1, 8), np.uint8), 1)
planes, scales = torch.zeros(1, 16, 8, dtype=torch.uint8), torch.ones(1, 16, 1)
backend.decode(backend.tile(PlaneMatrix(planes, scales, None, None, None, None, "bcq", 1, 0, 64)))
for called in (group_lanes.pack_rows, tiles._set_tiles):
    print(called.__name__, *(sum(c.values()) for c in called.stats[1:]))
hit = decoding._decode.compiled.cache_hits
print("_decode", hit, 1 - hit)
"""

Counts = dict[str, tuple[int, int]]  # kernel -> cache hits, cache misses


def run(script: str, **variables: str) -> Counts:
    """Cache hits and misses of every kernel that one process used, with these environment variables."""
    environment = {**os.environ, **variables}
    done = subprocess.run([sys.executable, "-c", script + END], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    return {name: (int(hits), int(misses)) for name, hits, misses in lines}


@pytest.mark.slow
def test_with_an_empty_cache_the_first_process_has_no_hits(tmp_path: Path) -> None:
    first, second = (run(QUICK_SCRIPT, NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2))
    assert first == dict.fromkeys(("pack_rows", "_set_tiles", "_decode"), (0, 1))
    assert second == dict.fromkeys(first, (1, 0))


@pytest.mark.slow
def test_a_second_process_compiles_nothing() -> None:
    first, second = run(SCRIPT), run(SCRIPT)
    used = {name for name, counts in first.items() if any(counts)}
    assert {name.rsplit(".", 2)[-2] for name in used} == {"reference", "bcq", "codebook", "uniform", "group_lanes"}
    assert {name: misses for name, (_, misses) in second.items() if misses} == {}
    # What is called from Python only is loaded from its file; what it calls comes with it.
    called = {name for name, (hits, _) in second.items() if hits}
    assert {f"lowbit_format.{n}" for n in ("reference._decode_bcq", "reference._decode_levels")} <= called
    assert {f"lowbit_format.quantize.{m}.fit" for m in ("bcq", "uniform", "codebook")} <= called
    assert {f"lowbit_format.quantize.{m}.assign" for m in ("bcq", "uniform", "codebook")} <= called
    assert "lowbit_format.quantize.group_lanes.pack_rows" in called


@pytest.mark.slow
def test_a_second_process_loads_the_kernels_of_the_operators() -> None:
    """C functions, which no dispatcher counts, and what is called from Python."""
    first, second = run(CPU_SCRIPT), run(CPU_SCRIPT)
    functions = {"products._multiply", "decoding._decode"}
    rows = {"tiles._set_tiles", "tiles._set_rows", "backend._signed_sums"}
    assert {f"lowbit_format.kernels.cpu.{name}" for name in functions | rows} <= first.keys()
    assert second == dict.fromkeys(first, (1, 0))
