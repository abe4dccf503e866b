"""AutoRound on the model, texts and measure of :mod:`.calibration`, for a table beside ours.

    python -m tools.benchmarks.calibration_peers MODEL CALIBRATION TEXT [--bits 4 3 2] [--iters 200] [--samples 32]

It needs `pip install auto-round`. AutoRound (arXiv 2309.05516) trains the rounding and the ranges of a uniform grid
block by block. Its model is measured with the weights that it computes; groups, samples and windows are ours.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import lowbit_format as lb


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--iters", type=int, default=200, help="steps for each block; AutoRound's own number is 200")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    plain: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    samples = cut(tokenizer, args.calibration.read_text("utf-8"), args.samples, args.length)
    print("| bits | steps a block | bits/weight | perplexity | divergence, nats | same prediction | seconds |")
    print("|---|---|---|---|---|---|---|")
    for bits in args.bits:
        begin = time.perf_counter()
        model = tuned(args.model, tokenizer, samples, bits, args)
        seconds = time.perf_counter() - begin
        options = {"samples": args.windows, "length": args.length}
        found = lb.evaluate(model, tokenizer, args.text, reference=plain.eval(), **options)
        stored = bits + (16 + bits) / args.group_size  # a scale in float16 and a zero point of `bits` for each group
        print(
            f"| {bits} | {args.iters} | {stored:.2f} | {found.perplexity:.2f} | {found.mean_divergence:.3f} | "
            f"{found.agreement:.1%} | {seconds:.0f} |",
            flush=True,
        )


def cut(tokenizer: Any, text: str, samples: int, length: int) -> list[str]:
    """`samples` pieces of at least `length` tokens, evenly spread over the text."""
    ids = tokenizer(text)["input_ids"]
    step = len(ids) // samples
    return [tokenizer.decode(ids[i * step : i * step + length + 20]) for i in range(samples)]


def tuned(model: Path, tokenizer: Any, samples: list[str], bits: int, args: argparse.Namespace) -> Any:
    """The model with AutoRound's weights, in float32."""
    from auto_round import AutoRound

    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    scheme = {"bits": bits, "group_size": args.group_size, "sym": False, "data_type": "int"}
    rounder = AutoRound(
        plain, tokenizer, scheme=scheme, dataset=samples, iters=args.iters, nsamples=len(samples), seqlen=args.length,
        batch_size=8, device_map="cpu", enable_torch_compile=False,
    )  # fmt: skip
    found, _ = rounder.quantize()
    return found.float().eval()


if __name__ == "__main__":
    main()
