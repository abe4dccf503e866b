"""The plugin in vLLM: models, tasks in one batch, and what it refuses. Run in the environment of
tools/vllm_environment: ``pytest -m vllm tests/vllm``.

The engine runs in this process, so that its errors are seen.
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
from support.building import write_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lowbit_format as lb
from lowbit_format.schema import Scheme
from lowbit_format.tasks.models import named_modules

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1")
vllm = pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from vllm.lora.request import LoRARequest  # noqa: E402

CONFIG = LlamaConfig(
    vocab_size=96,  # vLLM pads it to 128
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.3,
    eos_token_id=None,
    bos_token_id=None,
)
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


def model_in(directory: Path, choose: Callable[[str, nn.Module], Scheme | None], *, tied: bool) -> Path:
    torch.manual_seed(len(str(choose)))
    config = LlamaConfig(**{**CONFIG.to_dict(), "tie_word_embeddings": tied})
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
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()
    # vLLM 0.32 cannot do this twice in a process.
    type(vllm.platforms.current_platform).register_triton_kernel_overrides = classmethod(lambda cls: None)


def answers(engine: Any, prompts: Sequence[list[int]], tasks: Sequence[Any] | None = None) -> list[list[int]]:
    sampling = vllm.SamplingParams(temperature=0, max_tokens=12, detokenize=False, ignore_eos=True)
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    found = engine.generate(given, sampling, lora_request=tasks, use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in found]


@pytest.mark.parametrize(("choose", "tied"), [(everything, True), (mixed, False), (linears, True)])
def test_answers_are_those_of_transformers(
    choose: Callable[[str, nn.Module], Scheme | None], tied: bool, tmp_path: Path, serve: Callable[..., Any]
) -> None:
    base = model_in(tmp_path / "base", choose, tied=tied)
    assert answers(serve(base), PROMPTS) == reference(base, None, PROMPTS)


def test_compiled(tmp_path: Path, serve: Callable[..., Any]) -> None:
    base = model_in(tmp_path / "base", mixed, tied=False)
    assert answers(serve(base, enforce_eager=False), PROMPTS) == reference(base, None, PROMPTS)


def test_a_lower_precision(tmp_path: Path, serve: Callable[..., Any]) -> None:
    base = model_in(tmp_path / "base", everything, tied=True)
    engine = serve(base, hf_overrides={"lowbit_bits": 3})
    assert answers(engine, PROMPTS) == reference(base, None, PROMPTS, bits=3) != reference(base, None, PROMPTS)


def test_a_precision_that_the_file_lacks_is_refused(tmp_path: Path, serve: Callable[..., Any]) -> None:
    base = model_in(tmp_path / "base", everything, tied=True)
    with pytest.raises(Exception, match=r"asked for 2 bits, but the file has scales for 3, 4 only"):
        serve(base, hf_overrides={"lowbit_bits": 2})


@pytest.mark.parametrize(("kind", "choose"), [("rows", mixed), ("rows", everything), ("groups", everything)])
def test_tasks_are_mixed_in_one_batch(
    kind: str,
    choose: Callable[[str, nn.Module], Scheme | None],
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


def test_more_tasks_than_slots_and_none_of_their_files(tmp_path: Path, serve: Callable[..., Any]) -> None:
    base = model_in(tmp_path / "base", linears, tied=True)
    bundles = [task_in(base, tmp_path / str(n), n) for n in range(3)]
    expected = [reference(base, bundle, PROMPTS) for bundle in bundles]
    tasks = [LoRARequest(f"task-{n}", n + 1, str(path)) for n, path in enumerate(bundles)]
    engine = serve(base, enable_lora=True, max_loras=1)
    for task in tasks:
        assert engine.llm_engine.add_lora(task)
    for bundle in bundles:
        shutil.rmtree(bundle)
    for n in (0, 1, 2, 0):
        assert answers(engine, PROMPTS, [tasks[n]] * len(PROMPTS)) == expected[n]


def test_what_cannot_be_served_is_refused_and_the_engine_goes_on(tmp_path: Path, serve: Callable[..., Any]) -> None:
    base = model_in(tmp_path / "base", linears, tied=False)
    other = model_in(tmp_path / "other", mixed, tied=False)
    good = task_in(base, tmp_path / "good", 0)
    wrong = task_in(other, tmp_path / "wrong", 1)
    addends = task_in(base, tmp_path / "addends", 2, "add")
    broken = shutil.copytree(good, tmp_path / "broken")
    (broken / "task_scales.safetensors").write_bytes(b"no tensors")
    model = lb.from_pretrained(base, dtype=torch.float32)
    lb.prepare_scale_tuning(model, modules_to_save=["lm_head"])
    lb.save_task(model, tmp_path / "with-head")
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text("{}")
    ours, theirs = (lb.from_pretrained(path).lowbit_base.fingerprint.body for path in (base, other))

    engine = serve(base, enable_lora=True, max_loras=2)
    refused = {
        "wrong": rf"fingerprint {theirs} .* this one has {ours}",
        "addends": "LOWBIT_VLLM_TASKS=groups",
        "broken": "HDR-",
        "with-head": "brings modules of its own, 'lm_head'",
        "peft": "is an adapter of PEFT",
        "missing": "missing",
    }
    for number, (name, message) in enumerate(refused.items(), 10):
        with pytest.raises(Exception, match=message):
            engine.llm_engine.add_lora(LoRARequest(name, number, str(tmp_path / name)))
    task = LoRARequest("good", 1, str(good))
    assert answers(engine, PROMPTS, [task] * len(PROMPTS)) == reference(base, good, PROMPTS)
    assert answers(engine, PROMPTS) == reference(base, None, PROMPTS)


def test_unloaded_tasks_leave_the_memory(tmp_path: Path, serve: Callable[..., Any]) -> None:
    from lowbit_format.vllm.task_manager import UNLOADED_KEPT

    base = model_in(tmp_path / "base", linears, tied=True)
    bundle = task_in(base, tmp_path / "task", 0)
    engine = serve(base, enable_lora=True, max_loras=2)
    for number in range(1, UNLOADED_KEPT + 10):
        assert engine.llm_engine.add_lora(LoRARequest(f"task-{number}", number, str(bundle)))
        assert engine.llm_engine.remove_lora(number)
    assert len(engine.llm_engine.list_loras()) == UNLOADED_KEPT


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
