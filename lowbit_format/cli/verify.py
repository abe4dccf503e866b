"""``lowbit verify``: check every rule and every digest of a lowbit model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import track

from ..container.writer import seal as seal_file
from . import console
from .opening import open_model


def verify(
    model: Annotated[Path, typer.Argument(help="A lowbit model directory.")],
    seal: Annotated[
        bool, typer.Option("--seal", help="Afterwards write digests of all tensors into the headers.")
    ] = False,
) -> None:
    """Check a lowbit model: config, headers, shapes, values, padding and SHA-256 digests.

    Exits with 0 if all is well, with 2 and a named error at the first rule that is broken. Tensors without a digest
    are reported; they are no error: tools that rewrite files may drop digests, and `--seal` writes them again.

    Example: `lowbit verify ./llama-4bit`
    """
    with console.named_errors():
        reader = open_model(model)
        for module in track(list(reader.config), "values", console=console.err, transient=True):
            reader.check_module(module.path)
        names = list(reader.names())
        unverified = 0
        for name in track(names, "digests", console=console.err, transient=True):
            unverified += not reader.check_digest(name)
        mark = reader.fingerprint(trust_digests=False)
        if seal:
            for file in reader.headers:
                seal_file(reader.directory / file)
            unverified = 0
    console.out.print(
        f"{model}: good. {len(reader.config.modules)} modules, {len(names)} tensors, "
        + ("all with digests" if not unverified else f"{unverified} without a digest (unverified)")
        + (", sealed" if seal else "")
        + f"\nfingerprint {mark.body}",
        soft_wrap=True,
        highlight=False,
    )
