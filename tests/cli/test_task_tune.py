"""``lowbit task tune``: its options reach the tuning, what it prints, and its errors."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from support.task_data import base_with_tokenizer, classified
from support.tuning_models import Bases
from typer.testing import CliRunner, Result

from lowbit_format.cli import console
from lowbit_format.cli.main import app
from lowbit_format.tasks.bundle import read_bundle

pytestmark = pytest.mark.usefixtures("one_thread")


def tune(*args: object) -> Result:
    console.out.width = 200
    return CliRunner().invoke(app, ["task", "tune", *map(str, args)], env={"TERM": "dumb"})


def test_a_task_is_tuned_and_told(bases: Bases, tmp_path: Path) -> None:
    base, data, out = base_with_tokenizer(bases, "bert"), classified(tmp_path / "a.jsonl"), tmp_path / "out"
    result = tune(base, data, out, "--lr", "0.02", "--epochs", "1", "--batch-size", "8", "--eval", "0.2")
    assert result.exit_code == 0, result.output
    assert "classification: 43 examples to train on, 5 to choose by, 12 to judge by; labels no, yes" in result.stdout
    assert "alphatuning: 448 numbers and 66 in a head" in result.stdout
    for told in ("accuracy", "f1", "always the most frequent label", "learning rate", "most memory", f"Wrote {out}."):
        assert told in result.stdout
    assert read_bundle(out).config.method == "alphatuning"


def test_every_option_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[Any]()

    def called(*args: Any, **options: Any) -> Any:
        calls.append((args, options))
        raise KeyboardInterrupt

    monkeypatch.setattr("lowbit_format.tuning.tune.tune", called)
    result = tune(
        "user/base", "user/data", tmp_path / "out", "--eval", "validation", "--text", "a", "--label", "b", "--labels",
        "no,yes", "--kind", "classification", "--method", "scales", "--bits", 2, "--lr", "0.5", "--epochs", 1.5,
        "--optimizer", "zo", "--batch-size", 3, "--max-length", 9, "--class-weights", "--seed", 7, "--resume",
        "--push", "user/task",
    )  # fmt: skip
    assert result.exit_code == 130
    assert "run the same command with --resume" in result.stderr
    ((args, options),) = calls
    assert args == ("user/base", "user/data", tmp_path / "out")
    assert callable(options.pop("report"))
    assert options == {
        "eval": "validation", "columns": {"text": "a", "label": "b"}, "labels": ["no", "yes"], "kind": "classification",
        "method": "scales", "bits": 2, "lr": 0.5, "optimizer": "zo", "epochs": 1.5, "batch_size": 3, "max_length": 9,
        "class_weights": True, "seed": 7, "resume": True, "push": "user/task",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a.jsonl", ["--text", "review"], "DataError: .*no 'review'"),
        ("a.jsonl", ["--lr", "fast"], "TuningError: the learning rate is 'fast'"),
        ("a.jsonl", ["--kind", "language-modelling"], "TuningError: .*does not write a text from left to right"),
        ("none.csv", [], "DataError: none.csv: there is no such file"),
    ],
)
def test_errors_are_named(
    name: str, options: list[str], message: str, bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)  # nothing asks the Hub
    classified(tmp_path / "a.jsonl")
    result = tune(base_with_tokenizer(bases, "bert"), name, "out", *options)
    assert result.exit_code == 2
    assert re.search(message, result.stderr.replace("\n", " "))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]
