"""Opening the model that a command is given: what is wrong on this machine is said first."""

from __future__ import annotations

from pathlib import Path

from ..container.reader import CONFIG_FILE, ModelReader
from ..errors import DirectoryError
from ..tasks.bundle_config import TASK_CONFIG_FILE


def open_model(place: Path) -> ModelReader:
    """The lowbit model in the directory `place`.

    Raises:
        DirectoryError: there is no such directory, or something else is there; it says what and what to do.
        FormatError: see :class:`ModelReader`.
    """
    check_directory(place)
    return ModelReader(place)


def check_directory(place: Path) -> None:
    """Raise DirectoryError unless `place` is a directory that may hold a model."""

    def fail(message: str) -> DirectoryError:
        return DirectoryError("DIR-1", message, file=place)

    if place.is_file():
        raise fail(f"is a file, expected the directory of a model, such as {place.parent}")
    if not place.is_dir():
        raise fail("no such directory")
    if (place / CONFIG_FILE).is_file():
        return
    if (place / TASK_CONFIG_FILE).is_file():
        raise fail("is a task bundle, not a model: see `lowbit task inspect`")
    if below := sorted(file.parent for file in place.glob(f"*/{CONFIG_FILE}")):
        raise fail(f"holds no model itself, but {below[0]} does")
