"""What a step of training takes: processor time, and the most memory of a process, by method, each in a new process.

    python -m tools.benchmarks.tasks.steps BASE [--rows 8] [--tokens 128] [--steps 5] [--only NAME,..]

BASE is a lowbit model. The batch is random tokens; a model that writes text is trained to write it, another to classify
it. All methods have the same base: LoRA is PEFT's, r=8 on every quantized matrix of the layers. Inference is the loss
of the same batch in inference mode. Time is that of the thread, the best of `--steps`; torch has one thread.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from ..common import MB, ROOT, memory, table

NAMES = ("inference", "zo", "alphatuning", "scales", "peqa", "lora")


def main() -> None:
    """Print a row for each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--only", default=",".join(n for n in NAMES if n != "peqa"), help=f"of {', '.join(NAMES)}")
    parser.add_argument("--method", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.method:
        print(json.dumps(measure(args.method, args.base, args.rows, args.tokens, args.steps)))
        return
    rows = []
    for name in args.only.split(","):
        command = [sys.executable, "-m", "tools.benchmarks.tasks.steps", *sys.argv[1:], "--method", name]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        facts = json.loads(done.stdout.splitlines()[-1])
        row = [name, f"{facts['numbers']:,}", f"{facts['seconds'] * 1e3:.0f}"]
        rows.append([*row, f"{facts['peak'] / MB:.0f}", f"{(facts['peak'] - facts['loaded']) / MB:.0f}"])
    print(table(("method", "numbers", "ms a step", "peak MB of the process", "above the loaded model"), rows))


def measure(method: str, base: str, rows: int, tokens: int, steps: int) -> dict[str, float]:
    """Figures of one method; call it in a new process."""
    import torch
    import transformers

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(base)
    writes = config.architectures[0].endswith("ForCausalLM")
    auto = transformers.AutoModelForCausalLM if writes else transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(base, dtype=torch.float32).eval()
    ids = torch.randint(0, config.vocab_size, (rows, tokens))
    batch = {"input_ids": ids, "labels": ids if writes else torch.randint(0, 2, (rows,))}
    with torch.inference_mode():
        model(input_ids=ids[:1, :1])  # tiles planes
    loaded = memory()["VmRSS"]
    step = _step(method, model, batch)
    taken = []
    for _ in range(steps):
        began = time.thread_time()
        step()
        taken.append(time.thread_time() - began)
    numbers = 0 if method == "inference" else sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"seconds": min(taken), "peak": memory()["VmHWM"], "loaded": loaded, "numbers": numbers}


def _step(method: str, model: Any, batch: dict[str, Any]) -> Callable[[], object]:
    import torch

    import lowbit_format as lb

    if method == "inference":

        def infer() -> float:
            with torch.inference_mode():
                return float(model(**batch).loss)

        return infer
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        heads = [path for path in ("classifier", "score") if hasattr(model, path)]
        get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", modules_to_save=heads or None))
    else:
        lb.prepare_scale_tuning(model, "alphatuning" if method == "zo" else method)
    trained = [p for p in model.parameters() if p.requires_grad]
    if method == "zo":
        blind = lb.ZerothOrder(trained, 1e-4)
        return lambda: blind.step(lambda: model(**batch).loss)
    optimizer = torch.optim.AdamW(trained, 1e-3)

    def train() -> None:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    return train


if __name__ == "__main__":
    main()
