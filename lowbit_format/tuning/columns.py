"""Which columns of the data mean what, and what kind of task they make."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import DataError
from .examples import Table

CLASSIFICATION, REGRESSION = "classification", "regression"
TOKENS, LANGUAGE = "token-classification", "language-modelling"
KINDS = (CLASSIFICATION, REGRESSION, TOKENS, LANGUAGE)

# Names under which a column is found, for each meaning; the first is also its option.
NAMES: dict[str, tuple[str, ...]] = {
    "text": ("text", "sentence", "content", "sentence1", "premise", "question1", "question", "review"),
    "text_pair": ("text_pair", "sentence2", "hypothesis", "question2", "passage"),
    "label": ("label", "labels", "class", "category", "target", "score", "rating", "intent"),
    "tokens": ("tokens", "words"),
    "tags": ("tags", "ner_tags", "pos_tags", "labels"),
    "prompt": ("prompt", "instruction"),
    "input": ("input", "context"),
    "completion": ("completion", "response", "output"),
    "messages": ("messages", "conversations"),
}


@dataclass(frozen=True)
class Form:
    """Meanings that make a task of one of `kinds`; those of `more` may be there too."""

    kinds: tuple[str, ...]
    meanings: tuple[str, ...]
    more: tuple[str, ...] = ()


FORMS = (  # the first that the data have
    Form((LANGUAGE,), ("messages",)),
    Form((LANGUAGE,), ("prompt", "completion"), ("input",)),
    Form((TOKENS,), ("tokens", "tags")),
    Form((CLASSIFICATION, REGRESSION), ("text", "label"), ("text_pair",)),
    Form((LANGUAGE,), ("text",)),
)


@dataclass(frozen=True)
class Columns:
    """What was found.

    Attributes:
        kind: of the task, one of :data:`KINDS`.
        names: the column of each meaning.
    """

    kind: str
    names: Mapping[str, str]

    def unused(self, table: Table) -> tuple[str, ...]:
        """Columns of the data that mean nothing here."""
        return tuple(column for column in table.columns if column not in self.names.values())

    def values(self, table: Table, i: int) -> dict[str, Any]:
        """The values of example `i` by meaning.

        An ``input``, which may be empty, is a part of the prompt: it stands behind a blank line.

        Raises DataError, with the line, for a value that is missing.
        """
        found = {meaning: table.rows[i].get(column) for meaning, column in self.names.items()}
        if not found.get("input"):
            found.pop("input", None)
        for meaning, value in found.items():
            if value is None or value == "":
                raise DataError(f"{table.place(i)}: has no {self.names[meaning]!r}; fill it in, or take the line out")
            if meaning in ("text", "text_pair", "prompt", "input", "completion") and not isinstance(value, str):
                raise DataError(f"{table.place(i)}: {self.names[meaning]!r} is {value!r}, expected a text")
        if "input" in found:
            found["prompt"] = f"{found['prompt']}\n\n{found.pop('input')}"
        return found


def find_columns(table: Table, named: Mapping[str, str], kind: str | None = None) -> Columns:
    """The columns that the task needs, as they are named, or else found by their usual names.

    Args:
        table: the data.
        named: columns by meaning, as the caller names them.
        kind: of the task; by default what the columns make, and of numbers with fractions a regression.

    Raises:
        DataError: a named column is missing, or the columns make no task of that kind; it says which there are.
    """
    there = f"{table.where}: has the columns {', '.join(map(repr, table.columns))}"
    if kind is not None and kind not in KINDS:
        raise DataError(f"the kind of task is {kind!r}, expected {', '.join(KINDS)}")
    for meaning, column in named.items():
        if column not in table.columns:
            raise DataError(f"{there}, and no {column!r}, which is to be the {meaning}")
    found = {**_by_usual_names(table), **named}
    for form in FORMS:
        has = {*form.meanings, *form.more}
        if set(named) <= has and set(form.meanings) <= found.keys() and (kind is None or kind in form.kinds):
            columns = {meaning: column for meaning, column in found.items() if meaning in has}
            chosen = kind or (form.kinds[0] if len(form.kinds) == 1 else _kind_of_labels(table, columns["label"]))
            return Columns(chosen, columns)
    wanted = " or ".join("+".join(form.meanings) for form in FORMS if kind is None or kind in form.kinds)
    raise DataError(
        f"{there}; expected {wanted}. Say which column is which, such as --text and --label (text=, label=)"
    )


def _by_usual_names(table: Table) -> dict[str, str]:
    columns = {column.lower(): column for column in reversed(table.columns)}
    found = {meaning: [columns[name] for name in names if name in columns] for meaning, names in NAMES.items()}
    return {meaning: candidates[0] for meaning, candidates in found.items() if candidates}


def _kind_of_labels(table: Table, column: str) -> str:
    """Numbers of which one has a fraction are a regression's."""
    numbers = [number_of(row.get(column)) for row in table.rows]
    if column in table.classes or any(number is None for number in numbers):
        return CLASSIFICATION
    return REGRESSION if any(number != int(number) for number in numbers if number is not None) else CLASSIFICATION


def number_of(value: Any) -> float | None:
    """A finite number, also one written as text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
