"""Names of labels: in the bundle, on the model's config while its task is active, and back (TSK-12)."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.tuning_models import Bases, scatter

import lowbit_format as lb
from lowbit_format.errors import TaskError
from lowbit_format.tasks.bundle import read_bundle
from lowbit_format.tasks.bundle_config import Description, TaskConfig

pytestmark = pytest.mark.usefixtures("one_thread")

AUTO = transformers.AutoModelForSequenceClassification


def made(bases: Bases, directory: Path, labels: list[str], **options: Any) -> Path:
    """A task with these labels, as a loop of one's own saves it."""
    names: dict[str, Any] = {"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}}
    model = AUTO.from_pretrained(bases.path("bert"), **names)
    lb.prepare_scale_tuning(model, name=directory.name)
    scatter(model)
    return lb.save_task(model, directory, **options)


@pytest.fixture
def two(bases: Bases, tmp_path: Path) -> Any:
    """A model with the tasks ``films`` and ``mail``."""
    made(bases, tmp_path / "films", ["bad", "good"], metrics={"accuracy": 0.5, "odd": float("nan")})
    made(bases, tmp_path / "mail", ["ham", "spam"])
    model = AUTO.from_pretrained(bases.path("bert"))
    for name in ("films", "mail"):
        lb.load_task(model, tmp_path / name)
    return model


def test_a_bundle_says_what_its_task_is(two: Any, tmp_path: Path) -> None:
    config = read_bundle(tmp_path / "films").config
    assert config.task == Description("classification", ("bad", "good"), {"accuracy": 0.5})
    assert config.format_version == "1.1"
    card = (tmp_path / "films" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "| labels | bad, good |" in card


def test_labels_follow_the_active_task(two: Any) -> None:
    assert {task.name: task.labels for task in lb.list_tasks(two)} == {
        "films": ("bad", "good"),
        "mail": ("ham", "spam"),
    }
    own = dict(two.config.id2label)
    for name, want in [("films", {0: "bad", 1: "good"}), ("mail", {0: "ham", 1: "spam"}), (None, own)]:
        lb.set_task(two, name)
        assert two.config.id2label == want
        assert two.config.label2id == {label: i for i, label in want.items()}
    lb.set_task(two, "mail")
    lb.unload_task(two, "mail")
    assert two.config.id2label == own


def test_what_is_saved_has_the_bases_own_labels(two: Any, tmp_path: Path) -> None:
    """A saved state is the base's, whatever task is active."""
    lb.set_task(two, "films")
    two.save_pretrained(tmp_path / "base")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "base").id2label == {0: "LABEL_0", 1: "LABEL_1"}
    assert two.config.id2label == {0: "bad", 1: "good"}
    lb.set_task(two, None)
    assert two.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}


def test_a_merged_task_keeps_its_labels(two: Any, tmp_path: Path) -> None:
    lb.merge_task(two, "mail")
    two.save_pretrained(tmp_path / "base")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "base").id2label == {0: "ham", 1: "spam"}


def test_a_task_brings_its_class_and_its_outputs(bases: Bases, tmp_path: Path) -> None:
    """The base's files have neither head nor labels."""
    made(bases, tmp_path / "mood", ["sad", "so-so", "glad"])
    model = lb.from_pretrained(bases.path("bert"), task=tmp_path / "mood")
    assert type(model).__name__ == "BertForSequenceClassification"
    assert model.config.id2label == {0: "sad", 1: "so-so", 2: "glad"}
    named = lb.from_pretrained(bases.path("bert"), task=tmp_path / "mood", model_class=AUTO, num_labels=3)
    assert named.config.id2label == {0: "sad", 1: "so-so", 2: "glad"}


def test_labels_in_another_number_are_not_shown(two: Any) -> None:
    """As a bundle of a model without a head may have them."""
    task = Description("classification", ("a", "b", "c"))
    bundle = read_bundle_with(two, task)
    lb.set_task(two, lb.load_task(two, bundle, name="odd"))
    assert two.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}


def read_bundle_with(model: Any, task: Description) -> Any:
    from lowbit_format.tasks.saving import bundle_of

    bundle = bundle_of(model, "films")
    return replace(bundle, config=replace(bundle.config, task=task))


def test_versions_are_the_lowest_that_will_do() -> None:
    """VER-3; a reader of 1.0 ignores the key, and a copy keeps it."""
    old = {"format": "lowbit-task", "format_version": "1.0", "base_fingerprint": "0" * 64, "method": "x", "task": 3}
    plain = TaskConfig.from_dict(old)
    assert (plain.task, plain.to_dict()["task"], plain.to_dict()["format_version"]) == (None, 3, "1.0")
    told = TaskConfig("0" * 64, task=Description("regression"))
    assert told.to_dict()["format_version"] == "1.1"
    assert TaskConfig.from_dict(told.to_dict()) == told
    assert TaskConfig("0" * 64).to_dict()["format_version"] == "1.0"
    silent = TaskConfig.from_dict({**old, "format_version": "1.1", "task": None})
    assert (silent.to_dict()["format_version"], "task" in silent.to_dict()) == ("1.0", False)
    assert replace(told, task=None).to_dict()["format_version"] == "1.0"
    assert TaskConfig.from_dict({**old, "format_version": "1.2", "task": None}).to_dict()["format_version"] == "1.2"


def test_a_language_model_says_so(bases: Bases, tmp_path: Path) -> None:
    model = bases.load("llama")
    lb.prepare_scale_tuning(model)
    lb.save_task(model, tmp_path / "t")
    assert read_bundle(tmp_path / "t").config.task == Description("language-modelling")


def test_labels_are_those_of_the_saved_task_not_of_the_active_one(two: Any, tmp_path: Path) -> None:
    """Also of a base with names of its own; one that had none gets none, unless the task starts from one that has."""
    two.config.id2label, two.config.label2id = {0: "-", 1: "+"}, {"-": 0, "+": 1}
    lb.set_task(two, "films")
    lb.prepare_scale_tuning(two, name="mine")
    lb.set_task(two, "mail")
    lb.save_task(two, tmp_path / "mine", name="mine")
    assert read_bundle(tmp_path / "mine").config.task == Description("classification", ("-", "+"))


def test_a_task_that_starts_from_another_has_its_labels(two: Any, tmp_path: Path) -> None:
    lb.set_task(two, "mail")
    lb.prepare_scale_tuning(two, name="new", start="films")
    lb.save_task(two, tmp_path / "new")
    assert read_bundle(tmp_path / "new").config.task == Description("classification", ("bad", "good"))
    lb.unload_task(two, "new")
    lb.prepare_scale_tuning(two, name="fresh")
    lb.save_task(two, tmp_path / "fresh")
    assert read_bundle(tmp_path / "fresh").config.task == Description("classification")


def test_a_task_of_which_nothing_is_said_stays_so(two: Any, tmp_path: Path) -> None:
    bundle = read_bundle(tmp_path / "mail")
    lb.load_task(two, replace(bundle, config=replace(bundle.config, task=None)), name="old")
    lb.set_task(two, "films")
    lb.save_task(two, tmp_path / "old", name="old")
    assert read_bundle(tmp_path / "old").config.task is None


@pytest.mark.parametrize("labels", [["x", "x"], ["", "b"], ["a\nb", "b"]])
def test_names_that_are_no_labels_of_a_bundle_are_left_out(labels: list[str], bases: Bases, tmp_path: Path) -> None:
    """transformers takes them; a task whose labels it cannot name is a task all the same."""
    made(bases, tmp_path / "t", labels)
    assert read_bundle(tmp_path / "t").config.task == Description("classification")


@pytest.mark.parametrize(
    "metrics",
    [{"f1": "0.9"}, {"f1": None}, {"f1": True}, {"f1": 10**400}, {"f1": torch.tensor([0.5])}, {" ": 1.0}, {3: 1.0}],
)
def test_metrics_that_are_refused(metrics: Any, two: Any, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="expected a name and a number"):
        lb.save_task(two, tmp_path / "t", name="films", metrics=metrics)
    assert not (tmp_path / "t").exists()


def test_names_of_metrics_are_made_printable(two: Any, tmp_path: Path) -> None:
    """The same in the bundle as in the card."""
    lb.save_task(two, tmp_path / "t", name="films", metrics={" exact\nmatch": 1, "odd": -math.inf, "f\x1b1": 0.5})
    task = read_bundle(tmp_path / "t").config.task
    assert task is not None
    assert task.metrics == {"exact match": 1.0, "f1": 0.5}
    assert "| exact match | 1 |" in (tmp_path / "t" / "README.md").read_text()
