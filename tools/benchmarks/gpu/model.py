"""A part of the GPU benchmark: generating with a llama of 8B shape, and tuning a slice of it.

Weights are random: modules with random planes stand where ``nn.Linear`` stood, so that nothing has to be quantized.
"""

from __future__ import annotations

import importlib
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lowbit_format.integrations.base_model import base_of_tensors
from lowbit_format.integrations.model import specialize
from lowbit_format.integrations.placement import Placement, describe
from lowbit_format.integrations.quantizer import LowbitConfig
from lowbit_format.runtime.active_tasks import TaskState
from lowbit_format.runtime.modules import LowbitLinear
from lowbit_format.schema import ModuleEntry, Scheme

from ..common import spread, table
from .bench import Bench, TooLong, let_go, time_limit
from .predict import bcq

SHAPE: dict[str, Any] = {  # that of Llama 3 8B
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 2048,
}  # fmt: skip
TINY: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 128, "max_position_embeddings": 64,
}  # fmt: skip
PROMPT, NEW, REPEAT = 16, 48, 3  # tokens, tokens, times
COMPILING = 100.0  # seconds for a compiled variant, with its runs
SLICE, LENGTH, STEPS = 4, 1024, 8  # layers, tokens, steps
GIB = float(1 << 30)


def model(bench: Bench) -> Iterator[str]:
    """Tokens per second, batch 1, static cache, with and without torch.compile."""
    layers = (1 if bench.tiny else 4) if bench.quick or bench.tiny else SHAPE["num_hidden_layers"]
    rows: list[list[str]] = []
    for what, scheme in (("bf16", None), ("lowbit BCQ 4 bits", bcq(4, _group(bench)))):
        made = build(bench, layers, scheme)
        for compiled in (False, True):
            variant = f"{what}, {'torch.compile' if compiled else 'eager'}"
            limit = min(COMPILING, bench.left() / (1 if scheme or not compiled else 2))
            try:
                with time_limit(limit):
                    rows.append([variant, *_generating(bench, made, layers, compiled)])
            except TooLong as e:
                rows.append([variant, f"skipped: {e}", "", "", "", ""])
            except Exception as e:
                bench.wrong.append(f"model, {variant}: {_reason(e)}")
                rows.append([variant, f"failed: {type(e).__name__}", "", "", "", ""])
        del made
        torch.compiler.reset()
        let_go()
    yield (
        f"## A llama of 8B shape, {layers} of 32 layers, generate, batch 1 (model)\n\n"
        f"{'Tiny, in fact. ' if bench.tiny else ''}Greedy, static cache, {NEW} tokens after {PROMPT}; the output head "
        "is in half precision in both. A layer's time is that of a token less the head's, over the layers. The limit "
        "is that of reading all weights once at the speed of the copy.\n\n"
        + table(["", "tokens/s", "ms a token", "us of it a layer", "limit, tokens/s", "first call, s"], rows)
    )


def build(bench: Bench, layers: int, scheme: Scheme | None, *, digests: bool = False) -> Any:
    """A random llama in half precision; with `scheme`, all linear modules but the head are lowbit ones.

    With `digests` it knows its base, to which tasks are bound.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {**(TINY if bench.tiny else SHAPE), "num_hidden_layers": layers}
    before = torch.get_default_dtype()
    torch.set_default_dtype(bench.half)
    try:
        with torch.device(bench.device), torch.no_grad():
            made: Any = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False))
    finally:
        torch.set_default_dtype(before)
    made.eval().requires_grad_(False)
    made.generation_config.eos_token_id = None  # random weights may choose any token
    if scheme is not None:
        put_in(made, scheme, bench, digests)
    return made


def put_in(made: Any, scheme: Scheme, bench: Bench, digests: bool) -> None:
    """Lowbit modules with random contents in place of linear ones, as loading would put them; the head stays."""
    state, placed = TaskState(), Placement()
    for path, old in list(made.named_modules()):
        if type(old) is not nn.Linear or path == "lm_head" or (bench.tiny and "k_proj" not in path):
            continue
        rows, cols = old.out_features, old.in_features
        new = LowbitLinear(scheme, rows, cols, dtype=bench.half, device=bench.device)
        fill(new)
        new.path, new.state = path, state
        made.set_submodule(path, new.eval())
        placed.files[path] = ModuleEntry(path, scheme, "linear", (rows, cols))
    specialize(made, state)
    config = describe(made, placed)
    made.config.quantization_config = LowbitConfig.of(config)
    if digests:
        made.lowbit_base = base_of_tensors(made, config)
    tile(made)  # last: reading the planes, as above, restores the file's layout


def fill(module: LowbitLinear) -> None:
    """Random planes, and scales such that weights are about as large as in a model that is not trained."""
    with torch.no_grad():
        for role, param in module.matrix_parameters().items():
            if role == "planes":
                param.random_(0, 256)
            elif role == "scales":
                planes = torch.arange(param.shape[0], device=param.device).view(-1, 1, 1)
                param.copy_(torch.rand_like(param, dtype=torch.float32).add_(1).mul_(0.011 * 2.0**-planes))
            else:
                param.normal_(0, 0.001)


def tile(made: nn.Module) -> None:
    """Put every lowbit module into the tiled layout of the device's backend."""
    for module in made.modules():
        if isinstance(module, LowbitLinear):
            module.tile()


def _group(bench: Bench) -> int:
    return 32 if bench.tiny else 128


def _generating(bench: Bench, made: Any, layers: int, compiled: bool) -> list[str]:
    """Cells of one row."""
    from transformers.generation.streamers import BaseStreamer

    class Clock(BaseStreamer):
        """Notes when each token comes; to hand it over is to wait for the device."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    new = 3 if bench.tiny else NEW  # the first two say nothing
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "cache_implementation": "static"}
    options |= {"max_new_tokens": new, "min_new_tokens": new, "disable_compile": not compiled}
    if compiled and bench.tiny:
        from transformers import CompileConfig

        options["compile_config"] = CompileConfig(backend="eager")
        options["compile_config"]._compile_all_devices = True
    length = 2 if bench.tiny else PROMPT
    prompt = torch.randint(3, 100, (1, length), device=bench.device)

    def run() -> list[float]:
        clock = Clock()
        with torch.no_grad():
            out = made.generate(prompt, attention_mask=torch.ones_like(prompt), streamer=clock, **options)
        assert out.shape[1] == length + new, f"{out.shape[1] - length} tokens came, not {new}"
        return clock.times

    began = time.perf_counter()
    run()
    first = time.perf_counter() - began
    tokens = []
    for _ in range(1 if bench.tiny else REPEAT):
        times = run()
        tokens.append((len(times) - 2) / (times[-1] - times[1]))  # the prompt comes first, and it has the prefill
    head = made.lm_head.weight
    x = torch.randn(1, head.shape[1], device=bench.device, dtype=bench.half)
    heading = statistics.median(bench.measure(lambda _: F.linear(x, head)))
    token = 1e6 / statistics.median(tokens)
    held = sum(p.nbytes for n, p in made.named_parameters() if "embed_tokens" not in n)
    limit = bench.limits.copy / held
    return [spread(tokens), f"{token / 1e3:.2f}", f"{(token - heading) / layers:.1f}", f"{limit:.0f}", f"{first:.1f}"]


def _reason(e: Exception) -> str:
    """What happened, and where."""
    where = traceback.extract_tb(e.__traceback__)[-4:]
    return f"{type(e).__name__}: {e}"[:600] + "".join(f"; {Path(f.filename).name}:{f.lineno}" for f in where)


# --- tuning ------------------------------------------------------------------------------------------


def tuning(bench: Bench) -> Iterator[str]:
    """A step of tuning scales, beside one of LoRA on the float model."""
    rows = []
    for what, prepare in (("AlphaTuning, BCQ 4 bits", _alphatuning), ("LoRA, rank 16, bf16", _lora)):
        if bench.late():
            rows.append([what, "skipped: the part's time is over", "", "", "", ""])
            continue
        try:
            rows.append([what, *_tuning_cells(bench, prepare)])
        except Exception as e:
            bench.wrong.append(f"tuning, {what}: {_reason(e)}")
            rows.append([what, f"failed: {type(e).__name__}", "", "", "", ""])
        let_go()
    layers, length = (1, 8) if bench.tiny else (SLICE, LENGTH)
    yield (
        f"## Tuning {layers} layers of that shape, {length} tokens, batch 1 (tuning)\n\nA step is forward, backward "
        "and AdamW. Peak memory is that of the whole step, the model included.\n\n"
        + table(["", "ms a step", "peak, GiB", "of it before the step", "trained numbers", "loss, first to last"], rows)
    )


def _tuning_cells(bench: Bench, prepare: Callable[[Bench], Any]) -> list[str]:
    try:
        made = prepare(bench)
    except ImportError as e:
        return [f"not installed: {e}", "", "", "", ""]
    trained = [p for p in made.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in trained]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    length = 8 if bench.tiny else LENGTH
    ids = torch.randint(3, 100, (1, length), device=bench.device)

    def step() -> float:
        loss = made(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())  # waits for the device's forward pass

    made.train()
    losses = [step()]
    if not bench.tiny:
        losses.append(step())
        let_go()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    times = []
    for _ in range(1 if bench.tiny else STEPS):
        bench.synchronize()
        began = time.perf_counter()
        losses.append(step())
        bench.synchronize()
        times.append(1e3 * (time.perf_counter() - began))
    still = all(torch.equal(p, q) for p, q in zip(trained, start, strict=True))
    if still or not torch.isfinite(torch.tensor(losses)).all():
        bench.wrong.append(
            f"tuning, {prepare.__name__}: {'nothing changed' if still else 'no number'}, losses {losses}"
        )
    peak = ["-", "-"] if bench.tiny else [f"{n / GIB:.2f}" for n in (torch.cuda.max_memory_allocated(), held)]
    numbers = sum(p.numel() for p in trained)
    return [spread(times), *peak, f"{numbers:,}", f"{losses[0]:.4f} to {losses[-1]:.4f}"]


def _alphatuning(bench: Bench) -> Any:
    from lowbit_format import prepare_scale_tuning

    made = build(bench, 1 if bench.tiny else SLICE, bcq(4, _group(bench)), digests=True)
    prepare_scale_tuning(made, "alphatuning")
    return made


def _lora(bench: Bench) -> Any:
    peft = importlib.import_module("peft")
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    made = build(bench, 1 if bench.tiny else SLICE, None)
    return peft.get_peft_model(made, peft.LoraConfig(r=16, lora_alpha=32, target_modules=names, task_type="CAUSAL_LM"))
