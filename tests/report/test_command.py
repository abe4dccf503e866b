"""``lowbit report``: what it writes, and what it refuses by name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.directories import tiny_model
from typer.testing import CliRunner, Result

from lowbit_format.cli.main import app

pytest.importorskip("plotly")


def lowbit(*args: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args], env={"COLUMNS": "200", "TERM": "dumb"})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny_model(tmp_path / "model")
    return tmp_path / "model"


def test_it_writes_one_file_and_says_so(model: Path, tmp_path: Path) -> None:
    result = lowbit("report", model, "-o", tmp_path / "out.html", "--module", "a")
    assert result.exit_code == 0, result.output
    assert f"Wrote {tmp_path / 'out.html'}: 2 modules, 0 tasks" in result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out.html"]


def test_what_is_there_is_replaced_only_with_force(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.html"
    out.write_text("mine")
    result = lowbit("report", model, "-o", out)
    assert result.exit_code == 2
    assert "OutputError" in result.output
    assert "exists already" in result.output
    assert out.read_text() == "mine"
    assert lowbit("report", model, "-o", out, "--force").exit_code == 0
    assert out.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(("out", "said"), [(".", "is a directory"), ("missing/out.html", "there is no directory")])
def test_a_place_that_cannot_be_written_is_named(out: str, said: str, model: Path, tmp_path: Path) -> None:
    result = lowbit("report", model, "-o", tmp_path / out, "--force")
    assert result.exit_code == 2
    assert said in result.output


def test_what_is_no_model_is_named(model: Path, tmp_path: Path, checkpoint: Callable[..., Path]) -> None:
    out = tmp_path / "out.html"
    for place, said in [
        (tmp_path / "missing", "no such directory"),
        (model / "config.json", "is a file, expected the directory of a model"),
        (tmp_path, f"holds no model itself, but {model} does"),
        (checkpoint("llama"), "convert it first"),
    ]:
        result = lowbit("report", place, "-o", out)
        assert result.exit_code == 2
        assert said in result.output
    result = lowbit("report", model, "--against", tmp_path / "missing", "-o", out)
    assert result.exit_code == 2
    assert "no such directory" in result.output
    assert not out.exists()


def test_a_module_that_is_not_there_is_named(model: Path, tmp_path: Path) -> None:
    result = lowbit("report", model, "-o", tmp_path / "out.html", "--module", "nothing")
    assert result.exit_code == 2
    assert "'nothing': no such module" in result.output


@pytest.mark.parametrize("package", ["plotly", "jinja2"])
def test_a_missing_package_is_named(package: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    result = lowbit("report", model, "-o", tmp_path / "out.html")
    assert result.exit_code == 2
    assert package in result.output
    assert "pip install 'lowbit-format[report]'" in result.output
    assert not (tmp_path / "out.html").exists()


def test_without_an_original_it_needs_no_torch(model: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from lowbit_format.report.write import write_report; "
        "write_report(sys.argv[1], sys.argv[2]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, model, tmp_path / "out.html"], check=True)
