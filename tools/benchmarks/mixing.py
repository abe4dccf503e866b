"""Tasks in one batch: 8 rows with 8 tasks against 8 rows of one task, switching, and the memory that tasks take.

    python -m tools.benchmarks.mixing [--hidden 2048 --layers 4 --rows 8 --tasks 8 --tokens 1]

A Llama of random weights is converted to 4 bits (group 128) in a temporary directory, and tasks of random row deltas
are loaded. What is timed is one forward pass of `rows` x `tokens` tokens without a cache. Results are checked in the
same run: every row of a mixed batch against its single-task run.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lowbit_format as lb
from lowbit_format.tasks.bundle import TaskBundle
from lowbit_format.tasks.bundle_config import TaskConfig
from lowbit_format.tasks.models import named_modules


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--many", type=int, default=300, help="tasks loaded for the figure of memory")
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--planes", type=int, default=1, help="planes that a task tunes: 1 is AlphaTuning")
    parser.add_argument("--repeat", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        measure(make_base(Path(scratch), options.hidden, options.layers), options)


def measure(base: Path, options: argparse.Namespace) -> None:
    model = lb.from_pretrained(base).eval()
    ids = torch.randint(0, 1000, (options.rows, options.tokens))
    names = [f"task{i}" for i in range(options.tasks)]
    for i, name in enumerate(names):
        lb.load_task(model, random_task(model, i, options.planes), name=name)
    rows = [names[i % len(names)] for i in range(options.rows)]

    def forward() -> torch.Tensor:
        logits: torch.Tensor = model(ids, use_cache=False).logits
        return logits

    with lb.use_tasks(model, rows):
        mixed = forward()
    worst = 0.0
    for i, name in enumerate(rows):
        lb.set_task(model, name)
        alone = forward()[i]
        worst = max(worst, float((mixed[i] - alone).norm() / alone.norm()))
    print(f"{options.rows} rows of {options.tokens} tokens, hidden {options.hidden}, {options.layers} layers, 4 bits, "
          f"{options.tasks} tasks of {lb.list_tasks(model)[0].numbers:,} numbers")  # fmt: skip
    print(f"largest difference of a mixed row from its single-task run: {worst:.1e} of its norm")

    def in_block() -> None:
        with lb.use_tasks(model, rows):
            forward()

    lb.set_task(model, None)
    base_time = report("base, no task", forward, options.repeat, None)
    lb.set_task(model, names[0])
    one = report("one task (set_task)", forward, options.repeat, base_time)
    report(f"{len(set(rows))} tasks in the batch (use_tasks)", in_block, options.repeat, one)

    def one_by_one() -> None:
        for name in rows:
            lb.set_task(model, name)
            model(ids[:1], use_cache=False)

    report(f"{options.rows} batches of one row, switching between", one_by_one, options.repeat, one)
    report("set_task alone", lambda: lb.set_task(model, names[1]), 50, None)

    lb.set_task(model, None)
    bundle, process = random_task(model, 0, options.planes), psutil.Process()
    before = process.memory_info().rss
    for i in range(options.many):
        lb.load_task(model, bundle, name=f"more{i}")  # copies the numbers
    grown, counted = process.memory_info().rss - before, sum(t.nbytes for t in lb.list_tasks(model)[options.tasks :])
    print(
        f"{options.many} more tasks: {counted / 2**20:.1f} MiB of deltas, resident memory grew by {grown / 2**20:.1f}"
    )


def report(what: str, run: Callable[[], Any], repeat: int, other: float | None) -> float:
    """Print the median time in milliseconds, and its ratio to `other`."""
    run()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    median = statistics.median(times)
    ratio = "" if other is None else f", {median / other:.2f} x"
    print(f"{what:50} {median:9.2f} ms (min {min(times):.2f}, max {max(times):.2f}){ratio}")
    return median


def random_task(model: Any, seed: int, planes: int) -> TaskBundle:
    """A task with a factor for each row of the first `planes` planes of every linear module."""
    rng, deltas = np.random.default_rng(seed), {}
    for name, module in named_modules(model).items():
        if module.kind == "linear":
            deltas[f"{name}.scales.mul"] = rng.normal(0, 0.05, (planes, module.rows)).astype(np.float32)
    base = model.lowbit_base.fingerprint
    return TaskBundle(TaskConfig(base.body, base.head), deltas)


def make_base(scratch: Path, hidden: int, layers: int) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=hidden, intermediate_size=hidden * 11 // 4 // 128 * 128, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 512),
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(scratch / "float")
    lb.convert_hf_to_lowbit(scratch / "float", scratch / "base")
    return scratch / "base"


if __name__ == "__main__":
    main()
