"""What 8-bit activations change in a causal model: the error of every layer's products, and perplexity beside exact.

    python -m tools.benchmarks.activations MODEL TEXT [--windows 4] [--length 256] [--dtype float32]

Of every linear module: how far its products of the text's tokens are from the exact ones, relative to their norm, token
by token; median and worst. All products are by lookups here, as they are when one token is decoded after another: a
window at once would be exact.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

import lowbit_format as lb
from lowbit_format.calibration.data import causal_batches, read_texts, windows
from lowbit_format.kernels import operators
from lowbit_format.kernels.cpu import products
from lowbit_format.kernels.matrix import EXACT, INT8
from lowbit_format.runtime.modules import LowbitLinear

from .common import table


def main() -> None:
    """Print both tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    products.most_rows = lambda *_: math.inf  # type: ignore[assignment]
    model = lb.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = read_texts(options.text, tokenizer)
    taken = windows(texts, tokenizer, samples=options.windows, length=options.length, where=str(options.text))
    ids = [batch["input_ids"] for batch in causal_batches(taken)]
    with torch.no_grad():
        print(table(["product", "tokens", "median error", "worst"], list(errors(model, ids[0]))))
        exact, rounded = (perplexity(model, ids, activations) for activations in (EXACT, INT8))
    print(f"\nPerplexity: {exact:.4f} exact, {rounded:.4f} with 8-bit activations ({rounded / exact - 1:+.3%})")


def errors(model: Any, ids: Tensor) -> Iterator[list[str]]:
    """A row for each kind of product: the median over all tokens and layers, and the worst token with its layer."""
    found: dict[str, list[Tensor]] = {}

    def compare(module: LowbitLinear, inputs: tuple[Tensor], _: Tensor) -> None:
        x, w = inputs[0].reshape(-1, module.cols), module.plane_matrix
        exact = operators.linear(x, w._replace(activations=EXACT)).float()
        rounded = operators.linear(x, w._replace(activations=INT8)).float()
        off = (rounded - exact).norm(dim=-1) / exact.norm(dim=-1)
        found.setdefault(module.path, []).append(off)

    linear = [module for module in model.modules() if isinstance(module, LowbitLinear)]
    hooks = [module.register_forward_hook(compare) for module in linear]
    model(ids)
    for hook in hooks:
        hook.remove()
    kinds: dict[str, list[tuple[str, Tensor]]] = {}
    for path, parts in found.items():
        kinds.setdefault(path.rsplit(".", 1)[-1], []).append((path, torch.cat(parts)))
    for kind, layers in kinds.items():
        median = statistics.median(torch.cat([off for _, off in layers]).tolist())
        path, worst = max(((path, float(off.max())) for path, off in layers), key=lambda one: one[1])
        highest = max(float(off.median()) for _, off in layers)
        tokens = str(sum(len(off) for _, off in layers))
        yield [kind, tokens, f"{median:.2%} (layers up to {highest:.2%})", f"{worst:.2%} ({path})"]


def perplexity(model: Any, ids: list[Tensor], activations: str) -> float:
    """exp of the mean negative log likelihood of all tokens but the first of each window."""
    lb.set_activations(model, activations)
    loss, tokens = 0.0, 0
    for batch in ids:
        for row in batch:
            logits = model(row[None]).logits[0, :-1].float()
            loss += torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum").item()
            tokens += len(row) - 1
    return math.exp(loss / tokens)


if __name__ == "__main__":
    main()
