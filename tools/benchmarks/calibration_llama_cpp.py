"""llama.cpp's types on the model, texts and measure of :mod:`.calibration`, for a table beside ours.

    python -m tools.benchmarks.calibration_llama_cpp BINARIES GGUF CALIBRATION TEXT [--types Q4_K_M Q3_K_M Q2_K]

BINARIES is the folder of llama.cpp's `llama-quantize` and `llama-imatrix`, GGUF the float model in one file (or a
quantized one, of which the decoded weights are the float model). Each type is made without an importance matrix, and
with one from `--samples` windows of CALIBRATION. The files are decoded and measured by the same program as our own
models, so what llama.cpp loses by rounding activations is not in the figures. Bits a weight are of the whole file.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging

import lowbit_format as lb

from .common import run_program


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binaries", type=Path)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--types", nargs="+", default=["Q4_K_M", "Q3_K_M", "Q2_K"])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()
    logging.disable_progress_bar()
    plain = decoded(args.gguf)
    tokenizer = AutoTokenizer.from_pretrained(args.gguf.parent, gguf_file=args.gguf.name)
    weights = sum(p.numel() for p in plain.parameters())
    print("| type | importance matrix | bits a weight, whole file | perplexity | divergence, nats | same | seconds |")
    print("|---" * 7 + "|", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        matrix = Path(scratch, "imatrix.gguf")
        began = time.perf_counter()
        run_program(args.binaries / "llama-imatrix", "-m", args.gguf, "-f", args.calibration, "-o", matrix,
            "--chunks", args.samples, "-c", args.length)  # fmt: skip
        seen = time.perf_counter() - began
        for kind in args.types:
            for options in ([], ["--imatrix", matrix]):
                out, began = Path(scratch, f"{kind}.gguf"), time.perf_counter()
                run_program(args.binaries / "llama-quantize", *options, "--allow-requantize", args.gguf, out, kind)
                seconds = time.perf_counter() - began + (seen if options else 0)
                given = {"reference": plain, "samples": args.windows, "length": args.length}
                found = lb.evaluate(decoded(out), tokenizer, args.text, **given)
                print(
                    f"| {kind} | {'yes' if options else 'no'} | {8 * out.stat().st_size / weights:.2f} | "
                    f"{found.perplexity:.2f} | {found.mean_divergence:.3f} | {found.agreement:.1%} | {seconds:.0f} |",
                    flush=True,
                )
                out.unlink()


def decoded(gguf: Path) -> Any:
    """The model of a GGUF file with decoded weights, in float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    return model.eval()


if __name__ == "__main__":
    main()
