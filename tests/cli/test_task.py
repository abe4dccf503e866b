"""``lowbit task``: what it prints, its exit codes, and what it leaves on the disk. The Hub is stood in for."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.hub_server import running_hub
from typer.testing import CliRunner, Result

from lowbit_format.cli import console
from lowbit_format.cli.main import app
from lowbit_format.container.reader import ModelReader
from lowbit_format.container.writer import StoredTensor
from lowbit_format.errors import HubError
from lowbit_format.tasks.bundle import (
    CARD_FILE,
    SCALES_FILE,
    StoredBundle,
    TaskBundle,
    read_bundle,
    read_stored_bundle,
    write_bundle,
)
from lowbit_format.tasks.bundle_config import TASK_CONFIG_FILE, Description
from lowbit_format.tasks.repository import TaskRepository
from lowbit_format.testing.vectors import VECTORS

VALID, INVALID = VECTORS / "bundles" / "valid", VECTORS / "bundles" / "invalid"
GOOD = VALID / "all-deltas" / "bundle"
BASE = VECTORS / "valid" / "bundle-base" / "model"


def task(*args: object, columns: int = 200) -> Result:
    console.out.width = columns  # COLUMNS would be read once, when the console is made
    return CliRunner().invoke(app, ["task", *map(str, args)], env={"TERM": "dumb"})


def refused(result: Result) -> str:
    """The one line of an error."""
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


@pytest.fixture
def digested(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the tensors that were read and digested for a bundle."""
    sizes = list[int]()

    def sha256(content: bytes) -> Any:
        sizes.append(len(content))
        return hashlib.sha256(content)

    monkeypatch.setattr("lowbit_format.tasks.bundle.hashlib", SimpleNamespace(sha256=sha256))
    return sizes


def files(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """The good bundle with all deltas halved, and one module saved whole."""
    good = read_bundle(GOOD)
    deltas = {name: delta * np.float32(0.5) for name, delta in good.deltas.items()}
    saved = (StoredTensor("classifier.weight", "F32", (2, 3), np.zeros((2, 3), "<f4")),)
    config = replace(good.config, modules_to_save=("classifier",))
    write_bundle(tmp_path / "half", TaskBundle(config, deltas, saved))
    return tmp_path / "half"


# --- inspect ---------------------------------------------------------------------------------------


def test_help_names_every_command() -> None:
    printed = task("--help").output
    assert all(name in printed for name in ("inspect", "merge", "diff", "push", "pull", "list"))
    assert "task" in CliRunner().invoke(app, ["--help"]).output


def test_inspect_shows_what_a_bundle_holds(half: Path) -> None:
    result = task("inspect", half)
    assert result.exit_code == 0
    found = read_bundle(half)
    for name in [*found.deltas, "classifier.weight", "example/base", "2x3", "F32", found.config.base_fingerprint]:
        assert name in result.output
    assert "fits" not in result.output


@pytest.mark.parametrize("columns", [60, 80])
def test_names_are_folded_not_cut_on_narrow_terminals(columns: int, tmp_path: Path) -> None:
    path = "encoder." * 12 + "fc"
    deltas = {f"{path}.scales.mul": np.full((1, 2), 0.123, np.float32)}
    write_bundle(tmp_path, TaskBundle(replace(read_bundle(GOOD).config, modules_to_save=()), deltas))
    for result in (task("inspect", tmp_path, columns=columns), task("diff", tmp_path, columns=columns)):
        cells = "".join(line.split("│")[1].strip() for line in result.output.splitlines() if line.startswith("│"))
        assert f"{path}.scales.mul" in cells
        assert "…" not in result.output


def test_inspect_json_agrees_with_the_bundle(half: Path) -> None:
    facts, found = json.loads(task("inspect", half, "--json").stdout), read_bundle(half)
    assert {key: facts[key] for key in found.config.to_dict()} == found.config.to_dict()
    assert facts["file_bytes"] == (half / SCALES_FILE).stat().st_size
    assert (facts["delta_values"], facts["saved_values"]) == (found.delta_values, 6)
    assert facts["operations"] == {"offsets.add": 2, "scales.add": 2, "scales.mul": 4, "zeros.add": 1}
    assert facts["saved"] == {"classifier.weight": {"dtype": "F32", "shape": [2, 3], "bytes": 24}}
    assert "fits_base" not in facts
    for name, delta in found.deltas.items():
        d = facts["deltas"][name]
        assert (d["shape"], d["min"], d["max"]) == (list(delta.shape), delta.min(), delta.max())
        assert d["rms"] == pytest.approx(np.sqrt(np.mean(delta.astype(np.float64) ** 2)))


def test_inspect_names_the_dtypes_that_are_stored() -> None:
    """The golden file has all three; in memory all is float32."""
    facts = json.loads(task("inspect", GOOD, "--json").stdout)
    assert set(facts["dtypes"]) == {"F32", "F16", "BF16"}
    assert sum(facts["dtypes"].values()) == len(facts["deltas"])


def test_inspect_checks_against_a_base(half: Path) -> None:
    result = task("inspect", half, "--base", BASE)
    assert result.exit_code == 0
    assert f"It fits {BASE}." in result.stdout
    assert json.loads(task("inspect", half, "--base", BASE, "--json").stdout)["fits_base"] == str(BASE)


def test_inspect_says_by_what_a_bundle_fits() -> None:
    """FPR-5: a base with a flipped bit fits by digests, and does not with --verify; MAT-8: what no file can tell."""
    bundle, damaged = INVALID / "dig-3-base" / "bundle", VECTORS / "invalid" / "dig-3-bundle-base" / "model"
    good = VECTORS / "valid" / "bundle-saved-base" / "model"
    by_digests = f"It fits {damaged} (by digests; --verify checks the bytes)."
    assert by_digests in task("inspect", bundle, "--base", damaged).stdout
    assert "DIG-3" in refused(task("inspect", bundle, "--base", damaged, "--verify"))
    assert f"It fits {good}." in task("inspect", bundle, "--base", good, "--verify").stdout
    for option, by in (([], "digests"), (["--verify"], "bytes")):
        facts = json.loads(task("inspect", bundle, "--base", good, "--json", *option).stdout)
        assert (facts["fits_by"], facts["saved_not_in_base"]) == (by, 0)
    assert "only a model can tell" in task("inspect", VALID / "saved-fresh" / "bundle", "--base", good).stdout
    assert "MAT-7" in refused(task("inspect", INVALID / "mat-7-shape" / "bundle", "--base", good))
    assert task("inspect", bundle, "--verify").exit_code == 2


def test_inspect_refuses_another_base(tmp_path: Path) -> None:
    found = read_bundle(GOOD)
    write_bundle(tmp_path, replace(found, config=replace(found.config, base_fingerprint="0" * 64)))
    line = refused(task("inspect", tmp_path, "--base", BASE))
    assert all(part in line for part in ("FingerprintError", "0" * 64, found.config.base_fingerprint, "MAT-1"))


def test_inspect_with_a_base_finds_infinite_values(tmp_path: Path) -> None:
    """MAT-6 needs the base's values, not only its headers."""
    config = replace(read_bundle(VALID / "nested" / "bundle").config, modules_to_save=())
    huge = np.full((1, 2), np.finfo(np.float32).max, np.float32)
    write_bundle(tmp_path, TaskBundle(config, {"layers.0.fc.scales.mul": huge}))
    assert task("inspect", tmp_path).exit_code == 0
    assert "MAT-6" in refused(task("inspect", tmp_path, "--base", BASE))


@pytest.mark.parametrize("place", ["./nowhere", "/nowhere/at/all", "a/b/c", "~/x"])
def test_a_path_where_nothing_is_is_not_looked_for_on_the_hub(place: str) -> None:
    for command in ("inspect", "diff", "list"):
        assert "there is no such directory" in refused(task(command, place))


def test_an_ill_formed_bundle_is_a_named_error() -> None:
    line = refused(task("inspect", INVALID / "tsk-9-nan" / "bundle"))
    assert line.startswith("BundleError: ")
    assert "TSK-9" in line


def test_text_of_a_bundle_cannot_play_tricks_on_the_terminal(tmp_path: Path) -> None:
    found = read_bundle(GOOD)
    evil = replace(found.config, method="[red]not markup[/red]")
    write_bundle(tmp_path, replace(found, config=evil))
    for result in (task("inspect", tmp_path), task("list", tmp_path)):
        assert "[red]not markup[/red]" in result.output


def test_inspect_takes_the_modules_of_all_layers_together(tmp_path: Path) -> None:
    deltas = {f"layers.{i}.{m}.scales.mul": np.full((1, 2), i, np.float32) for i in range(4) for m in ("up", "down")}
    write_bundle(tmp_path, TaskBundle(replace(read_bundle(GOOD).config, modules_to_save=()), deltas))
    lines = task("inspect", tmp_path).stdout.splitlines()
    kinds = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "layers.*" in line]
    rms = f"{np.sqrt(14 / 4):.4g}"
    assert kinds == [[f"layers.*.{m}.scales.mul", "4", "1x2", rms, "0", "3"] for m in ("down", "up")]
    assert lines[-1].startswith("Well-formed.")
    every = task("inspect", tmp_path, "--modules").stdout
    assert all(name in every for name in deltas)


# --- merge and diff --------------------------------------------------------------------------------


def test_merge_adds_with_weights(half: Path, tmp_path: Path) -> None:
    result = task("merge", tmp_path / "out", GOOD, half, "--weight", 0.5, "--weight", "-1")
    assert result.exit_code == 0, result.output
    merged, one, two = read_bundle(tmp_path / "out"), read_bundle(GOOD), read_bundle(half)
    assert merged.config == replace(two.config, method="merge")
    for name, delta in merged.deltas.items():
        exact = 0.5 * one.deltas[name].astype(np.float64) - two.deltas[name].astype(np.float64)
        np.testing.assert_array_equal(delta, exact.astype(np.float32))
    card = (tmp_path / "out" / CARD_FILE).read_text("utf-8")
    assert "0.5 x `bundle`" in card
    assert "-1 x `half`" in card
    assert str(tmp_path) not in card


def test_merge_with_less_of_early_layers(half: Path, tmp_path: Path) -> None:
    good = read_bundle(GOOD)
    deltas = {f"layers.{i}.fc.scales.mul": np.ones((1, 4), np.float32) for i in range(2)}
    write_bundle(tmp_path / "deep", TaskBundle(good.config, deltas))
    assert task("merge", tmp_path / "out", tmp_path / "deep", "--lines", 0.25).exit_code == 0
    merged = read_bundle(tmp_path / "out").deltas
    assert [float(merged[name][0, 0]) for name in deltas] == [0.25, 1.0]
    assert "Of the first layer 0.25 times that" in (tmp_path / "out" / CARD_FILE).read_text("utf-8")
    assert "expected 0 to 1" in refused(task("merge", tmp_path / "x", tmp_path / "deep", "--lines", 2))


def test_merge_without_weights_is_the_mean(half: Path, tmp_path: Path) -> None:
    assert task("merge", tmp_path / "out", GOOD, half).exit_code == 0
    for name, delta in read_bundle(tmp_path / "out").deltas.items():
        np.testing.assert_allclose(delta, 0.75 * read_bundle(GOOD).deltas[name], rtol=1e-6)


@pytest.mark.parametrize(("dtype", "stored"), [("float16", "F16"), ("bfloat16", "BF16")])
def test_merge_into_a_small_dtype_says_what_it_cost(dtype: str, stored: str, half: Path, tmp_path: Path) -> None:
    result = task("merge", tmp_path / "out", half, "--dtype", dtype)
    assert f"values in {dtype}; rounding changed" in result.stdout
    assert json.loads(task("inspect", tmp_path / "out", "--json").stdout)["dtypes"] == {stored: 9}
    assert "expected float32, float16, bfloat16" in task("merge", tmp_path / "x", half, "--dtype", "F64").stderr
    assert not (tmp_path / "x").exists()


def test_merge_asks_whose_whole_modules_to_keep(half: Path, tmp_path: Path) -> None:
    found = read_bundle(half)
    other = replace(found.saved[0], data=np.ones((2, 3), "<f4"))
    write_bundle(tmp_path / "other", replace(found, saved=(other,)))
    places = [half, tmp_path / "other"]
    assert "--saved-from" in refused(task("merge", tmp_path / "out", *places))
    assert not (tmp_path / "out").exists()
    assert task("merge", tmp_path / "out", *places, "--saved-from", 1).exit_code == 0
    assert read_bundle(tmp_path / "out").saved[0].data.tobytes() == other.data.tobytes()


def test_merge_replaces_a_bundle_only_when_forced(half: Path, tmp_path: Path) -> None:
    shutil.copytree(half, tmp_path / "out")
    before = files(tmp_path / "out")
    assert "--force" in refused(task("merge", tmp_path / "out", GOOD))
    assert files(tmp_path / "out") == before
    assert task("merge", tmp_path / "out", GOOD, "--force").exit_code == 0
    assert read_bundle(tmp_path / "out").saved == ()


def test_nothing_but_a_bundle_is_ever_replaced(half: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for out in ("mine", "file"):
        assert "exists already" in refused(task("merge", tmp_path / out, half, "--force"))
    assert files(tmp_path / "mine") == {"notes.txt": b"mine"}
    assert (tmp_path / "file").read_text() == "mine"


def test_diff_tells_apart(half: Path, tmp_path: Path) -> None:
    same = task("diff", GOOD, GOOD)
    assert same.exit_code == 0
    assert "the same base and precision" in same.stdout
    result = task("diff", GOOD, half)
    assert result.exit_code == 1
    assert "whole modules differ" in result.stdout
    assert "layers.0.up.zeros.add" in result.stdout
    facts = json.loads(task("diff", GOOD, half, "--json").stdout)
    assert (facts["same_base"], facts["same_saved"]) == (True, False)
    assert facts["total"]["rms_b"] == pytest.approx(facts["total"]["rms_a"] / 2)
    assert {f"{d['module']}.{d['operation']}" for d in facts["deltas"]} == set(read_bundle(GOOD).deltas)
    other = replace(read_bundle(GOOD), config=replace(read_bundle(GOOD).config, base_fingerprint="0" * 64))
    write_bundle(tmp_path / "other", other)
    elsewhere = task("diff", GOOD, tmp_path / "other")
    assert elsewhere.exit_code == 1
    assert "different bases or precisions" in elsewhere.stdout


def test_diff_sees_whole_modules_alone(half: Path, tmp_path: Path) -> None:
    found = read_bundle(half)
    write_bundle(tmp_path / "other", replace(found, saved=(replace(found.saved[0], data=np.ones((2, 3), "<f4")),)))
    result = task("diff", half, tmp_path / "other")
    assert result.exit_code == 1
    assert "whole modules differ" in result.stdout


def test_diff_with_the_base(half: Path, tmp_path: Path) -> None:
    result = task("diff", half)
    assert result.exit_code == 1
    assert "1 tensors of whole modules" in result.stdout
    found = read_bundle(GOOD)
    write_bundle(tmp_path / "zero", replace(found, deltas={n: d * 0 for n, d in found.deltas.items()}))
    assert task("diff", tmp_path / "zero").exit_code == 0
    write_bundle(tmp_path / "alone", replace(read_bundle(half), deltas={}))
    assert task("diff", tmp_path / "alone").exit_code == 1


def test_diff_lists_those_that_differ_most_first(tmp_path: Path) -> None:
    config = read_bundle(GOOD).config
    deltas = {f"layers.{i}.fc.scales.mul": np.full((1, 1), i, np.float32) for i in range(1, 35)}
    write_bundle(tmp_path, TaskBundle(config, deltas))
    lines = task("diff", tmp_path).stdout.splitlines()
    listed = [line.split("│")[1].strip() for line in lines if "scales.mul" in line]
    assert listed == [f"layers.{i}.fc.scales.mul" for i in range(34, 4, -1)]
    assert any("… and 4 more" in line for line in lines)


# --- the Hub ---------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, half: Path) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """A Hub that has the bundle `half` at ``user/half``; what it was asked."""
    seen = list[tuple[tuple[Any, ...], dict[str, Any]]]()

    def watched(answer: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            seen.append((args, options))
            return answer(*args)

        return call

    def fetch(repo: str) -> StoredBundle:
        if repo != "user/half":
            raise HubError(f"{repo}: there is no such repository")
        return read_stored_bundle(half)

    found = (
        TaskRepository(
            "user/half", ("lowbit-task", "base_model:user/base", "base_model:adapter:user/base"), True, None
        ),
        TaskRepository("user/other", ("lowbit-task",), False, 1234),
    )
    monkeypatch.setattr("lowbit_format.tasks.repository.fetch_task", watched(fetch))
    monkeypatch.setattr("lowbit_format.tasks.repository.search_tasks", watched(lambda: found))
    monkeypatch.setattr("lowbit_format.tasks.sharing.push_task_to_hub", watched(lambda *_: "https://hub/commit/1"))
    return seen


def test_what_is_no_directory_is_on_the_hub(calls: list[Any], half: Path) -> None:
    result = task("inspect", "user/half", "--revision", "v1", "--subfolder", "a/b")
    assert result.exit_code == 0
    assert calls == [(("user/half",), {"revision": "v1", "subfolder": "a/b"})]
    assert task("diff", "user/half", half).exit_code == 0
    assert "user/none: there is no such repository" in refused(task("inspect", "user/none"))


def test_an_existing_directory_wins_over_the_hub(calls: list[Any], half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(half.parent)
    assert task("inspect", "half").exit_code == 0
    assert task("inspect", half.parent, "--subfolder", "half").exit_code == 0
    for command in ("inspect", "list"):
        assert "has no revision 'v1'" in refused(task(command, "half", "--revision", "v1"))
    assert calls == []


def test_push_passes_everything_on(calls: list[Any], half: Path) -> None:
    options = (
        "--subfolder sst2 --revision dev --private --message hello --base-model user/base "
        "--metric accuracy=0.91 --metric f1=0.5"
    )
    result = task("push", half, "user/tasks", *options.split(), "--tag", "v1")
    assert result.exit_code == 0, result.output
    assert "https://hub/commit/1" in result.stdout
    assert calls == [
        (
            (half, "user/tasks"),
            {
                "subfolder": "sst2",
                "revision": "dev",
                "private": True,
                "commit_message": "hello",
                "create_pr": False,
                "tag": "v1",
                "base_model": "user/base",
                "metrics": {"accuracy": 0.91, "f1": 0.5},
            },
        )
    ]
    task("push", half, "user/tasks", "--create-pr", "--public")
    assert calls[1][1] == {**dict.fromkeys(calls[0][1]), "create_pr": True, "private": False}


@pytest.mark.parametrize("metric", ["accuracy", "=1", "accuracy=", "accuracy=good", "accuracy=nan"])
def test_metrics_are_names_and_numbers(metric: str, calls: list[Any], half: Path) -> None:
    result = task("push", half, "user/tasks", "--metric", metric)
    assert result.exit_code == 2
    assert "name=value" in result.stderr
    assert calls == []


def test_push_of_what_is_no_bundle_asks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[object]()
    monkeypatch.setattr("lowbit_format.hub._api", asked.append)
    assert "there is no such file" in refused(task("push", tmp_path, "tasks"))
    assert asked == []


def test_pull_copies_the_bundle(calls: list[Any], half: Path, tmp_path: Path) -> None:
    (half / CARD_FILE).write_text("card")
    (half / "other.txt").write_text("not ours")
    result = task("pull", "user/half", tmp_path / "deep" / "out", "--revision", "v1", "--subfolder", "x")
    assert result.exit_code == 0, result.output
    assert calls == [(("user/half",), {"revision": "v1", "subfolder": "x"})]
    expected = {name: content for name, content in files(half).items() if name != "other.txt"}
    assert files(tmp_path / "deep" / "out") == expected
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["out"]


def test_pull_replaces_a_bundle_only_when_forced(calls: list[Any], half: Path, tmp_path: Path) -> None:
    write_bundle(tmp_path / "out", read_bundle(GOOD), card="of the old one")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    before = files(tmp_path / "out")
    assert "--force" in refused(task("pull", "user/half", tmp_path / "out"))
    assert (files(tmp_path / "out"), calls) == (before, [])
    assert task("pull", "user/half", tmp_path / "out", "--force").exit_code == 0
    assert files(tmp_path / "out") == {**files(half), "notes.txt": b"mine"}  # and no card of the old one
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert "exists already" in refused(task("pull", "user/half", tmp_path / "mine", "--force"))


def test_a_pull_that_fails_leaves_nothing(
    calls: list[Any], half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (half / SCALES_FILE).write_bytes((half / SCALES_FILE).read_bytes()[:-1])
    assert "HDR-" in refused(task("pull", "user/half", tmp_path / "out"))
    assert not (tmp_path / "out").exists()

    write_bundle(half, read_bundle(GOOD))
    copy = shutil.copyfile

    def full(source: Path, target: Path) -> Any:
        if Path(source).name == TASK_CONFIG_FILE:
            raise OSError(28, os.strerror(28))
        return copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", full)
    assert "No space left" in refused(task("pull", "user/half", tmp_path / "out"))
    assert [p.name for p in tmp_path.iterdir()] == ["half"]


def test_list_of_a_directory(half: Path) -> None:
    result = task("list", VALID)
    assert result.exit_code == 0
    assert f"{len(list(VALID.iterdir()))} tasks" in result.stdout
    facts = {t["subfolder"]: t for t in json.loads(task("list", VALID, "--json").stdout)}
    assert set(facts) == {f"{case.name}/bundle" for case in VALID.iterdir()}
    nested = facts["nested/bundle"]
    assert nested["bits"] == 2
    assert nested["bytes"] == (VALID / "nested" / "bundle" / SCALES_FILE).stat().st_size
    assert "(root)" in task("list", half).stdout


def test_list_of_an_empty_directory(tmp_path: Path) -> None:
    assert task("list", tmp_path).stdout == "no tasks\n"
    assert json.loads(task("list", tmp_path, "--json").stdout) == []


def test_list_goes_on_past_an_ill_formed_bundle(half: Path, tmp_path: Path) -> None:
    write_bundle(tmp_path / "bad", read_bundle(GOOD))
    (tmp_path / "bad" / TASK_CONFIG_FILE).write_text("{}")
    write_bundle(tmp_path / "zzz", read_bundle(GOOD))
    result = task("list", tmp_path)
    assert result.exit_code == 2
    assert [name in result.stdout for name in ("half", "bad", "zzz")] == [True] * 3
    assert "3 tasks, 1 of them ill-formed" in result.stdout
    assert f"BundleError: {tmp_path / 'bad'}" in result.stderr
    listed = task("list", tmp_path, "--json")
    assert listed.exit_code == 2
    facts = {f["subfolder"]: f for f in json.loads(listed.stdout)}
    assert "TSK-1" in facts["bad"]["error"]
    assert facts["zzz"]["method"] == read_bundle(GOOD).config.method


def test_a_typo_is_looked_for_here_first(half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``bundles/e2`` could be an id too: that there is no such directory is said first."""
    with running_hub(tmp_path / "server", monkeypatch):
        for args in (
            ("merge", tmp_path / "out", half, "bundles/e2"),
            ("inspect", "bundles/e2"),
            ("list", "bundles/e2"),
        ):
            result = task(*args)
            assert result.exit_code == 2
            line = result.stderr.splitlines()[-1]
            assert line.startswith("HubError: bundles/e2: there is no such directory here. On the Hub: ")
            assert "no such repository" in line


def test_list_searches_the_hub(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A base that is not to be had is searched for by its id."""

    def gone(repo_id: str) -> Any:
        raise HubError(f"{repo_id}: no such repository")

    monkeypatch.setattr("lowbit_format.cli.task_hub.list_files", gone)
    result = task("list", "--base", "user/base", "--author", "user", "--limit", 2)
    assert calls == [((), {"base": "user/base", "author": "user", "limit": 2})]
    assert "user/half" in result.stdout
    assert "1,234" in result.stdout
    assert "2 repositories with tasks (there may be more: see --limit)" in result.stdout
    facts = json.loads(task("list", "--author", "user", "--json").stdout)
    assert [(f["repo"], f["private"], f["downloads"], f["base"]) for f in facts] == [
        ("user/half", True, None, ["user/base"]),
        ("user/other", False, 1234, []),
    ]


def test_list_searches_for_a_base_on_disk_by_its_fingerprint(calls: list[Any]) -> None:
    assert task("list", "--base", BASE).exit_code == 0
    assert calls[0][1]["base"] == ModelReader(BASE).fingerprint().body


@pytest.mark.parametrize("args", [[], ["user/tasks", "--author", "user"], ["user/tasks", "--base", "user/base"]])
def test_list_wants_a_place_or_a_search(args: list[str], calls: list[Any]) -> None:
    result = task("list", *args)
    assert result.exit_code == 2
    assert "either" in result.stderr
    assert task("list", "--author", "user", "--revision", "v1").exit_code == 2
    assert calls == []


def test_there_and_back_through_a_hub(half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real client against a Hub on this machine."""
    with running_hub(tmp_path / "server", monkeypatch) as hub:
        pushed = task("push", half, "owner/tasks", "--subfolder", "sst2", "--tag", "v1", "--metric", "accuracy=0.91")
        assert pushed.exit_code == 0, pushed.output
        listed = json.loads(task("list", "owner/tasks", "--json").stdout)
        assert [(t["subfolder"], t["commit"], t["method"]) for t in listed] == [
            ("sst2", hub.head("owner/tasks"), "alphatuning")
        ]
        found = json.loads(task("list", "--base", BASE, "--json").stdout)
        assert [r["repo"] for r in found] == ["owner/tasks"]
        sealed = Path(shutil.copytree(BASE, tmp_path / "sealed"))
        assert CliRunner().invoke(app, ["verify", "--seal", str(sealed)]).exit_code == 0
        hub.create("somebody/renamed")  # a name that no card tells
        hub.commit("somebody/renamed", files(sealed))
        found = json.loads(task("list", "--base", "somebody/renamed", "--json").stdout)
        assert [r["repo"] for r in found] == ["owner/tasks"]
        pulled = task("pull", "owner/tasks", tmp_path / "out", "--subfolder", "sst2", "--revision", "v1")
        assert pulled.exit_code == 0, pulled.output
        for args, said in [
            (("inspect", "owner/tasks"), "choose one by subfolder"),
            (("pull", "owner/none", tmp_path / "none"), "no such repository"),
        ]:
            result = task(*args)
            assert result.exit_code == 2
            assert said in result.stderr.splitlines()[-1]  # above it, the client may show its progress
    told = read_bundle(tmp_path / "out").config
    assert told.task == Description(metrics={"accuracy": 0.91})
    assert replace(told, task=None, format_version="1.0") == read_bundle(half).config
    assert files(tmp_path / "out")[SCALES_FILE] == files(half)[SCALES_FILE]
    assert "0.91" in (tmp_path / "out" / CARD_FILE).read_text("utf-8")


def test_each_trip_reads_a_bundle_once(
    half: Path, tmp_path: Path, digested: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = len(read_bundle(half).deltas) + 1
    trips = {
        "push": ("push", half, "owner/tasks", "--base-model", "owner/base", "--metric", "f1=0.5"),
        "pull": ("pull", "owner/tasks", tmp_path / "out"),
        "inspect": ("inspect", "owner/tasks"),
        "merge": ("merge", tmp_path / "merged", "owner/tasks"),
    }
    with running_hub(tmp_path / "server", monkeypatch):
        for name, args in trips.items():
            digested.clear()
            result = task(*args)
            assert result.exit_code == 0, result.output
            assert (name, len(digested)) == (name, tensors)
