"""The GPU kernels compiled ahead of time for three GPUs: none spills, all fit, and no product gets longer.

``support/compiled.py`` compiles and reads them, in a process of its own for each target, since kernels run in Triton's
interpreter here. Every test run takes a few variants (``compiled.FEW``) for two of the three. The full set takes eight
minutes of one core, almost all of it in Triton's passes over its GPU dialect; whoever changes a kernel runs it::

    pytest -m exhaustive tests/kernels/gpu/test_compiled.py
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support import compiled

pytest.importorskip("triton")

from support.compiled import Report

from lowbit_format.kernels.gpu import launch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all((compiled.NVIDIA_TOOLS / tool).exists() for tool in ("ptxas", "nvdisasm", "cuobjdump")),
        reason="this package of Triton has no ptxas, nvdisasm or cuobjdump",
    ),
]
AMPERE = pytest.param("sm_80", marks=pytest.mark.exhaustive)  # compiles as Hopper does, but for its counts
every_target = pytest.mark.parametrize("target", [AMPERE if t == "sm_80" else t for t in compiled.TARGETS])
nvidia = pytest.mark.parametrize("target", [AMPERE, "sm_90"])

Reports = Callable[[str], list[Report]]
SETS = {"few": ["--few"], "all": []}  # options of compiled.py


def run(*args: str) -> list[Report]:
    """The reports that ``compiled.py`` prints."""
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, compiled.__file__, "--json", *args]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return [compiled.of_json(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.fixture(scope="session", params=["few", pytest.param("all", marks=pytest.mark.exhaustive)])
def chosen(request: pytest.FixtureRequest) -> str:
    """Which set of variants the tests are about."""
    return str(request.param)


@pytest.fixture(scope="session")
def reports(chosen: str, tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """Reports of the chosen variants on a target, compiled once for all workers of pytest-xdist."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    known: dict[str, list[Report]] = {}

    def get(target: str) -> list[Report]:
        if target not in known:
            known[target] = compiled_once(shared / f"compiled-{chosen}-{target}.json", target, *SETS[chosen])
        return known[target]

    return get


def compiled_once(file: Path, target: str, *options: str) -> list[Report]:
    with file.open("a+") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        f.seek(0)
        text = f.read()
        if not text:
            text = json.dumps([compiled.asdict(r) for r in run("--target", target, *options)])
            f.write(text)
    return [compiled.of_json(each) for each in json.loads(text)]


def named(found: list[Report], show: Callable[[Report], object]) -> dict[str, object]:
    """What a failing test prints."""
    return {f"{r.kernel}: {r.name}": show(r) for r in found}


@every_target
def test_every_variant_compiles(reports: Reports, target: str) -> None:
    found = reports(target)
    assert {r.kernel for r in found} == set(compiled.KERNELS)
    assert named([r for r in found if r.error], lambda r: r.error) == {}


@every_target
def test_nothing_spills(reports: Reports, target: str) -> None:
    spilling = [r for r in reports(target) if r.machine.spills or r.machine.stack]
    assert named(spilling, lambda r: (r.machine.spills, r.machine.stack)) == {}


@every_target
def test_shared_memory_fits(reports: Reports, target: str) -> None:
    most = 64 * 1024 if target == "gfx942" else 48 * 1024  # what a kernel may have without asking the driver
    assert named([r for r in reports(target) if r.machine.shared > most], lambda r: r.machine.shared) == {}


@every_target
def test_registers_leave_room_for_warps(reports: Reports, target: str) -> None:
    for r in reports(target):
        assert r.error or 0 < r.machine.registers <= 255, r.name
    family = {"sm_80": "ampere", "sm_90": "hopper", "gfx942": "amd"}[target]
    wanted = launch.FAMILIES[family].warps
    plain = [r for r in reports(target) if r.kernel == "product" and is_plain(r) and r.choices["columns"] <= 16]
    few = [r for r in plain if warps(target, r.machine.registers) < (wanted if is_short(r) else 16)]
    assert plain
    assert named(few, lambda r: (r.machine.registers, warps(target, r.machine.registers))) == {}


def warps(target: str, registers: int) -> int:
    """How many warps of so many registers a lane one multiprocessor (compute unit) holds.

    Four parts of a multiprocessor have 16384 registers each, which a warp takes in eights a lane; four parts of a
    compute unit have 512 for each of 64 lanes.
    """
    registers = -(-registers // 8) * 8
    return 4 * (512 // registers if target == "gfx942" else 16384 // (32 * registers))


def is_short(r: Report) -> bool:
    """Whether it is a product of few rows without combinations of planes: the rule for warps is made for these."""
    return r.choices["columns"] == 8 and r.choices["codec"] != "codebook"


def is_plain(r: Report) -> bool:
    """Whether a product has half-precision x, 16-bit scales and no deltas, and four warps: what is counted."""
    c = r.choices
    return c["deltas"] == "none" and c["x"] == c["scales"] == "fp16" and c["warps"] == 4 and "weight_rows" not in c


@nvidia
def test_products_are_of_tensor_cores(reports: Reports, target: str) -> None:
    """Eight blocks of so many steps, each times eight columns at once; one loop, so that each plane is read once."""
    products = real_products(reports(target))
    assert products
    for r in products:
        wanted, found = 8 * r.choices["steps"] * (r.choices["columns"] // 8), r.machine.loop["IMMA"]
        # Deltas of groups make a loop with two branches, of which the compiler may make two loops.
        one_loop = r.choices["deltas"] != "group"
        assert r.machine.matrix_loops == 1 or not one_loop, r.name
        assert found == wanted if one_loop else found > 0, r.name


def test_products_are_of_matrix_cores_on_amd(reports: Reports) -> None:
    for r in real_products(reports("gfx942")):
        assert r.machine.matrix_loops >= 1, r.name
        assert sum(n for name, n in r.machine.loop.items() if name.startswith("v_mfma_i32_")) >= 8, r.name


def real_products(found: list[Report]) -> list[Report]:
    """Products that were compiled, with more than one macro block: others need no loop."""
    return [r for r in found if r.kernel == "product" and not r.error and "weight_rows" not in r.choices]


@nvidia
def test_lanes_load_what_they_multiply(reports: Reports, target: str) -> None:
    """Nothing goes through shared memory or between lanes in the loop of a product, and warps do not wait."""
    for r in real_products(reports(target)):
        if is_plain(r):
            free = {"SHFL"} if r.choices["codec"] == "codebook" else set()  # the sum of a combination's coefficient
            exchanges = {k: n for k, n in r.machine.loop.items() if k in EXCHANGES - free}
            assert exchanges == {}, r.name
            assert r.machine.loop["LDG"] > 0, r.name


@nvidia
def test_lanes_multiply_what_they_load_in_order(reports: Reports, target: str) -> None:
    """What a lane finds in memory is its operand (test_tiles.py does it by hand); nothing comes in between."""
    checked = [r for r in real_products(reports(target)) if is_plain(r) and r.choices["codec"] != "codebook"]
    assert checked
    assert {r.name: r.machine.in_order for r in checked} == {r.name: r.machine.loop["IMMA"] for r in checked}


EXCHANGES = {"LDS", "LDSM", "STS", "SHFL", "BAR", "ATOMS", "WARPSYNC"}

# Instructions of the loop for each bit of a plane, at most: what was counted, and 5 % for other versions of Triton.
PER_BIT = {
    # codec, group size, columns: sm_80, sm_90
    ("bcq+offset", 128, 8): (0.805, 0.785),
    ("bcq+offset", 128, 16): (1.04, 0.985),
    ("bcq+offset", 64, 8): (1.21, 1.21),
    ("bcq+offset", 64, 16): (None, 1.50),
    ("bcq+offset", 32, 8): (2.04, 1.98),
    ("bcq+offset", 32, 16): (None, 2.70),
    ("uniform", 128, 8): (0.82, 0.82),
    ("uniform", 128, 16): (None, 1.03),
    ("codebook", 128, 8): (1.00, 0.97),  # for each bit of a combination of planes
    ("codebook", 128, 16): (None, 1.24),
}


@nvidia
def test_instructions_for_each_bit_of_a_plane(reports: Reports, chosen: str, target: str) -> None:
    counted = {
        (r.choices["codec"], r.choices["group"], r.choices["columns"]): r.per_bit
        for r in reports(target)
        if r.kernel == "product" and is_plain(r) and r.choices["bits"] == 3 and r.choices["rows"].isdigit()
    }
    limits = {key: limit[target == "sm_90"] for key, limit in PER_BIT.items()}
    limits = {key: limit for key, limit in limits.items() if limit is not None}
    checked = limits.keys() & counted.keys()
    assert checked if chosen == "few" else checked == limits.keys()
    assert {k: counted[k] for k in checked if not 0 < counted[k] <= limits[k]} == {}


@every_target
def test_decoding_rounds_every_operation(reports: Reports, target: str) -> None:
    """DEC-1: no multiplication is fused with an addition."""
    fused = {"FFMA", "FFMA32I", "v_fma_f32", "v_fmac_f32_e32", "v_pk_fma_f32", "v_mad_f32", "v_fmac_f32_e64"}
    decoding = [r for r in reports(target) if r.kernel == "decode"]
    assert len(decoding) >= 3
    for r in decoding:
        assert fused.isdisjoint(r.machine.instructions), r.name


def test_spills_are_seen() -> None:
    """With too few registers, a product spills, and the report says so."""
    (report,) = run("--few", "--target", "sm_90", "--kernel", "product", "--first", "1", "--registers", "40")
    assert report.machine.registers <= 40
    assert report.machine.spills > 0
    assert report.machine.stack > 0
