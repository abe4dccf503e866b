"""What short trainings tell of learning rates: the loss after trainings of several lengths, by rate.

    python -m tools.benchmarks.rates BASE DATA [--steps 12,20,96] [--rates 0.005,0.01,0.02,0.04,0.08] [--batch-size 32]

BASE is a lowbit model, DATA a file as ``lowbit task tune`` takes. Each training is whole, with its own warm-up and
decay; the loss is that on a tenth of the data. The rule in ``lowbit_format/tuning/rates.py`` rests on this table.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from transformers.utils import logging

from lowbit_format.tasks.bundle_config import Description
from lowbit_format.tuning import base as bases
from lowbit_format.tuning.columns import TOKENS
from lowbit_format.tuning.data import read_data
from lowbit_format.tuning.training import Job, loss_after, without_dropout
from lowbit_format.tuning.tune import MAX_LENGTH


def main() -> None:
    """Print a row for each length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("data")
    parser.add_argument("--steps", default="12,20,96")
    parser.add_argument("--rates", default="0.005,0.01,0.02,0.04,0.08")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=0, help="threads of torch; by default its own choice")
    args = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if args.threads:
        torch.set_num_threads(args.threads)
    read = read_data(args.data, 0.1, kind=None, columns={}, labels=None, seed=0)
    about = Description(read.columns.kind, () if read.labels is None else read.labels.names)
    tokenizer = bases.load_tokenizer(args.base, words=about.kind == TOKENS)
    encoded = read.encode(tokenizer, bases.longest(args.base, tokenizer, None, MAX_LENGTH))
    model, _, _ = bases.load(args.base, about, method=None, bits=None, seed=0, name="task")
    bases.settle(model, tokenizer, about, [item["labels"] for item in encoded.train.items])
    rates = [float(rate) for rate in args.rates.split(",")]
    print("| steps |", " | ".join(f"{rate:g}" for rate in rates), "|", flush=True)
    print("|---|" + "---|" * len(rates), flush=True)
    with tempfile.TemporaryDirectory() as scratch, without_dropout(model):
        job = Job(
            model, about.kind, tokenizer, encoded.train.items, encoded.choose.items, args.batch_size, 0, None,
            Path(scratch), lambda stage, done, total: None,
        )  # fmt: skip
        for steps in map(int, args.steps.split(",")):
            losses = [loss_after(job, rate, steps, "") for rate in rates]
            print(f"| {steps} |", " | ".join(f"{loss:.3f}" for loss in losses), "|", flush=True)


if __name__ == "__main__":
    main()
