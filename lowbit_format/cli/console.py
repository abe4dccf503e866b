"""What all subcommands share: the consoles, and how an error ends a command."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import typer
from rich.console import Console
from rich.table import Table

from ..errors import LowbitError

out = Console()
err = Console(stderr=True)


@contextlib.contextmanager
def named_errors() -> Iterator[None]:
    """Print a LowbitError on standard error and exit with 2; everything else is a bug and shows its trace."""
    try:
        yield
    except LowbitError as e:
        err.print(f"{type(e).__name__}: {e}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from e


def pairs(title: str, rows: list[tuple[str, str]]) -> Table:
    """A table of names and values."""
    table = Table(title=title, show_header=False, title_justify="left")
    for row in rows:
        table.add_row(*row)
    return table


def megabytes(nbytes: int) -> str:
    """A size for people."""
    return f"{nbytes / 1e6:,.1f} MB"
