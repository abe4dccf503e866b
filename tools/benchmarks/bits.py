"""Size of the whole file against perplexity: the same bits everywhere, and bits chosen for a budget of the same size.

    python -m tools.benchmarks.bits MODEL TEXT [--bits 4 3] [--rows] [--words 4,3,2] [--embeddings 4] [--calibrate TEXT]

MODEL is the directory of a float causal model, TEXT what it is measured on: `--windows` of `--length` tokens. For every
number of bits there are two lines, of which the second has a budget of the bytes of the first. With `--calibrate` they
are made with those data, at `--effort`. `--embeddings` and `--words` add lines in which the embedding alone is
quantized, uniformly: all rows to so many bits, or by the frequency of words in the text of `--frequencies`, most
frequent first.
Time is that of the whole conversion; the choice of bits is in it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import lowbit_format as lb
from lowbit_format.container.reader import ModelReader
from lowbit_format.converters.conversion_report import REPORT_FILE


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 3, 2])
    parser.add_argument("--codec", default="bcq")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--calibrate", type=Path)
    parser.add_argument(
        "--budgets", type=float, nargs="*", default=[], help="bits a weight of more lines with a budget"
    )
    parser.add_argument("--rows", action="store_true", help="beside each budget one whose rows may differ")
    parser.add_argument("--embeddings", type=int, nargs="*", default=[])
    parser.add_argument("--words", nargs="*", default=[])
    parser.add_argument("--frequencies", default="rank")
    parser.add_argument("--ratio", type=float, default=2.0)
    parser.add_argument("--effort", default="fast")
    parser.add_argument("--samples", type=int, help="to calibrate with; otherwise the effort's number")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    plain: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    calibration = None
    if args.calibrate is not None:
        calibration = lb.Calibration(str(args.calibrate), args.effort, args.samples, args.length)

    def perplexity(model: Any) -> float:
        return lb.evaluate(model, tokenizer, args.text, samples=args.windows, length=args.length).perplexity

    def line(name: str, recipe: lb.Recipe, budget: lb.Budget | None = None, *, words: bool = False) -> int:
        """Convert, measure and print; the bytes of all tensors. Where `words` alone are quantized, without data."""
        with tempfile.TemporaryDirectory() as scratch:
            out, began = Path(scratch) / "out", time.perf_counter()
            lb.convert_hf_to_lowbit(
                str(args.model), out, recipe, budget=budget, calibration=None if words else calibration, min_coverage=0
            )
            seconds = time.perf_counter() - began
            headers = ModelReader(out).headers.values()
            nbytes = sum(t.nbytes for header in headers for t in header.tensors.values())
            expected = json.loads((out / REPORT_FILE).read_text()).get("budget", {}).get("damage")
            found = perplexity(lb.from_pretrained(out, dtype=torch.float32).eval())
        damage = "" if expected is None else f"{expected:.3f}"
        print(
            f"| {name} | {8 * nbytes / weights:.3f} | {nbytes / 1e6:.1f} | {found:.2f} | {damage} | {seconds:.0f} |",
            flush=True,
        )
        return nbytes

    weights = sum(p.numel() for p in plain.parameters())
    print("| bits | bits a weight, whole file | MB | perplexity | expected damage | seconds |")
    print("|---" * 6 + "|")
    print(f"| float | | | {perplexity(plain):.2f} | | |", flush=True)
    for bits in args.bits:
        target = lb.Target(args.codec, bits=bits, group_size=args.group_size)
        nbytes = line(f"{bits} everywhere", lb.Recipe(target))
        line("a budget of that size", lb.Recipe(target), lb.Budget(nbytes=nbytes))
        if args.rows:
            line("the same with rows", lb.Recipe(target), lb.Budget(nbytes=nbytes, rows=True))
    for size in args.budgets:
        target = lb.Target(args.codec, group_size=args.group_size)
        line(f"a budget of {size:g}", lb.Recipe(target), lb.Budget(size))
        if args.rows:
            line(f"a budget of {size:g} with rows", lb.Recipe(target), lb.Budget(size, rows=True))
    for bits in args.embeddings:
        words = lb.Target("uniform", bits=bits, group_size=args.group_size)
        line(f"embeddings: {bits}", replace(embeddings_alone(plain), embeddings=words), words=True)
    for text in args.words:
        words = lb.Target("uniform", group_size=args.group_size)
        by = lb.Words(args.frequencies, tuple(map(int, text.split(","))), args.ratio)
        line(
            f"embeddings: {text} by frequency", replace(embeddings_alone(plain), embeddings=words, words=by), words=True
        )


def embeddings_alone(model: Any) -> lb.Recipe:
    """A recipe that keeps all layers of the body."""
    linear = [name for name, module in model.base_model.named_modules() if isinstance(module, torch.nn.Linear)]
    return lb.Recipe(rules=tuple(lb.Rule(f"*.{end}", None) for end in sorted({name.split(".")[-1] for name in linear})))


if __name__ == "__main__":
    main()
