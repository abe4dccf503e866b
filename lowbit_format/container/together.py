"""Replacing several files of a directory together: all of them or none (DIR-7)."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from .writer import disk_errors, sync_directory


@contextlib.contextmanager
def files_together(directory: Path, names: Sequence[str]) -> Iterator[Path]:
    """A hidden directory to write files into; when the block ends well, they replace those of `directory`.

    If the block or the replacing fails, the old files are there as before, and no new ones.

    Args:
        directory: made where it is missing; its other files stay.
        names: the files; one that the block does not write is removed. The last one makes a reader take the others.

    Raises:
        OutputError: the disk refuses.
    """
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".new-", suffix=".tmp", dir=directory))
        try:
            yield work
            _replace(work, directory, names)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _replace(work: Path, directory: Path, names: Sequence[str]) -> None:
    """Move the old files aside, the last name first, then the new ones in, the last name last.

    So a process that is killed in between leaves no mixture of old and new that a reader would take.
    """
    old, placed = work / "old", list[str]()
    old.mkdir()
    try:
        for name in reversed(names):
            if os.path.lexists(directory / name):
                os.replace(directory / name, old / name)
        for name in names:
            if os.path.lexists(work / name):
                os.replace(work / name, directory / name)
                placed.append(name)
    except BaseException:
        for name in placed:
            (directory / name).unlink()
        for name in names:
            if os.path.lexists(old / name):
                os.replace(old / name, directory / name)
        raise
    sync_directory(directory)
