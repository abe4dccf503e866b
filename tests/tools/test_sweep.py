"""The sweep over model classes is not broken: it tries one class, remembers it, and tells what it found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def sweep(file: Path, *arguments: str) -> str:
    """What the command prints for one class; its exit status must be 0."""
    done = subprocess.run(
        [sys.executable, "-m", "tools.sweep", "--out", str(file), "--only", "BertModel", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


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
