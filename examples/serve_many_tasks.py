"""Serve several tasks from one base: requests for all of them go through the model in one batch.

    python examples/serve_many_tasks.py BASE TASK [TASK ...]

BASE is a lowbit model, each TASK a task bundle of it (see tune_a_task.py): directories or Hub ids. Lines are read from
standard input: the name of a task (the last part of its path; ``-`` is the base), then the text.

    echo "films a joy from start to end" | python examples/serve_many_tasks.py minilm-mixed films questions

Tasks of a language model can be served by vLLM as well, through its OpenAI address (docs/vllm.md):

    vllm serve BASE --enable-lora --max-loras 8 --lora-modules NAME=TASK [NAME=TASK ...]
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import lowbit_format as lb


def main(arguments: Sequence[str] | None = None) -> None:
    """Load the base and its tasks, then answer line by line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="lowbit model: directory or Hub id")
    parser.add_argument("tasks", nargs="+", help="task bundles: directories or Hub ids")
    parser.add_argument("--labels", type=int, default=2, help="of the tasks (default: 2)")
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(options.base)
    model = AutoModelForSequenceClassification.from_pretrained(options.base, num_labels=options.labels).eval()
    for task in options.tasks:
        lb.load_task(model, task)
    for loaded in lb.list_tasks(model):
        print(f"task {loaded.name}: {loaded.nbytes / 1e3:.0f} kB in memory")

    requests = (split(line) for line in sys.stdin if line.strip())
    while batch := list(itertools.islice(requests, options.batch_size)):
        for (task, text), answer in zip(batch, answers(model, tokenizer, batch), strict=True):
            print(f"{task or 'base'}: {answer}: {text}")


def split(line: str) -> tuple[str | None, str]:
    """Task and text of a request; None is the base."""
    task, _, text = line.strip().partition(" ")
    return None if task == "-" else task, text


@torch.inference_mode()
def answers(model: Any, tokenizer: Any, batch: Sequence[tuple[str | None, str]]) -> Iterator[int]:
    """The label of each request. Each row of the batch is computed with its own task, head included."""
    inputs = tokenizer([text for _, text in batch], return_tensors="pt", padding=True, truncation=True)
    with lb.use_tasks(model, [task for task, _ in batch]):
        logits = model(**inputs).logits
    return iter(logits.argmax(-1).tolist())


if __name__ == "__main__":
    main()
