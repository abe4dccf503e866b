"""A layer of experts in a decode step, beside dense products of the same bytes.

    python -m tools.benchmarks.cpu.experts [--bits 4 3 2] [--threads 2] [--layers 3] [--repeat 40]

The shape is that of a layer of Qwen3-30B-A3B: 128 experts, of which a token takes 8. *Dense* is the products of 8 lone
modules of the same shapes with the same row, one after the other, and nothing else. Several layers with random planes
are used in turn, so that no expert is in a cache.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from ..common import seconds, spread, table
from .kernels import random_module

HIDDEN, INTERMEDIATE, EXPERTS, ACTIVE, GROUP = 2048, 768, 128, 8, 128


def main() -> None:
    """Print a table in Markdown."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for bits in options.bits:
        found = measure(bits, options.layers, options.repeat)
        layer, dense = (statistics.median(found[name]) for name in ("layer", "dense"))
        rows.append(
            [bits, f"{found['MB']:.1f}", spread(found["layer"], 2), spread(found["dense"], 2), f"{layer / dense:.2f}"]
        )
    print(table(["bits", "MB read", "layer, ms", "dense, ms", "layer / dense"], rows))


def measure(bits: int, layers: int, repeat: int) -> dict[str, Any]:
    """Milliseconds of the layer and of the dense products, and the megabytes that either reads."""
    import torch

    from lowbit_format.schema import Scheme

    scheme = Scheme("bcq", bits, GROUP, "F16", offset=True)
    stacks = [experts_layer(scheme) for _ in range(layers)]
    shapes = ((2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))
    lone = [[[random_module(scheme, *shape) for shape in shapes] for _ in range(ACTIVE)] for _ in range(4 * layers)]
    nbytes = sum(p.nbytes for pair in lone[0] for m in pair for p in m.matrix_parameters().values())
    found: dict[str, Any] = {"layer": [], "dense": [], "MB": nbytes / 1e6}
    weights = torch.full((1, ACTIVE), 1 / ACTIVE)
    x, inner = torch.randn(1, HIDDEN), torch.randn(1, INTERMEDIATE)
    with torch.inference_mode():
        for turn in range(repeat + 3):
            chosen = torch.randperm(EXPERTS)[:ACTIVE][None]
            pairs = lone[turn % len(lone)]

            def dense(pairs: Any = pairs) -> None:
                for up, down in pairs:
                    up(x)
                    down(inner)

            one = seconds(lambda turn=turn, chosen=chosen: stacks[turn % layers](x, chosen, weights))
            other = seconds(dense)
            if turn >= 3:  # the first calls tile the planes
                found["layer"].append(1000 * one)
                found["dense"].append(1000 * other)
    return found


def experts_layer(scheme: Any) -> Any:
    """The experts of one layer, with random planes."""
    import torch
    import transformers as hf
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    from lowbit_format.runtime.expert_forward import put_in
    from lowbit_format.runtime.experts import LowbitExperts

    config = hf.Qwen3MoeConfig(hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE, num_experts=EXPERTS)
    with torch.device("meta"):
        layer = Qwen3MoeExperts(config)
    for name, rows, cols in (("gate_up_proj", 2 * INTERMEDIATE, HIDDEN), ("down_proj", HIDDEN, INTERMEDIATE)):
        stack = LowbitExperts(scheme, rows, cols, experts=EXPERTS)
        for role, p in stack.matrix_parameters().items():
            if role == "planes":
                p.data = torch.randint(0, 256, p.shape, dtype=torch.uint8)
            else:
                p.data = torch.empty(p.shape).uniform_(0.001, 0.01).to(p.dtype)
        stack.finish_loading(name)
        put_in(layer, name, stack)
    return layer.eval()


if __name__ == "__main__":
    main()
