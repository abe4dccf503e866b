"""A model in several GGUF files, ``…-00001-of-0000N.gguf``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ...errors import SourceError

_SPLIT = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def all_parts(file: Path) -> list[Path]:
    """The files of the model to which `file` belongs, the first first; raises SourceError if one is missing."""
    split = _SPLIT.fullmatch(file.name)
    if split is None:
        return [file]
    count = int(split["count"])
    parts = [file.with_name(f"{split['stem']}-{n:05}-of-{count:05}.gguf") for n in range(1, count + 1)]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise SourceError(f"{file}: is one of {count} files, of which {missing[0]} is missing; download it too")
    return parts


def models_in(directory: Path) -> Iterator[Path]:
    """The models in a directory: each single file, and the first of each that has several."""
    for path in sorted(directory.glob("*.gguf")):
        split = _SPLIT.fullmatch(path.name)
        if split is None or int(split["number"]) == 1:
            yield path
