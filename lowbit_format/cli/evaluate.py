"""``lowbit eval``: how good a model is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress
from rich.table import Table

from ..errors import LoadError
from . import console
from .opening import check_directory

if TYPE_CHECKING:
    from ..calibration.compare import Comparison


def evaluate(
    model: Annotated[Path, typer.Argument(help="A lowbit model directory, or a float one.")],
    text: Annotated[Path, typer.Option("--text", help="A text file, or JSON lines with `text` or `messages`.")],
    reference: Annotated[
        Path | None, typer.Option("--reference", help="Directory of the float model, to compare predictions with.")
    ] = None,
    bits: Annotated[int | None, typer.Option(min=1, max=8, help="Read the model at this nested precision.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Windows (of a causal model) or paragraphs to take.")] = 32,
    length: Annotated[int, typer.Option(min=2, help="Most tokens of each.")] = 512,
    device: Annotated[str, typer.Option(help="To compute on, such as `cuda`.")] = "cpu",
) -> None:
    """Measure a model on a text.

    A causal model: perplexity, and with a reference the divergence of its predictions from the reference's and how
    often both predict the same. Another model: the cosine of its outputs and the reference's.

    Examples: `lowbit eval ./llama-3bit --text held-out.txt --reference ./llama`
    """
    with console.named_errors():
        check_directory(model)
        if reference is not None:
            check_directory(reference)
        found = _measure(model, text, reference, bits, samples, length, device)
        console.out.print(_table(found, reference is not None))


def _measure(
    place: Path, text: Path, reference: Path | None, bits: int | None, samples: int, length: int, device: str
) -> Comparison:
    import transformers

    from ..evaluation import evaluate as measure

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    except Exception as e:  # of many kinds, by what is missing
        raise LoadError(f"{place}: has no tokenizer that transformers can load: {e}") from e
    one = _load(place, bits, device)
    other = None if reference is None else _load(reference, None, device)
    with Progress(console=console.out, transient=True) as progress:
        task = progress.add_task("reading", total=None)
        return measure(
            one,
            tokenizer,
            text,
            reference=other,
            samples=samples,
            length=length,
            report=lambda done, total: progress.update(task, completed=done, total=total, description="batches"),
        )


def _load(place: Path, bits: int | None, device: str) -> Any:
    import torch
    import transformers

    from ..container.reader import CONFIG_FILE
    from ..container.strict_json import load_file
    from ..errors import DirectoryError
    from ..integrations.architecture import named_class
    from ..loading import from_pretrained

    if "quantization_config" in load_file(place / CONFIG_FILE, DirectoryError, constants=True):
        model = from_pretrained(place, bits=bits)
    else:
        config = transformers.AutoConfig.from_pretrained(place)
        model = (named_class(config) or transformers.AutoModel).from_pretrained(place, dtype=torch.float32)
    return model.to(device).eval()


def _table(found: Comparison, compared: bool) -> Table:
    table = Table(show_header=False)
    if found.is_causal:
        table.add_row("tokens", f"{found.tokens:,}")
        table.add_row("perplexity", f"{found.perplexity:.3f}")
        if compared:
            table.add_row("perplexity of the reference", f"{found.reference_perplexity:.3f}")
            table.add_row("divergence from the reference", f"{found.mean_divergence:.4f} nats a token")
            table.add_row("same prediction", f"{found.agreement:.1%}")
    else:
        table.add_row("samples", f"{found.tokens:,}")
        table.add_row("mean cosine", f"{found.mean_cosine:.5f}")
    return table
