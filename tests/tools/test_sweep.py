"""The sweep over model classes is not broken: it tries one class, remembers it, and tells what it found."""

from __future__ import annotations

import json
from pathlib import Path

from support.tools import run_tool


def sweep(file: Path, *arguments: str) -> str:
    """What the command prints for one class."""
    return run_tool("sweep", "--out", str(file), "--only", "BertModel", *arguments)


def test_a_class(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    printed = sweep(file)
    result = json.loads(file.read_text())
    assert result["class"] == "BertModel"
    assert result["ran"]
    assert result["coverage"] == 1.0
    assert result["faults"] == []
    assert printed.splitlines()[-1].split() == ["1", "...", "all", "agrees"]
    assert sweep(file, "--report") == printed.split("\n", 1)[1]
    assert len(file.read_text().splitlines()) == 1
