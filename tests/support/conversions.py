"""What is compared and asserted of the directory that a conversion writes."""

from __future__ import annotations

import hashlib
from pathlib import Path

from lowbit_format.converters.driver import work_directory


def content(directory: Path) -> dict[str, str]:
    """SHA-256 of every file, hidden ones too, by relative path."""
    files = [p for p in directory.rglob("*") if p.is_file()]
    return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def assert_nothing_looks_finished(out: Path, *, killed: bool = False) -> None:
    """DIR-7: neither `out` nor what an unfinished conversion leaves beside it is for use; no scraps, unless killed."""
    assert not out.exists()
    work = work_directory(out)
    assert work.name.startswith(".")
    if not killed:
        assert not (work / "config.json").exists()
        assert not list(work.glob("*.tmp"))
