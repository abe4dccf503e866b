"""CPU inference beside its peers, in one run: a 1.1B llama shape, single products, mixed tasks, and the start.

    python -m tools.benchmarks.cpu [--only model,peers,…] [--cache DIR] [--llama-cpp FOLDER] [--out FILE]

`model` and `peers` share tables: this package at several bits, llama.cpp (of which `--llama-cpp` has the programs
`llama-quantize` and `llama-bench`, compiled on the machine; ``gguf`` makes their file) and eager transformers on random
weights of one shape, each in a process of its own, in turns. Every figure is a median with minimum and maximum of
samples taken in this run. Models are made once and kept in `--cache`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..common import MB, SHAPE, Facts, run_part, spread, table

PARTS = ("model", "peers", "kernel", "tasks", "start")
LLAMA_TYPES = ("Q4_0", "Q4_K_M", "Q2_K")
FLOATS = ("bfloat16", "float32")
ACTIVATIONS = ("exact", "int8")
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
PROMPT, NEW, PREFILL = 8, 48, 128  # tokens


def main() -> None:
    """Print tables in Markdown as they come, and write them to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts to run, with commas between")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--layers", type=int, default=22, help="of the model; 22 are 1.1 billion parameters")
    parser.add_argument("--repeat", type=int, default=3, help="turns: processes for each model, rounds of each product")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", type=Path, help="keep the models here between runs")
    parser.add_argument("--llama-cpp", type=Path, help="folder of llama.cpp's programs")
    parser.add_argument("--generate", type=json.loads, default={}, help="more options of generate(), as JSON")
    parser.add_argument("--out", type=Path, help="write the tables here as well")
    options = parser.parse_args()
    options.only = options.only.split(",")
    if unknown := set(options.only) - set(PARTS):
        parser.error(f"--only: unknown {sorted(unknown)}, expected some of {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory() as temporary:
        options.cache = (options.cache or Path(temporary)).absolute()
        texts = []
        for text in report(options):
            print(f"{text}\n", flush=True)
            texts.append(text)
    if options.out:
        options.out.write_text("\n\n".join(texts) + "\n")


def report(options: argparse.Namespace) -> Iterator[str]:
    """The tables of all parts that were asked for."""
    before = processor_seconds()
    yield machine(options.threads)
    if {"model", "peers"} & set(options.only):
        yield from models(options)
    if "kernel" in options.only:
        yield from kernels(options)
    if "tasks" in options.only:
        yield tasks(options)
    if "start" in options.only:
        yield start(options)
    ours, all_busy, capacity = (b - a for a, b in zip(before, processor_seconds(), strict=True))
    if capacity:
        yield (
            f"Other processes took {max(0.0, all_busy - ours) / capacity:.0%} of all processor time meanwhile; "
            "with more than a few percent, medians are doubtful and maxima mean nothing."
        )


def processor_seconds() -> tuple[float, float, float]:
    """Seconds used by this process and its children, used by all processes, and passed on all cores; 0 off Linux."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0, 0.0, 0.0
    ours = os.times()
    ticks = [int(n) / os.sysconf("SC_CLK_TCK") for n in stat.read_text().splitlines()[0].split()[1:9]]
    idle = ticks[3] + ticks[4]
    return ours.user + ours.system + ours.children_user + ours.children_system, sum(ticks) - idle, sum(ticks)


def machine(threads: int) -> str:
    """What it runs on, and how fast memory can be read there."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    packages = ("numba", "torch", "transformers", "numpy")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    rows = []
    for n in sorted({1, threads}):
        facts = run_part("cpu.kernels", {"do": "bandwidth"}, n)
        rows.append([n, spread(facts.get("samples"))])
    return (
        f"# CPU inference\n\n{cpu}, {threads} threads; Python {platform.python_version()}, {versions}. "
        "Figures are medians (minimum-maximum).\n\n"
        "## Reading memory\n\n" + table(["threads", "GB/s"], rows)
    )


# --- one model -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """One row of the model's tables: how its process is started."""

    name: str
    module: str
    job: Facts


def models(options: argparse.Namespace) -> Iterator[str]:
    """Speed, start and memory of whole models, in turns."""
    folder = options.cache / f"llama-{options.layers}-layers"
    failed: dict[str, str] = {}
    contenders: list[Contender] = []
    if "model" in options.only:
        ways = ((bits, default, how) for bits in options.bits for default in (False, True) for how in ACTIVATIONS)
        contenders += [lowbit(options, folder, failed, *way) for way in ways]
    if "peers" in options.only:
        contenders += list(llama(options, folder, failed))
        contenders += [eager(options, folder, dtype, failed) for dtype in FLOATS]
    found: dict[str, list[Facts]] = {c.name: [] for c in contenders}
    for turn in range(options.repeat + 1):  # the first turn fills caches, of pages and of compiled code
        shift = turn % len(contenders)
        for c in contenders[shift:] + contenders[:shift]:
            if c.name in failed:
                continue
            job = {**c.job, "do": "measure", "prompt": PROMPT, "prefill": PREFILL, "generate": options.generate}
            job |= {"new": NEW, "inner": 2} if turn else {"new": 8, "inner": 1}
            facts = run_part(c.module, job, options.threads)
            if "failed" in facts:
                failed[c.name] = facts["failed"]
            elif turn:
                found[c.name].append(facts)
            print(f"turn {turn}: {c.name} {facts.get('failed', '')}", file=sys.stderr, flush=True)

    def samples(name: str, key: str) -> list[float]:
        return [value for facts in found[name] for value in facts[key]]

    speeds, loads = [], []
    for c in contenders:
        if c.name in failed:
            speeds.append([c.name, failed[c.name], "", "", ""])
            continue
        size = found[c.name][0]["bytes"]
        speeds.append(
            [c.name, f"{size / MB:.0f}", *(spread(samples(c.name, key)) for key in ("decode", "matrices", "prefill"))]
        )
        times = [spread(samples(c.name, key), 2) for key in ("start", "imports", "load")]
        loads.append([c.name, *times, *memory_cells(found[c.name])])
    shape = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in SHAPE.items())
    yield (
        f"## A llama of {options.layers} layers ({shape})\n\n"
        f"Decoding: greedy, batch 1, {NEW} tokens after a prompt of {PROMPT}, tokens per second after the first one "
        f"(`generate` of transformers; `llama-bench` of llama.cpp). Matrices alone: all linear modules once on one "
        f"token. Prefill: one pass of {PREFILL} tokens, logits of the last one. Lowbit computes in float32 unless the "
        "name says otherwise.\n\n"
        + table(["model", "file, MB", "decoding, tok/s", "matrices alone, tok/s", "prefill, tok/s"], speeds)
    )
    yield (
        "Start, page cache and compiled code warm: seconds from the start of the process to the first token. Memory in "
        "MB above that after the imports: anonymous and file-mapped pages at the first token, and the peak of the "
        "whole run with prefill.\n\n"
        + table(
            ["model", "to first token, s", "imports, s", "load, s", "anonymous", "file-mapped", "peak",
             "anonymous / file size"], loads,
        )
    )  # fmt: skip


def memory_cells(found: list[Facts]) -> list[str]:
    """Growth since the imports: anonymous, file-mapped, peak; and the first to the file's size."""

    def growth(when: str, key: str, since: str) -> list[float]:
        states = [f["memory"] for f in found if f["memory"]["imported"]]
        return [(m[when][key] - m["imported"][since]) / MB for m in states]

    anonymous = growth("after", "RssAnon", "RssAnon")
    cells = (anonymous, growth("after", "RssFile", "RssFile"), growth("end", "VmHWM", "VmRSS"))
    ratio = [grown / (f["bytes"] / MB) for grown, f in zip(anonymous, found, strict=False)]
    return [*(spread(cell, 0) for cell in cells), spread(ratio, 2)]


def lowbit(
    options: argparse.Namespace, folder: Path, failed: dict[str, str], bits: int, default: bool, activations: str
) -> Contender:
    """This package; converts the model if the cache does not have it.

    With `default` as the command converts and loads it: the head in 8 bits, bfloat16.
    """
    name, path = f"lowbit BCQ {bits} bits, {activations}", folder / f"bcq-{bits}"
    if default:
        name, path = f"lowbit by default, {bits} bits, bfloat16, {activations}", folder / f"default-{bits}"
    job = {"do": "convert", "folder": str(folder), "layers": options.layers, "bits": bits, "default": default}
    note(failed, name, run_part("cpu.model", job, options.threads))
    dtype = "bfloat16" if default else "float32"
    return Contender(name, "cpu.model", {"path": str(path), "lowbit": True, "dtype": dtype, "activations": activations})


def llama(options: argparse.Namespace, folder: Path, failed: dict[str, str]) -> Iterator[Contender]:
    """llama.cpp; makes the files if the cache does not have them."""
    for kind in LLAMA_TYPES if options.llama_cpp else ():
        job = {"path": str(folder / f"{kind}.gguf"), "layers": options.layers, "binaries": str(options.llama_cpp)}
        note(failed, f"llama.cpp {kind}", run_part("cpu.llama", {"do": "make", **job}, options.threads))
        yield Contender(f"llama.cpp {kind}", "cpu.llama", job)


def eager(options: argparse.Namespace, folder: Path, dtype: str, failed: dict[str, str]) -> Contender:
    """The float model in transformers."""
    name = f"transformers {dtype}"
    job = {"do": "convert", "folder": str(folder), "layers": options.layers, "bits": None, "default": False}
    note(failed, name, run_part("cpu.model", job, options.threads))
    return Contender(name, "cpu.model", {"path": str(folder / "float"), "lowbit": False, "dtype": dtype})


def note(failed: dict[str, str], name: str, facts: Facts) -> None:
    """Remember why a contender cannot take part."""
    if "failed" in facts:
        failed[name] = facts["failed"]


# --- single products, tasks, start -----------------------------------------------------------------


def kernels(options: argparse.Namespace) -> Iterator[str]:
    """A table for each shape and number of rows of x."""
    for rows, cols in SHAPES:
        batches = [1] if cols > rows else [1, 4, 8, 16]
        job = {"do": "kernel", "shape": [rows, cols], "batches": batches, "repeat": options.repeat}
        facts = run_part("cpu.kernels", job, options.threads)
        title = f"## Products with a matrix of {rows} rows and {cols} columns"
        if "failed" in facts:
            yield f"{title}\n\n{facts['failed']}"
            continue
        speed = facts["bandwidth"]
        yield (
            f"{title}\n\nRead bandwidth in this process: {spread(speed)} GB/s. The share is of that, for codes and "
            "parameters together. The error is that of the product with a float32 input, to the float64 product of "
            "the same stored weights.\n\n"
            + table(
                ["product", "rows of x", "ms", "codes, GB/s", "share of bandwidth", "relative error"],
                [kernel_row(product, statistics.median(speed)) for product in facts["products"]],
            )
        )


def kernel_row(product: Facts, speed: float) -> list[str]:
    median = statistics.median(product["ms"])
    codes, whole = (product[key] / 1e6 / median for key in ("planes", "nbytes"))
    share, error = f"{whole / speed:.0%}", f"{product['error']:.1e}"
    return [product["name"], str(product["batch"]), spread(product["ms"], 3), f"{codes:.1f}", share, error]


def tasks(options: argparse.Namespace) -> str:
    """One batch, one task against several."""
    job = {"do": "tasks", "folder": str(options.cache / "mixing"), "repeat": options.repeat}
    facts = run_part("cpu.kernels", job, options.threads)
    title = "## Several tasks in one batch"
    if "failed" in facts:
        return f"{title}\n\n{facts['failed']}"
    one = statistics.median(facts["ms"]["one task (set_task)"])
    rows = [[name, spread(ms), f"{statistics.median(ms) / one:.2f}"] for name, ms in facts["ms"].items()]
    return (
        f"{title}\n\nForward pass of 8 rows of one token, 4 Llama layers of hidden size 2048, 4 bits; a task has a "
        "delta on the first plane of every row. The largest difference of a row of the mixed batch from its "
        f"single-task run is {facts['worst']:.1e} of its norm.\n\n" + table(["", "ms", "to one task"], rows)
    )


def start(options: argparse.Namespace) -> str:
    """Compiled code: nothing cached, then a second process."""
    keys = ("others", "this package", "first", "all", "second")
    rows = []
    with tempfile.TemporaryDirectory() as compiled:
        for name, times in (("nothing cached", 1), ("second process", options.repeat)):
            job, cache = {"do": "start"}, {"NUMBA_CACHE_DIR": compiled}
            found = [run_part("cpu.kernels", job, options.threads, **cache) for _ in range(times)]
            if failures := [f["failed"] for f in found if "failed" in f]:
                rows.append([name, failures[0], *[""] * (len(keys) - 1)])
            else:
                rows.append([name, *(spread([f[key] for f in found], 2) for key in keys)])
    head = ["seconds", "import of torch, transformers, numba", "import of this package", "first product",
            "first products of 3 codecs at 1, 8 and 128 rows", "the same again"]  # fmt: skip
    return "## Start of a process\n\n" + table(head, rows)


if __name__ == "__main__":
    main()
