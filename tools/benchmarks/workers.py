"""Convert by several processes, here and on a Ray cluster, one of them killed: seconds, and whether bytes are the same.

    python -m tools.benchmarks.workers [--layers 8] [--codec uniform] [--scratch DIR]

The checkpoint is a llama of hidden size 2048 with random bf16 weights, as in `tools.benchmarks.convert`. A worker has
one thread, and so has the one process. Times are those of whole conversions, which begin their workers. The rows of Ray
are left out where it is not installed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .convert import make_checkpoint

WAYS: dict[str, dict[str, Any]] = {
    "one process, one thread": {},
    "one worker": {"workers": 1},
    "two workers": {"workers": 2},
    "two workers, one killed": {"workers": 2},
    "Ray, two workers": {"workers": 2, "ray": "local"},
    "Ray, two workers, one killed": {"workers": 2, "ray": "local"},
}


def digest(directory: Path) -> str:
    """SHA-256 of the weights and the config."""
    found = hashlib.sha256()
    for path in sorted([*directory.glob("*.safetensors"), directory / "config.json"]):
        found.update(path.read_bytes())
    return found.hexdigest()


def killer(killed: list[int]) -> Callable[[Any, int], None]:
    """Kills a worker at the tenth step."""
    steps = []

    def report(step: Any, number: int) -> None:
        steps.append(step)
        if len(steps) == 10:
            killed.append(next(iter(_workers())))
            os.kill(killed[0], signal.SIGKILL)

    return report


def _workers() -> list[int]:
    local = [child.pid for child in multiprocessing.active_children() if child.pid]
    if local:
        return local
    import psutil  # comes with Ray's own tools, and with accelerate

    return [p.pid for p in psutil.Process().children(recursive=True) if p.cmdline()[:1] == ["ray::_work"]]


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--codec", default="bcq")
    parser.add_argument("--scratch", type=Path, help="keep the checkpoint here between runs")
    args = parser.parse_args()
    os.environ["LOWBIT_NUM_THREADS"] = "1"

    from lowbit_format.converters import Recipe, convert_hf_to_lowbit
    from lowbit_format.quantize import Target

    recipe = Recipe(Target(codec=args.codec, bits=4))
    with tempfile.TemporaryDirectory() as temporary:
        scratch = args.scratch or Path(temporary)
        source = scratch / f"llama-{args.layers}-layers"
        if not source.exists():
            make_checkpoint(source, args.layers)
        convert_hf_to_lowbit(str(source), Path(temporary) / "first", recipe)  # compiles, fills the page cache
        expected = digest(Path(temporary) / "first")
        print("| conversion by | seconds | same bytes |\n|---|---|---|")
        for way, options in WAYS.items():
            if "ray" in options and importlib.util.find_spec("ray") is None:
                continue
            killed: list[int] = []
            report = {"report": killer(killed)} if "killed" in way else {}
            began = time.perf_counter()
            out = Path(temporary) / way.replace(" ", "-")
            convert_hf_to_lowbit(str(source), out, recipe, **options, **report)
            seconds = time.perf_counter() - began
            assert bool(killed) == ("killed" in way)
            print(f"| {way} | {seconds:.1f} | {'yes' if digest(out) == expected else 'NO'} |", flush=True)


if __name__ == "__main__":
    main()
