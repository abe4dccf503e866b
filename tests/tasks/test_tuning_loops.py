"""Tuning in the usual training loops: a plain one, the Trainer, DDP, autocast, checkpointing, torch.compile."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, load_model, save_model
from support.tuning_models import (
    LENGTH,
    MODELS,
    WAYS,
    Bases,
    batch,
    gradients,
    logits_of,
    loss_of,
    same,
    scatter,
    sgd_steps,
    trained,
    values,
    worker,
)
from torch import Tensor
from torch.utils.data import Dataset

from lowbit_format import TaskCallback, load_task, prepare_scale_tuning, save_task, set_task, unload_task
from lowbit_format.container.reader import ModelReader
from lowbit_format.errors import TaskError, TuningError
from lowbit_format.tasks.bundle import SCALES_FILE, TaskBundle, read_bundle
from lowbit_format.tasks.saving import bundle_of

pytestmark = pytest.mark.usefixtures("one_thread")


def prepared(bases: Bases, name: str, scheme: str = "bcq", **options: Any) -> Any:
    model = bases.load(name, scheme)
    prepare_scale_tuning(model, "scales", **options)
    return model


# --- plain loops -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "scheme"), [("bert", "bcq"), ("llama", "uniform"), ("gpt2", "codebook")])
def test_a_plain_loop_lowers_the_loss(name: str, scheme: str, bases: Bases) -> None:
    model = prepared(bases, name, scheme)
    data, losses = batch(model), []
    optimizer = torch.optim.AdamW(trained(model).values(), 2e-2)
    for _ in range(15):
        optimizer.zero_grad()
        loss = loss_of(model, data)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.97 * losses[0]


@pytest.mark.parametrize("name", MODELS)
def test_accumulated_gradients_are_those_of_the_whole_batch(name: str, bases: Bases) -> None:
    model = prepared(bases, name, kind="add", offsets=True)
    scatter(model, 0.01)
    data = batch(model, 6)
    want = gradients(model, data)
    model.zero_grad()
    for rows in (slice(0, 2), slice(2, 4), slice(4, 6)):
        (loss_of(model, {key: t[rows] for key, t in data.items()}) / 3).backward()
    largest = max(float(grad.abs().max()) for grad in want.values())
    for key, p in trained(model).items():
        torch.testing.assert_close(p.grad, want[key], rtol=1e-4, atol=1e-6 * largest)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing(name: str, reentrant: bool, bases: Bases) -> None:
    """The same gradients bit for bit, with dropout; embeddings are frozen, so a block's input may need no gradient."""
    model = prepared(bases, name, offsets=True).train()
    scatter(model, 0.01)
    found, data = [], batch(model)
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(5)
        found.append(gradients(model, data))
    assert model.is_gradient_checkpointing
    assert found[0].keys() == trained(model).keys()
    assert same(found[1], found[0])


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_autocast(name: str, bases: Bases) -> None:
    model = prepared(bases, name, offsets=True)
    scatter(model, 0.01)
    data = batch(model)
    want = gradients(model, data)
    with torch.autocast("cpu", torch.bfloat16):
        model.zero_grad()
        loss_of(model, data).backward()
    found = {key: p.grad for key, p in trained(model).items()}
    assert {p.dtype for p in trained(model).values()} == {grad.dtype for grad in found.values()} == {torch.float32}
    found, want = (torch.cat([grads[key].flatten() for key in grads]) for grads in (found, want))
    assert not torch.equal(found, want)  # it was on
    assert float((found - want).norm() / want.norm()) < 0.03


# --- torch.compile ---------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    """How many have been compiled."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("name", [pytest.param("llama", marks=pytest.mark.exhaustive), "gpt2"])
def test_compiled(name: str, bases: Bases, fresh_compiler: None) -> None:
    """One graph, with the loss and the gradients of the eager model."""
    model = prepared(bases, name, kind="add", offsets=True)
    if name == "gpt2":
        model.loss_type = "ForCausalLM"  # transformers finds no name in GPT2LMHeadModel and warns, in the graph
    scatter(model, 0.01)
    data = batch(model)
    want, loss = gradients(model, data), loss_of(model, data)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.zero_grad()
    found = loss_of(compiled, data)
    found.backward()
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=0)
    largest = max(float(grad.abs().max()) for grad in want.values())
    for key, p in trained(model).items():
        torch.testing.assert_close(p.grad, want[key], rtol=1e-4, atol=1e-6 * largest)
    with torch.no_grad():  # an optimizer's step changes numbers, which no graph depends on
        for p in trained(model).values():
            p.sub_(0.1 * p.grad)
    assert graphs() == 1
    torch.testing.assert_close(loss_of(compiled, data), loss_of(model, data), rtol=1e-5, atol=0)
    assert graphs() == 1


@pytest.mark.parametrize(
    ("name", "modules_to_save"),
    [pytest.param("llama", [], marks=pytest.mark.exhaustive), ("bert", ["classifier"])],
)
def test_switching_compiles_nothing(
    name: str, modules_to_save: list[str], bases: Bases, tmp_path: Path, fresh_compiler: None
) -> None:
    """Two loaded tasks of the same shapes share one graph; the base has another."""
    for seed, task in enumerate(("a", "b")):
        model = prepared(bases, name, modules_to_save=modules_to_save)
        scatter(model, 0.05, seed)
        save_task(model, tmp_path / task)
    model = bases.load(name)
    for task in ("a", "b"):
        load_task(model, tmp_path / task)
    ids, want = batch(model)["input_ids"], {}
    for task in (None, "a", "b"):
        set_task(model, task)
        want[task] = logits_of(model)
    assert not torch.equal(want["a"], want["b"])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for task, compiled_by_now in (("a", 1), ("b", 1), ("a", 1), (None, 2), ("b", 2), (None, 2)):
            set_task(compiled, task)
            found = compiled(input_ids=ids, use_cache=False).logits if name != "bert" else compiled(ids).logits
            torch.testing.assert_close(found, want[task])
            assert graphs() == compiled_by_now, task


# --- the Trainer -----------------------------------------------------------------------------------


class Rows(Dataset):  # type: ignore[type-arg]
    """Random sentences with a label that their first word gives."""

    def __init__(self, rows: int, seed: int) -> None:
        self.ids = torch.randint(2, 64, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"input_ids": self.ids[i], "labels": int(self.ids[i, 0]) % 2}


def trainer(model: Any, directory: Path, *, callback: bool = True, **options: Any) -> transformers.Trainer:
    """On the CPU, 8 steps of 4 rows, with a checkpoint after 4; dropout is on."""
    defaults = {"max_steps": 8, "save_steps": 4, "learning_rate": 2e-2, "per_device_train_batch_size": 4}
    args = transformers.TrainingArguments(
        str(directory), use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1000, **{**defaults, **options}
    )
    return transformers.Trainer(
        model, args, train_dataset=Rows(32, 0), eval_dataset=Rows(16, 1), callbacks=[TaskCallback()] if callback else []
    )


def optimizer_numbers(trainer: transformers.Trainer) -> list[Tensor]:
    """All state of the optimizer, in the order of its parameters."""
    state = trainer.optimizer.state_dict()["state"]
    return [state[i][key] for i in sorted(state) for key in sorted(state[i])]


def test_a_resumed_training_is_a_straight_one(bases: Bases, tmp_path: Path) -> None:
    """Deltas, head, optimizer and random numbers, bit for bit, on a model that was loaded anew."""
    straight = prepared(bases, "bert", offsets=True)
    first = trainer(straight, tmp_path / "run")
    first.train()
    want, at_start = values(trained(straight)), prepared(bases, "bert", offsets=True)
    assert not any(torch.equal(p, want[key]) for key, p in trained(at_start).items())

    resumed = at_start
    checkpoint = tmp_path / "run" / "checkpoint-4"
    second = trainer(resumed, tmp_path / "again")
    second.train(resume_from_checkpoint=str(checkpoint))
    assert second.state.global_step == 8
    assert same(trained(resumed), want)
    numbers, wanted = optimizer_numbers(second), optimizer_numbers(first)
    assert len(numbers) == len(wanted) == 3 * len(want)
    assert all(torch.equal(a, b) for a, b in zip(numbers, wanted, strict=True))
    assert torch.equal(logits_of(resumed), logits_of(straight))


def test_checkpoints_hold_the_task_only(bases: Bases, tmp_path: Path) -> None:
    model = prepared(bases, "bert", offsets=True)
    base = logits_of(bases.load("bert"))
    trainer(model, tmp_path / "run", save_steps=8).train()
    checkpoint = tmp_path / "run" / "checkpoint-8"
    assert same(load_file(checkpoint / "model.safetensors"), values(trained(model)))
    numbers = sum(p.numel() for p in trained(model).values())
    files = {f.name: f.stat().st_size for f in checkpoint.iterdir()}
    assert files["model.safetensors"] < 4 * numbers + 200 * len(trained(model))
    assert files[SCALES_FILE] < 4 * numbers + 300 * len(trained(model))
    assert files["optimizer.pt"] < 8 * numbers + 700 * len(trained(model)) + 4000  # its file has much around them
    assert "config.json" not in files

    assert read_bundle(checkpoint).delta_values == numbers - 66
    other = bases.load("bert")
    set_task(other, load_task(other, checkpoint))
    assert torch.equal(logits_of(other), logits_of(model))

    model.save_pretrained(tmp_path / "base")  # the training is over: this is the base again
    saved, source = ModelReader(tmp_path / "base"), ModelReader(bases.path("bert"))
    assert saved.fingerprint() == source.fingerprint()
    assert not [name for name in saved.names() if "tuned" in name]
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    assert torch.equal(logits_of(again), base)
    unload_task(model, "default")
    assert torch.equal(logits_of(model), base)


@pytest.mark.parametrize("callback", [True, False])
def test_the_best_model_is_loaded_at_the_end(callback: bool, bases: Bases, tmp_path: Path) -> None:
    """Without the callback too: what the Trainer saves is the task."""
    model = prepared(bases, "bert")
    every = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
    run = trainer(
        model,
        tmp_path,
        callback=callback,
        learning_rate=0.5,
        greater_is_better=True,
        metric_for_best_model="loss",
        **every,
    )
    run.train()  # "best" is the highest loss here, which by then is not the last
    losses = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    best = max(losses, key=losses.__getitem__)
    assert best != 8, losses
    assert run.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert same(trained(model), load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors"))
    assert not same(trained(model), load_file(tmp_path / "checkpoint-8" / "model.safetensors"))
    assert run.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-6)


def test_a_checkpoint_without_the_task_is_refused(bases: Bases, tmp_path: Path) -> None:
    """It holds the base with its head, so training would start anew from it."""
    saved = prepared(bases, "bert")
    saved.lowbit_save = None  # as before there was a task
    trainer(saved, tmp_path / "run", callback=False).train()
    model = prepared(bases, "bert")
    with pytest.raises(TaskError, match=r"lacks 13 of 15 tensors in training.*holds the base"):
        trainer(model, tmp_path / "again").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))


def test_a_checkpoint_of_another_tuning_is_refused(bases: Bases, tmp_path: Path) -> None:
    trainer(prepared(bases, "bert", include=["query"]), tmp_path / "run", max_steps=1, save_steps=1).train()
    model = prepared(bases, "bert", include=["query", "key"])
    with pytest.raises(TaskError, match=r"lacks 2 of 6 tensors in training, such as '.*key\.tuned\.scales'"):
        trainer(model, tmp_path / "again").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


def test_a_tied_delta_resumes(bases: Bases, tmp_path: Path) -> None:
    """It has two names in the model, of which a checkpoint has one."""
    model = prepared(bases, "llama", include=["embed_tokens"])
    scatter(model)
    wanted = values(trained(model))
    assert list(wanted) == ["model.embed_tokens.tuned.scales"]
    callback = TaskCallback()
    callback.on_train_begin(None, None, None, model)
    model.save_pretrained(tmp_path, state_dict=None)  # as the Trainer does
    again = prepared(bases, "llama", include=["embed_tokens"])
    again.load_state_dict(load_file(tmp_path / "model.safetensors"), False)
    assert same(trained(again), wanted)
    assert torch.equal(logits_of(again), logits_of(model))


@pytest.mark.parametrize(
    "options", [{"gradient_checkpointing": True}, {"bf16": True}, {"gradient_accumulation_steps": 2}]
)
def test_options_of_the_trainer(options: dict[str, Any], bases: Bases, tmp_path: Path) -> None:
    model = prepared(bases, "bert")
    before = values(trained(model))
    trainer(model, tmp_path, max_steps=2, save_strategy="no", **options).train()
    assert not any(torch.equal(p, before[key]) for key, p in trained(model).items())
    assert all(bool(p.isfinite().all()) and p.dtype == torch.float32 for p in trained(model).values())


def test_what_the_trainer_saves_after_training(bases: Bases, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """``trainer.save_model`` writes the task; ``model.save_pretrained`` the base, and it says so."""
    model = prepared(bases, "bert", modules_to_save=["classifier"])
    run = trainer(model, tmp_path / "runs", max_steps=2, save_strategy="no")
    run.train()
    run.save_model(str(tmp_path / "mine"))
    again = read_bundle(tmp_path / "mine")
    assert again.config.modules_to_save == ("classifier",)
    wanted = bundle_of(model)
    assert all(again.deltas[key].tobytes() == delta.tobytes() for key, delta in wanted.deltas.items())
    with caplog.at_level(logging.WARNING, "lowbit_format"):
        model.save_pretrained(tmp_path / "base")
    assert "the base is saved" in caplog.text
    assert ModelReader(tmp_path / "base").fingerprint() == model.lowbit_base.fingerprint


def test_the_callback_needs_a_task(bases: Bases, tmp_path: Path) -> None:
    model = bases.load("bert", "bcq")
    with pytest.raises(TuningError, match="prepare_scale_tuning"):
        TaskCallback().on_train_begin(None, None, None, model)


def test_buffers_of_a_head_are_in_the_checkpoint(bases: Bases, tmp_path: Path) -> None:
    def with_norm() -> Any:
        model = bases.load("bert", "bcq")
        model.classifier = torch.nn.Sequential(torch.nn.BatchNorm1d(model.config.hidden_size), model.classifier)
        prepare_scale_tuning(model, "scales", modules_to_save=["classifier"])
        return model

    model = with_norm()
    model.train()(input_ids=torch.randint(2, 60, (4, 6)))
    assert model.classifier[0].running_mean.abs().sum() > 0
    TaskCallback().on_train_begin(None, None, None, model)
    model.save_pretrained(tmp_path, state_dict=None)
    again = with_norm()
    assert again.load_state_dict(load_file(tmp_path / "model.safetensors"), False).missing_keys == []
    assert torch.equal(again.classifier[0].running_mean, model.classifier[0].running_mean)


def test_whole_state_dicts_of_tied_models_load(bases: Bases, tmp_path: Path) -> None:
    """As accelerate's ``load_state``, which expects the names that tied tensors leave out in the result."""
    model = prepared(bases, "llama", include=["embed_tokens"])
    scatter(model)
    save_model(model, tmp_path / "all.safetensors")
    again = prepared(bases, "llama", include=["embed_tokens"])
    load_model(again, tmp_path / "all.safetensors")
    assert same(trained(again), values(trained(model)))


# --- distributed -----------------------------------------------------------------------------------


def numbers_of(bundle: TaskBundle) -> dict[str, Any]:
    """All numbers of a task, deltas and head, by name, as copies."""
    heads = {t.name: t.data.view(np.float32) for t in bundle.saved}
    return {key: values.flatten() for key, values in {**bundle.deltas, **heads}.items()}


@pytest.mark.slow
def test_two_processes_do_as_one(bases: Bases, tmp_path: Path) -> None:
    """Each has one half of every batch; afterwards both have what one process has that got it whole.

    With DDP, and with FSDP2, where each has one half of the model too.
    """
    alone = bases.load("bert")
    prepare_scale_tuning(alone)
    start, base = numbers_of(bundle_of(alone)), bases.path("bert")
    torch.multiprocessing.spawn(worker, (2, str(base), str(tmp_path / "meeting"), str(tmp_path), 5), nprocs=2)
    sgd_steps(alone, alone, 5, slice(None))
    end = numbers_of(bundle_of(alone))
    for way in WAYS:
        files = [(tmp_path / f"{way}-{rank}" / SCALES_FILE).read_bytes() for rank in range(2)]
        assert files[0] == files[1]
        assert "FSDP" not in (tmp_path / f"{way}-0" / "README.md").read_text("utf-8")
        found = numbers_of(read_bundle(tmp_path / f"{way}-0"))
        assert found.keys() == end.keys()
        for key, numbers in found.items():
            moved = float(np.abs(end[key] - start[key]).max())
            assert moved > 0
            np.testing.assert_allclose(numbers, end[key], rtol=0, atol=max(1e-4 * moved, 1e-8))
    for rank in range(2):
        here, in_all = map(int, (tmp_path / f"bytes-{rank}").read_text().split())
        assert here < 0.7 * in_all  # a plane cannot be halved: of three, one process has two
