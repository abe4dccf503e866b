"""Quantize and dequantize one matrix: speed and error, beside whatever peers are installed, in one run.

    python -m tools.benchmarks.quantize [--rows 4096] [--cols 4096] [--repeat 5]

The matrix is normal with a spread between rows, ``randn * 0.02 * exp(0.3 * randn)`` of each row. Speeds are medians;
a first call that compiles or warms up is not counted. Peers: ``pip install hqq gguf bitsandbytes optimum-quanto``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowbit_format.quantize import Target, quantize
from lowbit_format.reference import decode


@dataclass(frozen=True)
class Contender:
    """A quantizer: `quantize` gives a state, `dequantize` makes float32 of it; bits include all parameters."""

    name: str
    bits: float
    quantize: Callable[[], Any]
    dequantize: Callable[[Any], np.ndarray]


def ours(weight: np.ndarray) -> Iterator[Contender]:
    """Our codecs at several bits, parameters in float16."""
    targets = [Target(bits=b) for b in (1, 2, 3, 4)]
    targets += [Target("uniform", b, solver="minmax") for b in (2, 3, 4)]
    targets += [Target("uniform", b, solver="mse") for b in (2, 3, 4)]
    targets += [Target("codebook", table="nf4"), Target("codebook", table="fp4-e2m1")]
    for t in targets:
        parameters = (t.bits + t.offset) if t.codec == "bcq" else (2 if t.codec == "uniform" else 1)
        name = {"bcq": "BCQ", "uniform": f"uniform {t.solver}", "codebook": str(t.table)}[t.codec]
        out = np.empty_like(weight)
        yield Contender(
            f"lowbit {name}",
            t.bits + 16 * parameters / t.group_size,
            lambda t=t: quantize(weight, t).matrix,
            lambda m, out=out: decode(m, out=out),
        )


def peers(weight: np.ndarray) -> Iterator[Contender]:
    """Whatever of the peers can be imported here."""
    try:
        import gguf

        kind = gguf.GGMLQuantizationType.Q4_0
        yield Contender(
            "gguf-py Q4_0",
            4.5,
            lambda: gguf.quants.quantize(weight, kind),
            lambda q: gguf.quants.dequantize(q, kind),
        )
    except ImportError:
        pass
    try:
        import torch
        from hqq.core.quantize import Quantizer as HQQ

        tensor = torch.from_numpy(weight)
        for bits in (2, 3, 4):
            yield Contender(
                "HQQ",
                bits + 32 / 128,
                lambda bits=bits: HQQ.quantize(tensor, nbits=bits, group_size=128, axis=1, device="cpu"),
                lambda q: HQQ.dequantize(*q).float().numpy(),
            )
    except ImportError:
        pass
    try:
        import bitsandbytes.functional as bnb
        import torch

        tensor = torch.from_numpy(weight)
        yield Contender(
            "bitsandbytes NF4",
            4 + 32 / 64,
            lambda: bnb.quantize_4bit(tensor, blocksize=64, quant_type="nf4"),
            lambda q: bnb.dequantize_4bit(*q).numpy(),
        )
    except (ImportError, RuntimeError):
        pass
    try:
        import torch
        from optimum.quanto import MaxOptimizer, qint4, quantize_weight

        tensor = torch.from_numpy(weight)

        def quanto() -> Any:
            scale, shift = MaxOptimizer()(tensor, qint4, axis=0, group_size=128)
            return quantize_weight(tensor, qint4, axis=0, scale=scale, shift=shift, group_size=128)

        yield Contender("quanto int4", 4 + 64 / 128, quanto, lambda q: q.dequantize().numpy())
    except ImportError:
        pass


def seconds(work: Callable[[], Any], repeat: int) -> float:
    """Median time of a call, the first one not counted."""
    work()
    times = []
    for _ in range(repeat):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--cols", type=int, default=4096)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    spread = 0.02 * np.exp(0.3 * rng.standard_normal((args.rows, 1)))
    weight = (rng.standard_normal((args.rows, args.cols)) * spread).astype(np.float32)
    print("| quantizer | bits/weight | relative error | quantize, Mweights/s | dequantize, Gweights/s |")
    print("|---|---|---|---|---|")
    for quantizer in [*ours(weight), *peers(weight)]:
        state = quantizer.quantize()
        error = np.linalg.norm(quantizer.dequantize(state) - weight) / np.linalg.norm(weight)
        quantizing = weight.size / seconds(quantizer.quantize, args.repeat) / 1e6
        dequantizing = (
            weight.size
            / seconds(lambda quantizer=quantizer, state=state: quantizer.dequantize(state), args.repeat)
            / 1e9
        )
        print(
            f"| {quantizer.name} | {quantizer.bits:.2f} | {error:.4f} | {quantizing:.1f} | {dequantizing:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
