"""``lowbit task``: look at task bundles, add them, compare them, and share them (:mod:`.task_hub`)."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from ..container.reader import ModelReader
from ..dtypes import BY_NAME
from ..matrix import F32
from ..tasks.arithmetic import ModuleDifference, compare_bundles, merge_bundles, same_saved, total_difference
from ..tasks.bundle import StoredBundle, TaskBundle, rounding_loss, write_bundle
from ..tasks.bundle_config import PLAIN
from ..tasks.finding import find_bundle
from ..tasks.matching import check_applies
from ..tasks.operations import SAVED, split_delta
from . import console, task_hub, task_tune
from .console import columns, plain
from .task_options import Force, Revision, Subfolder, check_out

MOST = 30  # deltas listed by diff, those that differ most first

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="""Task bundles: the scales of one base, tuned for one task.

A bundle is a directory, or a repository on the Hub; an existing directory is taken for one.
""",
)

Place = Annotated[str, typer.Argument(help="A bundle's directory, or its repository on the Hub.")]


@app.command()
def inspect(
    bundle: Place,
    base: Annotated[
        Path | None, typer.Option(help="A lowbit model directory; check that the bundle can be applied to it.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="With `--base`: check the bytes of the base too, as `lowbit verify` does.")
    ] = False,
    revision: Revision = None,
    subfolder: Subfolder = None,
    modules: Annotated[bool, typer.Option("--modules", help="List every module, not only kinds of modules.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")] = False,
) -> None:
    """Show what a task bundle holds: its base, method, deltas, and modules that it carries whole.

    Modules whose paths differ in numbers alone, as those of a model's layers do, are one kind and one line.

    Exits with 2 and a named error if the bundle is ill-formed, or does not fit the model of `--base`. Which model that
    is, is told *by digests* where its files give them: whether they are damaged is checked with `--verify` only.

    Example: `lowbit task inspect ./sst2-scales --base ./llama-4bit`
    """
    if verify and base is None:
        raise typer.BadParameter("--verify checks a base: give one with --base")
    verdict = "Well-formed. With --base DIR it is checked against a base too."
    with console.named_errors():
        found = find_bundle(bundle, revision=revision, subfolder=subfolder)
        facts = describe(found)
        if base is not None:
            model = ModelReader(base)
            unknown = check_applies(found.bundle, model, verify=verify)
            facts["fits_base"] = str(base)
            facts["fits_by"] = "digests" if model.has_lowbit_digests() and not verify else "bytes"
            facts["saved_not_in_base"] = unknown
            verdict = _verdict(facts)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    for table in _tables(facts, modules):
        console.out.print(table)
    console.out.print(f"base fingerprint {facts['base_fingerprint']}", soft_wrap=True, highlight=False)
    if facts["head_fingerprint"]:
        console.out.print(f"head fingerprint {facts['head_fingerprint']}", soft_wrap=True, highlight=False)
    console.out.print(verdict, soft_wrap=True, highlight=False, markup=False)


@app.command()
def merge(
    out: Annotated[Path, typer.Argument(help="Directory to make.")],
    bundles: Annotated[list[str], typer.Argument(help="Directories or repositories of bundles of one base.")],
    weight: Annotated[
        list[float] | None, typer.Option(help="One for each bundle, in their order. The default is their mean.")
    ] = None,
    saved_from: Annotated[
        int | None, typer.Option(help="Keep the whole modules of this bundle; 0 is the first one.")
    ] = None,
    lines: Annotated[
        float | None,
        typer.Option(help="LiNeS: take only this part of the first layer's deltas, all of the last's, evenly between."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help=f"Of the deltas in the file: {', '.join(f'`{d}`' for d in BY_NAME)}.")
    ] = "float32",
    force: Force = False,
) -> None:
    """Write the weighted sum of task bundles as a new one.

    Deltas are added in float64 and rounded once. A delta that a bundle lacks counts as zero.

    Examples: `lowbit task merge ./both ./sst2-scales ./imdb-scales --weight 0.7 --weight 0.3`,
    `lowbit task merge ./both ./sst2-scales ./imdb-scales --weight 0.8 --weight 0.8 --lines 0.5`
    """
    if dtype not in BY_NAME:
        raise typer.BadParameter(f"--dtype is {dtype!r}, expected {', '.join(BY_NAME)}")
    with console.named_errors():
        check_out(out, force)
        parts = [find_bundle(place).bundle for place in bundles]
        merged = merge_bundles(parts, weight or None, saved_from=saved_from, lines=lines)
        loss = rounding_loss(merged, BY_NAME[dtype])
        write_bundle(out, merged, dtype=BY_NAME[dtype], card=_card(bundles, weight, lines, merged))
    console.out.print(
        f"Wrote {out}: {len(merged.deltas)} deltas, {merged.delta_values:,} values in {dtype}"
        + (f"; rounding changed {loss.changed:,}, by {loss.relative_rms:.2g} of their rms" if loss.changed else ""),
        soft_wrap=True, highlight=False, markup=False,
    )  # fmt: skip


@app.command()
def diff(
    a: Place,
    b: Annotated[str | None, typer.Argument(help="Another one. Without it, A is compared with its base.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")] = False,
) -> None:
    """Compare the deltas of two task bundles, or of one and its base.

    Exits with 0 if they are the same, with 1 if they differ, with 2 if one cannot be read.

    Example: `lowbit task diff ./sst2-scales ./imdb-scales`
    """
    with console.named_errors():
        one = find_bundle(a).bundle
        two = None if b is None else find_bundle(b).bundle
        rows, total = compare_bundles(one, two), total_difference(one, two)
    saved = same_saved(one, two) if two is not None else not one.saved
    alike = two is None or _base(one) == _base(two)
    if as_json:
        facts = {"same_base": alike, "same_saved": saved, "total": asdict(total), "deltas": [asdict(r) for r in rows]}
        typer.echo(json.dumps(facts, indent=2))
    else:
        _print_differences(rows, total, two is not None)
        if two is not None:
            console.out.print("the same base and precision" if alike else "different bases or precisions")
        if two is None and one.saved:
            console.out.print(f"and {len(one.saved)} tensors of whole modules")
        elif two is not None and (one.saved or two.saved):
            console.out.print(f"whole modules {'are the same' if saved else 'differ'}")
    raise typer.Exit(0 if alike and saved and total.largest == 0 else 1)


app.command()(task_tune.tune)
app.command()(task_hub.push)
app.command()(task_hub.pull)
app.command("list")(task_hub.list_tasks)


def describe(stored: StoredBundle) -> dict[str, Any]:
    """Facts about a bundle in a directory as a JSON object."""
    bundle, dtypes = stored.bundle, {t.name: t.dtype for t in stored.header.tensors.values()}
    return {
        **bundle.config.to_dict(),  # first: no key of the file takes the place of one of ours
        "directory": str(stored.directory),
        "file_bytes": stored.nbytes,
        "delta_values": bundle.delta_values,
        "saved_values": bundle.saved_values,
        "dtypes": dict(Counter(dtypes[name] for name in sorted(bundle.deltas))),
        "operations": dict(Counter(split_delta(name)[1].name for name in sorted(bundle.deltas))),
        "deltas": {
            name: {"dtype": dtypes[name], "shape": list(delta.shape), **_range(delta)}
            for name, delta in sorted(bundle.deltas.items())
        },
        "saved": {
            t.name: {"dtype": dtypes[SAVED + t.name], "shape": list(t.shape), "bytes": t.nbytes}
            for t in sorted(bundle.saved, key=lambda t: t.name)
        },
    }


def _verdict(facts: dict[str, Any]) -> str:
    """What a bundle that fits a base is told to do so by, and what is left to a model."""
    by_digests = " (by digests; --verify checks the bytes)" if facts["fits_by"] == "digests" else ""
    verdict = f"It fits {facts['fits_base']}{by_digests}."
    if unknown := facts["saved_not_in_base"]:
        verdict += f" Its files lack {unknown} tensors of whole modules: whether these fit, only a model can tell."
    return verdict


def _range(delta: F32) -> dict[str, float | None]:
    if not delta.size:
        return {"rms": 0.0, "min": None, "max": None}
    rms = float(np.sqrt(np.square(delta.astype(np.float64)).mean()))
    return {"rms": rms, "min": float(delta.min()), "max": float(delta.max())}


def _tables(facts: dict[str, Any], every_module: bool) -> list[Table]:
    place = facts["base_model_name_or_path"] or "unnamed"
    rows = [
        ("directory", facts["directory"]),
        ("format", f"{facts['format']} {facts['format_version']}"),
        ("base", place + (f" at {facts['revision']}" if facts["revision"] else "")),
        *_told({} if facts["format_version"] == PLAIN else facts.get("task", {})),
        ("method", facts["method"]),
        ("tuned at", f"{facts['bits']} bits" if facts["bits"] else "the base's own bits"),
        ("deltas", ", ".join(f"{n} {operation}" for operation, n in facts["operations"].items()) or "none"),
        ("values", f"{facts['delta_values']:,} in deltas, {facts['saved_values']:,} in whole modules"),
        ("deltas stored in", ", ".join(facts["dtypes"]) or "-"),
        ("size", f"{facts['file_bytes']:,} bytes"),
        ("whole modules", ", ".join(facts["modules_to_save"]) or "none"),
    ]
    pairs = Table(*columns("", "", numbers=()), title="Task bundle", show_header=False, title_justify="left")
    for name, value in rows:
        pairs.add_row(name, plain(value))
    tables = [pairs]
    if facts["saved"]:
        saved = Table(*columns("tensor", numbers=("dtype", "shape", "bytes")), title="Whole modules")
        for name, t in facts["saved"].items():
            saved.add_row(plain(name), t["dtype"], "x".join(map(str, t["shape"])), f"{t['bytes']:,}")
        tables.append(saved)
    if facts["deltas"]:
        tables.append(_deltas_table(facts["deltas"], every_module))
    return tables


def _told(task: dict[str, Any]) -> list[tuple[str, str]]:
    """What the bundle says of its task (TSK-12)."""
    metrics = ", ".join(f"{name} {value:.6g}" for name, value in task.get("metrics", {}).items())
    rows = [("kind", task.get("kind", "")), ("labels", ", ".join(task.get("labels", []))), ("metrics", metrics)]
    return [(name, value) for name, value in rows if value]


def _deltas_table(deltas: dict[str, Any], every_module: bool) -> Table:
    """A line for each delta, or for each kind: one path but for numbers, one operation, one shape."""
    kinds: dict[tuple[str, tuple[int, ...]], list[dict[str, Any]]] = defaultdict(list)
    for name, d in deltas.items():
        kind = name if every_module else ".".join("*" if part.isdecimal() else part for part in name.split("."))
        kinds[kind, tuple(d["shape"])].append({"name": name, **d})
    table = Table(*columns("delta", numbers=("modules", "shape", "rms", "min", "max")), title="Deltas")
    for (kind, shape), members in kinds.items():
        name = members[0]["name"] if len(members) == 1 else kind
        sizes = [m for m in members if m["min"] is not None]
        numbers = ["-"] * 3
        if sizes:
            rms = math.sqrt(sum(m["rms"] ** 2 for m in sizes) / len(sizes))
            low, high = min(m["min"] for m in sizes), max(m["max"] for m in sizes)
            numbers = [f"{number:.4g}" for number in (rms, low, high)]
        table.add_row(plain(name), str(len(members)), "x".join(map(str, shape)), *numbers)
    return table


def _base(bundle: TaskBundle) -> tuple[str, str, int | None]:
    return bundle.config.base_fingerprint, bundle.config.head_fingerprint, bundle.config.bits


def _print_differences(rows: list[ModuleDifference], total: ModuleDifference, other: bool) -> None:
    """A table of the deltas that differ most; `other` says whether there is a second bundle."""
    names = ("rms A", "rms B", "rms A - B", "cosine") if other else ("rms",)
    title = "Deltas of A and B" if other else "Deltas"
    table = Table(*columns("delta", numbers=(*names, "largest", "row")), title=title)
    ranked = sorted(rows, key=lambda r: -r.rms)
    for r in ranked[:MOST]:
        table.add_row(plain(f"{r.module}.{r.operation}"), *_cells(r, other))
    if len(ranked) > MOST:
        table.add_row(f"… and {len(ranked) - MOST} more")
    table.add_section()
    table.add_row(f"all {total.values:,} values", *_cells(total, other))
    console.out.print(table)


def _cells(r: ModuleDifference, other: bool) -> list[str]:
    cosine = "-" if r.cosine is None else f"{r.cosine:.4f}"
    rms = [f"{r.rms_a:.4g}", f"{r.rms_b:.4g}", f"{r.rms:.4g}", cosine] if other else [f"{r.rms_a:.4g}"]
    return [*rms, f"{r.largest:.4g}", "-" if r.row is None else str(r.row)]


def _card(places: list[str], weights: list[float] | None, lines: float | None, merged: TaskBundle) -> str:
    """The model card of a merged bundle. Of a directory only the name is told: its path is nobody else's business."""
    from ..tasks.card import task_card

    shares = weights or [1 / len(places)] * len(places)
    names = [Path(place).resolve().name if Path(place).is_dir() else place for place in places]
    parts = "".join(f"- {share:g} x `{name}`\n" for share, name in zip(shares, names, strict=True))
    layers = (
        ""
        if lines is None
        else f"\nOf the first layer {lines:g} times that, of the last all, evenly between (LiNeS).\n"
    )
    return task_card(merged, notes=f"The weighted sum of these tasks:\n\n{parts}{layers}")
