"""Examples to tune on, as rows of named values: from JSON lines, CSV, TSV, or a data set of the Hub."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from ..errors import DataError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Examples as they were read.

    Attributes:
        where: the file or data set, for messages.
        columns: names of the values.
        rows: the examples.
        lines: where each begins: lines of the file, or numbers from 1 on.
        classes: names of labels by column, where the source has them (class labels of the Hub).
    """

    where: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    lines: tuple[int, ...]
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def place(self, i: int) -> str:
        """Where example `i` is, for messages."""
        return f"{self.where}, line {self.lines[i]}"

    def take(self, chosen: list[int]) -> Table:
        """The examples with these numbers."""
        rows, lines = tuple(self.rows[i] for i in chosen), tuple(self.lines[i] for i in chosen)
        return Table(self.where, self.columns, rows, lines, self.classes)


def read_examples(source: str, split: str = "train") -> Table:
    """The examples of a file (``.jsonl``, ``.csv`` or ``.tsv``), or of a data set on the Hub (``user/name[:config]``).

    CSV is read with quotes, as spreadsheets write it; TSV has none. Both begin with a line of names.

    Raises:
        DataError: no such file or data set, a line that is broken (with its number), or no example.
    """
    path = Path(source)
    if path.is_file():
        read = _READERS.get(path.suffix.lower())
        if read is None:
            raise DataError(f"{path}: ends in {path.suffix!r}, expected {', '.join(_READERS)}")
        table = _from_file(path, read)
    else:
        table = _from_hub(source, split)
    if not table.rows:
        raise DataError(f"{table.where}: holds no example")
    return table


def splits_of(source: str) -> tuple[str, ...]:
    """Names of the splits of a data set on the Hub; none for a file."""
    if Path(source).is_file():
        return ()
    repo, _, config = source.partition(":")
    return tuple(_hub(source, lambda hub: hub.get_dataset_split_names(repo, config or None)))


Numbered = Iterator[tuple[int, Row]]


def _from_file(path: Path, read: Callable[[TextIO, Path], Numbered]) -> Table:
    lines, rows = list[int](), list[Row]()
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            for line, row in read(f, path):
                lines.append(line)
                rows.append(row)
    except UnicodeDecodeError as e:
        raise DataError(f"{path}: is not UTF-8 text behind line {lines[-1] if lines else 0}: {e.reason}") from e
    except OSError as e:
        raise DataError(f"{path}: cannot be read: {e.strerror or e}") from e
    columns = dict.fromkeys(name for row in rows for name in row)  # objects of JSON need not have the same
    return Table(str(path), tuple(columns), tuple(rows), tuple(lines))


def _json_lines(f: TextIO, path: Path) -> Numbered:
    for number, line in enumerate(f, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as e:  # also of an integer with very many digits
            raise DataError(f"{path}, line {number}: is not JSON ({e}); expected one object a line") from e
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: is no object; expected one object a line, with names and values")
        yield number, row


def _delimited(f: TextIO, path: Path, options: dict[str, Any]) -> Numbered:
    reader, names, begin = csv.reader(f, strict=True, **options), list[str](), 1
    while True:
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            raise DataError(f"{path}, line {begin}: {e}; check the quotes there, or give JSON lines") from e
        if values and not names:
            names = [name.strip() for name in values]
            if len(set(names)) != len(names) or "" in names:
                raise DataError(f"{path}, line 1: names columns {names}, expected different names")
        elif values:
            if len(values) != len(names):
                raise DataError(f"{path}, line {begin}: has {len(values)} values, expected {len(names)}: {names}")
            yield begin, dict(zip(names, values, strict=True))
        begin = reader.line_num + 1


def _csv(f: TextIO, path: Path) -> Numbered:
    return _delimited(f, path, {})


def _tsv(f: TextIO, path: Path) -> Numbered:
    return _delimited(f, path, {"delimiter": "\t", "quoting": csv.QUOTE_NONE})


_READERS: dict[str, Callable[[TextIO, Path], Numbered]] = {
    ".jsonl": _json_lines,
    ".json": _json_lines,
    ".csv": _csv,
    ".tsv": _tsv,
}


def _from_hub(name: str, split: str) -> Table:
    repo, _, config = name.partition(":")
    found = _hub(name, lambda hub: hub.load_dataset(repo, config or None, split=split))
    classes = {
        column: tuple(names)
        for column, feature in found.features.items()
        if (names := getattr(getattr(feature, "feature", feature), "names", None))
    }
    return Table(name, tuple(found.column_names), tuple(found), tuple(range(1, len(found) + 1)), classes)


def _hub(name: str, ask: Callable[[Any], Any]) -> Any:
    """What `ask` gets from the package datasets; every error of it as a DataError."""
    try:
        import datasets  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ModuleNotFoundError:
        raise DataError(
            f"{name}: there is no such file; a data set of the Hub needs the package datasets: "
            'pip install "lowbit-format[tune]"'
        ) from None
    try:
        return ask(datasets)
    except Exception as e:  # of many kinds, by where the data lie
        raise DataError(f"{name}: there is no such file, and it is not to be had as a data set of the Hub: {e}") from e
