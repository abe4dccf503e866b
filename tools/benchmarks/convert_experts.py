"""Convert a Mixture-of-Experts model of the names and shapes of Qwen3-30B-A3B: memory planned and taken.

    python -m tools.benchmarks.convert_experts [--layers 2] [--bits 4] [--scratch DIR]

The checkpoint of all 48 layers is a sparse file of zeros that takes no room; only its plan is made, as ``--dry-run``
does. The one of fewer layers has random values and is converted, which takes about 3 GB of disk a layer. Each in a
process of its own; the peak is VmHWM, imports included.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path

from .common import Facts, job_of_this_process, memory, run_part, table

LAYERS, EXPERTS, HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, WORDS = 48, 128, 2048, 768, 32, 4, 128, 151_936


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Of every tensor, by its name on the Hub."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (WORDS, HIDDEN)}
    for i in range(layers):
        at = f"model.layers.{i}"
        found |= {f"{at}.{n}_layernorm.weight": (HIDDEN,) for n in ("input", "post_attention")}
        found |= {f"{at}.self_attn.{n}_norm.weight": (HEAD_DIM,) for n in "qk"}
        for name, rows, cols in (("q", HEADS, 0), ("k", KV_HEADS, 0), ("v", KV_HEADS, 0), ("o", 0, HEADS)):
            found[f"{at}.self_attn.{name}_proj.weight"] = (rows * HEAD_DIM or HIDDEN, cols * HEAD_DIM or HIDDEN)
        found[f"{at}.mlp.gate.weight"] = (EXPERTS, HIDDEN)
        for e in range(EXPERTS):
            for name, shape in (("gate", (INNER, HIDDEN)), ("up", (INNER, HIDDEN)), ("down", (HIDDEN, INNER))):
                found[f"{at}.mlp.experts.{e}.{name}_proj.weight"] = shape
    return {**found, "model.norm.weight": (HIDDEN,), "lm_head.weight": (WORDS, HIDDEN)}


def make_checkpoint(directory: Path, layers: int, *, filled: bool) -> Path:
    """The checkpoint with `layers` layers, random or sparse."""
    import numpy as np

    from lowbit_format.container.header import build_header

    directory.mkdir(parents=True)
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_hidden_layers": layers,
        "hidden_size": HIDDEN, "intermediate_size": 6144, "moe_intermediate_size": INNER, "num_experts": EXPERTS,
        "num_experts_per_tok": 8, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
        "vocab_size": WORDS, "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    pool = 0.02 * np.random.default_rng(0).standard_normal(1 << 22, np.float32)
    words = (pool.view(np.uint32) >> 16).astype("<u2")
    found = shapes(layers)
    with open(directory / "model.safetensors", "wb") as f:
        f.write(build_header([(name, "BF16", shape) for name, shape in found.items()], {"format": "pt"}))
        for i, shape in enumerate(found.values()):
            if filled:
                f.write(np.roll(np.resize(words, math.prod(shape)), i).tobytes())
            else:
                f.seek(2 * math.prod(shape), 1)
        f.truncate(f.tell())
    return directory


def work(source: str, out: str, bits: int) -> Facts:
    """Plan the conversion of `source`; carry it out if `out` is not empty."""
    from lowbit_format.converters import Recipe, convert_hf_to_lowbit, plan_conversion
    from lowbit_format.quantize import Target

    recipe, began = Recipe(Target(bits=bits)), time.perf_counter()
    _, plan, _ = plan_conversion(source, recipe)
    facts = {"planning": time.perf_counter() - began, "planned": plan.peak_memory(), "output": plan.output_bytes()}
    facts |= {"source": sum(step.tensor.nbytes for step in plan.steps), "peak_of_plan": memory()["VmHWM"]}
    if out:
        facts |= {"seconds": convert_hf_to_lowbit(source, out, recipe).seconds, "peak": memory()["VmHWM"]}
    return facts


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--scratch", type=Path, help="a place with room, instead of the temporary one")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=args.scratch) as temporary:
        root = Path(temporary)
        for layers, out in ((LAYERS, ""), (args.layers, str(root / "out"))):
            source = make_checkpoint(root / f"{layers}", layers, filled=bool(out))
            job = {"source": str(source), "out": out, "bits": args.bits}
            facts = run_part("convert_experts", job, threads=2)
            if "failed" in facts:
                sys.exit(facts["failed"])
            cells = [f"{facts[key] / 1e6:,.0f}" if key in facts else "-" for key in ("source", "output", "planned")]
            peaks = [f"{facts[key] / 1e6:,.0f}" if key in facts else "-" for key in ("peak_of_plan", "peak")]
            rows.append([layers, *cells, *peaks, f"{facts['planning']:.1f}", f"{facts.get('seconds', 0):.0f}"])
    head = ["layers", "source MB", "output MB", "expected peak MB", "peak of planning", "peak of converting"]
    print(table([*head, "planning s", "converting s"], rows))


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        given = job_of_this_process()
        print(json.dumps(work(given["source"], given["out"], given["bits"])))
    else:
        main()
