"""The model card of a task: what it says, what the Hub reads, and that text from elsewhere stays text."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit_format.container.writer import StoredTensor
from lowbit_format.errors import TaskError
from lowbit_format.tasks.bundle import TaskBundle
from lowbit_format.tasks.bundle_config import TaskConfig
from lowbit_format.tasks.card import task_card
from lowbit_format.tasks.repository import base_tag

BASE = "0123456789abcdef" * 4
CONFIG = TaskConfig(
    BASE, method="alphatuning", base_model_name_or_path="user/base-4bit", bits=3, modules_to_save=("classifier",)
)
DELTAS = {
    "fc.scales.mul": np.zeros((2, 700), np.float32),
    "up.scales.mul": np.zeros((1, 100), np.float32),
}
SAVED = (StoredTensor("classifier.weight", "F16", (2, 700), np.zeros((2, 700), "<f2")),)
BUNDLE = TaskBundle(CONFIG, DELTAS, SAVED)


def with_config(**changes: Any) -> TaskBundle:
    return replace(BUNDLE, config=replace(CONFIG, **changes))


def front_matter(card: str) -> dict[str, Any]:
    return dict(ModelCard(card).data.to_dict())


def code_of(card: str) -> str:
    """The Python example, which must parse."""
    (code,) = re.findall(r"```python\n(.*?)\n```", card, re.DOTALL)
    ast.parse(code)
    return str(code)


def fact(card: str, name: str) -> str:
    (value,) = re.findall(rf"^\| {re.escape(name)} \| (.*) \|$", card, re.MULTILINE)
    return str(value)


def test_front_matter() -> None:
    card = task_card(BUNDLE, metrics={"accuracy": 0.9, "f1": 0.8}, dataset="glue", language=["en"], license="mit")
    assert front_matter(card) == {
        "library_name": "lowbit-format",
        "tags": ["lowbit", "lowbit-task", "lowbit-format", "alphatuning", "lowbit-base-0123456789abcdef"],
        "base_model": "user/base-4bit",
        "base_model_relation": "adapter",
        "datasets": ["glue"],
        "language": ["en"],
        "license": "mit",
        "metrics": ["accuracy", "f1"],
    }


def test_facts() -> None:
    card = task_card(BUNDLE)
    assert fact(card, "base") == "`user/base-4bit`"
    assert fact(card, "base fingerprint") == f"`{BASE}`"
    assert fact(card, "method") == "alphatuning"
    assert fact(card, "precision") == "the base's first 3 bits"
    assert fact(card, "trained numbers for scales") == "1,500 in 2 tensors"
    assert fact(card, "numbers kept in full precision") == "1,400 (classifier)"
    assert fact(card, "size") == "8,800 bytes"
    assert fact(task_card(BUNDLE, nbytes=1234567), "size") == "1,234,567 bytes"
    plain = task_card(replace(with_config(bits=None, modules_to_save=()), saved=()))
    assert fact(plain, "precision") == "all bits of the base"
    assert fact(plain, "numbers kept in full precision") == "0"


def test_loading() -> None:
    code = code_of(task_card(with_config(revision="v1.0"), repo_id="user/tasks", subfolder="glue/sst2"))
    assert code.startswith("import lowbit_format as lb\n")
    assert 'model = lb.from_pretrained("user/base-4bit", revision="v1.0", bits=3)' in code
    assert 'lb.load_task(model, "user/tasks", subfolder="glue/sst2", name="sst2")' in code
    assert 'lb.set_task(model, "sst2")' in code
    assert "PATH_OR_REPO_OF_THIS_TASK" in code_of(task_card(BUNDLE))


def test_results_and_notes() -> None:
    card = task_card(BUNDLE, metrics={"accuracy": 0.91234567, "steps": 3}, notes="Trained on **one** machine.")
    assert (fact(card, "accuracy"), fact(card, "steps")) == ("0.912346", "3")
    assert card.endswith("## Notes\n\nTrained on **one** machine.\n")
    assert "## Results" not in task_card(BUNDLE)
    assert "metrics" not in front_matter(task_card(BUNDLE))


@pytest.mark.parametrize("place", ["/home/someone/base", "../base", "C:\\models\\base", "~/base", None])
def test_a_path_of_this_machine_is_not_written(place: str | None) -> None:
    card = task_card(with_config(base_model_name_or_path=place))
    assert "base_model" not in front_matter(card)
    assert "PATH_OR_REPO_OF_THE_BASE" in code_of(card)
    assert place is None or place not in card


def test_a_local_directory_that_looks_like_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "base").mkdir(parents=True)
    assert "out/base" not in task_card(with_config(base_model_name_or_path="out/base"))


@pytest.mark.parametrize("metrics", [{"f1": "0.9"}, {"f1": None}, {"f1": True}, {" ": 1.0}, {3: 1.0}])
def test_metrics_that_are_refused(metrics: Any) -> None:
    with pytest.raises(TaskError, match="expected a name and a number"):
        task_card(BUNDLE, metrics=metrics)


HOSTILE = "x | y\n---\nlicense: evil\n<script>`{{ 7*7 }}`</script> ![a](http://b) # $$z$$ \x00\ud800"


def test_hostile_text_stays_text() -> None:
    card = task_card(with_config(method=HOSTILE, revision=HOSTILE), metrics={HOSTILE: 1.0}, dataset=HOSTILE)
    assert "license" not in front_matter(card)
    body = ModelCard(card).text
    for sign in ("<script>", "![a]", "x | y", "\n---", "$$z"):
        assert sign not in body.replace("\\\\", "")
    assert "{{ 7\\*7 }}" in body
    assert re.search(r"^\| x \\\| y --- license: evil .* \| 1 \|$", body, re.MULTILINE)
    assert "revision" not in code_of(card)
    card.encode()


TEXT = st.text(max_size=40) | st.sampled_from([HOSTILE, "- a: b", "'", '"', "%", "null", "...", "\u2028", "a:\n  b"])


@settings(max_examples=100, deadline=None)
@given(method=TEXT, place=TEXT, revision=TEXT, metric=TEXT, value=st.floats())
def test_any_text_makes_a_sound_card(method: str, place: str, revision: str, metric: str, value: float) -> None:
    bundle = with_config(method=method, base_model_name_or_path=place, revision=revision)
    metrics = {metric: value} if "".join(filter(str.isprintable, metric)).strip() else {}
    card = task_card(bundle, metrics=metrics)
    assert card == task_card(bundle, metrics=metrics)
    card.encode()
    data = front_matter(card)
    allowed = {"library_name", "tags", "base_model", "base_model_relation", "metrics"}
    assert set(data) <= allowed
    assert base_tag(BASE) in data["tags"]
    assert all(re.fullmatch(r"[a-z0-9-]+", tag) for tag in data["tags"])
    code_of(card)
    headings = re.findall(r"^#+ .*$", ModelCard(card).text.split("```")[-1], re.MULTILINE)
    assert headings == ["## What it is", *(["## Results"] if metrics else [])]
