"""The kernels of a CPU, made for machines with fewer instruction sets than this one."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPT = """
import json
import sys
sys.path.insert(0, sys.argv[1])
import test_cpu_isa
print(json.dumps(test_cpu_isa.check()))
"""


@dataclass(frozen=True)
class Machine:
    """A processor by LLVM's names."""

    name: str
    features: str
    has: frozenset[str]  # what of AVX-512, AVX2 and conversions from float16 its code may use


MACHINES = [
    Machine(
        "haswell",
        "+sse,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+cx16,+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt,+movbe",
        frozenset({"avx2", "f16c"}),
    ),
    Machine("x86-64", "+sse,+sse2", frozenset()),
]


def check() -> dict[str, list[str]]:
    """Everything of test_cpu_kernels.py in brief, every codec by hand, and gradients; what the code was made of."""
    import torch
    from test_cpu_kernels import (
        FLOATS,
        KINDS,
        absolute,
        assert_near,
        check_everything,
        check_linear,
        drawn,
        exact,
        magnitude,
        random_call,
        same_bits,
    )

    from lowbit_format import vector_ir
    from lowbit_format.runtime import naive
    from lowbit_format.runtime.cpu import decoding, kernels, products
    from lowbit_format.schema import SCALE_DTYPES

    check_everything()
    turn = 0
    for kind in KINDS:
        for bits in (1, 2, 4, 5, 8):
            for group_size in (0, 32, 128):
                turn += 1
                w = drawn(kind, bits, group_size, 37, 300, turn, SCALE_DTYPES[turn % len(SCALE_DTYPES)])
                form = kernels.pack(w)
                assert same_bits(kernels.decode(form), naive.decode(w))
                for i, batch in enumerate((1, 3, 8)):
                    tasks = (None, "mul", "add")[(turn + i) % 3]
                    call = random_call(w, batch, dtype=FLOATS[(turn + i) % 3], tasks=tasks, seed=turn)
                    check_linear(call)
                    grad = torch.randn(batch, 37)
                    _, _, _, deltas, ids = call
                    found = kernels.linear_input_grad(grad, form, deltas, ids)
                    want = naive.linear_input_grad(grad.double(), exact(w), deltas, ids)
                    terms = naive.linear_input_grad(grad.double().abs(), absolute(w), magnitude(deltas), ids)
                    assert_near(found, want, terms)
                    x = call.x.float()
                    pair = zip(
                        kernels.linear_param_grads(grad, x, form, deltas, ids),
                        naive.linear_param_grads(grad, x, w, deltas, ids),
                        strict=True,
                    )
                    for mine, theirs in pair:
                        assert (mine is None) == (theirs is None)
                        if mine is not None and theirs is not None:
                            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)
    parts = (products._make_tables, products._multiply, decoding._decode)
    code = "".join(kernel.compiled._library.get_asm_str() for kernel in parts)
    return {
        "features": sorted(vector_ir.features()),
        "code": [word for word in ("zmm", "ymm", "xmm", "vpermps", "vcvtph2ps", "vfmadd") if word in code],
    }


@pytest.mark.slow
@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="needs an x86-64")
@pytest.mark.parametrize("machine", MACHINES, ids=[m.name for m in MACHINES])
def test_right_on_a_lesser_machine(machine: Machine, tmp_path: Path) -> None:
    if "avx2" in machine.has and not _here("avx2", "fma", "f16c"):
        pytest.skip("this machine lacks AVX2 itself")
    environment = {
        **os.environ,
        "NUMBA_CPU_NAME": machine.name,
        "NUMBA_CPU_FEATURES": machine.features,
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert {"avx512f", "avx2", "f16c"} & set(seen["features"]) == machine.has
    wide = {"ymm", "vpermps", "vcvtph2ps", "vfmadd"} if "avx2" in machine.has else set[str]()
    assert set(seen["code"]) == {"xmm"} | wide


def _here(*names: str) -> bool:
    """Whether this machine itself has these instruction sets."""
    from llvmlite import binding

    own: dict[str, bool] = binding.get_host_cpu_features()
    return all(own.get(name, False) for name in names)
