"""Tune the scales of a lowbit model for a classification task, in a plain loop, and save the task.

    python examples/tune_a_task.py BASE OUT [--data FILE]

BASE is a lowbit model's directory or Hub id, OUT the directory of the task bundle to write. FILE has one example a
line: the label (an integer from 0 on), a tab, the text. Without it eight sentences on films are learnt.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import lowbit_format as lb

FILMS = [
    (1, "a joy from start to end"),
    (0, "dull, and far too long"),
    (1, "warm and clever"),
    (0, "a waste of time"),
    (1, "i would see it again"),
    (0, "nobody should have to sit through this"),
    (1, "the best film of the year"),
    (0, "badly acted and badly cut"),
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Tune, print the loss of each epoch, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="lowbit model: directory or Hub id")
    parser.add_argument("out", type=Path, help="directory of the task bundle to write")
    parser.add_argument("--data", type=Path, help="lines of label, tab, text")
    parser.add_argument("--method", default="alphatuning", help="alphatuning, peqa or scales (default: alphatuning)")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-2, help="deltas want larger rates than weights do")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)  # the fresh head, and the order of the examples
    examples = read(options.data) if options.data else FILMS
    labels = 1 + max(label for label, _ in examples)
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    model = AutoModelForSequenceClassification.from_pretrained(options.base, num_labels=labels)
    print(lb.prepare_scale_tuning(model, options.method, name=options.out.name))

    trained = [p for p in model.parameters() if p.requires_grad]  # the deltas and the head, nothing else
    optimizer = torch.optim.AdamW(trained, lr=options.rate, weight_decay=0.0)
    model.train()
    for epoch in range(options.epochs):
        total = 0.0
        for batch in torch.randperm(len(examples)).split(options.batch_size):
            chosen = [examples[int(i)] for i in batch]
            inputs = tokenizer([text for _, text in chosen], return_tensors="pt", padding=True, truncation=True)
            loss = model(**inputs, labels=torch.tensor([label for label, _ in chosen])).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += float(loss.detach()) * len(chosen)
        print(f"epoch {epoch + 1}: loss {total / len(examples):.4f}")

    lb.save_task(model, options.out)
    print(f"Wrote {options.out}.")


def read(path: Path) -> list[tuple[int, str]]:
    """The examples of a file."""
    lines = path.read_text("utf-8").splitlines()
    return [(int(label), text) for label, text in (line.split("\t", 1) for line in lines if line.strip())]


if __name__ == "__main__":
    main()
