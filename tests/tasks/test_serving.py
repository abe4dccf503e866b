"""Tasks of a model in memory: loaded, chosen, mixed in one batch, unloaded, merged into the base."""

from __future__ import annotations

import copy
import logging
import pickle
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import composites
from support.building import write_model
from support.composites import converted
from support.models import IDS, bert_config, gpt2, llama_config, t5
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertForMaskedLM,
    BertModel,
    LlamaForCausalLM,
    PreTrainedModel,
)

import lowbit_format as lb
from lowbit_format.container.reader import ModelReader
from lowbit_format.container.writer import StoredTensor
from lowbit_format.errors import BundleError, DigestError, FingerprintError, PrecisionError, TaskError, TuningError
from lowbit_format.integrations.placement import lowbit_modules
from lowbit_format.reference import decode_numpy
from lowbit_format.runtime import active_tasks
from lowbit_format.runtime.modules import LowbitModule
from lowbit_format.schema import Scheme
from lowbit_format.tasks.bundle import TaskBundle, read_bundle, write_bundle
from lowbit_format.tasks.bundle_config import TaskConfig
from lowbit_format.tasks.matching import effective_params
from lowbit_format.tasks.models import named_modules
from lowbit_format.tasks.operations import OPERATIONS
from lowbit_format.tasks.saving import bundle_of

BCQ = Scheme("bcq", 3, 8, "F16", offset=True, nested=(2,))
UNIFORM = Scheme("uniform", 4, 16, "F16")
TABLE = Scheme("codebook", 2, 0, "F32")
ADDITIONS = tuple(name for name in OPERATIONS if name.endswith(".add"))


def everything(path: str, module: nn.Module) -> Scheme:
    """All modules: embeddings and what is tied to them too, in three codecs."""
    if isinstance(module, nn.Embedding):
        return TABLE
    return UNIFORM if "down" in path or "output" in path else BCQ


def linears(path: str, module: nn.Module) -> Scheme | None:
    return None if isinstance(module, nn.Embedding) else BCQ


MODELS: dict[str, tuple[Callable[[], PreTrainedModel], Any]] = {
    "llama-tied": (lambda: LlamaForCausalLM(llama_config(True)), AutoModelForCausalLM),
    "gpt2": (gpt2, AutoModelForCausalLM),
    "bert": (lambda: BertForMaskedLM(bert_config()), AutoModel),
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("bases")
    return {name: write_model(make(), root / name, everything) for name, (make, _) in MODELS.items()}


@pytest.fixture
def llama(directories: dict[str, Path]) -> Any:
    return AutoModelForCausalLM.from_pretrained(directories["llama-tied"]).eval()


def task(model: Any, seed: int, operations: tuple[str, ...] = ("scales.mul",), planes: int | None = None) -> TaskBundle:
    """A bundle for `model` of random deltas, large enough to be seen in the results."""
    rng, base = np.random.default_rng(seed), model.lowbit_base
    deltas = {}
    for name, module in named_modules(model).items():
        p, rows, groups = module.scales.shape
        p = min(p, planes or p)
        shapes = {"scales.mul": (p, rows), "scales.add": (p, rows, groups)}
        shift = {"bcq": "offsets.add", "uniform": "zeros.add"}.get(module.scheme.codec)
        for op in operations:
            if op in shapes:
                size = 0.5 if op == "scales.mul" else 0.02
                deltas[f"{name}.{op}"] = rng.normal(0, size, shapes[op]).astype(np.float32)
            elif op == shift:
                deltas[f"{name}.{op}"] = rng.normal(0, 0.1, (rows, groups)).astype(np.float32)
    config = TaskConfig(base.fingerprint.body, base.fingerprint.head, bits=base.bits)
    return TaskBundle(config, deltas)


def logits(model: Any, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(**(inputs or {"input_ids": IDS}))
    found: Tensor = out.logits if hasattr(out, "logits") else out.last_hidden_state
    return found


def planes_of(model: Any) -> dict[str, bytes]:
    return {path: m.planes.detach().numpy().tobytes() for path, m in lowbit_modules(model)}


def close(found: Tensor, want: Tensor) -> None:
    """To 1e-5 of the row's size."""
    assert float((found - want).norm() / want.norm()) < 1e-5


# --- one task --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("operations", [("scales.mul",), ("scales.add",), ADDITIONS, ("zeros.add", "scales.mul")])
def test_a_task_computes_with_the_effective_scales_of_the_spec(
    directories: dict[str, Path], name: str, operations: tuple[str, ...]
) -> None:
    """Module by module the weight is that of TSK-8, decoded by the reference."""
    model = MODELS[name][1].from_pretrained(directories[name]).eval()
    reader, bundle = ModelReader(directories[name]), task(model, 1, operations)
    before, planes = logits(model), planes_of(model)
    lb.load_task(model, bundle, name="a")
    assert torch.equal(logits(model), before)
    lb.set_task(model, "a")
    for short, module in named_modules(model).items():
        path = next(p for p in reader.config.modules if reader.config.canonical_path(p)[0] == short)
        matrix = reader.matrix(path)
        want = replace(matrix, params=effective_params(bundle, short, matrix.params))
        weight = module.dequantize(torch.float32)
        weight = weight.t() if module.kind == "conv1d" else weight
        np.testing.assert_array_equal(weight.numpy(), decode_numpy(want))
    changed = logits(model)
    assert not torch.allclose(changed, before)
    lb.set_task(model, None)
    assert torch.equal(logits(model), before)
    assert planes_of(model) == planes


@pytest.mark.parametrize("name", MODELS)
def test_a_float_model_with_the_weights_of_the_task_gives_its_results(directories: dict[str, Path], name: str) -> None:
    """Tied places too: an embedding's delta reaches the output head (TIE-1)."""
    model = MODELS[name][1].from_pretrained(directories[name]).eval()
    lb.load_task(model, task(model, 1, ("scales.mul", "offsets.add")), name="a")
    lb.set_task(model, "a")
    found = logits(model)
    assert not any(isinstance(m, LowbitModule) for m in model.dequantize().modules())
    torch.testing.assert_close(logits(model), found)


def test_save_and_load_are_bit_equal(directories: dict[str, Path], tmp_path: Path) -> None:
    one, two = (AutoModelForCausalLM.from_pretrained(directories["llama-tied"]).eval() for _ in range(2))
    bundle = task(one, 3, ADDITIONS)
    lb.load_task(one, bundle, name="a")
    lb.set_task(one, "a")
    lb.save_task(one, tmp_path / "task", metrics={"loss": 1.5})
    again = read_bundle(tmp_path / "task")
    assert again.deltas.keys() == bundle.deltas.keys()
    assert all(again.deltas[k].tobytes() == v.tobytes() for k, v in bundle.deltas.items())
    assert "1.5" in (tmp_path / "task" / "README.md").read_text()
    assert lb.load_task(two, tmp_path / "task") == "task"
    lb.set_task(two, "task")
    assert torch.equal(logits(two), logits(one))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_deltas_in_fewer_bits(llama: Any, tmp_path: Path, dtype: str) -> None:
    bundle = task(llama, 3)
    lb.load_task(llama, bundle, name="a")
    lb.save_task(llama, tmp_path, name="a", dtype=dtype)
    again = read_bundle(tmp_path).deltas
    for name, delta in bundle.deltas.items():
        want = torch.tensor(delta).to(getattr(torch, dtype)).float().numpy()
        np.testing.assert_array_equal(again[name], want)
    assert f"stored in {dtype}" in (tmp_path / "README.md").read_text()


def test_from_pretrained_with_a_task_takes_its_precision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = write_model(LlamaForCausalLM(llama_config(True)), tmp_path / "base", linears)
    low = lb.from_pretrained(base, bits=2).eval()
    lb.load_task(low, task(low, 5), name="a")
    lb.save_task(low, tmp_path / "mine", name="a")
    lb.set_task(low, "a")
    model = lb.from_pretrained(base, task=tmp_path / "mine").eval()
    assert [(t.name, t.active, t.config.bits) for t in lb.list_tasks(model)] == [("mine", True, 2)]
    assert torch.equal(logits(model), logits(low))
    with pytest.raises(BundleError, match="MAT-3"):
        lb.load_task(lb.from_pretrained(base), tmp_path / "mine")


def test_the_base_may_be_saved_sharded_and_renamed(llama: Any, tmp_path: Path) -> None:
    bundle = task(llama, 3)
    lb.load_task(llama, bundle, name="a")
    lb.set_task(llama, "a")
    want = logits(llama)
    llama.save_pretrained(tmp_path / "elsewhere", max_shard_size="8KB")
    assert len(list((tmp_path / "elsewhere").glob("*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "elsewhere").eval()
    lb.set_task(llama, None)
    assert torch.equal(logits(again), logits(llama))  # what was saved is the base
    lb.load_task(again, bundle, name="a")
    lb.set_task(again, "a")
    assert torch.equal(logits(again), want)


def test_casts_and_copies_keep_deltas(llama: Any) -> None:
    lb.load_task(llama, task(llama, 3), name="a")
    lb.set_task(llama, "a")
    want = logits(llama)
    for other in (copy.deepcopy(llama), pickle.loads(pickle.dumps(llama))):
        assert torch.equal(logits(other), want)
        lb.set_task(other, None)
        assert not torch.equal(logits(other), want)
        assert torch.equal(logits(llama), want)
    llama.to(torch.bfloat16).to(torch.float32)
    assert torch.equal(llama.model.layers[0].self_attn.q_proj.deltas["a"].scales, _delta(llama, "a"))
    assert llama.model.layers[0].self_attn.q_proj.deltas["a"].scales.dtype == torch.float32


def _delta(model: Any, name: str) -> Tensor:
    bundle = bundle_of(model, name)
    return torch.tensor(bundle.deltas["layers.0.self_attn.q_proj.scales.mul"])


def test_memory_of_a_task_is_its_deltas(llama: Any) -> None:
    bundles = [task(llama, i, planes=1) for i in range(200)]
    for i, bundle in enumerate(bundles):
        lb.load_task(llama, bundle, name=f"t{i}")
    held = {
        t.data_ptr(): t.nbytes
        for m in named_modules(llama).values()
        for d in m.deltas.values()
        for t in d
        if t is not None
    }
    assert sum(held.values()) == sum(t.nbytes for t in lb.list_tasks(llama)) == sum(b.nbytes for b in bundles)
    for i in range(200):
        lb.unload_task(llama, f"t{i}")
    assert lb.list_tasks(llama) == []
    assert not any(m.deltas for _, m in lowbit_modules(llama))


# --- refusals --------------------------------------------------------------------------------------


def test_another_base_is_refused_naming_both(llama: Any) -> None:
    bundle = task(llama, 1)
    other = replace(bundle, config=replace(bundle.config, base_fingerprint="ab" * 32, base_model_name_or_path="x/y"))
    with pytest.raises(FingerprintError, match=f"{'ab' * 32}.*x/y.*{llama.lowbit_base.fingerprint.body}"):
        lb.load_task(llama, other, name="a")
    assert lb.list_tasks(llama) == []


@pytest.mark.parametrize("defect", ["unknown", "shape", "infinite", "precision", "above", "damaged"])
def test_what_does_not_fit_is_refused_and_nothing_is_loaded(llama: Any, tmp_path: Path, defect: str) -> None:
    bundle = task(llama, 1)
    name = "layers.1.mlp.down_proj.scales.mul"
    if defect == "unknown":
        bundle.deltas["layers.7.mlp.down_proj.scales.mul"] = bundle.deltas[name]
    elif defect == "shape":
        bundle.deltas[name] = bundle.deltas[name][:, 1:]
    elif defect == "infinite":
        bundle.deltas[name] = np.full_like(bundle.deltas[name], 3e38)
        module = llama.model.layers[1].mlp.down_proj
        module.scales.data.mul_(100)
    elif defect == "precision":
        bundle = replace(bundle, config=replace(bundle.config, bits=1))
    elif defect == "above":  # of no module, though every module would be read at its own bits
        most = max(m.scheme.bits for m in llama.lowbit_base.config)
        bundle = replace(bundle, config=replace(bundle.config, bits=most + 1))
    write_bundle(tmp_path, bundle)
    if defect == "damaged":
        file = tmp_path / "task_scales.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    error, rule = {
        "unknown": (BundleError, "TSK-7"),
        "shape": (BundleError, "TSK-7"),
        "infinite": (BundleError, "MAT-6"),
        "precision": (PrecisionError, "NST-3"),
        "above": (PrecisionError, "NST-3"),
        "damaged": (DigestError, "DIG-3"),
    }[defect]
    with pytest.raises(error, match=rule):
        lb.load_task(llama, tmp_path, name="a")
    assert lb.list_tasks(llama) == []
    assert not any(m.deltas for _, m in lowbit_modules(llama))


def test_names(llama: Any, tmp_path: Path) -> None:
    lb.load_task(llama, task(llama, 1), name="a")
    for call in (
        lambda: lb.load_task(llama, task(llama, 1), name="a"),
        lambda: lb.set_task(llama, "b"),
        lambda: lb.unload_task(llama, "b"),
        lambda: lb.save_task(llama, tmp_path, name="b"),
        lambda: lb.save_task(llama, tmp_path),
        lambda: lb.merge_task(llama, "b"),
        lambda: lb.use_tasks(llama, ["a", "b"]).__enter__(),
        lambda: lb.use_tasks(llama, []).__enter__(),
        lambda: lb.set_task(nn.Linear(2, 2), "a"),
        lambda: lb.set_task(llama.model, "a"),
        lambda: lb.save_task(llama, tmp_path, name="a", dtype="int8"),
    ):
        with pytest.raises(TaskError):
            call()
    with pytest.raises(BundleError, match="no such directory"):
        lb.load_task(llama, tmp_path / "nothing")
    assert list(tmp_path.iterdir()) == []


# --- mixing ----------------------------------------------------------------------------------------


def alone(model: Any, name: str | None, run: Callable[[], Tensor]) -> Tensor:
    lb.set_task(model, name)
    out = run()
    lb.set_task(model, None)
    return out


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "kinds",
    [
        (("scales.mul",), ("scales.mul",), ("scales.mul",)),
        (("scales.add",), ("scales.add",), ("scales.add",)),
        (("scales.mul",), ("scales.add",), ("offsets.add", "zeros.add")),
    ],
    ids=["mul", "add", "every kind"],
)
def test_each_row_equals_its_single_task_run(directories: dict[str, Path], name: str, kinds: Any) -> None:
    model = MODELS[name][1].from_pretrained(directories[name]).eval()
    for i, operations in enumerate(kinds):
        lb.load_task(model, task(model, i, operations, planes=i + 1), name=f"t{i}")
    rows = ["t2", None, "t0", "t1", None, "t0", "t0"]
    ids = torch.randint(2, 60, (len(rows), 5))
    with lb.use_tasks(model, rows):
        found = logits(model, input_ids=ids)
    for i, row in enumerate(rows):
        close(found[i], alone(model, row, lambda: logits(model, input_ids=ids))[i])
    assert torch.equal(logits(model, input_ids=ids), alone(model, None, lambda: logits(model, input_ids=ids)))
    for only in ("t1", None):
        with lb.use_tasks(model, only):
            assert torch.equal(logits(model, input_ids=ids), alone(model, only, lambda: logits(model, input_ids=ids)))


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["llama-tied", "t5"])
def test_generate_mixed_with_beams_and_padding(
    directories: dict[str, Path], tmp_path: Path, name: str, beams: int
) -> None:
    if name == "t5":
        torch.manual_seed(0)
        model = AutoModelForSeq2SeqLM.from_pretrained(write_model(t5(), tmp_path / "t5", linears)).eval()
    else:
        model = AutoModelForCausalLM.from_pretrained(directories[name]).eval()
    for i in range(2):
        lb.load_task(model, task(model, i), name=f"t{i}")
    rows = ["t1", None, "t0", "t1"]
    ids, mask = torch.randint(2, 60, (4, 6)), torch.ones(4, 6, dtype=torch.long)
    mask[0, :3] = mask[2, :1] = 0
    options = {"num_beams": beams, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    options |= {"output_scores": True, "return_dict_in_generate": True}

    def generate() -> Any:
        return model.generate(input_ids=ids, attention_mask=mask, **options)

    with lb.use_tasks(model, rows):
        found = generate()
    scores = torch.stack(found.scores).unflatten(1, (len(rows), -1))  # [step, row, beam, word]
    seen = []
    for i, row in enumerate(rows):
        lb.set_task(model, row)
        want = generate()
        assert torch.equal(found.sequences[i], want.sequences[i])
        seen.append(torch.stack(want.scores).unflatten(1, (len(rows), -1))[:, i])
        torch.testing.assert_close(scores[:, i], seen[-1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(seen[0], seen[1])


def test_rows_must_fit_the_tasks(llama: Any) -> None:
    lb.load_task(llama, task(llama, 1), name="a")
    with lb.use_tasks(llama, ["a", None, "a"]), pytest.raises(TaskError, match="2 rows"):
        logits(llama)


def test_only_generate_repeats_the_rows_of_a_task(llama: Any) -> None:
    """Two names for four rows would be meant for other rows: a, b, a, b, or the first two of them."""
    lb.load_task(llama, task(llama, 1), name="a")
    ids, options = IDS[:1].repeat(4, 1), {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    fits = {"num_beams": 2, "num_return_sequences": 2, **options}
    with lb.use_tasks(llama, ["a", None]):
        for call in (
            lambda: llama(input_ids=ids),
            lambda: llama.generate(input_ids=ids, **options),
            lambda: llama.generate(input_ids=ids[:1], **fits),  # two beams of one row
        ):
            with pytest.raises(TaskError, match="rows, and use_tasks has 2 tasks"):
                call()
        assert len(llama.generate(input_ids=ids[:2], **fits)) == 4
        with pytest.raises(TaskError, match="4 rows"):  # again outside of generate's beams
            llama.generate(input_ids=ids, **options)
    with lb.use_tasks(llama, "a"):
        llama(input_ids=ids)


def test_an_unloaded_task_is_not_taken_for_the_base(llama: Any) -> None:
    lb.load_task(llama, task(llama, 1), name="a")
    with lb.use_tasks(llama, ["a", None]):
        logits(llama)
        lb.unload_task(llama, "a")
        with pytest.raises(TaskError, match="'a'"):
            logits(llama)


def test_blocks_nest_and_models_do_not_disturb_each_other(directories: dict[str, Path]) -> None:
    one, two = (AutoModelForCausalLM.from_pretrained(directories["llama-tied"]).eval() for _ in range(2))
    for model in (one, two):
        for i in range(2):
            lb.load_task(model, task(model, i), name=f"t{i}")
    base, first, second = (alone(one, name, lambda: logits(one)) for name in (None, "t0", "t1"))
    with lb.use_tasks(one, "t0"):
        assert torch.equal(logits(two), base)
        with lb.use_tasks(two, "t1"), lb.use_tasks(one, None):
            assert torch.equal(logits(one), base)
            assert torch.equal(logits(two), second)
        assert torch.equal(logits(one), first)
    with pytest.raises(ZeroDivisionError), lb.use_tasks(one, "t0"):
        raise ZeroDivisionError
    assert torch.equal(logits(one), base)


def test_threads_do_not_disturb_each_other(llama: Any) -> None:
    for i in range(3):
        lb.load_task(llama, task(llama, i), name=f"t{i}")
    want = {name: alone(llama, name, lambda: logits(llama)) for name in (None, "t0", "t1", "t2")}
    lb.set_task(llama, "t2")
    wrong, barrier = [], threading.Barrier(4)

    def serve(name: str | None, use: bool) -> None:
        barrier.wait()
        for _ in range(15):
            if use:
                with lb.use_tasks(llama, [name, name]):
                    found = logits(llama)
            else:
                found = logits(llama)
            if not torch.equal(found, want[name]):
                wrong.append(name)

    jobs = [("t0", True), ("t1", True), (None, True), ("t2", False)]
    threads = [threading.Thread(target=serve, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_one_row_for_the_whole_batch(tmp_path: Path) -> None:
    """Position embeddings are looked up once for all rows; tasks that change them make a row for each."""
    torch.manual_seed(0)
    model = AutoModel.from_pretrained(write_model(BertForMaskedLM(bert_config()), tmp_path / "b", everything)).eval()
    bundle = task(model, 1)
    only = {k: v for k, v in bundle.deltas.items() if "position" in k}
    assert only
    lb.load_task(model, replace(bundle, deltas=only), name="a")
    with lb.use_tasks(model, ["a", None]):
        found = logits(model)
    for i, name in enumerate(("a", None)):
        close(found[i], alone(model, name, lambda: logits(model))[i])
    assert not torch.allclose(alone(model, "a", lambda: logits(model)), logits(model))


def test_a_block_sees_what_changes_in_it(llama: Any) -> None:
    """Stacked deltas are kept for a block: not those in training, nor those of a task that was loaded anew."""
    lb.load_task(llama, task(llama, 1), name="a")
    lb.prepare_scale_tuning(llama, "scales", include=["*_proj"], name="new")
    with lb.use_tasks(llama, ["new", "a"]):
        before = logits(llama)
        llama(input_ids=IDS).logits[0].sum().backward()
        with torch.no_grad():
            for param in llama.parameters():
                if param.requires_grad:
                    assert param.grad is not None
                    param += 0.1
        after = logits(llama)
        assert not torch.allclose(after[0], before[0])
        assert torch.equal(after[1], before[1])
        lb.unload_task(llama, "a")
        lb.load_task(llama, task(llama, 2), name="a")
        assert not torch.allclose(logits(llama)[1], before[1])


def test_what_does_not_work_row_by_row_is_refused(llama: Any, tmp_path: Path) -> None:
    """Where rows cannot be assigned to tasks, an error is raised, and no row gets another one's task."""
    lb.load_task(llama, task(llama, 1), name="a")
    projection = llama.model.layers[0].self_attn.q_proj
    with lb.use_tasks(llama, ["a", None]):
        with pytest.raises(TaskError, match="one row without a batch"):
            projection(torch.randn(32))
        with active_tasks.model_call(4), pytest.raises(TaskError, match="first axis is not the batch"):
            projection(torch.randn(8, 4, 32))
        projection.path = "model.layers.0.mlp.experts.3.w1"
        with pytest.raises(TaskError, match="row by row"):
            projection(torch.randn(4, 32))
    t5_model = AutoModelForSeq2SeqLM.from_pretrained(write_model(t5(), tmp_path / "t5", everything)).eval()
    lb.load_task(t5_model, task(t5_model, 1), name="a")
    with lb.use_tasks(t5_model, ["a", None]), pytest.raises(TaskError, match="relative_attention_bias"):
        t5_model(input_ids=IDS, decoder_input_ids=IDS)
    llama.config.model_type = "xlnet"
    with pytest.raises(TaskError, match="xlnet"), lb.use_tasks(llama, ["a", None]):
        pass


def test_under_peft(llama: Any) -> None:
    """A task and an adapter on one model."""
    from peft import LoraConfig, get_peft_model

    lb.load_task(llama, task(llama, 1), name="a")
    want = alone(llama, "a", lambda: logits(llama))
    adapted = get_peft_model(llama, LoraConfig(target_modules=["q_proj"], r=2))
    lb.set_task(adapted, "a")
    assert torch.equal(logits(adapted), want)
    assert [t.name for t in lb.list_tasks(adapted)] == ["a"]


def test_a_merged_model_forgets_where_the_old_base_is(llama: Any, tmp_path: Path) -> None:
    lb.load_task(llama, task(llama, 1), name="a")
    lb.merge_task(llama, "a")
    lb.load_task(llama, task(llama, 2), name="b")
    lb.save_task(llama, tmp_path, name="b")
    config = read_bundle(tmp_path).config
    assert config.base_model_name_or_path is None
    assert config.base_fingerprint == llama.lowbit_base.fingerprint.body
    lb.save_task(llama, tmp_path, name="b", base_model="x/y")
    assert read_bundle(tmp_path).config.base_model_name_or_path == "x/y"


def test_merging_spares_a_task_in_training(llama: Any) -> None:
    lb.load_task(llama, task(llama, 1), name="a")
    lb.prepare_scale_tuning(llama, "scales", name="new")
    with pytest.raises(TaskError, match="'new' is being trained"):
        lb.merge_task(llama, "a")
    assert [t.name for t in lb.list_tasks(llama)] == ["a", "new"]


def test_a_task_needs_a_directory_of_its_own(llama: Any, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path / "base")
    before = sorted(p.name for p in (tmp_path / "base").iterdir())
    lb.load_task(llama, task(llama, 1), name="a")
    with pytest.raises(TaskError, match="holds a model"):
        lb.save_task(llama, tmp_path / "base", name="a")
    assert sorted(p.name for p in (tmp_path / "base").iterdir()) == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "README.md").write_text("mine")
    lb.save_task(llama, tmp_path / "notes", name="a")
    assert (tmp_path / "notes" / "README.md").read_text() == "mine"


def test_models_without_lowbit_modules_are_told_apart(llama: Any) -> None:
    """One that was loaded before the import, a part of a lowbit model, two of them, and any other."""
    forgotten = LlamaForCausalLM(llama_config(True))
    forgotten.config.quantization_config = {"quant_method": "lowbit"}
    plain = copy.deepcopy(llama).dequantize()
    for model, message in (
        (forgotten, "RANDOM"),
        (llama.model.layers[0], "this LlamaDecoderLayer is a part of a lowbit model"),
        (llama.model, "this LlamaModel is a part of a lowbit model"),
        (nn.Sequential(llama, copy.deepcopy(llama)), "contains 2 lowbit models: give one of them, 0 or 1"),
        (plain, "no lowbit model: load one"),
        (nn.Linear(2, 2), "no lowbit model: load one"),
    ):
        with pytest.raises(TaskError, match=message):
            lb.set_task(model, None)
    with pytest.raises(BundleError, match="no such directory"):
        lb.load_task(llama, "flims")


def test_pieces_of_images_are_no_rows(tmp_path: Path) -> None:
    """Tasks of the text part mix while a vision tower sees patches; those that change the tower are refused."""
    model = AutoModelForImageTextToText.from_pretrained(converted(composites.qwen2_5_vl(), tmp_path)[0])
    ids = torch.tensor([[1, 1, 62, 60, 63, 9], [1, 62, 60, 60, 63, 9]])
    grid = torch.tensor([[1, 2, 2], [1, 4, 2]])
    batch = {"input_ids": ids, "attention_mask": (ids > 1).long(), "image_grid_thw": grid}
    batch |= {"pixel_values": torch.randn(12, 96), "mm_token_type_ids": (ids == 60).int()}
    whole = task(model, 1)
    for name, text in (("text", True), ("all", False)):
        deltas = {n: d for n, d in whole.deltas.items() if "visual" not in n or not text}
        lb.load_task(model, replace(whole, deltas=deltas), name=name)

    def run() -> Tensor:
        with torch.no_grad():
            return model(**batch).logits

    with lb.use_tasks(model, ["text", None]):
        mixed = run()
    for row, name in enumerate(("text", None)):
        close(mixed[row], alone(model, name, run)[row])
    assert not torch.allclose(mixed[0], alone(model, None, run)[0])
    expected = r"visual\.blocks\.0\..* gets 12 patches.*batch of 2 rows.*exclude=\['model\.visual\.blocks\.\*'\]"
    with lb.use_tasks(model, ["all", None]), pytest.raises(TaskError, match=expected):
        run()


def test_patterns_may_be_without_the_prefix(directories: dict[str, Path]) -> None:
    """As bundles name modules."""
    model = AutoModelForSequenceClassification.from_pretrained(directories["bert"])
    found = lb.prepare_scale_tuning(model, "scales", include=["encoder.layer.1.*.query"])
    assert found.modules == ("bert.encoder.layer.1.attention.self.query",)
    lb.unload_task(model, "default")
    with pytest.raises(TuningError, match=r"bert\.encoder\.layer\.0\.attention\.self\.query"):
        lb.prepare_scale_tuning(model, "scales", include=["bert.encoder.layer.0.attention.self.qeury"])


def test_the_card_says_how_to_load_a_head(directories: dict[str, Path], tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(directories["bert"], num_labels=5)
    lb.prepare_scale_tuning(model, "scales")
    lb.save_task(model, tmp_path / "a")
    card = (tmp_path / "a" / "README.md").read_text()
    assert "from transformers import BertForSequenceClassification" in card
    assert "num_labels=5, model_class=BertForSequenceClassification" in card


def test_merging_refuses_what_the_dtype_cannot_hold(llama: Any) -> None:
    bundle = task(llama, 1)
    name = next(k for k in bundle.deltas if "down_proj" in k)
    bundle.deltas[name][:] = 1e7
    lb.load_task(llama, bundle, name="a")
    want = alone(llama, "a", lambda: logits(llama))
    with pytest.raises(TaskError, match="float16"):
        lb.merge_task(llama, "a", scale_dtype="float16")
    assert torch.equal(alone(llama, "a", lambda: logits(llama)), want)


# --- heads -----------------------------------------------------------------------------------------


@pytest.fixture
def classifier(directories: dict[str, Path], tmp_path: Path) -> tuple[Any, list[Path]]:
    """A model with a fresh head, and two bundles with heads of their own."""
    bundles = []
    for i in range(2):
        torch.manual_seed(i)
        model = AutoModelForSequenceClassification.from_pretrained(directories["bert"]).eval()
        lb.prepare_scale_tuning(model, "scales", name="x")
        for param in model.parameters():
            if param.requires_grad:
                nn.init.normal_(param, std=0.3)
        bundles.append(tmp_path / f"t{i}")
        lb.save_task(model, bundles[-1])
    torch.manual_seed(7)
    return AutoModelForSequenceClassification.from_pretrained(directories["bert"]).eval(), bundles


def test_tasks_bring_their_heads(classifier: tuple[Any, list[Path]], tmp_path: Path) -> None:
    model, bundles = classifier
    base = logits(model)
    for bundle in bundles:
        lb.load_task(model, bundle)
    rows = ["t1", None, "t0", "t1"]
    ids = torch.randint(2, 60, (4, 6))
    want = {name: alone(model, name, lambda: logits(model, input_ids=ids)) for name in (None, "t0", "t1")}
    assert not torch.allclose(want["t0"], want["t1"])
    with lb.use_tasks(model, rows):
        found = logits(model, input_ids=ids)
    for i, name in enumerate(rows):
        close(found[i], want[name][i])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(alone(other, "t1", lambda m=other: logits(m, input_ids=ids)), want["t1"])
    lb.set_task(model, "t0")
    model.save_pretrained(tmp_path / "saved")
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(logits(saved), base)
    lb.unload_task(model, "t0")
    assert torch.equal(logits(model), base)


def test_what_a_bundle_does_not_save_stays_the_bases(classifier: tuple[Any, list[Path]]) -> None:
    """MAT-7: a weight without its bias; also while another task of this head is being trained."""
    model, bundles = classifier
    bundle, bias = read_bundle(bundles[0]), model.classifier.bias.detach().clone()
    part = replace(bundle, saved=tuple(t for t in bundle.saved if t.name != "classifier.bias"))
    lb.load_task(model, part, name="before")
    lb.prepare_scale_tuning(model, "scales", name="tuned")
    nn.init.normal_(model.classifier.bias)
    lb.load_task(model, part, name="during")
    lb.load_task(model, bundle, name="whole")
    whole, *parts = (model.classifier.module_of(name).state_dict() for name in ("whole", "before", "during"))
    assert not torch.equal(whole["bias"], bias)
    for found in parts:
        assert torch.equal(found["bias"], bias)
        assert torch.equal(found["weight"], whole["weight"])
    more = StoredTensor("classifier.scale", "F32", (1,), np.ones(1, "<f4"))
    with pytest.raises(TaskError, match=r"classifier\.scale|'scale'.*MAT-7"):
        lb.load_task(model, replace(bundle, saved=(*bundle.saved, more)), name="more")


def test_a_prefix_in_a_bundle_is_taken_off(classifier: tuple[Any, list[Path]]) -> None:
    """TSK-5: by the reader too, before it looks which saved modules lie in one another; and nothing is saved twice."""
    model, bundles = classifier
    bundle, own = read_bundle(bundles[0]), model.bert.embeddings.LayerNorm.weight
    ones = StoredTensor("bert.embeddings.LayerNorm.weight", "F32", tuple(own.shape), np.full(own.shape, 2, "<f4"))
    listed = (*bundle.config.modules_to_save, "bert.embeddings.LayerNorm")
    good = replace(bundle, config=replace(bundle.config, modules_to_save=listed), saved=(*bundle.saved, ones))
    lb.load_task(model, good, name="good")
    assert set(model.bert.embeddings.LayerNorm.module_of("good").weight.tolist()) == {2.0}
    bare = replace(ones, name=ones.name.removeprefix("bert."))
    listed = (*listed, "embeddings.LayerNorm")
    twice = replace(good, config=replace(bundle.config, modules_to_save=listed), saved=(*good.saved, bare))
    with pytest.raises(BundleError, match="TSK-5"):
        lb.load_task(model, twice, name="twice")
    assert [t.name for t in lb.list_tasks(model)] == ["good"]


def test_heads_with_hooks(classifier: tuple[Any, list[Path]]) -> None:
    """accelerate replaces ``forward`` of single modules."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    model, bundles = classifier
    lb.load_task(model, bundles[0])
    want = alone(model, "t0", lambda: logits(model))
    lb.unload_task(model, "t0")
    add_hook_to_module(model.classifier, ModelHook())
    lb.load_task(model, bundles[0])
    assert torch.equal(alone(model, "t0", lambda: logits(model)), want)


def test_a_head_in_the_files_is_trained_too(directories: dict[str, Path], tmp_path: Path) -> None:
    """One that was saved with the base before it was ever trained must not stay random, unnoticed."""
    AutoModelForSequenceClassification.from_pretrained(directories["bert"]).save_pretrained(tmp_path / "saved")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert model.lowbit_fresh == ()
    assert lb.prepare_scale_tuning(model, "scales").modules_to_save == ("classifier",)


def test_a_bundle_with_a_head_needs_a_model_with_one(
    classifier: tuple[Any, list[Path]], directories: dict[str, Path]
) -> None:
    headless = AutoModel.from_pretrained(directories["bert"])
    with pytest.raises(TaskError, match="'classifier'"):
        lb.load_task(headless, classifier[1][0])
    other = AutoModelForSequenceClassification.from_pretrained(directories["bert"], num_labels=5)
    with pytest.raises(TaskError, match=r"num_labels=2"):
        lb.load_task(other, classifier[1][0])
    assert lb.list_tasks(headless) == lb.list_tasks(other) == []


def test_heads_of_other_sizes_serve_alone_but_not_in_one_batch(
    classifier: tuple[Any, list[Path]], directories: dict[str, Path], tmp_path: Path
) -> None:
    model, bundles = classifier
    lb.load_task(model, bundles[0])
    with lb.use_tasks(model, ["t0", None]):
        logits(model)
    module = model.classifier.task_copies["t0"]
    module.weight.data, module.bias.data = torch.randn(3, 32), torch.randn(3)
    with lb.use_tasks(model, ["t0", None]), pytest.raises(TaskError, match="different sizes"):
        logits(model)


def test_parts_that_the_class_lacks_are_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = write_model(BertModel(bert_config()), tmp_path / "base", everything)
    bundle = task(AutoModel.from_pretrained(base), 1)
    model = AutoModelForTokenClassification.from_pretrained(base)
    missing = {k.removesuffix(".scales.mul") for k in bundle.deltas} - set(named_modules(model))
    assert missing
    with caplog.at_level(logging.WARNING):
        lb.load_task(model, bundle, name="a")
    assert all(part in caplog.text for part in missing)


# --- merging ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("operations", [("scales.mul",), ADDITIONS])
def test_a_merged_model_is_a_base_of_its_own(
    directories: dict[str, Path], tmp_path: Path, name: str, operations: tuple[str, ...]
) -> None:
    model = MODELS[name][1].from_pretrained(directories[name]).eval()
    bundle = task(model, 1, operations)
    lb.load_task(model, bundle, name="a")
    lb.load_task(model, task(model, 2), name="b")
    want, planes, old = alone(model, "a", lambda: logits(model)), planes_of(model), model.lowbit_base.fingerprint
    lb.merge_task(model, "a")
    close(logits(model), want)
    assert planes_of(model) == planes
    assert lb.list_tasks(model) == []
    assert model.lowbit_base.fingerprint != old
    model.save_pretrained(tmp_path / "merged")
    reader = ModelReader(tmp_path / "merged")
    reader.verify()
    assert reader.fingerprint(trust_digests=False) == model.lowbit_base.fingerprint
    again = MODELS[name][1].from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(FingerprintError):
        lb.load_task(again, bundle, name="a")


def test_merging_into_the_dtype_of_the_base_rounds(llama: Any) -> None:
    lb.load_task(llama, task(llama, 1, planes=1), name="a")
    want = alone(llama, "a", lambda: logits(llama))
    lb.merge_task(llama, "a", scale_dtype=None)
    assert llama.model.layers[0].self_attn.q_proj.scales.dtype == torch.float16
    assert not torch.equal(logits(llama), want)
    assert float((logits(llama) - want).norm() / want.norm()) < 5e-3


def test_a_merged_head_is_the_models_own(classifier: tuple[Any, list[Path]], tmp_path: Path) -> None:
    model, bundles = classifier
    lb.load_task(model, bundles[0])
    want = alone(model, "t0", lambda: logits(model))
    lb.merge_task(model, "t0")
    close(logits(model), want)  # not equal: of many rows the base's weight and the change of it are decoded, and added
    model.save_pretrained(tmp_path / "merged")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits(again), logits(model))
