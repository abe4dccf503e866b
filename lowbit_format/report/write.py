"""The report of a model directory, as a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..container.atomic import atomic_file, disk_errors
from ..container.reader import ModelReader
from ..differences import open_side
from ..errors import OutputError
from .facts import ModelFacts, model_facts
from .page import render


def write_report(
    model: str | Path,
    out: str | Path,
    *,
    against: str | Path | None = None,
    modules: Sequence[str] = (),
    force: bool = False,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> ModelFacts:
    """Write one HTML file that shows a lowbit model: sizes, bits and errors by layer and kind, levels, tasks.

    The file loads nothing from elsewhere. Of both models one matrix each is in memory at a time.

    Args:
        model: a lowbit model directory.
        out: the file to write; it appears only when it is whole.
        against: the model that it was made from, or another lowbit one: errors are measured against it. Without it
            they are those that the conversion left in the directory.
        modules: paths of modules whose distribution to show, beside those that are chosen.
        force: replace a file that is there.
        report: called with the number of modules compared and of all.

    Returns:
        The facts that the report shows.

    Raises:
        FormatError: one of the two models is ill-formed, or has no such module.
        SourceError: the float model cannot be read.
        OutputError: `out` exists, cannot be written, or plotly is not installed.
    """
    model, out = Path(model), Path(out)
    check_out(out, force)
    reader = ModelReader(model)
    other = None if against is None else open_side(Path(against))
    name = "" if against is None else Path(against).resolve().name
    facts = model_facts(reader, against=name, other=other, modules=modules, report=report)
    text = render(facts)
    with disk_errors(out), atomic_file(out) as f:
        f.write(text.encode())
    return facts


def check_out(out: Path, force: bool) -> None:
    """Raise OutputError if something is at `out`, unless that is a file and `force` allows to replace it."""
    if out.is_dir():
        raise OutputError(f"{out}: is a directory, expected the name of a file to write")
    if out.exists() and not force:
        raise OutputError(f"{out}: exists already; choose another name, or replace it with --force")
    if not out.parent.is_dir():
        raise OutputError(f"{out}: there is no directory {out.parent}; make it first")
