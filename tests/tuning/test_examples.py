"""Reading examples, finding columns and labels, holding out; each way to be wrong has a message that says where."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
from support.task_data import classified, sentences, write_lines

from lowbit_format.errors import DataError
from lowbit_format.tuning.columns import find_columns
from lowbit_format.tuning.data import read_data
from lowbit_format.tuning.examples import read_examples
from lowbit_format.tuning.labels import find_labels
from lowbit_format.tuning.splits import hold_out


def file(tmp_path: Path, name: str, content: str | bytes) -> str:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def table(tmp_path: Path, rows: list[dict[str, Any]]) -> Any:
    return read_examples(str(write_lines(tmp_path / "rows.jsonl", rows)))


# --- files -----------------------------------------------------------------------------------------


def test_json_lines(tmp_path: Path) -> None:
    found = read_examples(file(tmp_path, "a.jsonl", '{"text": "a\\nb", "label": 1}\n\n{"text": "c", "label": 0.5}\n'))
    assert found.columns == ("text", "label")
    assert found.rows == ({"text": "a\nb", "label": 1}, {"text": "c", "label": 0.5})
    assert found.place(1) == f"{tmp_path / 'a.jsonl'}, line 3"


def test_csv_has_quotes_and_lines_in_values(tmp_path: Path) -> None:
    found = read_examples(file(tmp_path, "a.csv", '\ufefftext,label\r\n"a, ""b""\nc",yes\r\n\r\nd,no\r\n'))
    assert found.rows == ({"text": 'a, "b"\nc', "label": "yes"}, {"text": "d", "label": "no"})
    assert found.lines == (2, 5)


def test_objects_need_not_have_the_same_names(tmp_path: Path) -> None:
    found = table(tmp_path, [{"text": "a"}, {"text": "b", "label": "x"}, {"extra": 1}])
    assert found.columns == ("text", "label", "extra")


def test_tsv_has_no_quotes(tmp_path: Path) -> None:
    """As in GLUE: a quote that is never closed must not swallow the lines behind it."""
    found = read_examples(file(tmp_path, "a.tsv", 'label\ttext\n0\t"so it begins\n1\tplain\n'))
    assert found.rows == ({"label": "0", "text": '"so it begins'}, {"label": "1", "text": "plain"})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2: is not JSON"),
        ("a.jsonl", '{"text": "a"}\n\n["b"]\n', r"a\.jsonl, line 3: is no object"),
        ("a.csv", "text,label\na,b\nc\n", r"a\.csv, line 3: has 1 values, expected 2: \['text', 'label'\]"),
        ("a.csv", 'text,label\na,b\n"c\nd,e\n', r"a\.csv, line 3: .*check the quotes"),
        ("a.csv", "text,text\na,b\n", r"a\.csv, line 1: names columns \['text', 'text'\]"),
        ("a.tsv", "label\ttext\n0\ta\n1\tb\tc\n", r"a\.tsv, line 3: has 3 values"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r"a\.jsonl: is not UTF-8 text behind line \d"),
        ("a.jsonl", '{"text": "a"}\n{"text": ' + "1" * 5000 + "}", r"a\.jsonl, line 2: is not JSON"),
        ("a.jsonl", "", r"a\.jsonl: holds no example"),
        ("a.csv", "text,label\n", r"a\.csv: holds no example"),
        ("a.txt", "text", r"a\.txt: ends in '\.txt', expected \.jsonl, \.json, \.csv, \.tsv"),
    ],
)
def test_broken_files(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_examples(file(tmp_path, name, content))


def test_a_data_set_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"no/such: there is no such file; .*pip install .*lowbit-format\[tune\]"):
        read_examples("no/such")


def test_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Class labels keep their names. A directory stands for the Hub."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = {"text": [f"w{i}" for i in range(20)], "label": [i % 2 for i in range(20)]}
    data = datasets.Dataset.from_dict(rows, features)
    datasets.DatasetDict({"train": data, "validation": data.select(range(4))}).save_to_disk(tmp_path / "there")
    loaded = datasets.load_from_disk(str(tmp_path / "there"))
    monkeypatch.setattr("datasets.load_dataset", lambda repo, config, split: loaded[split])
    monkeypatch.setattr("datasets.get_dataset_split_names", lambda repo, config: list(loaded))
    found = read_data("user/films:en", "validation", kind=None, columns={}, labels=None, seed=0)
    assert found.labels is not None
    assert found.labels.names == ("no", "yes")
    assert found.labels.outputs == {"0": 0, "1": 1}
    assert (len(found.train.rows) + len(found.choose.rows), len(found.judge.rows)) == (20, 4)
    assert found.notes == ("4 of the 4 examples to judge by are among those to train on",)


# --- columns ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "kind", "names"),
    [
        ({"text": "a", "label": "x"}, "classification", {"text": "text", "label": "label"}),
        ({"idx": 1, "sentence": "a", "label": 1}, "classification", {"text": "sentence", "label": "label"}),
        ({"premise": "a", "hypothesis": "b", "label": 2}, "classification",
         {"text": "premise", "text_pair": "hypothesis", "label": "label"}),
        ({"Text": "a", "score": "0.5"}, "regression", {"text": "Text", "label": "score"}),
        ({"tokens": ["a"], "ner_tags": [1]}, "token-classification", {"tokens": "tokens", "tags": "ner_tags"}),
        ({"prompt": "a", "completion": "b"}, "language-modelling", {"prompt": "prompt", "completion": "completion"}),
        ({"messages": []}, "language-modelling", {"messages": "messages"}),
        ({"text": "a"}, "language-modelling", {"text": "text"}),
    ],
)  # fmt: skip
def test_columns_make_the_task(row: dict[str, Any], kind: str, names: dict[str, str], tmp_path: Path) -> None:
    found = find_columns(table(tmp_path, [row]), {})
    assert (found.kind, found.names) == (kind, names)


def test_an_input_is_a_part_of_the_prompt(tmp_path: Path) -> None:
    """As Alpaca has it, where it is often empty; Dolly calls it a context."""
    rows = [{"instruction": "Translate", "output": "house"}, {"instruction": "Sum", "input": "1 2", "output": "3"}]
    data = table(tmp_path, [*rows, {"instruction": "Sing", "input": "", "output": "la"}])
    found = find_columns(data, {})
    prompts = [found.values(data, i)["prompt"] for i in range(3)]
    assert prompts == ["Translate", "Sum\n\n1 2", "Sing"]
    assert found.values(data, 1).keys() == {"prompt", "completion"}
    data = table(tmp_path, [{"instruction": "a", "context": "b", "response": "c"}])
    assert find_columns(data, {}).values(data, 0) == {"prompt": "a\n\nb", "completion": "c"}
    data = table(tmp_path, [{"instruction": "a", "input": 3, "response": "c"}])
    with pytest.raises(DataError, match="line 1: 'input' is 3, expected a text"):
        find_columns(data, {}).values(data, 0)


def test_columns_that_are_not_used_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": text, "label": label, "id": i, "source": "x"} for i, (text, label) in enumerate(sentences(30))]
    data = write_lines(tmp_path / "a.jsonl", rows)
    found = read_data(str(data), 0.1, kind=None, columns={}, labels=None, seed=0)
    assert found.notes == ("columns that are not used: 'id', 'source'",)
    assert "a.jsonl: columns that are not used: 'id', 'source'" in caplog.text


def test_named_columns_and_a_named_kind(tmp_path: Path) -> None:
    rows = table(tmp_path, [{"mr": "a", "ref": "b", "text": "c", "label": 3}])
    assert find_columns(rows, {"prompt": "mr", "completion": "ref"}).kind == "language-modelling"
    assert find_columns(rows, {"text": "mr"}).names == {"text": "mr", "label": "label"}
    assert find_columns(rows, {}, "regression").kind == "regression"
    assert find_columns(rows, {}, "language-modelling").names == {"text": "text"}


@pytest.mark.parametrize(
    ("named", "kind", "message"),
    [
        ({}, None, r"has the columns 'mr', 'ref'; expected messages or prompt\+completion or .*--text and --label"),
        ({"prompt": "mrs"}, None, r"has the columns 'mr', 'ref', and no 'mrs', which is to be the prompt"),
        ({"prompt": "mr"}, None, r"has the columns 'mr', 'ref'; expected"),
        ({}, "ranking", r"the kind of task is 'ranking', expected classification, regression"),
        ({"text": "mr"}, "classification", r"has the columns 'mr', 'ref'; expected text\+label"),
    ],
)
def test_missing_columns(named: dict[str, str], kind: str | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        find_columns(table(tmp_path, [{"mr": "a", "ref": "b"}]), named, kind)


@pytest.mark.parametrize(
    ("row", "message"),
    [({"text": "a"}, "line 2: has no 'label'"), ({"text": "", "label": "x"}, "line 2: has no 'text'"),
     ({"text": 7, "label": "x"}, "line 2: 'text' is 7, expected a text")],
)  # fmt: skip
def test_missing_values(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    rows = table(tmp_path, [{"text": "a", "label": "x"}, row])
    with pytest.raises(DataError, match=message):
        find_labels(rows, find_columns(rows, {}))


# --- labels ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "given", "names", "outputs"),
    [
        (["b", "a", "b"], None, ("a", "b"), {"a": 0, "b": 1}),
        ([10, 2, 2.0], None, ("2", "10"), {"2": 0, "10": 1}),
        (["1", "0"], ["no", "yes"], ("no", "yes"), {"0": 0, "1": 1}),
        (["yes", "no"], ["yes", "no"], ("yes", "no"), {"yes": 0, "no": 1}),
        ([True, False], None, ("False", "True"), {"False": 0, "True": 1}),
    ],
)
def test_labels(values: list[Any], given: list[str] | None, names: Any, outputs: Any, tmp_path: Path) -> None:
    rows = table(tmp_path, [{"text": "a", "label": value} for value in values])
    found = find_labels(rows, find_columns(rows, {}, "classification"), given)
    assert (found.names, dict(found.outputs)) == (names, outputs)


def test_integers_of_class_labels_are_not_names(tmp_path: Path) -> None:
    """Names may be numbers themselves: as many stars, counted from 1 on."""
    rows = table(tmp_path, [{"text": "a", "label": value} for value in (1, 2)])
    rows = dataclasses.replace(rows, classes={"label": ("1", "2", "3")})
    found = find_labels(rows, find_columns(rows, {}))
    assert (found.names, dict(found.outputs)) == (("1", "2", "3"), {"0": 0, "1": 1, "2": 2})


@pytest.mark.parametrize(
    ("values", "given", "message"),
    [
        (["x", "x"], None, "all 2 examples have the label 'x'"),
        ([0, 1, 2], ["no", "yes"], "line 3: unknown label '2', expected one of 'no', 'yes'"),
        (["no", "maybe"], ["no", "yes"], "line 1: unknown label 'no'|line 2: unknown label 'maybe'"),
        ([0, 1], ["no", "y\n"], "names of labels are .*without control characters"),
        (["a\nb", "c"], None, r"rows\.jsonl: the label 'a\\nb' has control characters"),
        ([0, 1], ["no", "no"], "names of labels are .*expected different names"),
    ],
)
def test_labels_that_do_not_do(values: list[Any], given: list[str] | None, message: str, tmp_path: Path) -> None:
    rows = table(tmp_path, [{"text": "a", "label": value} for value in values])
    with pytest.raises(DataError, match=message):
        find_labels(rows, find_columns(rows, {}), given)


@pytest.mark.parametrize(
    ("label", "given", "message"),
    [("perhaps", None, r"eval\.jsonl, line 2: unknown label 'perhaps', expected one of 'no', 'yes'"),
     ("rare", ["no", "yes", "rare"], r"eval\.jsonl, line 2: no example to train on has the label 'rare'")],
)  # fmt: skip
def test_labels_to_judge_by(label: str, given: list[str] | None, message: str, tmp_path: Path) -> None:
    judge = write_lines(tmp_path / "eval.jsonl", [{"text": "w1", "label": "no"}, {"text": "w2", "label": label}])
    with pytest.raises(DataError, match=message):
        read_data(str(classified(tmp_path / "a.jsonl")), judge, kind=None, columns={}, labels=given, seed=0)


# --- parts -----------------------------------------------------------------------------------------


def test_parts_have_all_labels_and_no_example_twice() -> None:
    groups, labels = [f"text {i // 2}" for i in range(200)], ["rare" if i < 8 else "usual" for i in range(200)]
    kept, out = hold_out(groups, labels, 0.1, seed=0)
    assert sorted(kept + out) == list(range(200))
    assert not {groups[i] for i in kept} & {groups[i] for i in out}
    assert {labels[i] for i in out} == {labels[i] for i in kept} == {"rare", "usual"}
    assert len(out) == 22  # one of four rare texts, ten of 96, each twice
    assert hold_out(groups, labels, 0.1, seed=0) == (kept, out)
    assert hold_out(groups, labels, 0.1, seed=1) != (kept, out)


def test_columns_may_have_other_names_in_the_file_to_judge_by(tmp_path: Path) -> None:
    """As in SST-2: `sentence` in train.tsv, `content` in dev.tsv."""
    train = file(tmp_path, "train.tsv", "label\tsentence\n" + "".join(f"{i % 2}\ttext {i}\n" for i in range(20)))
    judge = file(tmp_path, "dev.tsv", "label\tcontent\n0\ta\n1\tb\n")
    found = read_data(train, judge, kind=None, columns={}, labels=None, seed=0)
    assert found.judge_columns.names == {"text": "content", "label": "label"}
    assert found.notes == ()


def test_what_cannot_be_cut(tmp_path: Path) -> None:
    rows = str(write_lines(tmp_path / "a.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]))
    with pytest.raises(DataError, match=r"has 2 different examples, too few to hold some out"):
        read_data(rows, 0.1, kind=None, columns={}, labels=None, seed=0)
    with pytest.raises(DataError, match=r"the part of the data to judge by is 2, expected a number between 0 and 1"):
        read_data(rows, "2", kind=None, columns={}, labels=None, seed=0)
    with pytest.raises(DataError, match=r"there is no meaning 'texts'"):
        read_data(rows, 0.1, kind=None, columns={"texts": "text"}, labels=None, seed=0)
