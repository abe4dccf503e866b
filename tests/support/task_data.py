"""Files of examples in the words of :func:`.checkpoints.with_tokenizer`, and bases that can read them."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from support.checkpoints import with_tokenizer
from support.tuning_models import Bases

WORDS = 60  # the models of tuning_models have embeddings for as many


def base_with_tokenizer(bases: Bases, name: str, scheme: str = "bcq") -> Path:
    """A lowbit directory of a tiny model, with a tokenizer."""
    directory = bases.path(name, scheme)
    if not (directory / "tokenizer.json").exists():
        with_tokenizer(directory)
    return directory


def sentences(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Different texts of five words, all of the first half of words (``"yes"``), or all of the second (``"no"``)."""
    draw, half = random.Random(seed), WORDS // 2
    sides = [draw.randrange(2) for _ in range(count)]
    words = [[draw.randrange(half) + side * half for _ in range(5)] for side in sides]
    texts = (" ".join(f"w{w}" for w in some) for some in words)
    return [(text, ("yes", "no")[side]) for text, side in zip(texts, sides, strict=True)]


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def classified(path: Path, count: int = 60, seed: int = 0) -> Path:
    """JSON lines of ``text`` and ``label``."""
    return write_lines(path, [{"text": text, "label": label} for text, label in sentences(count, seed)])
