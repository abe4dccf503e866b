"""``lowbit report``: one HTML file that shows a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from ..report.write import check_out, write_report
from . import console
from .opening import check_directory


def report(
    model: Annotated[Path, typer.Argument(help="A lowbit model directory.")],
    against: Annotated[
        Path | None, typer.Option(help="Directory of the model that it was made from: measure errors against it.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")] = Path("report.html"),
    module: Annotated[
        list[str] | None, typer.Option(help="Show the weights and levels of this module too; may be repeated.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Show a lowbit model in a browser: one HTML file, which loads nothing from elsewhere.

    It tells sizes and bits by kind and layer, where the errors are, how weights and levels are distributed, what the
    conversion measured, and which task bundles lie beside the model. Needs `pip install 'lowbit-format[report]'`.

    Example: `lowbit report ./llama-4bit --against ./llama -o llama-4bit.html`
    """
    with console.named_errors():
        check_out(out, force)
        for place in filter(None, (model, against)):
            check_directory(place)
        with Progress(console=console.err, transient=True) as progress:
            task = progress.add_task("comparing", total=None)
            facts = write_report(
                model,
                out,
                against=against,
                modules=module or (),
                force=force,
                report=lambda done, total: progress.update(task, completed=done, total=total),
            )
    console.out.print(
        f"Wrote {out}: {len(facts.modules)} modules, {len(facts.tasks.fitting)} tasks, "
        f"{console.megabytes(out.stat().st_size)}. Open it in a browser.",
        soft_wrap=True, highlight=False, markup=False,
    )  # fmt: skip
