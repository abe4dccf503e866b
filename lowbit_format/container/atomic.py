"""Files and directories that appear whole or not at all (DIR-7)."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from ..errors import OutputError


def write_json(path: Path, obj: object) -> None:
    """Write a JSON file atomically."""
    with atomic_file(path) as f:
        f.write((json.dumps(obj, indent=2, ensure_ascii=False) + "\n").encode())


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name, synced to the disk, only if the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with disk_errors(path):
            f = open(temporary, "wb")  # noqa: SIM115 - closed by sync_and_close
            try:
                yield f
                sync_and_close(f)
            finally:
                f.close()
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sync_and_close(f: BinaryIO) -> None:
    """Force the file to the disk: a rename after this cannot become visible before the data."""
    f.flush()
    os.fsync(f.fileno())
    f.close()


@contextlib.contextmanager
def disk_errors(path: object) -> Iterator[None]:
    """Turn an OSError (full disk, missing permission) into an OutputError that names the path."""
    try:
        yield
    except OSError as e:
        hint = (
            "free some space and run again (a conversion: with --resume)"
            if e.errno == errno.ENOSPC
            else "check the path and its permissions"
        )
        raise OutputError(f"{path}: cannot write: {e.strerror or e}; {hint}") from e


@contextlib.contextmanager
def atomic_directory(out: Path) -> Iterator[Path]:
    """A hidden sibling directory that becomes `out` if the block ends without an error, else is removed (DIR-7).

    Raises OutputError if `out` exists and is not an empty directory.
    """
    check_absent(out)
    work = out.with_name(f".{out.name}.{secrets.token_hex(8)}.tmp")  # containers share numbers of processes
    with disk_errors(out):
        work.mkdir(parents=True)
        try:
            yield work
            publish(work, out)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise


def check_absent(out: Path) -> None:
    """Raise OutputError unless `out` is absent or an empty directory."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out}: exists already and is not empty; choose another name or remove it")


def publish(work: Path, out: Path) -> None:
    """Rename the complete directory `work` to `out`, durably."""
    sync_directory(work)
    if out.exists():
        out.rmdir()
    os.replace(work, out)
    sync_directory(out.parent)


def sync_directory(path: Path) -> None:
    """Make renames in a directory durable, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def files_together(directory: Path, names: Sequence[str]) -> Iterator[Path]:
    """A hidden directory to write files into; if the block ends without an error, they replace those of `directory`.

    If the block or the replacement fails, `directory` has its old files as before, and no new ones.

    Args:
        directory: made if it is missing; its other files stay.
        names: of the files; an old file is removed if the block does not write its name. The last file is the commit
            marker: readers ignore the others until it exists.

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
    """Move the old files out, the commit marker first, then the new ones in, the commit marker last.

    A process killed in between may leave a mixture of old and new files, but none with a commit marker.
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
