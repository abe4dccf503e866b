"""``lowbit``: convert models, look at them, check them, turn them back; try it all with ``lowbit demo``."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from ..converters.command import convert
from . import cut, demo, dequantize, diff, evaluate, inspect, report, task, verify

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""Low-bit models in bit-planes: one model, many tasks.

Make one with `lowbit convert SOURCE OUT`; try everything with `lowbit demo`.
""",
)
app.command()(convert)
app.command()(demo.demo)
app.command()(inspect.inspect)
app.command()(verify.verify)
app.command()(cut.cut)
app.command()(dequantize.dequantize)
app.command()(diff.diff)
app.command()(report.report)
app.command("eval")(evaluate.evaluate)
app.add_typer(task.app, name="task")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lowbit-format {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def run() -> None:
    """Entry point."""
    app()
