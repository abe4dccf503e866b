"""A part of the CPU benchmark: one model in one process: start, first token, decoding, prefill and memory.

The model is a lowbit directory, or a float one for the eager transformers peer.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from ..common import Facts, import_package, job_of_this_process, memory, seconds


def main() -> None:
    job = job_of_this_process()
    if job["do"] == "convert":
        convert(Path(job["folder"]), job["layers"], job["bits"], job["default"])
        print("{}")
        return
    print(json.dumps(measure(job)))


def convert(folder: Path, layers: int, bits: int | None, default: bool) -> None:
    """Make ``folder/float`` and, unless `bits` is None, a lowbit model of it, where they do not exist.

    It is ``folder/default-BITS``, as the command makes it, or ``folder/bcq-BITS``, whose head has these bits too.
    """
    from ..convert import make_checkpoint

    source = folder / "float"
    if not source.exists():
        folder.mkdir(parents=True, exist_ok=True)
        make_checkpoint(folder / "float.part", layers)
        (folder / "float.part").rename(source)
    out = folder / f"{'default' if default else 'bcq'}-{bits}"
    if bits is None or out.exists():
        return
    from lowbit_format.converters import Recipe, convert_hf_to_lowbit
    from lowbit_format.quantize import Target

    convert_hf_to_lowbit(source, out, Recipe(Target(bits=bits), lm_head=None if default else True))


def measure(job: Facts) -> Facts:
    """Everything about one model."""
    import numba  # noqa: F401  (counted with the imports, as the model class is)
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401
    from transformers.generation.streamers import BaseStreamer

    lowbit = job["lowbit"]
    if lowbit:
        import lowbit_format as lb

        import_package()
    imported, import_end = memory(), time.time()

    class Clock(BaseStreamer):  # type: ignore[misc]
        """Notes when each token comes."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    options = {"do_sample": False, "pad_token_id": 0, **job["generate"]}
    prompt = torch.arange(3, 3 + job["prompt"])[None]
    text = torch.arange(3, 3 + job["prefill"])[None]

    def generate(model: Any, new: int) -> list[float]:
        """When the prompt went in (first) and each token came out."""
        clock = Clock()
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new,
            streamer=clock,
            **options,
        )
        assert len(clock.times) == new + 1
        return clock.times

    dtype = getattr(torch, job["dtype"])
    with torch.inference_mode():
        if lowbit:
            model = lb.from_pretrained(job["path"], dtype=dtype, activations=job["activations"]).eval()
        else:
            model = AutoModelForCausalLM.from_pretrained(job["path"], dtype=dtype, attn_implementation="sdpa").eval()
        model.generation_config.eos_token_id = None  # random weights may choose any token
        loaded = time.time()
        generate(model, 1)
        first_token, after = time.time(), memory()

        products = [m for m in model.modules() if getattr(m, "kind", None) == "linear" or type(m) is torch.nn.Linear]
        inputs = {m.in_features: torch.randn(1, 1, m.in_features, dtype=dtype) for m in products}

        def matrices() -> None:
            for m in products:
                m(inputs[m.in_features])

        def prefill() -> None:
            model(text, use_cache=True, logits_to_keep=1)

        generate(model, 4)
        decode, alone, filled = [], [], []
        for _ in range(job["inner"]):
            times = generate(model, job["new"])
            decode.append((job["new"] - 1) / (times[-1] - times[1]))
            matrices()
            alone += [1 / seconds(matrices) for _ in range(3)]
        prefill()
        filled = [job["prefill"] / seconds(prefill) for _ in range(job["inner"])]
    return {
        "start": [first_token - job["began"]],
        "imports": [import_end - job["began"]],
        "load": [loaded - import_end],
        "decode": decode,
        "matrices": alone,
        "prefill": filled,
        "bytes": sum(f.stat().st_size for f in Path(job["path"]).glob("*.safetensors")),
        "memory": {"imported": imported, "after": after, "end": memory()},
    }


if __name__ == "__main__":
    main()
