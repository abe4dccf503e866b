"""A compiled model, in one graph, switches tasks between blocks, batches, threads and asyncio tasks as an eager one."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from support.building import write_model
from support.models import IDS, bert_config, llama_config
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertModel,
    LlamaForCausalLM,
)

import lowbit_format as lb
from lowbit_format.errors import TaskError
from lowbit_format.runtime import active_tasks, compiled_tasks
from lowbit_format.schema import Scheme
from lowbit_format.tasks.bundle import TaskBundle
from lowbit_format.tasks.bundle_config import TaskConfig
from lowbit_format.tasks.models import named_modules

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEME = Scheme("bcq", 2, 0, "F32", offset=True)
NAMES = ("a", "b", "added")


def linears(path: str, module: nn.Module) -> Scheme | None:
    return None if isinstance(module, nn.Embedding) and "position" in path else SCHEME


def bundle(model: Any, seed: int, operation: str = "scales.mul") -> TaskBundle:
    rng, base = np.random.default_rng(seed), model.lowbit_base
    deltas = {}
    for name, module in named_modules(model).items():
        p, rows, groups = module.scales.shape
        shape = (1, rows) if operation == "scales.mul" else (p, rows, groups)
        deltas[f"{name}.{operation}"] = rng.normal(0, 0.3 if operation == "scales.mul" else 0.02, shape).astype("f4")
    return TaskBundle(TaskConfig(base.fingerprint.body, base.fingerprint.head, bits=base.bits), deltas)


def counted() -> Any:
    """A backend that runs graphs as aot_autograd makes them, and counts them."""
    torch.compiler.reset()
    return CompileCounterWithBackend("aot_eager")


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    found: Tensor = model(input_ids=ids).logits
    return found


def same(found: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def small_llama() -> LlamaForCausalLM:
    config = llama_config(True)
    config.num_hidden_layers = 1
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return write_model(small_llama(), tmp_path_factory.mktemp("base") / "llama", linears)


def with_tasks(directory: Path) -> Any:
    """A model with two tasks that go into one product, and one that does not."""
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    for i, name in enumerate(NAMES):
        lb.load_task(model, bundle(model, i, "scales.add" if name == "added" else "scales.mul"), name=name)
    return model


class Compiled(NamedTuple):
    """A model with tasks, the same compiled, and what compiles it."""

    model: Any
    graph: Any
    backend: Any


@pytest.fixture(scope="module")
def compiled(directory: Path) -> Compiled:
    """Shared by the tests of this file: a graph that serves one of them has to serve the others."""
    model, backend = with_tasks(directory), counted()
    return Compiled(model, torch.compile(model, backend=backend, fullgraph=True), backend)


@torch.no_grad()
def test_one_graph_for_all_tasks(compiled: Compiled) -> None:
    """Blocks, mixtures, the base, the model's own task inside and outside of blocks."""
    model, graph, backend = compiled
    same(logits(graph), logits(model))
    outside = backend.frame_count
    blocks: list[Any] = ["a", "b", None, ["a", "b"], ["b", "a"], [None, "a"], "added", ["added", "a"], ["added", None]]
    seen = []
    for tasks in [*blocks, *blocks]:
        with lb.use_tasks(model, tasks):
            found = logits(graph)
            same(found, logits(model))
        seen.append(found)
        same(logits(graph), logits(model))
    assert backend.frame_count == outside + 1
    assert len({round(float(t.norm()), 4) for t in seen}) == len(blocks)  # and they differ


@torch.no_grad()
def test_what_is_refused_without_a_compiler_is_refused_with_one(compiled: Compiled) -> None:
    model, graph, _ = compiled
    for tasks in (["a", "b", "a"], ["a"] * 3 + ["b"]):
        with lb.use_tasks(model, tasks):
            for called in (model, graph):
                with pytest.raises(TaskError, match=rf"gets {len(IDS)} rows, and use_tasks has {len(tasks)} tasks"):
                    logits(called)


@torch.no_grad()
def test_threads_and_asyncio_tasks_stay_apart(compiled: Compiled) -> None:
    """One graph, and each caller its own tasks, also one that has opened no block."""
    model, graph, _ = compiled
    lb.set_task(model, "added")
    mixes: list[Any] = ["a", ["a", "b"], None, ["b", None]]
    want = {}
    for i, tasks in enumerate(mixes):
        with lb.use_tasks(model, tasks):
            want[i] = logits(model)
            logits(graph)
    want[-1] = logits(model)
    wrong, barrier = list[int](), threading.Barrier(5)

    @torch.no_grad()
    def serve(i: int) -> None:
        barrier.wait()
        for _ in range(6):
            if i < 0:
                found = logits(graph)
            else:
                with lb.use_tasks(model, mixes[i]):
                    found = logits(graph)
            if not torch.allclose(found, want[i], rtol=1e-4, atol=1e-5):
                wrong.append(i)

    threads = [threading.Thread(target=serve, args=(i,)) for i in want]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []

    async def answer(i: int) -> Tensor:
        with lb.use_tasks(model, mixes[i]):
            await asyncio.sleep(0.001)
            return logits(graph)

    async def all_at_once() -> list[Tensor]:
        return await asyncio.gather(*(answer(i) for i in range(len(mixes))))

    for i, found in enumerate(asyncio.run(all_at_once())):
        same(found, want[i])


def test_gradients_of_the_input(compiled: Compiled) -> None:
    model, graph, _ = compiled
    x = torch.randn(2, 4, model.config.hidden_size)
    for tasks in (["a", "b"], ["added", None], "b"):
        grads = []
        for called in (model, graph):
            mine = x.clone().requires_grad_()
            with lb.use_tasks(model, tasks):
                called(inputs_embeds=mine).logits.square().sum().backward()
            grads.append(mine.grad)
        same(grads[1], grads[0])


@torch.no_grad()
def test_a_task_that_is_unloaded_and_another_of_its_name(compiled: Compiled) -> None:
    model, graph, _ = compiled
    lb.set_task(model, None)
    with lb.use_tasks(model, ["a", "b"]):
        before = logits(graph)
        lb.unload_task(model, "a")
        with pytest.raises(TaskError, match="no task 'a' is loaded"):
            logits(graph)
    lb.load_task(model, bundle(model, 9), name="a")
    with lb.use_tasks(model, ["a", "b"]):
        same(logits(graph), logits(model))
        assert not torch.allclose(logits(graph)[0], before[0])


@torch.no_grad()
def test_other_batches(compiled: Compiled) -> None:
    """The numbers of rows and tokens are free in the second graph."""
    model, graph, backend = compiled
    graphs = backend.frame_count
    for rows, length in ((4, 5), (6, 3), (3, 4)):
        ids = torch.arange(rows * length).reshape(rows, length) % 50
        with lb.use_tasks(model, [("a", None, "b")[i % 3] for i in range(rows)]):
            same(logits(graph, ids), logits(model, ids))
    assert backend.frame_count <= graphs + 1


@torch.no_grad()
def test_a_copy_is_a_model_of_its_own(directory: Path) -> None:
    """Its graph asks for its own tasks, and does not see those of the original."""
    llama = with_tasks(directory)
    twin = copy.deepcopy(llama)
    graph = torch.compile(twin, backend=counted(), fullgraph=True)
    lb.set_task(twin, "b")
    with lb.use_tasks(llama, ["a", "b"]), lb.use_tasks(twin, ["b", None]):
        same(logits(graph), logits(twin))
        assert not torch.allclose(logits(graph), logits(llama))
    keys = [int(m.key) for model in (llama, twin) for m in named_modules(model).values()]
    assert len(set(keys)) == len(keys)


@torch.no_grad()
def test_layers_that_are_compiled_one_by_one(tmp_path: Path) -> None:
    """Then the model's call is outside of the graphs. All layers have one graph."""
    llama, backend = (
        with_tasks(write_model(LlamaForCausalLM(llama_config(True)), tmp_path / "llama", linears)),
        counted(),
    )
    for layer in llama.model.layers:
        layer.compile(backend=backend, fullgraph=True)
    found = []
    for tasks in (["a", "b"], "added", [None, "b"]):
        with lb.use_tasks(llama, tasks):
            found.append(logits(llama))
    graphs = backend.frame_count
    twin = copy.deepcopy(llama)
    for layer in twin.model.layers:
        layer._compiled_call_impl = None
    for tasks, mine in zip((["a", "b"], "added", [None, "b"]), found, strict=True):
        with lb.use_tasks(twin, tasks):
            same(mine, logits(twin))
    assert graphs <= 2


@torch.no_grad()
def test_heads(tmp_path: Path) -> None:
    """Each row's logits come from its task's head, in one graph."""
    torch.manual_seed(0)
    base = write_model(BertModel(bert_config()), tmp_path / "bert", linears)
    make: Callable[[], Any] = lambda: AutoModelForSequenceClassification.from_pretrained(base)  # noqa: E731
    for i, name in enumerate("ab"):
        torch.manual_seed(i)
        model = make()
        lb.prepare_scale_tuning(model, name=name)
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
        lb.save_task(model, tmp_path / name)
    torch.manual_seed(7)
    model = make().eval()
    for name in "ab":
        lb.load_task(model, tmp_path / name)
    backend = counted()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    found = []
    for tasks in (["a", "b"], ["b", None], "a", None):
        with lb.use_tasks(model, tasks):
            found.append(logits(compiled))
            same(found[-1], logits(model))
    assert backend.frame_count == 1
    assert not torch.allclose(found[0][0], found[3][0])


def test_no_tasks_in_a_backward_pass_without_the_block(compiled: Compiled) -> None:
    """Where something is computed anew there, in a thread that has no block, the row's task is unknown."""
    module = next(iter(named_modules(compiled.model).values()))

    class Anew(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return torch.ops.lowbit.task_numbers(grad, module.key, 2, False, -1, -1, False, None).to(grad)

    out = Anew.apply(torch.zeros(2, requires_grad=True))
    with lb.use_tasks(compiled.model, ["a", "b"]):
        out.sum().backward(retain_graph=True)
    with pytest.raises(TaskError, match="computed anew in the backward pass"):
        out.sum().backward()


def test_a_module_that_is_gone() -> None:
    key = compiled_tasks.new_key(type("Module", (), {})())
    with pytest.raises(TaskError, match="a module that is gone"):
        torch.ops.lowbit.task_numbers(torch.zeros(1), key, 1, False, -1, -1, False, None)


def test_numbers_of_another_process_are_not_given_twice(tmp_path: Path) -> None:
    """A model is unpickled where numbers start anew."""
    model = AutoModelForCausalLM.from_pretrained(write_model(small_llama(), tmp_path / "model", linears))
    for name in ("a", "b"):
        lb.load_task(model, bundle(model, 0), name=name)
    state = copy.copy(model.lowbit_state)  # as pickle does
    assert state.loaded.keys() == state.numbers.keys()
    assert not set(state.numbers.values()) & set(model.lowbit_state.numbers.values())


@pytest.mark.parametrize("tasks", [["a", "b"], ["a"] * 3 + ["b"]])
def test_what_the_compiler_leaves_out_knows_the_batch(tasks: list[str], tmp_path: Path) -> None:
    """Layers behind a graph break check the rows as those of an uncompiled model do."""
    base = write_model(BertModel(bert_config()), tmp_path / "model", lambda path, module: SCHEME)  # positions too
    model = AutoModel.from_pretrained(base).eval()
    for seed, name in enumerate("ab"):
        lb.load_task(model, bundle(model, seed), name=name)
    for part in (model.embeddings, model.encoder):
        part.forward = torch._dynamo.disable(part.forward)
    graph, ids = torch.compile(model, backend="aot_eager"), IDS[:1].repeat(4, 1)
    with torch.no_grad(), lb.use_tasks(model, tasks):
        if len(tasks) == 4:
            same(graph(input_ids=ids).last_hidden_state, model(input_ids=ids).last_hidden_state)
        else:
            with pytest.raises(TaskError, match="gets 4 rows, and use_tasks has 2 tasks"):
                graph(input_ids=ids)
    assert active_tasks.traced.call is None
