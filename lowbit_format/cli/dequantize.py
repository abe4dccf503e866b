"""``lowbit dequantize``: back to an ordinary Hugging Face checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from ..dtypes import BY_NAME
from ..export import dequantize_directory
from . import console
from .opening import open_model


def dequantize(
    model: Annotated[Path, typer.Argument(help="A lowbit model directory.")],
    out: Annotated[Path, typer.Argument(help="Directory to make. It appears only when it is complete.")],
    dtype: Annotated[
        str, typer.Option(help=f"`auto` (the model's own), {', '.join(f'`{d}`' for d in BY_NAME)}.")
    ] = "auto",
    bits: Annotated[int | None, typer.Option(min=1, max=8, help="Read at a nested precision.")] = None,
) -> None:
    """Turn a lowbit model back into an ordinary checkpoint that any program reads.

    Every quantized weight is decoded exactly as the format says and rounded once to the dtype.

    Example: `lowbit dequantize ./llama-4bit ./llama-float --dtype bfloat16`
    """
    with console.named_errors():
        reader = open_model(model)
        with Progress(console=console.err, transient=True) as progress:
            task = progress.add_task("decoding", total=len(reader.config.modules))
            written = dequantize_directory(reader, out, dtype=dtype, bits=bits, report=lambda: progress.advance(task))
    console.out.print(f"Wrote {out}: {len(reader.config.modules)} weights decoded to {written}.", highlight=False)
