"""Quality of a model by bits, without data and calibrated: perplexity and divergence from the float model, or cosine.

    python -m tools.benchmarks.calibration MODEL CALIBRATION TEXT [--bits 4 3 2] [--efforts fast default] [--samples 32]

MODEL is the directory of a float model, CALIBRATION a text to calibrate with, TEXT another to measure on: `--windows`
of `--length` tokens, or paragraphs for an encoder, whose outputs are compared by their cosine. Each line is a
conversion of its own; the time is that of the whole conversion.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import lowbit_format as lb


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--efforts", nargs="*", default=["fast"])
    parser.add_argument("--codec", default="bcq")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--samples", type=int, help="to calibrate with; otherwise the effort's number")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    architectures = AutoConfig.from_pretrained(args.model).architectures or []
    causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures)
    loader = AutoModelForCausalLM if causal else AutoModel
    plain: Any = loader.from_pretrained(args.model, dtype=torch.float32)
    plain = plain.eval()

    def measure(model: Any) -> Any:
        options = {"samples": args.windows, "length": args.length}
        return lb.evaluate(model, tokenizer, args.text, reference=plain, **options)

    def quality(found: Any) -> str:
        if not causal:
            return f"{found.mean_cosine:.4f}"
        return f"{found.perplexity:.2f} | {found.mean_divergence:.3f} | {found.agreement:.1%}"

    measures = ["perplexity", "divergence, nats", "same prediction"] if causal else ["mean cosine"]
    print(f"| bits | calibrated | bits/weight | {' | '.join(measures)} | seconds |")
    print("|---" * (4 + len(measures)) + "|")
    if causal:
        print(f"| float | | | {measure(plain).perplexity:.2f} | 0 | 100% | |", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for bits in args.bits:
            for effort in ("no", *args.efforts):
                out = Path(scratch) / f"{bits}-{effort}"
                target = lb.Target(args.codec, bits=bits, group_size=args.group_size)
                recipe = lb.Recipe(target, embeddings=False, lm_head=False)
                how = None
                if effort != "no":
                    how = lb.Calibration(str(args.calibration), effort, args.samples, args.length)
                done = lb.convert_hf_to_lowbit(str(args.model), out, recipe, calibration=how)
                weights = sum(o.module.numel for o in done.outcomes.values())
                stored = 8 * sum(o.nbytes for o in done.outcomes.values()) / weights
                found = measure(lb.from_pretrained(out).eval())
                print(
                    f"| {bits} | {effort} | {stored:.2f} | {quality(found)} | {done.seconds:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
