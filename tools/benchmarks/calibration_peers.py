"""Peers of calibrated conversion, on the model, texts and measure of :mod:`.calibration`, for a table beside ours.

    python -m tools.benchmarks.calibration_peers MODEL CALIBRATION TEXT [--peers hqq gptq autoround] [--bits 4 3 2]

Each wants its package, best in an environment of its own: `pip install hqq`, `llmcompressor`, `auto-round`.

hqq: Half-Quadratic Quantization (Badri and Shaji 2023), without data.
gptq: error feedback (arXiv 2210.17323) as LLM Compressor runs it, columns by their importance.
autoround: training of the rounding and the ranges of each block (arXiv 2309.05516).

All have an integer grid with a scale and a zero point for each group. A model is measured with the weights that the
peer computes, in float32; groups, samples and windows are ours, embedding and head stay as they are.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import lowbit_format as lb


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument(
        "--iters", type=int, default=200, help="AutoRound's steps for each block; its own number is 200"
    )
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    plain: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    samples = cut(tokenizer, args.calibration.read_text("utf-8"), args.samples, args.length)
    print("| bits | peer | bits/weight | perplexity | divergence, nats | same prediction | seconds |")
    print("|---|---|---|---|---|---|---|")
    for bits in args.bits:
        for name in args.peers:
            begin = time.perf_counter()
            model = PEERS[name](load(args.model), tokenizer, samples, bits, args)
            seconds = time.perf_counter() - begin
            options = {"samples": args.windows, "length": args.length}
            found = lb.evaluate(model, tokenizer, args.text, reference=plain.eval(), **options)
            # A scale in float16 for each group, and a zero point: HQQ's in float16 too, the others' in as few bits.
            stored = bits + (16 + (16 if name == "hqq" else bits)) / args.group_size
            print(
                f"| {bits} | {name} | {stored:.2f} | {found.perplexity:.2f} | {found.mean_divergence:.3f} | "
                f"{found.agreement:.1%} | {seconds:.0f} |",
                flush=True,
            )


def load(model: Path) -> Any:
    """The float model, in float32."""
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def cut(tokenizer: Any, text: str, samples: int, length: int) -> list[str]:
    """`samples` pieces of at least `length` tokens, evenly spread over the text."""
    ids = tokenizer(text)["input_ids"]
    step = len(ids) // samples
    return [tokenizer.decode(ids[i * step : i * step + length + 20]) for i in range(samples)]


def hqq(model: Any, tokenizer: Any, samples: list[str], bits: int, args: argparse.Namespace) -> Any:
    """The model with HQQ's weights, group by group along each row."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=bits, group_size=args.group_size, axis=1)
    for module in linear_modules(model):
        found = HQQLinear(module, config, compute_dtype=torch.float32, device="cpu", del_orig=False)
        module.weight.data = found.dequantize()
    return model


def gptq(model: Any, tokenizer: Any, samples: list[str], bits: int, args: argparse.Namespace) -> Any:
    """The model with GPTQ's weights."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier

    weights = QuantizationArgs(num_bits=bits, group_size=args.group_size, strategy="group", symmetric=False)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    tokens = [tokenizer(text, truncation=True, max_length=args.length)["input_ids"] for text in samples]
    data = Dataset.from_dict({"input_ids": tokens, "attention_mask": [[1] * len(ids) for ids in tokens]})
    recipe = GPTQModifier(config_groups={"all": scheme}, ignore=["lm_head"])
    oneshot(model, dataset=data, recipe=recipe, max_seq_length=args.length, num_calibration_samples=len(tokens))
    return model.float().eval()


def autoround(model: Any, tokenizer: Any, samples: list[str], bits: int, args: argparse.Namespace) -> Any:
    """The model with AutoRound's weights."""
    from auto_round import AutoRound

    scheme = {"bits": bits, "group_size": args.group_size, "sym": False, "data_type": "int"}
    rounder = AutoRound(
        model, tokenizer, scheme=scheme, dataset=samples, iters=args.iters, nsamples=len(samples), seqlen=args.length,
        batch_size=8, device_map="cpu", enable_torch_compile=False,
    )  # fmt: skip
    found, _ = rounder.quantize()
    return found.float().eval()


def linear_modules(model: nn.Module) -> list[nn.Linear]:
    """The linear modules of the layers; the head, which may be the embedding too, is none."""
    return [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]


PEERS = {"hqq": hqq, "gptq": gptq, "autoround": autoround}


if __name__ == "__main__":
    main()
