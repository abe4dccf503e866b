"""``lowbit inspect``: what a lowbit model directory holds, from its headers alone."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from ..container.reader import ModelReader
from ..schema import ModuleEntry, Scheme, scheme_names
from . import console
from .opening import open_model


def inspect(
    model: Annotated[Path, typer.Argument(help="A lowbit model directory.")],
    modules: Annotated[bool, typer.Option("--modules", help="List every module, not only schemes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")] = False,
) -> None:
    """Show what a lowbit model holds: schemes, sizes, precisions, fingerprint.

    Reads headers only, so it is quick for a model of any size. A fingerprint "by digests" rests on what the headers
    say of the data. `lowbit verify` checks the data too.

    Example: `lowbit inspect ./llama-4bit --modules`
    """
    with console.named_errors():
        reader = open_model(model)
        facts = describe(reader)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    for line in _module_lines(facts) if modules else ():  # a line is never broken by us: a path can be copied
        console.out.print(line, soft_wrap=True, highlight=False, markup=False)
    for table in _tables(reader, facts):
        console.out.print(table)
    by = " (by digests)" if facts["fingerprint_by"] == "digests" else ""
    console.out.print(f"fingerprint {facts['fingerprint']}{by}", soft_wrap=True, highlight=False)


def describe(reader: ModelReader) -> dict[str, Any]:
    """Facts about a model as a JSON object."""
    config, lowbit = reader.config, reader.lowbit_names()
    names = scheme_names(m.scheme for m in config)
    stored = sum(reader.info(n).nbytes for n in lowbit)
    weights = sum(m.numel for m in config)
    mark = reader.fingerprint()
    return {
        "directory": str(reader.directory),
        "format_version": config.format_version,
        "architectures": reader.model_config.get("architectures"),
        "fingerprint": mark.body,
        "head_fingerprint": mark.head,
        "fingerprint_by": "digests" if reader.has_lowbit_digests() else "bytes",  # FPR-5
        "files": {f: sum(t.nbytes for t in h.tensors.values()) for f, h in reader.headers.items()},
        "quantized_weights": weights,
        "bits_per_quantized_weight": 8 * stored / weights if weights else 0.0,
        "lowbit_bytes": stored,
        "other_bytes": sum(reader.info(n).nbytes for n in reader.names() if n not in lowbit),
        "precisions": config.precisions(),
        "tensors_without_digest": sum(reader.stored_digest(n) is None for n in reader.names()),
        "tied": config.tied,
        "schemes": {name: scheme.to_dict() for scheme, name in names.items()},
        "modules": {
            m.path: {
                "scheme": names[m.scheme],
                "kind": m.kind,
                "shape": list(m.shape),
                "bytes": _module_bytes(reader, m),
            }
            for m in config
        },
    }


def _module_bytes(reader: ModelReader, module: ModuleEntry) -> int:
    return sum(reader.info(spec.name).nbytes for spec in reader.specs(module.path))


def _tables(reader: ModelReader, facts: dict[str, Any]) -> list[Table]:
    rows = [
        ("directory", facts["directory"]),
        ("format", f"lowbit {facts['format_version']}"),
        ("architecture", ", ".join(facts["architectures"] or ["unknown"])),
        ("quantized weights", f"{facts['quantized_weights']:,} in {len(facts['modules'])} modules"),
        ("bits per quantized weight", f"{facts['bits_per_quantized_weight']:.3f}"),
        (
            "size",
            f"{console.megabytes(facts['lowbit_bytes'])} quantized, {console.megabytes(facts['other_bytes'])} other",
        ),
        ("files", ", ".join(facts["files"])),
        ("precisions", ", ".join(f"{k} bits" for k in facts["precisions"])),
        (
            "digests",
            "all tensors"
            if not facts["tensors_without_digest"]
            else f"{facts['tensors_without_digest']} tensors lack one",
        ),
    ]
    if facts["tied"]:
        rows.append(("tied", ", ".join(f"{a} -> {b}" for a, b in facts["tied"].items())))
    groups: dict[tuple[str, str], list[ModuleEntry]] = defaultdict(list)
    names = scheme_names(m.scheme for m in reader.config)
    for m in reader.config:
        groups[names[m.scheme], m.kind].append(m)
    # A name tells codec, bits and group size. On a narrow terminal only the extras are folded.
    schemes = Table(
        Column("scheme", no_wrap=True), "scales", Column("extras", overflow="fold"), Column("kind", no_wrap=True),
        *console.columns(numbers=("modules", "weights")), title="Schemes",
    )  # fmt: skip
    for (name, kind), members in sorted(groups.items()):
        s = members[0].scheme
        weights = sum(m.numel for m in members)
        schemes.add_row(name, s.scale_dtype, _extras(s), kind, f"{len(members):,}", f"{weights:,}")
    return [schemes, console.pairs("Model", rows)]


def _module_lines(facts: dict[str, Any]) -> list[str]:
    """One line for each module: path, kind, shape, scheme, bytes."""
    rows = [
        (path, m["kind"], "x".join(map(str, m["shape"])), m["scheme"], f"{m['bytes']:,} bytes")
        for path, m in facts["modules"].items()
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]


def _extras(scheme: Scheme) -> str:
    parts = ["offset"] * scheme.offset + ["row_bits"] * scheme.row_bits
    return ", ".join([*parts, *(f"nested {k}" for k in scheme.nested)]) or "-"
