"""``lowbit diff``: how two models differ, module by module."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.progress import track
from rich.table import Table

from ..container.reader import ModelReader
from . import console

MOST = 30  # modules listed, those that differ most first


def diff(
    a: Annotated[Path, typer.Argument(help="A lowbit model directory.")],
    b: Annotated[Path, typer.Argument(help="Another one.")],
) -> None:
    """Compare two lowbit models: schemes, decoded weights, other tensors.

    The difference of a module is ``||A - B|| / ||A||`` of the decoded weights. Exits with 0 if the models are the
    same bit
    for bit, with 1 if they differ, with 2 if one cannot be read.

    Example: `lowbit diff ./llama-4bit ./llama-3bit`
    """
    with console.named_errors():
        one, two = ModelReader(a), ModelReader(b)
        rows = _module_rows(one, two)
        others = _other_differences(one, two)
    same = sum(row[2] == "same" for row in rows)
    table = Table("module", "A", "B", "difference", title="Modules that differ")
    differing = sorted((r for r in rows if r[2] != "same"), key=lambda r: -r[1])
    for path, _, what, schemes in differing[:MOST]:
        table.add_row(path, *schemes, what)
    if len(differing) > MOST:
        table.add_row(f"… and {len(differing) - MOST} more", "", "", "")
    if table.row_count:
        console.out.print(table)
    for name, what in others[:MOST]:
        console.out.print(f"{name}: {what}", highlight=False)
    fingerprints = one.fingerprint().body, two.fingerprint().body
    base = "the same base" if fingerprints[0] == fingerprints[1] else "different bases"
    console.out.print(
        f"{same} modules are the same, {len(rows) - same} differ; {len(others)} other tensors differ; {base}",
        highlight=False,
    )
    raise typer.Exit(0 if same == len(rows) and not others else 1)


def _module_rows(one: ModelReader, two: ModelReader) -> list[tuple[str, float, str, tuple[str, str]]]:
    """Path, sort key, difference in words, and the two schemes, for every module of either."""
    rows = []
    for path in track(
        sorted({*one.config.modules, *two.config.modules}), "comparing", console=console.err, transient=True
    ):
        schemes = (_scheme(one, path), _scheme(two, path))
        if "-" in schemes:
            rows.append((path, np.inf, "only in A" if schemes[1] == "-" else "only in B", schemes))
            continue
        if one.module(path).shape != two.module(path).shape:
            rows.append((path, np.inf, "shapes differ", schemes))
            continue
        x, y = one.decode(path).astype(np.float64), two.decode(path).astype(np.float64)
        norm, distance = float(np.linalg.norm(x)), float(np.linalg.norm(x - y))
        relative = distance / norm if norm else float(distance > 0)
        stored_alike = schemes[0] == schemes[1] and distance == 0
        rows.append((path, relative, "same" if stored_alike else f"{relative:.6f}", schemes))
    return rows


def _scheme(reader: ModelReader, path: str) -> str:
    if path not in reader.config.modules:
        return "-"
    s = reader.module(path).scheme
    return f"{s.label or s.codec} {s.bits} g{s.group_size} {s.scale_dtype}"


def _other_differences(one: ModelReader, two: ModelReader) -> list[tuple[str, str]]:
    """Tensors outside of quantized modules that are not the same bytes."""
    mine, theirs = set(one.names()) - one.lowbit_names(), set(two.names()) - two.lowbit_names()
    found = [(n, "only in A" if n in mine else "only in B") for n in sorted(mine ^ theirs)]
    for name in sorted(mine & theirs):
        x, y = one.info(name), two.info(name)
        if (x.dtype, x.shape) != (y.dtype, y.shape):
            found.append((name, f"{x.dtype} {list(x.shape)} in A, {y.dtype} {list(y.shape)} in B"))
        elif not np.array_equal(one.raw(name), two.raw(name)):
            found.append((name, "values differ"))
    return found
