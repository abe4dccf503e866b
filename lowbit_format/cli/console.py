"""What all subcommands share: the consoles, tables, text from files, and how an error ends a command."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from ..errors import LowbitError

out = Console()
err = Console(stderr=True)

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


@contextlib.contextmanager
def named_errors() -> Iterator[None]:
    """Print a LowbitError on standard error and exit with 2; everything else is a bug and shows its trace."""
    try:
        yield
    except LowbitError as e:
        print_error(e)
        raise typer.Exit(2) from e


def print_error(error: LowbitError) -> None:
    """Print an error with its name on standard error."""
    err.print(f"{type(error).__name__}: {error}", style="red", markup=False, highlight=False, soft_wrap=True)


def pairs(title: str, rows: list[tuple[str, str]]) -> Table:
    """A table of names and values."""
    table = Table(title=title, show_header=False, title_justify="left")
    for row in rows:
        table.add_row(*row)
    return table


def columns(*names: str, numbers: Sequence[str]) -> list[Column]:
    """Columns of a table: `names` whose text is folded and never cut, and `numbers` that are kept on one line."""
    folded = [Column(name, overflow="fold") for name in names]
    return folded + [Column(number, justify="right", no_wrap=True) for number in numbers]


def plain(text: str) -> str:
    """`text` from a file for the terminal: no markup, no control characters."""
    return escape(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", text))


def megabytes(nbytes: int) -> str:
    """A size for people."""
    return f"{nbytes / 1e6:,.1f} MB"
