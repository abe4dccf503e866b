"""What the benchmarks share: spreads of samples, tables, memory of a process, parts in processes of their own.

Standard library only, for it is also imported by interpreters that have nothing of this package.
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

HERE = Path(__file__).parent
SHAPE = {"hidden": 2048, "inner": 5632, "heads": 32, "kv_heads": 4, "vocabulary": 32000}  # that of bench_convert.py
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
    """A table in Markdown."""
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


def run_part(script: str, job: Facts, threads: int, *, python: str = sys.executable, **environment: str) -> Facts:
    """Run a script of this folder in a process of its own, and read the JSON that it prints last.

    The job gets ``began``, the time at which the process was started. What fails gives ``{"failed": reason}``.
    """
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS", "LOWBIT_NUM_THREADS")
    variables = dict.fromkeys(names, str(threads))
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    job = {**job, "threads": threads, "began": time.time()}
    try:
        done = subprocess.run(
            [python, str(HERE / script), json.dumps(job)],
            capture_output=True,
            text=True,
            env={**os.environ, **variables, **quiet, **environment},
        )
    except OSError as e:
        return {"failed": f"{python}: {e.strerror}"}
    try:
        facts: Facts = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        print(done.stderr[-3000:], file=sys.stderr)
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return {"failed": reason[:200]}
    return facts


def job_of_this_process() -> Facts:
    """The job that :func:`run_part` gave."""
    job: Facts = json.loads(sys.argv[1])
    return job


def import_package() -> None:
    """Import all of lowbit_format that a model on a CPU needs: what a process pays before it does anything."""
    for name in ("integrations.quantizer", "runtime.modules", "kernels.cpu.backend"):
        importlib.import_module(f"lowbit_format.{name}")
