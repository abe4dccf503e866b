"""What the benchmarks share: spreads of samples, tables, memory of a process, and parts that run in new processes.

Standard library only, so that a part says itself what its imports take.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]  # of the repository
SHAPE = {
    "hidden": 2048,
    "inner": 5632,
    "heads": 32,
    "kv_heads": 4,
    "vocabulary": 32000,
}  # of a 1.1B llama
MB = 1e6

Facts = dict[str, Any]


def spread(samples: Sequence[float] | None, digits: int = 1) -> str:
    """``median (minimum-maximum)``; a dash for nothing measured."""
    if not samples:
        return "-"
    return f"{statistics.median(samples):.{digits}f} ({min(samples):.{digits}f}-{max(samples):.{digits}f})"


def seconds(work: Callable[[], Any]) -> float:
    """Time of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown: its head, and its rows of as many cells."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def memory() -> dict[str, int]:
    """Bytes of this process: ``VmRSS`` resident, ``RssAnon`` and ``RssFile`` of it, ``VmHWM`` its peak. Linux only."""
    status = Path("/proc/self/status")
    if not status.exists():
        return {}
    lines = (line.split() for line in status.read_text().splitlines())
    wanted = ("VmRSS:", "VmHWM:", "RssAnon:", "RssFile:")
    return {words[0][:-1]: int(words[1]) * 1024 for words in lines if words and words[0] in wanted}


def module_command(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of ``tools.benchmarks``; its environment has to be that of :func:`environment`."""
    return [sys.executable, "-m", f"tools.benchmarks.{module}", *arguments]


def environment(**more: str) -> dict[str, str]:
    """The variables of this process, with the repository on Python's path and `more` added."""
    path = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{path}" if path else str(ROOT), **more}


def run_part(module: str, job: Facts, threads: int, **variables: str) -> Facts:
    """Run a module of ``tools.benchmarks`` in a new process, and read the JSON that it prints last.

    Args:
        module: such as ``"cpu.model"``.
        job: what it gets as JSON, with ``threads``, and ``began``: the time at which the process was started.
        threads: for all libraries.
        variables: further variables of the environment.

    Returns:
        What it printed; ``{"failed": reason}`` if it failed.
    """
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS", "LOWBIT_NUM_THREADS")
    variables = {**dict.fromkeys(names, str(threads)), **variables}
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    job = {**job, "threads": threads, "began": time.time()}
    done = subprocess.run(
        module_command(module, json.dumps(job)),
        capture_output=True,
        text=True,
        env=environment(**{**quiet, **variables}),
    )
    try:
        facts: Facts = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        print(done.stderr[-3000:], file=sys.stderr)
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return {"failed": reason[:200]}
    return facts


def run_program(*command: Any) -> str:
    """What another program prints; its messages are shown only if it fails, which ends this process."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(done.args)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def job_of_this_process() -> Facts:
    """The job that :func:`run_part` gave."""
    job: Facts = json.loads(sys.argv[1])
    return job


def import_package() -> None:
    """Import all of lowbit_format that a model on a CPU needs: what a process pays before it does anything."""
    for name in ("integrations.quantizer", "runtime.modules", "kernels.cpu.backend"):
        importlib.import_module(f"lowbit_format.{name}")
