"""``lowbit cut``: one precision of a model, as a model of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ..container.reader import ModelReader
from ..errors import HubError
from ..hub import is_hub_id, list_files
from ..partial_download import open_remote, progress
from ..precision import copy_precision
from . import console
from .opening import open_model


def cut(
    model: Annotated[str, typer.Argument(help="A lowbit model directory, or a repository on the Hub.")],
    out: Annotated[Path, typer.Argument(help="Directory to make. It appears only when it is complete.")],
    bits: Annotated[int, typer.Option(min=1, max=8, help="The precision, which the model has scales for.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
) -> None:
    """Write one precision of a model as a smaller model: its first planes, with the scales stored for them.

    Of a model on the Hub nothing else is fetched. To task bundles the result is another base, with another fingerprint.

    Example: `lowbit cut user/llama-4bit ./llama-2bit --bits 2`
    """
    with console.named_errors():
        if is_hub_id(model):
            remote = open_remote(model, list_files(model, revision=revision))
            with progress(remote, bits) as bar:
                copy_precision(remote, bits, out, report=bar.update)
            reader: ModelReader = remote
            cost = f"; fetched {remote.files.traffic}"
        elif revision is not None:
            raise HubError(f"{model}: is no repository on the Hub, and has no revision {revision!r}")
        else:
            reader, cost = open_model(Path(model)), ""
            copy_precision(reader, bits, out)
        before, after = (console.megabytes(_nbytes(r)) for r in (reader, ModelReader(out)))
    console.out.print(f"Wrote {escape(str(out))}: {after} of tensors, of {before}{cost}.", highlight=False)


def _nbytes(reader: ModelReader) -> int:
    return sum(t.nbytes for header in reader.headers.values() for t in header.tensors.values())
