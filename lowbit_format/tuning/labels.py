"""Names of labels, and which output each is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DataError
from ..schema import is_name
from .columns import TOKENS, Columns, number_of
from .examples import Table


@dataclass(frozen=True)
class Labels:
    """The labels of a task.

    Attributes:
        names: of the outputs, in their order.
        outputs: the output that each label of the data means, by the label's text.
    """

    names: tuple[str, ...]
    outputs: Mapping[str, int]


def find_labels(table: Table, columns: Columns, given: Sequence[str] | None = None) -> Labels:
    """The labels of the data to train on.

    Names come from `given`, or from the data set; then labels that are numbers count them, from 0 on, unless `given`
    has these very numbers. Otherwise the labels of the data name themselves: numbers in their order, or else words in
    alphabetical order.

    Raises:
        DataError: fewer than two labels, or names that do not fit.
    """
    column = columns.names["tags" if columns.kind == TOKENS else "label"]
    counts = Counter(text for i in range(len(table.rows)) for text in label_texts(table, columns, i))
    numbers = {text: number_of(text) for text in counts}
    names = tuple(given or table.classes.get(column, ()))
    if len(set(names)) != len(names) or not all(map(is_name, names)):
        raise DataError(f"the names of labels are {list(names)}, expected different names without control characters")
    if column in table.classes or (names and not set(counts) <= set(names)):
        outputs = {str(i): i for i in range(len(names))}
    else:
        ordered = sorted(counts) if None in numbers.values() else sorted(counts, key=lambda text: (numbers[text], text))
        names = names or tuple(ordered)
        if wrong := next((name for name in names if not is_name(name)), None):
            raise DataError(f"{table.where}: the label {wrong!r} has control characters, which no name may have")
        outputs = {name: i for i, name in enumerate(names)}
    for i in range(len(table.rows)):
        for text in label_texts(table, columns, i):
            if text not in outputs:
                raise DataError(f"{table.place(i)}: unknown label {text!r}, expected one of {_shown(names)}")
    if len(counts) < 2:
        raise DataError(
            f"{table.where}: all {len(table.rows)} examples have the label {next(iter(counts))!r}: there is nothing to "
            "learn. Expected at least two"
        )
    return Labels(names, outputs)


def check_seen(table: Table, columns: Columns, labels: Labels, seen: Container[str]) -> None:
    """Refuse an example to judge by whose label is unknown, or not among those `seen` in training.

    Raises DataError with its line.
    """
    for i in range(len(table.rows)):
        for text in label_texts(table, columns, i):
            if text not in labels.outputs:
                raise DataError(f"{table.place(i)}: unknown label {text!r}, expected one of {_shown(labels.names)}")
            if text not in seen:
                raise DataError(f"{table.place(i)}: no example to train on has the label {text!r}; add some")


def label_texts(table: Table, columns: Columns, i: int) -> list[str]:
    """The labels of example `i` as texts, the same for 1, 1.0 and ``"1"``: one, or one for each token."""
    values = columns.values(table, i)
    if columns.kind != TOKENS:
        return [_text(values["label"])]
    tokens, tags = tokens_of(values["tokens"]), tokens_of(values["tags"])
    if len(tokens) != len(tags):
        raise DataError(f"{table.place(i)}: has {len(tokens)} tokens and {len(tags)} tags, expected as many")
    return [_text(tag) for tag in tags]


def tokens_of(value: Any) -> list[Any]:
    """A list, or a text's words."""
    return value.split() if isinstance(value, str) else list(value)


def _text(value: Any) -> str:
    whole = isinstance(value, float) and value.is_integer()
    return str(int(value)) if whole else str(value).strip()


def _shown(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:12])) + (", …" if len(names) > 12 else "")
