"""The kernels as they are made for other machines: which code runs there, and that it gives right answers.

A process of its own compiles for a machine that Numba's settings name, and this one can run: its code is what such a
machine would run.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lowbit_format.machine.llvm import features

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="names of x86-64 machines"),
]
AVX2 = "avx", "avx2", "bmi", "bmi2", "f16c", "fma", "popcnt", "sse3", "sse4.1", "sse4.2", "ssse3"
AVX512 = *AVX2, "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"
VBMI = *AVX512, "avx512vbmi", "avx512vnni"
MACHINES = {  # LLVM's names; instruction sets above SSE2
    "haswell": AVX2,
    "icelake-server": VBMI,
    "nehalem": ("sse3", "sse4.1", "sse4.2", "ssse3"),
    "skylake-avx512": AVX512,
    "x86-64": (),
}
# Registers of vpermps, if it is there; of the twins vpermps and vpermd, LLVM chooses by what stands around it.
PERMUTES = {"haswell": "ymm", "x86-64": None, "skylake-avx512": "zmm"}

SCRIPT = """
import json, re
from lowbit_format.kernels.cpu import products
from lowbit_format.machine.llvm import features
from support.cpu_kernels import check_everything

check_everything()
text = products._multiply.compiled._library.get_asm_str()
print(json.dumps({
    "features": sorted(features()),
    "permutes": {kind: len(re.findall(rf"vperm(?:ps|d)\\s.*%{kind}", text)) for kind in ("xmm", "ymm", "zmm")},
    "wide": len(re.findall("%zmm", text)),
    "fused": len(re.findall("vfn?m(?:add|sub)", text)),
}))
"""

# Instructions that look up bytes, and their registers.
BYTE_LOOKUPS = {
    "haswell": ("vpshufb", "ymm"),
    "icelake-server": ("vpermb", "zmm"),
    "nehalem": ("pshufb", "xmm"),
    "skylake-avx512": ("vpshufb", "zmm"),
}

ROUNDED_SCRIPT = """
import json, re
from lowbit_format.kernels.cpu import products
from lowbit_format.machine.llvm import features
from support.cpu_kernels import check_rounded_everything

check_rounded_everything()
text = products._multiply_rounded.compiled._library.get_asm_str()
found = re.findall(r"\\b(vpermb|v?pshufb|vpdpbusd|v?pmaddubsw)\\s.*%([xyz]mm)", text)
print(json.dumps({"features": sorted(features()), "instructions": sorted(set(found))}))
"""


def run_on(machine: str, cache: Path, script: str = SCRIPT) -> dict[str, Any]:
    """Check kernels as made for `machine`, and say what they consist of."""
    here = Path(__file__).parents[3]
    environment = {
        **os.environ,
        "NUMBA_CPU_NAME": machine,
        "NUMBA_CPU_FEATURES": ",".join(f"+{name}" for name in MACHINES[machine]),
        "NUMBA_CACHE_DIR": str(cache),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(here), str(here / "tests"), os.environ.get("PYTHONPATH")])),
    }
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# The rest of the suite runs the kernels of this machine, which are those of the first where it has AVX-512. Each takes
# half a minute to compile; machines without AVX2, such as the last, have not been made for ten years.
@pytest.mark.parametrize(
    "machine",
    [
        pytest.param("skylake-avx512", marks=pytest.mark.exhaustive),
        "haswell",
        pytest.param("x86-64", marks=pytest.mark.exhaustive),
    ],
)
def test_kernels_as_made_for_a_machine(machine: str, tmp_path: Path) -> None:
    if missing := set(MACHINES[machine]) - features():
        pytest.skip(f"this machine has no {', '.join(sorted(missing))}")
    found = run_on(machine, tmp_path)
    assert set(found["features"]) == set(MACHINES[machine])
    assert {kind for kind, count in found["permutes"].items() if count} == {PERMUTES[machine]} - {None}
    assert (found["wide"] > 0) == (PERMUTES[machine] == "zmm")
    assert (found["fused"] > 0) == ("fma" in MACHINES[machine])


@pytest.mark.parametrize(
    "machine",
    [
        pytest.param("icelake-server", marks=pytest.mark.exhaustive),
        pytest.param("skylake-avx512", marks=pytest.mark.exhaustive),
        "haswell",
        pytest.param("nehalem", marks=pytest.mark.exhaustive),
    ],
)
def test_8_bit_activations_as_made_for_a_machine(machine: str, tmp_path: Path) -> None:
    if missing := set(MACHINES[machine]) - features():
        pytest.skip(f"this machine has no {', '.join(sorted(missing))}")
    found = run_on(machine, tmp_path, ROUNDED_SCRIPT)
    assert set(found["features"]) == set(MACHINES[machine])
    lookup, register = BYTE_LOOKUPS[machine]
    others = {"vpermb"} if lookup != "vpermb" else {"vpmaddubsw", "pmaddubsw"}
    instructions = [tuple(one) for one in found["instructions"]]
    assert (lookup, register) in instructions
    assert others.isdisjoint(name for name, _ in instructions)
