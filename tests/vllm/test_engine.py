"""The plugin in vLLM: models, tasks in one batch, and what it refuses. Run in the environment of
tools/vllm/environment: ``pytest -m vllm tests/vllm``.

Each engine runs in processes of its own, as in a server.
"""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.building import Choice, write_model
from support.vllm_models import LLAMA
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import lowbit_format as lb
from lowbit_format.converters import convert_hf_to_lowbit
from lowbit_format.schema import Scheme
from lowbit_format.tasks.models import named_modules

os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1")
pytest.importorskip("vllm.version")  # `vllm` alone would be this folder
pytestmark = pytest.mark.vllm

import vllm  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402

BCQ = Scheme("bcq", 4, 64, "F16", offset=True, nested=(3,))
MIXED = {
    "embed_tokens": Scheme("uniform", 6, 128, "F16", nested=(3,)),
    "q_proj": BCQ,
    "k_proj": Scheme("uniform", 4, 32, "BF16", row_bits=True, nested=(3,)),
    "gate_proj": Scheme("bcq", 3, 0, "F32"),
    "up_proj": Scheme("bcq", 5, 64, "F16", nested=(3,)),
    "down_proj": Scheme("uniform", 3, 96, "F16"),
    "lm_head": Scheme("bcq", 6, 128, "F16", nested=(3,)),
}  # v_proj and o_proj are kept


def everything(path: str, module: nn.Module) -> Scheme | None:
    return BCQ


def mixed(path: str, module: nn.Module) -> Scheme | None:
    return MIXED.get(path.rpartition(".")[2])


def linears(path: str, module: nn.Module) -> Scheme | None:
    return BCQ if isinstance(module, nn.Linear) and "lm_head" not in path else None


def model_in(directory: Path, choose: Choice, *, tied: bool) -> Path:
    torch.manual_seed(len(str(choose)))
    config = LlamaConfig(**{**LLAMA.to_dict(), "tie_word_embeddings": tied})
    return write_model(LlamaForCausalLM(config), directory, choose)


def task_in(base: Path, out: Path, seed: int, kind: str = "mul", **options: Any) -> Path:
    """A bundle with random deltas, large enough to change most answers."""
    torch.manual_seed(seed)
    model = lb.from_pretrained(base, dtype=torch.float32)
    lb.prepare_scale_tuning(model, method="scales", kind=kind, modules_to_save=[], **options)
    with torch.no_grad():
        for module in named_modules(model).values():
            for parameter in () if module.tuned is None else module.tuned.parameters():
                parameter.normal_(0, 0.3 if kind == "mul" else 0.02)
    lb.save_task(model, out)
    return out


PROMPTS = [[5, 9, 2, 33], [17, 60, 1], [8, 8, 40, 3, 21, 4, 50], [90, 3], [5, 9, 2, 33]]


def reference(base: Path, task: Path | None, prompts: Sequence[list[int]], **options: Any) -> list[list[int]]:
    """Greedy answers of transformers, one by one."""
    model = lb.from_pretrained(base, dtype=torch.float32, **options).eval()
    if task is not None:
        lb.set_task(model, lb.load_task(model, task, name="task"))
    answers = []
    for prompt in prompts:
        ids = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=12, do_sample=False
        )
        answers.append(ids[0, len(prompt) :].tolist())
    return answers


@pytest.fixture
def serve() -> Iterator[Callable[..., Any]]:
    """Makes an engine; it is gone when the test ends."""
    engines: list[Any] = []

    def make(base: Path, **options: Any) -> Any:
        from vllm import LLM

        options = {"dtype": "float32", "max_model_len": 64, "max_num_seqs": 8, "enforce_eager": True, **options}
        engines.append(LLM(str(base), skip_tokenizer_init=True, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.llm_engine.engine_core.shutdown()
    engines.clear()
    gc.collect()


def answers(engine: Any, prompts: Sequence[list[int]], tasks: Sequence[Any] | None = None) -> list[list[int]]:
    sampling = vllm.SamplingParams(temperature=0, max_tokens=12, detokenize=False, ignore_eos=True)
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    found = engine.generate(given, sampling, lora_request=tasks, use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in found]


@pytest.mark.parametrize(
    ("choose", "tied", "options", "bits"),
    [
        (everything, True, {}, None),
        (mixed, False, {"enforce_eager": False}, None),
        (everything, True, {"hf_overrides": {"lowbit_bits": 3}}, 3),
    ],
    ids=["tied", "mixed and compiled", "a lower precision"],
)
def test_answers_are_those_of_transformers(
    choose: Choice, tied: bool, options: dict[str, Any], bits: int | None, tmp_path: Path, serve: Callable[..., Any]
) -> None:
    base = model_in(tmp_path / "base", choose, tied=tied)
    assert answers(serve(base, **options), PROMPTS) == reference(base, None, PROMPTS, bits=bits)


def test_experts(tmp_path: Path, serve: Callable[..., Any]) -> None:
    """Of the base; a task that changes the rest is served too, one that changes experts is refused."""
    torch.manual_seed(1)
    config = Qwen3MoeConfig(
        **{**LLAMA.to_dict(), "head_dim": 32, "model_type": "qwen3_moe"},
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        decoder_sparse_step=1,
        norm_topk_prob=True,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "float")
    base = tmp_path / "base"
    convert_hf_to_lowbit(str(tmp_path / "float"), base, measured=False)
    some, every = task_in(base, tmp_path / "some", 1, exclude=["*experts*"]), task_in(base, tmp_path / "all", 1)
    engine = serve(base, enable_lora=True, max_loras=1)
    tasks = [None] * len(PROMPTS) + [LoRARequest("some", 1, str(some))] * len(PROMPTS)
    assert answers(engine, PROMPTS * 2, tasks) == reference(base, None, PROMPTS) + reference(base, some, PROMPTS)
    with pytest.raises(Exception, match=r"experts\.(gate_up|down)_proj: the task changes experts"):
        engine.llm_engine.add_lora(LoRARequest("all", 2, str(every)))


def test_gpt2(tmp_path: Path, serve: Callable[..., Any]) -> None:
    """Its matrices are stored transposed (Conv1D), and its queries, keys and values are one."""
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=96, n_positions=64, n_embd=128, n_layer=2, n_head=4, initializer_range=0.3, eos_token_id=None
    )
    base = write_model(
        GPT2LMHeadModel(config), tmp_path / "base", lambda path, module: None if path.endswith("wpe") else BCQ
    )
    assert answers(serve(base), PROMPTS) == reference(base, None, PROMPTS)


def test_a_precision_that_the_file_lacks_is_refused(tmp_path: Path, serve: Callable[..., Any]) -> None:
    base = model_in(tmp_path / "base", everything, tied=True)
    with pytest.raises(Exception, match=r"asked for 2 bits, but the file has scales for 3, 4 only"):
        serve(base, hf_overrides={"lowbit_bits": 2})


@pytest.mark.parametrize(("kind", "choose"), [("rows", mixed), ("groups", everything)])
def test_tasks_are_mixed_in_one_batch(
    kind: str,
    choose: Choice,
    tmp_path: Path,
    serve: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the same prompts too, whose beginnings vLLM keeps: none may be taken from another task."""
    monkeypatch.setenv("LOWBIT_VLLM_TASKS", kind)
    base = model_in(tmp_path / "base", choose, tied=choose is everything)
    kinds = ("mul", "mul", "add") if kind == "groups" else ("mul",) * 3
    bundles = [task_in(base, tmp_path / str(n), n, kind) for n, kind in enumerate(kinds)]
    tasks = [None, *(LoRARequest(f"task-{n}", n + 1, str(path)) for n, path in enumerate(bundles))]
    expected = [reference(base, bundle, PROMPTS) for bundle in (None, *bundles)]
    assert all(a != b for i, a in enumerate(expected) for b in expected[:i])
    engine = serve(base, enable_lora=True, max_loras=3, enable_prefix_caching=True)
    jobs = [(prompt, task) for prompt in range(len(PROMPTS)) for task in range(4)]
    for _ in range(2):  # the second time from what is kept of the first
        found = answers(engine, [PROMPTS[p] for p, _ in jobs], [tasks[t] for _, t in jobs])
        assert found == [expected[t][p] for p, t in jobs]
    alone = answers(engine, PROMPTS, [tasks[2]] * len(PROMPTS))
    assert alone == expected[2]


def test_tasks_come_and_go(tmp_path: Path, serve: Callable[..., Any]) -> None:
    """More tasks than slots, none of whose files is left; many that are unloaded; some that cannot be served."""
    from lowbit_format.vllm.task_manager import UNLOADED_KEPT

    base, other = model_in(tmp_path / "base", linears, tied=False), model_in(tmp_path / "other", mixed, tied=False)
    bundles = [task_in(base, tmp_path / str(n), n) for n in range(3)]
    expected = [reference(base, bundle, PROMPTS) for bundle in bundles]
    tasks = [LoRARequest(f"task-{n}", n + 1, str(path)) for n, path in enumerate(bundles)]
    refused = {
        task_in(other, tmp_path / "wrong", 1): f"fingerprint {fingerprint(other)} .* this one has {fingerprint(base)}",
        task_in(base, tmp_path / "addends", 2, "add"): "LOWBIT_VLLM_TASKS=groups",
        shutil.copytree(bundles[0], tmp_path / "broken"): "HDR-",
        with_head(base, tmp_path / "head"): "brings modules of its own, 'lm_head'",
        tmp_path / "peft": "is an adapter of PEFT",
        tmp_path / "missing": "missing",
    }
    (tmp_path / "broken" / "task_scales.safetensors").write_bytes(b"no tensors")
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text("{}")

    engine = serve(base, enable_lora=True, max_loras=1)
    load, unload = engine.llm_engine.add_lora, engine.llm_engine.remove_lora
    for task in tasks:
        assert load(task)
    for number in range(100, 100 + UNLOADED_KEPT + 5):
        assert load(LoRARequest(f"task-{number}", number, str(bundles[0])))
        assert unload(number)
    assert len(engine.llm_engine.list_loras()) == len(tasks) + UNLOADED_KEPT
    for bundle in bundles:
        shutil.rmtree(bundle)
    for number, (path, message) in enumerate(refused.items(), 10):
        with pytest.raises(Exception, match=message):
            load(LoRARequest(path.name, number, str(path)))
    for n in (0, 1, 2, 0):
        assert answers(engine, PROMPTS, [tasks[n]] * len(PROMPTS)) == expected[n]
    assert answers(engine, PROMPTS) == reference(base, None, PROMPTS)


def fingerprint(base: Path) -> str:
    return lb.ModelReader(base).fingerprint().body


def with_head(base: Path, out: Path) -> Path:
    """A bundle that brings its head."""
    model = lb.from_pretrained(base, dtype=torch.float32)
    lb.prepare_scale_tuning(model, modules_to_save=["lm_head"])
    lb.save_task(model, out)
    return out


@pytest.mark.parametrize("processes", [2])
def test_tensor_parallel(
    processes: int, tmp_path: Path, serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows and columns of every kind of matrix in two processes; groups of 96 columns fall into two of them."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    base = model_in(tmp_path / "base", mixed, tied=False)
    bundle = task_in(base, tmp_path / "task", 0)
    engine = serve(base, enable_lora=True, max_loras=2, tensor_parallel_size=processes)
    task = LoRARequest("task", 1, str(bundle))
    found = answers(engine, [*PROMPTS, *PROMPTS], [None] * len(PROMPTS) + [task] * len(PROMPTS))
    assert found == reference(base, None, PROMPTS) + reference(base, bundle, PROMPTS)


def test_another_vllm_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.lora.worker_manager import WorkerLoRAManager

    from lowbit_format.errors import LoadError
    from lowbit_format.vllm import internals, registration

    internals.check()
    monkeypatch.delattr(WorkerLoRAManager, "_load_adapter")
    with pytest.raises(LoadError, match=rf"this is vLLM {vllm.__version__}, and it has no .*_load_adapter") as error:
        internals.check()
    with pytest.raises(LoadError, match=r"cannot serve lowbit models: lowbit-format works with vLLM 0\.32\.0"):
        registration._unavailable(error.value).from_config({})
