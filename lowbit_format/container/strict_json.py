"""Strict JSON: no duplicate keys, no NaN or Infinity (DIR-8), and limits on size and nesting (DIR-10).

A number without a finite binary64 value counts as Infinity, however it is written (DIR-9).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

MAX_BYTES = 1 << 25  # of a file: parsed, it takes many times its size
MAX_DEPTH = 64  # levels, the outermost value is one: a parsed value can then be walked and printed recursively
_MAX_DIGITS = 309  # of a finite binary64 value; Python reads longer integers, up to a limit of its own
_FREE, _BYTES_EACH = 1024, 10  # a text may have 1024 lists and objects, plus one for each 10 characters: `[],[],…`
# would otherwise take many times the memory of its text


def load_file(path: Path, fail: Callable[[str, str], Exception], *, constants: bool = False) -> Any:
    """Parse the file at `path`; see :func:`loads`."""
    if path.stat().st_size > MAX_BYTES:
        raise fail("JSON", f"has {path.stat().st_size} bytes, expected at most {MAX_BYTES}")
    return loads(path.read_bytes(), fail, constants=constants)


def loads(text: str | bytes, fail: Callable[[str, str], Exception], *, constants: bool = False) -> Any:
    """Parse `text`.

    Args:
        text: JSON; bytes must be UTF-8.
        fail: makes the exception from a rule id (``"DIR-8"`` or ``"JSON"``) and a message.
        constants: allow NaN and Infinity, and numbers that count as it (they become it): Python writes them, and
            transformers has them in ``config.json``.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        obj = dict(pairs)
        if len(obj) != len(pairs):
            counts = Counter(k for k, _ in pairs)
            twice = next(k for k in counts if counts[k] > 1)
            raise fail("DIR-8", f"the key {twice[:80]!r} appears twice in one object")
        return obj

    def constant(name: str) -> NoReturn:
        raise fail("DIR-8", f"{name} is not JSON")

    def fraction(digits: str) -> float:
        value = float(digits)
        if math.isinf(value) and not constants:
            raise fail("DIR-8", f"the number {digits[:40]} is too large, which counts as Infinity")
        return value

    def integer(digits: str) -> int | float:
        if len(digits) < _MAX_DIGITS:
            return int(digits)
        value = fraction(digits)
        return value if math.isinf(value) else int(digits)

    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        if text.count("[") + text.count("{") > _FREE + len(text) // _BYTES_EACH:
            raise fail("JSON", "has more lists and objects than the facts about tensors need")
        value = json.loads(
            text,
            object_pairs_hook=unique,
            parse_constant=None if constants else constant,
            parse_float=fraction,
            parse_int=integer,
        )
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as e:
        raise fail("JSON", f"not valid JSON in UTF-8: {str(e)[:120]}") from e
    if _deeper_than(MAX_DEPTH, value):
        raise fail("JSON", f"more than {MAX_DEPTH} lists and objects inside each other")
    return value


def _deeper_than(limit: int, value: object) -> bool:
    """Whether `value` has more than `limit` levels of lists and objects; the outermost is the first."""
    level = [value]
    for _ in range(limit):
        level = [
            inner
            for outer in level
            if isinstance(outer, list | dict)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, list | dict)
        ]
        if not level:
            return False
    return True
