"""The machine code of the GPU kernels, compiled ahead of time without a GPU: registers, spills, instructions.

The library itself launches each variant, on small tensors of the CPU. Instead of the launch, the kernel is compiled,
specialised as for a real launch of these arguments. By hand::

    python tests/support/compiled.py                # all targets, all variants, a table
    python tests/support/compiled.py --target sm_90 --kernel product
    python tests/support/compiled.py --few          # only what every test run compiles

Triton's interpreter must be off when Triton is imported, so tests run this in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler.errors import CompilationError
from triton.runtime.driver import driver
from triton.runtime.jit import KernelInterface

from lowbit_format.kernels.gpu import activations, decoding, gradients, products, tiles
from lowbit_format.kernels.gpu.launch import Config
from lowbit_format.kernels.matrix import PlaneMatrix

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
FLOATS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Machine:
    """What is in the machine code of a kernel.

    Attributes:
        registers: registers of a lane; on AMD vector and accumulation registers together.
        spills: on NVIDIA, loads and stores of local memory; on AMD, registers that the compiler says it spilled.
        stack: bytes of local memory of a lane, stacks of calls included.
        shared: bytes of shared memory (LDS) of a program.
        instructions: instructions of the whole kernel, by name without suffixes.
        loop: instructions of one pass of the loop with matrix instructions (if there is none, of the longest loop).
        matrix_loops: loops with matrix instructions.
        in_order: on NVIDIA, matrix instructions whose left operand is a vector that the lane loaded, masked, and whose
            right operand is two words next to each other of another, both in the order of memory.
    """

    registers: int = 0
    spills: int = 0
    stack: int = 0
    shared: int = 0
    instructions: dict[str, int] = field(default_factory=dict)
    loop: dict[str, int] = field(default_factory=dict)
    matrix_loops: int = 0
    in_order: int = 0


@dataclass(frozen=True)
class Report:
    """One variant on one target.

    Attributes:
        target, kernel: keys of :data:`TARGETS` and :data:`KERNELS`.
        choices: what makes the variant; for a product also ``steps`` and ``columns``.
        error: the compiler's error, or "".
        machine: the machine code, if there was no error.
        bits: for a product, bits of planes that a lane multiplies in one pass of the loop; otherwise 0.
        seconds: time that compiling took; next to none where Triton had it in its cache.
    """

    target: str
    kernel: str
    choices: dict[str, Any]
    error: str
    machine: Machine
    bits: int
    seconds: float

    @property
    def name(self) -> str:
        """For people: the choices; of a product only those that are not the plain ones."""
        common = CHOICES if self.kernel == "product" else {}
        named = {k: v for k, v in self.choices.items() if k not in ("columns", "steps") or not common}
        return " ".join(f"{k}={v}" for k, v in named.items() if k not in common or common[k][0] != v) or "plain"

    @property
    def loop(self) -> int:
        """Instructions of one pass of the loop."""
        return sum(self.machine.loop.values())

    @property
    def per_bit(self) -> float:
        """Instructions of the loop for each bit of a plane."""
        return self.loop / self.bits if self.bits else 0.0


def of_json(given: dict[str, Any]) -> Report:
    """The report that :func:`main` printed."""
    return Report(**{**given, "machine": Machine(**given["machine"])})


class Variant(NamedTuple):
    """A kernel as the library launches it: its name, the choices, and the call that launches it."""

    kernel: str
    choices: dict[str, Any]
    launch: Callable[[], object]


# Variants -----------------------------------------------------------------------------------------------------------

STEPS = {32: 1, 64: 2, 128: 4, 256: 4, 0: 4}  # by group size; 0 is one group a row
ROWS, COLS, TASKS = 256, 8192, 4

# The first of each is the plain one. Rows of x: one, as many as fill so many columns, or several panels.
CHOICES: dict[str, tuple[Any, ...]] = {
    "codec": ("bcq+offset", "bcq", "uniform", "uniform+zero", "codebook", "affine+offset"),
    "group": (128, 32, 64, 256, 0),
    "rows": ("8", "one", "16", "many"),
    "deltas": ("none", "row", "group"),
    "ids": (False, True),
    "x": ("fp16", "bf16", "fp32"),
    "warps": (4, 2, 8),
    "scales": ("fp16", "bf16", "fp32"),
    "bits": (3, 2, 4),
    "bias": (True, False),
}
PAIRED = (("deltas", "rows"), ("deltas", "codec"), ("x", "rows"), ("warps", "rows"))
# Those that take the most registers, or were seen to spill.
HEAVY: tuple[dict[str, Any], ...] = (
    {"codec": "uniform", "rows": "many", "deltas": "group", "warps": 8, "scales": "fp32", "bits": 2},
    {"codec": "uniform", "rows": "16", "deltas": "row", "x": "fp32", "warps": 8, "scales": "fp32", "bias": False},
    {"codec": "codebook", "group": 256, "rows": "many", "deltas": "row", "x": "fp32", "warps": 2, "bits": 2},
    {"codec": "bcq", "group": 256, "rows": "many", "deltas": "group", "ids": True, "warps": 8, "scales": "bf16"},
)
COUNTED: dict[str, list[dict[str, Any]]] = {
    "sm_90": [
        *({"group": group, "rows": rows} for group in (128, 64, 32) for rows in ("8", "16")),
        *({"codec": codec, "rows": rows} for codec in ("uniform", "codebook") for rows in ("8", "16")),
    ],
    "sm_80": [
        *({"rows": rows} for rows in ("8", "16")),
        *({"group": group} for group in (64, 32)),
        *({"codec": codec} for codec in ("uniform", "codebook")),
    ],
    "gfx942": [
        *({"rows": rows} for rows in ("16", "many")),
        *({"group": group, "rows": "16"} for group in (64, 32)),
        *({"codec": codec, "rows": "16"} for codec in ("uniform", "codebook")),
    ],
}


# What every test run compiles: each kernel, codec and kind of deltas, with a shift and without, small and large
# batches, mostly with short blocks, which compile several times faster. The first is compiled once more, to spill.
FEW: dict[str, tuple[dict[str, Any], ...]] = {
    "sm_90": (
        {"group": 64, "rows": "16"},
        {},
        {"codec": "uniform"},
        {"codec": "codebook"},
        {"codec": "bcq", "group": 32, "rows": "one", "deltas": "row", "x": "fp32", "scales": "fp32", "warps": 2},
        {"codec": "uniform+zero", "group": 64, "rows": "many", "deltas": "group", "ids": True, "x": "bf16", "warps": 8},
        {"codec": "codebook", "group": 32, "deltas": "row", "ids": True, "scales": "bf16", "bits": 4, "bias": False},
        {"codec": "affine+offset", "group": 32, "deltas": "row", "ids": True, "scales": "fp32"},
    ),
    "sm_80": ({"group": 64},),
    "gfx942": (
        {"group": 32, "rows": "16"},
        {"codec": "codebook", "group": 32, "rows": "many", "deltas": "group", "ids": True},
    ),
}


def variants(target: str, few: bool = False) -> Iterator[Variant]:
    """What is compiled for a target: :data:`FEW`, or the full set.

    The full set has the products whose instructions are counted, and more products so that each choice is there, on
    sm_90 also each pair of choices that change each other's code; and all variants of the other kernels.
    """
    if few:
        yield from map(product, (plain(**given) for given in FEW[target]))
        yield from (*FEW_OTHERS, *(FEW_ONES if target == "sm_90" else ()))
        return
    choices = CHOICES if target != "gfx942" else {**CHOICES, "rows": ("one", "16", "many")}
    made = [plain(**given) for given in (*COUNTED[target], *HEAVY)]
    yield from map(product, cover(choices, made, PAIRED if target == "sm_90" else ()))
    yield from (*DECODED, *SUMMED, *SLICED, *(ONES if target == "sm_90" else ()))


def plain(**given: Any) -> dict[str, Any]:
    """A product with these choices, and plain ones for the rest."""
    return {**{k: values[0] for k, values in CHOICES.items()}, **given}


def cover(
    choices: dict[str, tuple[Any, ...]], made: list[dict[str, Any]], paired: Iterable[tuple[str, str]]
) -> list[dict[str, Any]]:
    """`made` and as few more as found, so that each value of each choice and each pair of `paired` choices is there."""
    missing = {((k, v),) for k, values in choices.items() for v in values}
    for a, b in paired:
        missing |= {((a, v), (b, w)) for v in choices[a] for w in choices[b]}
    made, rng = list(made), random.Random(0)
    for one in made:
        missing = {need for need in missing if not need_met(need, one)}
    while missing:
        needs = sorted(missing, key=str)
        found = [
            {**{k: rng.choice(values) for k, values in choices.items()}, **dict(rng.choice(needs))} for _ in range(100)
        ]
        best = max(found, key=lambda one: sum(need_met(need, one) for need in needs))
        missing = {need for need in missing if not need_met(need, best)}
        made.append(best)
    return made


def need_met(need: tuple[tuple[str, Any], ...], one: dict[str, Any]) -> bool:
    """Whether `one` has the values."""
    return all(one[k] == v for k, v in need)


def product(one: dict[str, Any], **shape: int) -> Variant:
    """The product kernel of these choices."""

    def launch() -> None:
        w = matrix(one["codec"], one["bits"], one["group"], one["scales"], **shape)
        x = torch.zeros(rows_of_x(one), w.cols, dtype=FLOATS[one["x"]])
        bias = torch.zeros(w.scales.shape[1], dtype=x.dtype) if one["bias"] else None
        products.multiply(x, w, bias, *deltas_and_ids(one["deltas"], one["ids"], w, len(x)), Config(one["warps"], 16))

    return Variant(
        "product", {**one, "steps": STEPS[one["group"]], **{f"weight_{k}": v for k, v in shape.items()}}, launch
    )


def rows_of_x(one: dict[str, Any]) -> int:
    """How many rows of x the choice stands for."""
    count = activations.SLICES[FLOATS[one["x"]]]
    return {"one": 1, "many": 80 // count}.get(one["rows"]) or int(one["rows"]) // count


def matrix(codec: str, bits: int, group: int, scales: str = "fp16", rows: int = ROWS, cols: int = COLS) -> PlaneMatrix:
    """A tiled matrix of zeros."""
    kind, groups, dtype = codec.split("+")[0], -(-cols // (group or cols)), FLOATS[scales]
    shift = torch.zeros(rows, groups, dtype=dtype) if "+" in codec else None
    w = PlaneMatrix(
        planes=torch.zeros(bits, rows, cols // 8, dtype=torch.uint8),
        scales=torch.zeros(bits if kind == "bcq" else 1, rows, groups, dtype=dtype),
        offsets=shift if kind in ("bcq", "affine") else None,
        zeros=shift if kind == "uniform" else None,
        codebook=torch.zeros(2**bits) if kind == "codebook" else None,
        row_bits=None,
        codec=kind,
        bits=bits,
        group_size=group,
        cols=cols,
    )
    return tiles.tile(w)


def deltas_and_ids(kind: str, ids: bool, w: PlaneMatrix, n: int) -> tuple[Tensor | None, Tensor | None]:
    """Deltas of the kind ``none``, ``row`` or ``group``, and with `ids` the task of each of n rows."""
    if kind == "none":
        return None, None
    planes, rows, groups = w.scales.shape
    deltas = torch.zeros((TASKS, planes, rows, groups) if kind == "group" else (TASKS, planes, rows))
    return deltas, torch.zeros(n, dtype=torch.int64) if ids else None


def decoded(
    codec: str, bits: int, group: int, out: str, chosen: int = 0, deltas: str = "none", **shape: int
) -> Variant:
    """The decode kernel, for all rows or for so many chosen ones."""

    def launch() -> None:
        w, rows = matrix(codec, bits, group, **shape), torch.zeros(chosen, dtype=torch.int64)
        if chosen:
            decoding.decode_chosen(w, rows, *deltas_and_ids(deltas, True, w, chosen), FLOATS[out])
        else:
            decoding.decode(w, FLOATS[out])

    choices = {"codec": codec, "bits": bits, "group": group, "out": out, "chosen": chosen, "deltas": deltas, **shape}
    return Variant("decode", choices, launch)


def summed(codec: str, bits: int, group: int, x: str, n: int = 48, chosen: bool = False, **shape: int) -> Variant:
    """The kernel of gradients: of a product of n rows of x, or of n chosen rows."""

    def launch() -> None:
        w = matrix(codec, bits, group, **shape)
        of_cols = torch.zeros(n, w.cols, dtype=FLOATS[x])
        if chosen:
            gradients.of_rows(of_cols, w, torch.zeros(n, dtype=torch.int64))
        else:
            gradients.of_product(torch.zeros(n, w.scales.shape[1], dtype=FLOATS[x]), of_cols, w)

    choices = {"codec": codec, "bits": bits, "group": group, "x": x, "n": n, "chosen": chosen, **shape}
    return Variant("gradient", choices, launch)


def sliced(steps: int, columns: int, x: str, strided: bool = False, cols: int = COLS) -> Variant:
    """The kernel that makes slices of activations."""

    def launch() -> None:
        rows = columns // activations.SLICES[FLOATS[x]]
        given = torch.zeros(cols, rows, dtype=FLOATS[x]).T if strided else torch.zeros(rows, cols, dtype=FLOATS[x])
        activations.to_slices(given, steps, rows)

    return Variant("slices", {"steps": steps, "columns": columns, "x": x, "strided": strided, "cols": cols}, launch)


DECODED = (
    decoded("bcq", 1, 128, "fp16"),
    decoded("bcq+offset", 3, 64, "bf16", 48, "group"),
    decoded("bcq", 4, 32, "fp32", 48, "row"),
    decoded("bcq+offset", 8, 0, "fp32"),
    decoded("uniform+zero", 8, 128, "fp16", 48),
    decoded("uniform", 4, 64, "bf16", 48, "row"),
    decoded("codebook", 4, 256, "fp16"),
    decoded("codebook", 8, 32, "fp32", 48, "group"),
    decoded("affine+offset", 4, 32, "fp16"),
)
SUMMED = (
    summed("bcq+offset", 3, 128, "fp16"),
    summed("uniform", 4, 64, "bf16"),
    summed("codebook", 8, 32, "fp16"),
    summed("bcq", 8, 0, "fp32"),
    summed("bcq", 2, 128, "fp16", chosen=True),
    summed("codebook", 4, 64, "fp32", chosen=True),
)
SLICED = (
    sliced(4, 16, "fp16"),
    sliced(4, 32, "bf16", True),
    sliced(1, 8, "fp32"),
    sliced(2, 16, "bf16"),
    sliced(4, 32, "fp32"),
)
# An argument that is 1 is a constant in the kernel, another kind of value to the compiler than an argument.
ONE = {"rows": 1, "cols": 128}
ONES = (
    *(
        product(plain(codec=codec, bits=1, rows="one", deltas="group", ids=True), **ONE)
        for codec in ("bcq+offset", "uniform+zero", "codebook")
    ),
    decoded("bcq+offset", 1, 32, "fp16", 1, "group", **ONE),
    decoded("uniform+zero", 1, 32, "fp16", 0, **ONE),
    decoded("codebook", 1, 32, "fp16", 1, "row", **ONE),
    summed("bcq", 1, 32, "fp16", 1, **ONE),
    summed("bcq", 1, 32, "fp16", 1, True, **ONE),
    summed("codebook", 1, 32, "fp16", 1, **ONE),
    sliced(4, 8, "fp16", cols=128),
)
FEW_OTHERS = (DECODED[0], DECODED[5], DECODED[6], DECODED[-1], SUMMED[0], SUMMED[2], SUMMED[4], SLICED[0], SLICED[2])
FEW_ONES = (ONES[2], ONES[3], ONES[7], ONES[-1])
KERNELS = {
    "product": products._multiply,
    "decode": decoding._decode,
    "gradient": gradients._signed_sums,
    "slices": activations._to_slices,
}

# Compiling ----------------------------------------------------------------------------------------------------------


class Driver:
    """What Triton asks of a GPU's driver before it launches anything."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int | str:
        return self.target.arch  # a key for what is compiled

    def get_current_stream(self, device: int | str) -> int:
        return 0


def compiled(variant: Variant, target: GPUTarget, **forced: int) -> Any:
    """What Triton would have launched, but for options that are `forced`."""
    nvidia, found = target.backend == "cuda", []

    def compile_only(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        def launched(*args: Any, **options: Any) -> None:
            if kernel is KERNELS[variant.kernel]:
                asm = {"ASM": nvidia} if "ASM" in options else {}  # the tensors are the CPU's
                found.append(kernel.run(*args, grid=grid, warmup=True, **{**options, **asm, **forced}))

        return launched

    driver.set_active(Driver(target))
    version = mock.patch.object(torch.version, "hip", None if nvidia else "7.0")
    with version, mock.patch.object(KernelInterface, "__getitem__", compile_only):
        variant.launch()
    (kernel,) = found
    return kernel


def report(variant: Variant, target: str, **forced: int) -> Report:
    """Compile and read one variant; with options of Triton that are `forced`, not as it ships."""
    began, error, kernel = time.perf_counter(), "", None
    try:
        kernel = compiled(variant, TARGETS[target], **forced)
    except (CompilationError, RuntimeError) as e:
        error = f"{type(e).__name__}: {e}"
    seconds = time.perf_counter() - began
    choices, bits = dict(variant.choices), 0
    if variant.kernel == "product":
        with mock.patch.object(torch.version, "hip", None if target.startswith("sm") else "7.0"):
            count = activations.SLICES[FLOATS[choices["x"]]]
            choices["columns"] = count * products.panel_rows(rows_of_x(choices), count)
        bits = tiles.TILE_ROWS * 8 * tiles.STEP * choices["steps"] // TARGETS[target].warp_size
    read = of_nvidia if target.startswith("sm") else of_amd
    machine = Machine() if kernel is None else read(kernel)
    return Report(target, variant.kernel, choices, error, machine, bits, round(seconds, 2))


# Reading ------------------------------------------------------------------------------------------------------------

_NVIDIA = re.compile(
    r"^(?P<label>\.L_x_\d+):|^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<name>[A-Z][A-Z0-9_.]*)(?P<rest>[^;]*);",
    re.M,
)
_AMD = re.compile(r"^(?P<label>\.LBB\d+_\d+):|^\t(?P<name>[a-z]\w+)(?P<rest>[^;\n]*)", re.M)


def of_nvidia(kernel: Any) -> Machine:
    """By ``nvdisasm`` and ``cuobjdump -res-usage``. A spill is a load or store of local memory: LDL, STL."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        code = _said_by("nvdisasm", file.name)
        used = {
            k: int(v)
            for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", _said_by("cuobjdump", "-res-usage", file.name))
        }
    everything, loop, matrix_loops = _instructions(code, _NVIDIA, r"\.L_x_\d+", r"[IHQD]G?MMA")
    return Machine(
        registers=used["REG"],
        spills=everything["LDL"] + everything["STL"],
        stack=used["STACK"] + used["LOCAL"],
        shared=kernel.metadata.shared,  # what SHARED says beside it is the system's own
        instructions=dict(everything),
        loop=dict(loop),
        matrix_loops=matrix_loops,
        in_order=_in_order(kernel.asm["ptx"]),
    )


def of_amd(kernel: Any) -> Machine:
    """By the assembly text, which ends with what a kernel takes."""
    code = kernel.asm["amdgcn"]
    used = {k: int(v) for k, v in re.findall(r"^\s+\.(\w+):\s+(\d+)$", code, re.M)}
    everything, loop, matrix_loops = _instructions(code, _AMD, r"\.LBB\d+_\d+", r"v_mfma")
    return Machine(
        registers=used["vgpr_count"],
        spills=used["vgpr_spill_count"] + used["sgpr_spill_count"],
        stack=used["private_segment_fixed_size"],
        shared=used["group_segment_fixed_size"] + kernel.metadata.shared,
        instructions=dict(everything),
        loop=dict(loop),
        matrix_loops=matrix_loops,
    )


def _said_by(tool: str, *args: str) -> str:
    return subprocess.run([str(NVIDIA_TOOLS / tool), *args], capture_output=True, text=True, check=True).stdout


def _in_order(ptx: str) -> int:
    """How many matrix instructions multiply what was loaded, as it was loaded."""
    loaded: dict[str, tuple[int, int]] = {}  # register -> which load, which word of it
    masked: dict[str, str] = {}
    for number, line in enumerate(ptx.splitlines()):
        if found := re.search(r"ld\.global[.\w:]*\.v[24]\.b32\s*\{([^}]*)\}", line):
            loaded.update({r.strip(): (number, i) for i, r in enumerate(found[1].split(","))})
        elif found := re.match(r"\s*and\.b32\s+(%r\d+), (%r\d+), %r\d+;", line):
            masked[found[1]] = found[2]
    count = 0
    for found in re.finditer(r"mma\.sync\S*\s*\{[^}]*\},\s*\{([^}]*)\},\s*\{([^}]*)\}", ptx):
        left = [loaded.get(masked.get(r.strip(), ""), (-1, -1)) for r in found[1].split(",")]
        right = [loaded.get(r.strip(), (-1, -1)) for r in found[2].split(",")]
        (load, first), *_ = right
        whole = left == [(left[0][0], i) for i in range(4)] and left[0][0] >= 0
        count += whole and load >= 0 and first % 2 == 0 and right == [(load, first), (load, first + 1)]
    return count


def _instructions(code: str, line: re.Pattern[str], label: str, matrix: str) -> tuple[Counter[str], Counter[str], int]:
    """Instructions of all and of the main loop by name, and how many loops have matrix instructions."""
    labels: dict[str, int] = {}
    names: list[str] = []
    loops: list[tuple[int, int]] = []
    for found in line.finditer(code):
        if found["label"]:
            labels[found["label"]] = len(names)
            continue
        names.append(found["name"].split(".")[0])
        goes_to = re.search(label, found["rest"])
        if goes_to and goes_to[0] in labels and re.match(r"BRA|s_c?branch", names[-1]):
            loops.append((labels[goes_to[0]], len(names)))
    parts = [names[start:stop] for start, stop in loops if stop - start > 1]  # NVIDIA's end in one that never ends
    with_matrix = [part for part in parts if any(re.match(matrix, name) for name in part)]
    return Counter(names), Counter(max(with_matrix or parts, key=len, default=[])), len(with_matrix)


# By hand ------------------------------------------------------------------------------------------------------------


def table(reports: Iterable[Report]) -> Iterator[str]:
    """Lines for reading."""
    yield "target kernel    regs spills stack shared  loop   /bit     s  variant"
    for r in reports:
        m = r.machine
        yield (
            f"{r.target:7}{r.kernel:9}{m.registers:5}{m.spills:7}{m.stack:6}{m.shared:7}{r.loop:6}{r.per_bit:7.3f}"
            f"{r.seconds:6.1f}  {r.name}" + (f"  {r.error.splitlines()[-1]}" if r.error else "")
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, action="append", help="may come more than once; default: all")
    parser.add_argument("--kernel", choices=KERNELS, help="only this one")
    parser.add_argument("--few", action="store_true", help="only the variants that every test run compiles")
    parser.add_argument("--json", action="store_true", help="one report a line, for programs")
    parser.add_argument("--first", type=int, help="only so many")
    parser.add_argument("--registers", type=int, help="no more than these for a lane (NVIDIA): not what ships")
    options = parser.parse_args()
    forced = {} if options.registers is None else {"maxnreg": options.registers}
    wanted = [
        (variant, target)
        for target in options.target or TARGETS
        for variant in variants(target, options.few)
        if options.kernel in (None, variant.kernel)
    ]
    reports = (report(*each, **forced) for each in wanted[: options.first])
    lines = (json.dumps(asdict(r)) for r in reports) if options.json else table(reports)
    for text in lines:
        print(text, flush=True)


if __name__ == "__main__":
    main()
