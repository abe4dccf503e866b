"""Products, decoding, tasks, generation and tuning on a GPU, beside the library's products and peers, in one run.

    python -m tools.benchmarks.gpu [--only copy,gemv,batch,…] [--out FILE] [--quick]
    python -m tools.benchmarks.gpu --predict [--copy TB/s] [--matmul TFLOP/s] [--clock GHz] [--multiprocessors N]
    python -m tools.benchmarks.gpu --self-check [--only ...]

Tables in Markdown, as they come; every figure is a median (minimum-maximum) of samples taken in this run. A sample is
one pass, in a CUDA graph, over as many copies of a matrix as exceed three times the last cache. Results are compared
with float64 on the device, in memory that held NaN before. Exit status 1: something was wrong, or a part failed.

Every part has a budget. The most telling rows come first; a row for which no time is left says so. On one H200 all of
it should take under eight minutes, of which compiling kernels is about two: the budgets (:data:`PARTS`) add up to that.
``--predict`` needs no GPU: it prints the times that follow from counted instructions and a device's limits.
``--self-check`` needs none either: it runs every code path once, at tiny sizes on the CPU, in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import subprocess
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lowbit_format.kernels import operators


class Part(NamedTuple):
    """A part of the run: the module that has the function of its name, and its seconds."""

    module: str
    budget: float


PARTS = {
    "copy": Part("products", 15),
    "gemv": Part("products", 75),
    "batch": Part("products", 60),
    "tasks": Part("products", 35),
    "prefill": Part("decoding", 25),
    "dequantize": Part("decoding", 40),
    "peers": Part("peers", 40),
    "model": Part("model", 130),
    "tuning": Part("model", 30),
}


def main() -> int:
    """Print tables in Markdown as they come, and write them to a file. The exit status is 0 if all went well."""
    options = _options()
    texts: list[str] = []
    failures: list[str] = []
    for text in predictions(options) if options.predict else report(options, failures):
        print(f"{text}\n", flush=True)
        texts.append(text)
        if options.out:  # as it comes: a run that is stopped leaves what it has
            options.out.write_text("\n\n".join(texts) + "\n")
    return 1 if failures else 0


def predictions(options: argparse.Namespace) -> Iterator[str]:
    """What ``--predict`` prints."""
    from .predict import Limits, report

    rates = (options.clock * 1e9, options.copy * 1e12, options.matmul * 1e12)
    yield from report(Limits(options.multiprocessors, *rates))


def report(options: argparse.Namespace, failures: list[str]) -> Iterator[str]:
    """The tables of all parts that were asked for; what goes wrong is added to `failures`."""
    began = time.perf_counter()
    bench = _bench(options)
    yield _machine(bench)
    for name in options.only:
        part, since, known = PARTS[name], time.perf_counter(), len(bench.notes)
        if not bench.tiny:
            bench.late_at = since + part.budget * (0.6 if options.quick else 1)
        try:
            yield from getattr(importlib.import_module(f".{part.module}", __package__), name)(bench)
        except Exception:
            failures.append(name)
            yield f"**The part {name} failed:**\n\n```\n{traceback.format_exc().rstrip()}\n```"
        importlib.import_module(".bench", __package__).let_go()
        notes = "".join(f" Note: {n}." for n in dict.fromkeys(bench.notes[known:]))
        yield f"({name}: {time.perf_counter() - since:.0f} s, of {part.budget:.0f} s.{notes})"
    failures += bench.wrong
    for wrong in bench.wrong:
        yield f"**WRONG:** {wrong}"
    verdict = f"{len(failures)} failures: {'; '.join(failures)}" if failures else "All results are right."
    yield f"{verdict}\n\nTotal time: {time.perf_counter() - began:.0f} s."


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts to run, with commas between")
    parser.add_argument("--out", type=Path, help="write the tables here as well")
    parser.add_argument("--quick", action="store_true", help="fewer sizes, repetitions and layers")
    parser.add_argument("--predict", action="store_true", help="print predictions; needs no GPU")
    parser.add_argument("--self-check", action="store_true", help="run everything tiny on the CPU, interpreted")
    parser.add_argument("--clock", type=float, default=1.755, help="GHz to predict with where none can be read")
    parser.add_argument("--copy", type=float, default=4.3, help="TB/s to predict with (--predict)")
    parser.add_argument("--matmul", type=float, default=790, help="TFLOP/s to predict with (--predict)")
    parser.add_argument("--multiprocessors", type=int, default=132, help="to predict with (--predict)")
    options = parser.parse_args()
    options.only = options.only.split(",")
    if unknown := set(options.only) - set(PARTS):
        parser.error(f"--only: unknown {sorted(unknown)}, expected some of {', '.join(PARTS)}")
    return options


def _bench(options: argparse.Namespace) -> Any:
    """The device. Triton decides when it is imported whether it interprets, so the variable comes first."""
    if options.self_check:
        os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch

    if not options.self_check and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here; --predict and --self-check need none")
    from .bench import Bench

    torch.manual_seed(0)
    if options.self_check:
        operators.BACKENDS["cpu"] = operators.BACKENDS["cuda"]  # modules, too, take the interpreted kernels
        torch.set_num_threads(1)
    device = torch.device("cpu" if options.self_check else "cuda")
    return Bench(device, options.quick, options.clock * 1e9)


def _machine(bench: Any) -> str:
    """What it runs on."""
    import torch

    versions = []
    for package in ("torch", "triton", "transformers", "peft", "lowbit-format"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} not installed")
    if bench.tiny:
        return f"# GPU kernels, self-check: tiny, interpreted, times mean nothing\n\n{', '.join(versions)}."
    from .bench import smi

    p = torch.cuda.get_device_properties(bench.device)
    cache = getattr(p, "L2_cache_size", 0)
    try:
        query = "clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,utilization.gpu"
        clocks = f"At rest ({query}): {smi(bench.device, query)}."
    except (OSError, IndexError, subprocess.SubprocessError) as e:
        clocks = f"Clocks cannot be read ({type(e).__name__})."
    return (
        f"# GPU inference\n\n{p.name}, {p.multi_processor_count} multiprocessors, {p.total_memory / 2**30:.0f} GiB, "
        f"last cache {cache / 2**20:.0f} MiB; CUDA {torch.version.cuda}, {', '.join(versions)}. {clocks} Figures are "
        "medians (minimum-maximum)."
    )


if __name__ == "__main__":
    raise SystemExit(main())
