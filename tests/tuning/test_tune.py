"""Tuning in one call, on tiny models: what it writes, what it says, what it refuses, and that it resumes."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import build, with_tokenizer
from support.task_data import base_with_tokenizer, classified, sentences, write_lines
from support.tuning_models import Bases
from transformers import AutoTokenizer

import lowbit_format as lb
from lowbit_format.errors import DataError, LoadError, LowbitError, OutputError, TuningError
from lowbit_format.kernels.cpu import backend as cpu
from lowbit_format.tasks.bundle import read_bundle
from lowbit_format.tasks.zeroth_order import ZerothOrder
from lowbit_format.tuning import forward_training, training
from lowbit_format.tuning import tune as module
from lowbit_format.tuning.training import without_dropout

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK: dict[str, Any] = {"lr": 2e-2, "epochs": 4, "batch_size": 8}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


# --- what comes out --------------------------------------------------------------------------------


def test_a_classification(bases: Bases, here: Path) -> None:
    """The rate is chosen, the bundle has the labels, and it computes what the figures say."""
    base, told = base_with_tokenizer(bases, "bert"), list[tuple[str, int, int]]()
    data, judge = classified(here / "data.jsonl", 200), classified(here / "eval.jsonl", 40, seed=1)
    found = lb.tune(base, data, "out", eval=judge, epochs=4, batch_size=8, report=lambda *step: told.append(step))
    assert sorted(p.name for p in here.iterdir()) == ["data.jsonl", "eval.jsonl", "out"]
    assert (found.kind, found.labels, found.method) == ("classification", ("no", "yes"), "alphatuning")
    assert found.examples == (180, 20, 40)
    assert found.rates[found.rate] <= 1.03 * min(found.rates.values())
    assert len(found.rates) >= 3
    assert found.best_step <= found.steps <= 100
    assert told[-1] == ("training", found.steps, 100)
    assert {f"rate {rate:g}" for rate in found.rates} < {stage for stage, *_ in told}
    assert found.after["loss"] < found.before["loss"]

    config = read_bundle("out").config
    assert config.task is not None
    assert (config.task.kind, config.task.labels) == ("classification", ("no", "yes"))
    assert config.task.metrics == {name: found.after[name] for name in ("accuracy", "f1")}
    assert "accuracy" in Path("out", "README.md").read_text()
    model = lb.from_pretrained(base, task="out").eval()
    assert model.config.id2label == {0: "no", 1: "yes"}
    tokenizer = AutoTokenizer.from_pretrained(base)
    right = 0
    for text, label in sentences(40, seed=1):
        with torch.no_grad():
            right += model.config.id2label[int(model(**tokenizer(text, return_tensors="pt")).logits.argmax())] == label
    assert right / 40 == pytest.approx(found.after["accuracy"])


def test_a_regression_begins_at_the_mean(bases: Bases, here: Path) -> None:
    data = write_lines(
        here / "a.jsonl",
        [{"text": text, "score": 50.5 + (label == "yes")} for text, label in sentences(60)],
    )
    found = lb.tune(base_with_tokenizer(bases, "bert"), data, "out", **QUICK)
    assert found.kind == "regression"
    assert found.before["mse"] < 5
    assert set(found.after) == {"loss", "mse", "pearson"}
    model = lb.from_pretrained(bases.path("bert"), task="out")
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")


def test_a_token_classification(bases: Bases, here: Path) -> None:
    rows = [
        {"tokens": text.split(), "tags": ["O" if int(w[1:]) < 15 else "B" for w in text.split()]}
        for text, _ in sentences(60)
    ]
    data = write_lines(here / "a.jsonl", rows)
    found = lb.tune(base_with_tokenizer(bases, "bert"), data, "out", **{**QUICK, "epochs": 12})
    assert (found.kind, found.labels) == ("token-classification", ("B", "O"))
    assert found.after["loss"] < found.before["loss"]
    assert type(lb.from_pretrained(bases.path("bert"), task="out")).__name__ == "BertForTokenClassification"


@pytest.mark.parametrize(("name", "scheme", "method"), [("llama", "uniform", "peqa"), ("gpt2", "codebook", "scales")])
def test_language_modelling(name: str, scheme: str, method: str, bases: Bases, here: Path) -> None:
    rows = [{"q": text, "a": "w1 w2" if label == "yes" else "w3 w4"} for text, label in sentences(60)]
    data = write_lines(here / "a.jsonl", rows)
    base = base_with_tokenizer(bases, name, scheme)
    found = lb.tune(base, data, "out", columns={"prompt": "q", "completion": "a"}, **QUICK)
    assert (found.kind, found.labels, found.method) == ("language-modelling", (), method)
    assert found.after["perplexity"] < found.before["perplexity"]
    assert read_bundle("out").config.method == method
    assert lb.list_tasks(lb.from_pretrained(base, task="out"))[0].labels == ()


@pytest.mark.parametrize("scheme", ["uniform", "bcq"])
def test_the_method_is_that_of_the_trained_matrices(scheme: str, here: Path) -> None:
    """By default a conversion rounds embeddings and the output head to 8 bits, in another codec."""
    source = with_tokenizer(build("llama", here / "float"))
    lb.convert_hf_to_lowbit(str(source), here / "base", lb.Recipe(lb.Target(scheme, 4, 16)))
    data = write_lines(here / "a.jsonl", [{"text": text} for text, _ in sentences(30)])
    found = lb.tune(here / "base", data, "out", **QUICK)
    assert found.method == {"bcq": "alphatuning", "uniform": "peqa"}[scheme]
    assert not any("embed" in name for name in read_bundle("out").deltas)


def test_a_classification_by_a_causal_model(bases: Bases, here: Path) -> None:
    """It has no token to pad with of its own, and looks for the last one that is none."""
    found = lb.tune(base_with_tokenizer(bases, "llama"), classified(here / "a.jsonl"), "out", **QUICK)
    assert read_bundle("out").config.modules_to_save == ("score",)
    assert found.after["loss"] < found.before["loss"]


def test_the_seed_and_class_weights(bases: Bases, here: Path) -> None:
    base, data = base_with_tokenizer(bases, "bert"), classified(here / "a.jsonl")
    options = {**QUICK, "epochs": 1}
    for out, more in {"a": {}, "b": {}, "c": {"seed": 1}, "d": {"class_weights": True}}.items():
        lb.tune(base, data, out, **options, **more)
    a, b, c, d = (Path(name, "task_scales.safetensors").read_bytes() for name in "abcd")
    assert a == b
    assert len({a, c, d}) == 3


def test_what_was_done_to_the_data_is_told(bases: Bases, here: Path) -> None:
    rows = [{"text": text, "label": label} for text, label in sentences(60)]
    data = write_lines(here / "a.jsonl", [*rows, {"text": " ".join(["w1"] * 20), "label": "yes"}])
    judge = write_lines(here / "eval.jsonl", rows[:3])
    found = lb.tune(base_with_tokenizer(bases, "bert"), data, "out", eval=judge, max_length=8, **QUICK)
    assert found.notes == (
        "3 of the 3 examples to judge by are among those to train on",
        "1 examples were too long and lost their end: see --max-length",
    )


# --- resuming --------------------------------------------------------------------------------------


class Stop(Exception):
    """In the place of the key that interrupts a program."""


def test_a_resumed_tuning_is_a_straight_one(bases: Bases, here: Path) -> None:
    """Interrupted in the choice of the rate and in the training: the same files, bit for bit."""
    base, data, told = base_with_tokenizer(bases, "bert"), classified(here / "a.jsonl"), list[str]()
    options: dict[str, Any] = {"epochs": 2, "batch_size": 8}
    straight = lb.tune(base, data, "out", **options)
    want = contents(here / "out")
    shutil.rmtree("out")

    def stop_at(*at: Any) -> Any:
        def stop(stage: str, done: int, total: int) -> None:
            told.append(stage)
            if (stage, done) == at:
                raise Stop

        return stop

    with pytest.raises(Stop):
        lb.tune(base, data, "out", report=stop_at("rate 0.01", 3), **options)
    assert not Path("out").exists()
    with pytest.raises(OutputError, match=r"out\.tuning: holds an unfinished tuning; go on with --resume"):
        lb.tune(base, data, "out", **options)
    with pytest.raises(OutputError, match=r"the unfinished tuning has seed 0, this one 1"):
        lb.tune(base, data, "out", resume=True, seed=1, **options)
    told.clear()
    with pytest.raises(Stop):
        lb.tune(base, data, "out", resume=True, report=stop_at("training", 9), **options)
    assert "rate 0.005" not in told  # it was done before
    told.clear()
    again = lb.tune(base, data, "out", resume=True, report=stop_at(), **options)
    assert set(told) == {"training"}
    assert contents(here / "out") == want
    assert (again.rates, again.best_step, again.after) == (straight.rates, straight.best_step, straight.after)
    assert not Path("out.tuning").exists()


def test_without_a_backward_pass(bases: Bases, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted in the choice of the rate, between two checkpoints, and at the end: the same files, bit for bit."""
    monkeypatch.setitem(module.OPTIMIZERS, "zo", module.Optimizer(forward_training, (1e-2, 3e-2), 10))
    for function in ("linear_input_grad", "linear_param_grads"):
        monkeypatch.setattr(cpu, function, None)
    base, data = base_with_tokenizer(bases, "bert"), classified(here / "a.jsonl", 100)
    options: dict[str, Any] = {"optimizer": "zo", "epochs": 6, "batch_size": 16}
    straight = lb.tune(base, data, "out", **options)
    assert straight.optimizer == "zo"
    assert straight.after["loss"] < straight.before["loss"]
    assert len(straight.rates) >= 2
    want = contents(here / "out")
    shutil.rmtree("out")

    def stop_at(*at: Any) -> Any:
        def stop(stage: str, done: int, total: int) -> None:
            if (stage, done) == at:
                raise Stop

        return stop

    def fail(*_: Any, **__: Any) -> None:
        raise Stop

    for at in (("rate 0.03", 2), ("training", 13)):
        with pytest.raises(Stop):
            lb.tune(base, data, "out", resume=True, report=stop_at(*at), **options)
    saved = Path("out.tuning", forward_training.CHECKPOINT)
    assert saved.stat().st_size < 4000
    with pytest.raises(OutputError, match="the unfinished tuning has optimizer 'zo', this one 'adam'"):
        lb.tune(base, data, "out", resume=True, **{**options, "optimizer": "adam"})
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_task", fail)
        with pytest.raises(Stop):
            lb.tune(base, data, "out", resume=True, **options)
    told = list[str]()
    again = lb.tune(base, data, "out", resume=True, report=lambda stage, *_: told.append(stage), **options)
    assert told == []
    assert contents(here / "out") == want
    assert (again.steps, again.best_step, again.after) == (straight.steps, straight.best_step, straight.after)


def test_a_text_without_a_backward_pass(bases: Bases, here: Path) -> None:
    """Without a head nothing has gradients, and a checkpoint is seeds and derivatives alone."""
    data = write_lines(here / "a.jsonl", [{"text": text} for text, _ in sentences(40)])
    base, seen = base_with_tokenizer(bases, "llama"), list[set[str]]()

    def look(stage: str, done: int, total: int) -> None:
        if done > 5:
            seen.append(set(load_file(Path("out.tuning", forward_training.CHECKPOINT))))

    found = lb.tune(base, data, "out", optimizer="zo", lr=1e-2, epochs=4, batch_size=4, report=look)
    assert found.after["loss"] < found.before["loss"]
    assert seen[-1] == {*ZerothOrder([torch.zeros(1)]).state_dict(), "evaluated", "losses"}


def test_a_damaged_checkpoint_of_steps(bases: Bases, here: Path) -> None:
    base, data = base_with_tokenizer(bases, "bert"), classified(here / "a.jsonl")
    options: dict[str, Any] = {"optimizer": "zo", "lr": 1e-2, "epochs": 2, "batch_size": 8}

    def stop(stage: str, done: int, total: int) -> None:
        if done == 6:
            raise Stop

    with pytest.raises(Stop):
        lb.tune(base, data, "out", report=stop, **options)
    Path("out.tuning", forward_training.CHECKPOINT).write_bytes(b"no tensors")
    with pytest.raises(OutputError, match=r"checkpoint-steps\.safetensors: cannot be read"):
        lb.tune(base, data, "out", resume=True, **options)


@pytest.mark.parametrize("patience", [1, 100])  # it ends early; it ends with its last step
def test_a_training_that_ended_is_not_resumed(
    patience: int, bases: Bases, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted between the end of the training and the bundle: the same files, and not a step more."""
    monkeypatch.setattr(training, "PATIENCE", patience)
    base, data, told = base_with_tokenizer(bases, "bert"), classified(here / "a.jsonl"), list[str]()
    options: dict[str, Any] = {"lr": 0.5, "epochs": 5, "batch_size": 8}
    straight = lb.tune(base, data, "out", **options)
    want = contents(here / "out")
    assert straight.best_step < straight.steps
    shutil.rmtree("out")

    def stop(*_: Any, **__: Any) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_task", stop)
        with pytest.raises(Stop):
            lb.tune(base, data, "out", **options)
    again = lb.tune(base, data, "out", resume=True, report=lambda stage, *_: told.append(stage), **options)
    assert told == []
    assert contents(here / "out") == want
    assert (again.steps, again.best_step, again.after) == (straight.steps, straight.best_step, straight.after)


def test_a_failure_leaves_nothing_that_looks_finished(
    bases: Bases, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(model: Any, directory: Path, **options: Any) -> None:
        Path(directory, "task_config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_task", fail)
    with pytest.raises(OutputError, match="free some space"):
        lb.tune(base_with_tokenizer(bases, "bert"), classified(here / "a.jsonl"), "out", **QUICK)
    assert sorted(p.name for p in here.iterdir()) == ["a.jsonl", "out.tuning"]


def test_dropout_comes_back(bases: Bases) -> None:
    model = bases.load("bert")
    rates = {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}
    with without_dropout(model):
        assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0} != rates
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == rates


# --- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kind": "language-modelling"}, TuningError, "bert does not write a text from left to right"),
        ({"method": "peqa"}, TuningError, "peqa trains uniform modules"),
        ({"method": "lora"}, TuningError, "unknown method 'lora'"),
        ({"lr": "high"}, TuningError, "the learning rate is 'high', expected a number above 0, or 'auto'"),
        ({"lr": -1.0}, TuningError, "the learning rate is -1.0"),
        ({"optimizer": "sgd"}, TuningError, "unknown optimizer 'sgd': choose one of adam, zo"),
        ({"epochs": 0}, TuningError, "epochs is 0, expected more than 0"),
        ({"max_length": 33}, TuningError, "examples of 33 tokens are wanted, and .* takes 32 at most"),
        ({"bits": 2}, LowbitError, "2 bits|precision"),
        ({"labels": ["a", "b"]}, DataError, "unknown label '(yes|no)'"),
        ({"eval": "nothing.jsonl"}, DataError, "nothing.jsonl: there is no such file"),
    ],
)
def test_what_does_not_do(
    options: dict[str, Any], error: type[Exception], message: str, bases: Bases, here: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "datasets", None)  # nothing asks the Hub
    with pytest.raises(error, match=message):
        lb.tune(base_with_tokenizer(bases, "bert"), classified(here / "a.jsonl"), "out", **options)
    assert sorted(p.name for p in here.iterdir()) == ["a.jsonl"]


def test_bases_that_do_not_do(bases: Bases, here: Path) -> None:
    data = classified(here / "a.jsonl")
    with pytest.raises(TuningError, match="has no tokenizer"):
        lb.tune(bases.path("bert", "uniform"), data, "out")
    with pytest.raises(LoadError, match="not a lowbit model"):
        lb.tune(with_tokenizer(build("bert", here / "float")), data, "out")


def test_a_place_that_is_taken(bases: Bases, here: Path) -> None:
    Path("out").mkdir()
    Path("out", "mine").touch()
    with pytest.raises(OutputError, match="out: exists already"):
        lb.tune("nowhere", "nothing", "out")
    Path("other.tuning").mkdir()
    Path("other.tuning", "mine").touch()
    with pytest.raises(OutputError, match=r"other\.tuning: is in the way"):
        lb.tune(base_with_tokenizer(bases, "bert"), classified(here / "a.jsonl"), "other", **QUICK)


def test_a_training_that_diverges(bases: Bases, here: Path) -> None:
    with pytest.raises(TuningError, match=r"diverged at the learning rate 1e\+30"):
        lb.tune(base_with_tokenizer(bases, "bert"), classified(here / "a.jsonl"), "out", lr=1e30, epochs=1)
    with pytest.raises(TuningError, match=r"diverged at the learning rate 1e\+30"):
        lb.tune(
            base_with_tokenizer(bases, "bert"), here / "a.jsonl", "zo", lr=1e30, epochs=1, batch_size=8, optimizer="zo"
        )
