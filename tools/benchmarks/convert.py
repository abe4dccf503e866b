"""Convert a 1.1B llama shape of random bf16 weights: speed, peak memory, import time.

    python -m tools.benchmarks.convert [--layers 22] [--scratch DIR]

Each conversion runs twice in processes of its own, the second is counted: compiled code and the page cache are warm
then. The time is that of the whole conversion, reading, digests and writing included, without Python's imports; the
peak is the largest resident memory of the process.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .common import environment, module_command

OPTIONS = {
    "BCQ 4 bits, group 128": {"bits": 4},
    "BCQ 3 bits, group 128": {"bits": 3},
    "BCQ 2 bits, group 128": {"bits": 2},
    "uniform 4 bits, round to nearest, group 128": {"codec": "uniform", "bits": 4, "solver": "minmax"},
    "uniform 4 bits, least error, group 128": {"codec": "uniform", "bits": 4, "solver": "mse"},
}
GIB = 1 << 30


def make_checkpoint(directory: Path, layers: int) -> None:
    """A llama of hidden size 2048 with random bf16 weights; 22 layers are 1.1 billion parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=4, vocab_size=32000, dtype="bfloat16",
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory, max_shard_size="5GB")


def convert(source: str, out: str, settings: str) -> None:
    """Runs in a process of its own: convert once and print what it took as JSON."""
    from lowbit_format.converters import Recipe, convert_hf_to_lowbit, plan_conversion
    from lowbit_format.converters.summary import Totals
    from lowbit_format.quantize import Target

    recipe = Recipe(Target(**json.loads(settings)), lm_head=True)
    plan_conversion(source, recipe)  # imports torch and transformers
    done = convert_hf_to_lowbit(source, out, recipe)
    totals = Totals.of(done.plan, done.outcomes)
    largest = max(s.tensor.numel for s in done.plan.quantized)
    facts = {
        "seconds": done.seconds,
        "speed": totals.weights / done.seconds / 1e6,
        "error": totals.relative_error,
        "megabytes": totals.output_bytes / 1e6,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB,
        "allowed": 1.0 + 3 * 4 * largest / GIB,
    }
    print(json.dumps(facts))


def import_seconds(module: str) -> float:
    """Median time that importing a module adds to starting Python."""

    def start(code: str) -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - began

    return statistics.median(start(f"import {module}") - start("pass") for _ in range(7))


def main() -> None:
    """Print tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--scratch", type=Path, help="keep the checkpoint here between runs")
    parser.add_argument("--one", nargs=3, metavar=("SOURCE", "OUT", "SETTINGS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        convert(*args.one)
        return
    with tempfile.TemporaryDirectory() as temporary:
        scratch = args.scratch or Path(temporary)
        source, out = scratch / f"llama-{args.layers}-layers", scratch / "out"
        if not source.exists():
            make_checkpoint(source, args.layers)
        print("| what | seconds | Mweights/s | relative error | MB | peak GiB (allowed) |")
        print("|---|---|---|---|---|---|")
        for name, settings in OPTIONS.items():
            for _ in range(2):
                shutil.rmtree(out, ignore_errors=True)
                command = module_command("convert", "--one", str(source), str(out), json.dumps(settings))
                done = subprocess.run(command, env=environment(), check=True, stdout=subprocess.PIPE, text=True)
            f = json.loads(done.stdout.splitlines()[-1])
            print(
                f"| {name} | {f['seconds']:.1f} | {f['speed']:.1f} | {f['error']:.4f} | {f['megabytes']:.0f} "
                f"| {f['peak']:.2f} ({f['allowed']:.2f}) |",
                flush=True,
            )
        shutil.rmtree(out, ignore_errors=True)
    print(f"\n`import lowbit_format`: {import_seconds('lowbit_format'):.3f} s above starting Python")


if __name__ == "__main__":
    main()
