"""Results of a task as a caller gives them, checked and made fit for a bundle and its card."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import TaskError


def checked_metrics(metrics: Mapping[str, float] | None) -> dict[str, float]:
    """Results by name, each name printable and on one line; raises TaskError for what is no name or no number."""
    found = {}
    for name, value in (metrics or {}).items():
        plain, number = _plain(name), _number(value)
        if not plain or number is None:
            raise TaskError(f"metric {name!r} is {_shown(value)}; expected a name and a number (a tensor has .item())")
        found[plain] = number
    return found


def printable(text: str) -> str:
    """`text` without lone surrogates and control characters, which neither UTF-8 nor YAML can hold."""
    return "".join(c for c in text.encode("utf-8", "replace").decode() if c.isprintable() or c in "\n\t")


def _plain(name: object) -> str:
    return printable(" ".join(name.split())).strip() if isinstance(name, str) else ""


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:  # of an integer
        return None


def _shown(value: object) -> str:
    """Python writes no integer of very many digits."""
    return "a very large integer" if isinstance(value, int) and value.bit_length() > 1024 else repr(value)
