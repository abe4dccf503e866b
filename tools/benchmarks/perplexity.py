"""Perplexity of a small causal language model on a text, for the float model and at several bits.

    python -m tools.benchmarks.perplexity MODEL TEXT [--bits 4,3,2] [--group-size 128]

TEXT is split at ``<|endoftext|>``; each part is scored alone, with the tokenizer's first token before it. Also prints
what the model says after "Once upon a time", by greedy search.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import lowbit_format  # noqa: F401 - registers the format
from lowbit_format.converters import Recipe, convert_hf_to_lowbit
from lowbit_format.quantize import Target

WAYS: dict[str, dict[str, Any]] = {
    "BCQ": {"codec": "bcq"},
    "uniform, least error": {"codec": "uniform"},
    "uniform, min-max": {"codec": "uniform", "solver": "minmax"},
}


def perplexity(model: Any, tokenizer: Any, parts: list[str]) -> float:
    """exp of the mean negative log likelihood of all tokens but the first of each part."""
    loss, tokens = 0.0, 0
    for part in parts:
        ids = tokenizer(part, return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].float()
        loss += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        tokens += ids.shape[1] - 1
    return math.exp(loss / tokens)


def sample(model: Any, tokenizer: Any) -> str:
    """A greedy continuation."""
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(out[0], skip_special_tokens=True)).replace("\n", " ")


def main() -> None:
    """Print a table in Markdown, and samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--group-size", type=int, default=128)
    args = parser.parse_args()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    parts = [p.strip() for p in args.text.read_text("utf-8").split("<|endoftext|>") if p.strip()]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    print("| model | bits/weight | relative error | perplexity |")
    print("|---|---|---|---|")
    print(f"| float | 32 | 0 | {perplexity(model, tokenizer, parts):.3f} |", flush=True)
    samples = {"float": sample(model, tokenizer)}
    with tempfile.TemporaryDirectory() as scratch:
        for bits in map(int, args.bits.split(",")):
            for name, settings in WAYS.items():
                out = Path(scratch) / f"{name}-{bits}".replace(" ", "-")
                target = Target(bits=bits, group_size=args.group_size, **settings)
                done = convert_hf_to_lowbit(str(args.model), out, Recipe(target, embeddings=False, lm_head=False))
                weights = sum(o.module.numel for o in done.outcomes.values())
                stored = 8 * sum(o.nbytes for o in done.outcomes.values()) / weights
                error = math.sqrt(
                    sum(o.squared_error for o in done.outcomes.values())
                    / sum(o.squared_norm for o in done.outcomes.values())
                )
                model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
                value = perplexity(model, tokenizer, parts)
                print(f"| {name}, {bits} bits | {stored:.2f} | {error:.4f} | {value:.3f} |", flush=True)
                samples[f"{name}, {bits} bits"] = sample(model, tokenizer)
    for name, text in samples.items():
        print(f"\n{name}: {text}")


if __name__ == "__main__":
    main()
