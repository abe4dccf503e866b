"""The data of a tuning: read, its columns and labels found, in three parts, encoded."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from .columns import LANGUAGE, NAMES, REGRESSION, TOKENS, Columns, find_columns
from .encoding import Encoded, encode
from .examples import Table, read_examples, splits_of
from .labels import Labels, check_seen, find_labels, label_texts
from .splits import hold_out

log = logging.getLogger(__name__)

CHOOSE = 0.1  # part of the examples to train on that the rate and the checkpoint are chosen by
VALIDATION = ("validation", "dev", "test")  # splits of the Hub's data sets to judge by, the first there is


@dataclass(frozen=True)
class EncodedParts:
    """Encoded examples to train on, to choose by, to judge by; and what was done to them."""

    train: Encoded
    choose: Encoded
    judge: Encoded

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know of it, in sentences."""
        parts = (self.train, self.choose, self.judge)
        truncated, empty, whole = (sum(getattr(p, n) for p in parts) for n in ("truncated", "empty", "whole_loss"))
        found = []
        if truncated:
            found.append(f"{truncated:,} examples were too long and lost their end: see --max-length")
        if empty:
            found.append(f"{empty:,} examples were left out, for nothing of them is to be predicted: see --max-length")
        if whole:
            found.append(
                f"{whole:,} chats are learnt whole: the template does not show where the assistant's turns are"
            )
        return tuple(found)


@dataclass(frozen=True)
class Data:
    """What was read.

    Attributes:
        columns: of the examples to train on.
        labels: of the task, if its kind has some.
        train, choose, judge: the parts, and `judge_columns` those of the last.
        notes: what a person should know of it.
    """

    columns: Columns
    labels: Labels | None
    train: Table
    choose: Table
    judge: Table
    judge_columns: Columns
    notes: tuple[str, ...]

    def encode(self, tokenizer: Any, max_length: int) -> EncodedParts:
        """All parts; see :func:`.encoding.encode`."""
        return EncodedParts(
            encode(self.train, self.columns, self.labels, tokenizer, max_length),
            encode(self.choose, self.columns, self.labels, tokenizer, max_length),
            encode(self.judge, self.judge_columns, self.labels, tokenizer, max_length),
        )


def read_data(
    source: str,
    judge: str | os.PathLike[str] | float,
    *,
    kind: str | None,
    columns: Mapping[str, str],
    labels: Sequence[str] | None,
    seed: int,
) -> Data:
    """Read the data and cut them; arguments as of :func:`.tune.tune`, with `judge` for ``eval``.

    Raises DataError.
    """
    if unknown := set(columns) - NAMES.keys():
        raise DataError(f"columns: there is no meaning {sorted(unknown)[0]!r}, expected some of {', '.join(NAMES)}")
    part = _fraction(judge)
    table = read_examples(source)
    found = find_columns(table, columns, kind)
    has_labels = found.kind not in (REGRESSION, LANGUAGE)
    if not has_labels and labels:
        raise DataError(f"names of labels are given, and a task of {found.kind} has no labels")
    names = find_labels(table, found, labels) if has_labels else None
    if part is None:
        rest, judged = table, _judging(source, os.fspath(judge))  # type: ignore[arg-type]
        judged_columns = find_columns(judged, {m: c for m, c in columns.items() if c in judged.columns}, found.kind)
        if set(judged_columns.names) != set(found.names):
            raise DataError(
                f"{judged.where}: has {', '.join(judged_columns.names)} in {list(judged.columns)}, expected "
                f"{', '.join(found.names)} as in {table.where}"
            )
    else:
        rest, judged = _cut(table, found, part, seed)
        judged_columns = found
    train, choose = _cut(rest, found, CHOOSE, seed + 1)
    if names is not None:
        seen = {text for i in range(len(train.rows)) for text in label_texts(train, found, i)}
        check_seen(judged, judged_columns, names, seen)
    known = {repr(_inputs(rest, found, i)) for i in range(len(rest.rows))}
    again = sum(repr(_inputs(judged, judged_columns, i)) in known for i in range(len(judged.rows)))
    notes = list[str]()
    if unused := found.unused(table):
        notes.append(f"columns that are not used: {', '.join(map(repr, unused))}")
        log.warning("%s: %s", table.where, notes[-1])
    if again:
        notes.append(f"{again:,} of the {len(judged.rows):,} examples to judge by are among those to train on")
    return Data(found, names, train, choose, judged, judged_columns, tuple(notes))


def _fraction(judge: str | os.PathLike[str] | float) -> float | None:
    """The part to hold out, if `judge` is a number."""
    try:
        part = float(judge)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    if not (math.isfinite(part) and 0 < part < 1):
        raise DataError(f"the part of the data to judge by is {part:g}, expected a number between 0 and 1, or a file")
    return part


def _judging(source: str, judge: str) -> Table:
    """The file, or the split of the same data set of the Hub, to judge by."""
    if Path(judge).is_file() or judge not in splits_of(source):
        return read_examples(judge)
    return read_examples(source, judge)


def _cut(table: Table, columns: Columns, part: float, seed: int) -> tuple[Table, Table]:
    """Two parts, by label; the same inputs are in one of them."""
    groups = [_inputs(table, columns, i) for i in range(len(table.rows))]
    labels = [""] * len(groups)
    if columns.kind not in (REGRESSION, LANGUAGE, TOKENS):
        labels = [label_texts(table, columns, i)[0] for i in range(len(groups))]
    kept, out = hold_out(groups, labels, part, seed)
    if not out or not kept:
        raise DataError(
            f"{table.where}: has {len(groups)} different examples, too few to hold some out; give more of each label, "
            "or a file to judge by (--eval, eval=)"
        )
    return table.take(kept), table.take(out)


def _inputs(table: Table, columns: Columns, i: int) -> list[Any]:
    """What example `i` gives a model, without what is to be predicted."""
    values = columns.values(table, i)
    return [values[m] for m in sorted(values) if m not in ("label", "tags", "completion")]
