"""``lowbit task tune``: from a base and data to a task bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from . import console
from .opening import check_directory

if TYPE_CHECKING:
    from ..tuning.tune import Tuned

_COLUMN = "Column, where it has no usual name."


def tune(
    base: Annotated[str, typer.Argument(help="A lowbit model with its tokenizer: directory, or Hub id.")],
    data: Annotated[str, typer.Argument(help="`.jsonl`, `.csv` or `.tsv`, or a data set of the Hub: `user/name`.")],
    out: Annotated[Path, typer.Argument(help="Directory of the task bundle. It appears only when it is complete.")],
    judge: Annotated[
        str, typer.Option("--eval", help="To judge by: a file, a split of the data set, or a part to hold out.")
    ] = "0.1",
    text: Annotated[str | None, typer.Option(help=_COLUMN)] = None,
    text_pair: Annotated[str | None, typer.Option(help=_COLUMN)] = None,
    label: Annotated[str | None, typer.Option(help=_COLUMN)] = None,
    tokens: Annotated[str | None, typer.Option(help=_COLUMN)] = None,
    tags: Annotated[str | None, typer.Option(help=_COLUMN)] = None,
    prompt: Annotated[str | None, typer.Option(help=_COLUMN)] = None,
    input_: Annotated[str | None, typer.Option("--input", help="Column of what follows the prompt.")] = None,
    completion: Annotated[str | None, typer.Option(help=_COLUMN)] = None,
    messages: Annotated[str | None, typer.Option(help=_COLUMN)] = None,
    kind: Annotated[
        str | None,
        typer.Option(help="`classification`, `regression`, `token-classification` or `language-modelling`."),
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="Names of labels that are numbers, from 0 on, such as `negative,positive`.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="`alphatuning`, `peqa` or `scales`; by default what the base's codec wants.")
    ] = None,
    bits: Annotated[int | None, typer.Option(min=1, max=8, help="Tune at this precision of the base.")] = None,
    lr: Annotated[str, typer.Option(help="Learning rate of the deltas; `auto` chooses by short trainings.")] = "auto",
    optimizer: Annotated[
        str, typer.Option(help="`adam`, or `zo`: no backward pass, the memory of inference, many more steps.")
    ] = "adam",
    epochs: Annotated[float | None, typer.Option(help="How often each example is seen, at most.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Examples of a step.")] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="Most tokens of an example.")] = None,
    class_weights: Annotated[
        bool, typer.Option("--class-weights", help="Let each label count the same, however rare.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted tuning.")] = False,
    push: Annotated[str | None, typer.Option(help="Publish the bundle in this repository of the Hub.")] = None,
) -> None:
    """Tune the scales of a base for a task.

    The columns make the task: `text` (and `text_pair`) with `label`: classification, or regression if a label has a
    fraction; `tokens` with `tags`: token classification; `prompt` (and `input`, which follows it behind a blank line)
    with `completion`, `messages`, or `text` alone: language modelling.

    Examples: `lowbit task tune ./minilm-4bit films.csv ./films`,
    `lowbit task tune ./llama-4bit chats.jsonl ./chats --eval held-out.jsonl`
    """
    named = {
        "text": text, "text_pair": text_pair, "label": label, "tokens": tokens, "tags": tags, "prompt": prompt,
        "input": input_, "completion": completion, "messages": messages,
    }  # fmt: skip
    with console.named_errors():
        if Path(base).exists():
            check_directory(Path(base))
        found = _tune(
            base, data, out, eval=judge, kind=kind, labels=None if labels is None else labels.split(","),
            columns={meaning: column for meaning, column in named.items() if column is not None}, method=method,
            bits=bits, lr=_rate(lr), optimizer=optimizer, epochs=epochs, batch_size=batch_size, max_length=max_length,
            class_weights=class_weights, seed=seed, resume=resume, push=push,
        )  # fmt: skip
    show(found)


def _rate(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _tune(*args: object, **options: object) -> Tuned:
    """:func:`lowbit_format.tune` with a progress bar; an interrupted one says how to go on."""
    import transformers

    from ..tuning.tune import tune

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    bars = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*bars, TimeElapsedColumn(), TimeRemainingColumn(), console=console.err, transient=True) as progress:
        shown = {"": progress.add_task("reading", total=None)}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in shown:
                for task in shown.values():
                    progress.update(task, visible=False)
                shown[stage] = progress.add_task(stage, total=total)
            progress.update(shown[stage], completed=done)

        try:
            return tune(*args, **options, report=report)  # type: ignore[arg-type]
        except KeyboardInterrupt:
            progress.stop()
            console.err.print("Interrupted: run the same command with --resume to go on.", style="red")
            raise typer.Exit(130) from None


def show(found: Tuned) -> None:
    """Print what came out."""
    train, choose, judge = found.examples
    console.out.print(
        f"{found.kind}: {train:,} examples to train on, {choose:,} to choose by, {judge:,} to judge by"
        + (f"; labels {', '.join(found.labels[:8])}{', …' if len(found.labels) > 8 else ''}" if found.labels else ""),
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    for note in found.notes:
        console.out.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    table = Table(*console.columns("", numbers=("base", "tuned")))
    for name, after in found.after.items():
        table.add_row(name, f"{found.before[name]:.4g}", f"{after:.4g}")
    if found.most_frequent is not None:
        table.add_row("always the most frequent label", f"{found.most_frequent:.4g}", "")
    console.out.print(table)
    tried = ", ".join(f"{rate:g} (loss {loss:.4f})" for rate, loss in sorted(found.rates.items()))
    head = f" and {found.saved_numbers:,} in a head" if found.saved_numbers else ""
    rows = [
        ("trained", f"{found.method}: {found.numbers:,} numbers{head}, {found.nbytes:,} bytes"),
        ("learning rate", f"{found.rate:g}" + (f", of {tried}" if tried else "")),
        ("steps", f"{found.steps:,}, best after {found.best_step:,}"),
        ("time", f"{found.seconds:.0f} s"),
        ("most memory", console.megabytes(found.peak_bytes)),
    ]
    console.out.print(console.pairs("", rows))
    where = f" and pushed it: {found.url}" if found.url else ""
    console.out.print(f"Wrote {found.directory}{where}.", highlight=False, markup=False, soft_wrap=True)
