"""``lowbit diff``: how two models differ, module by module."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.progress import track
from rich.table import Column, Table

from ..differences import Difference, FloatSide, LowbitSide, Side, compare_matrices, open_side
from ..errors import DirectoryError
from . import console
from .opening import check_directory

MOST = 30  # modules listed, those that differ most first


def diff(
    a: Annotated[Path, typer.Argument(help="A lowbit model directory, or a float one.")],
    b: Annotated[Path, typer.Argument(help="Another one; one of the two is a lowbit model.")],
) -> None:
    """Compare two lowbit models, or one and a float model: schemes, decoded weights, other tensors.

    The difference of a module is ``||A - B|| / ||A||`` of the decoded weights. Exits with 0 if the models are the
    same bit for bit, with 1 if they differ, with 2 if one cannot be read.

    Examples: `lowbit diff ./llama ./llama-4bit`, `lowbit diff ./llama-4bit ./llama-3bit`
    """
    with console.named_errors():
        check_directory(a)
        check_directory(b)
        one, two = open_side(a), open_side(b)
        if isinstance(one, FloatSide) and isinstance(two, FloatSide):
            raise DirectoryError("DIR-1", "both are float models; one of the two must be a lowbit model", file=a)
        rows = _compare_modules(one, two)
        others = _other_differences(one, two)
    differing = sorted((r for r in rows if not r.is_none), key=lambda r: -r.relative)
    same = len(rows) - len(differing)
    table = Table(Column("module", overflow="fold"), "A", "B", "difference", title="Modules that differ")
    for row in differing[:MOST]:
        table.add_row(row.path, *row.schemes, row.why_not or f"{row.relative:.6f}")
    if len(differing) > MOST:
        table.add_row(f"… and {len(differing) - MOST} more", "", "", "")
    if table.row_count:
        console.out.print(table)
    for name, what in others[:MOST]:
        console.out.print(f"{name}: {what}", highlight=False, soft_wrap=True)
    if len(others) > MOST:
        console.out.print(f"… and {len(others) - MOST} other tensors more", highlight=False)
    if norm := sum(r.squared_norm for r in rows):
        error = (sum(r.squared_distance for r in rows) / norm) ** 0.5
        console.out.print(f"difference over all modules in both: {error:.4f}", highlight=False)
    console.out.print(
        f"{same} modules are the same, {len(differing)} differ; {len(others)} other tensors differ; {_bases(one, two)}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    raise typer.Exit(0 if not differing and not others else 1)


def _quantized(*models: Side) -> set[str]:
    """Paths of the quantized modules of either model."""
    return {path for model in models if isinstance(model, LowbitSide) for path in model.reader.config.modules}


def _compare_modules(one: Side, two: Side) -> list[Difference]:
    paths = track(sorted(_quantized(one, two)), "comparing", console=console.err, transient=True)
    return [compare_matrices(one, two, path) for path in paths]


def _other_differences(one: Side, two: Side) -> list[tuple[str, str]]:
    """Tensors outside of quantized modules that are not the same bytes."""
    modules = _quantized(one, two)
    mine, theirs = one.others(modules), two.others(modules)
    found = [(n, "only in A" if n in mine else "only in B") for n in sorted(mine.keys() ^ theirs.keys())]
    for name in sorted(mine.keys() & theirs.keys()):
        (x, x_shape), (y, y_shape) = mine[name], theirs[name]
        if mine[name] != theirs[name]:
            found.append((name, f"{x} {list(x_shape)} in A, {y} {list(y_shape)} in B"))
        elif not np.array_equal(one.raw(name), two.raw(name)):
            found.append((name, "values differ"))
    return found


def _bases(one: Side, two: Side) -> str:
    """Whether tasks of one model can be used with the other."""
    if isinstance(one, LowbitSide) and isinstance(two, LowbitSide):
        mine, theirs = (model.reader.fingerprint(trust_digests=False) for model in (one, two))  # FPR-5
        same = mine.body == theirs.body
        return "the same base" if same else "different bases"
    return f"{'A' if isinstance(one, FloatSide) else 'B'} is a float model"
