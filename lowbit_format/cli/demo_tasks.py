"""The tasks of ``lowbit demo``: two are tuned over one base, and then answer in one batch."""

from __future__ import annotations

import time
from pathlib import Path

from rich.table import Table

from . import console

DATA = Path(__file__).with_name("demo_data")
TASKS = ("films", "questions")
ASKED = (  # in none of the files
    ("films", "a clever and touching story"),
    ("questions", "when is the next bus"),
    ("films", "boring and much too loud"),
    ("questions", "the next bus is at noon"),
)


def show_tasks(base: Path, place: Path) -> None:
    """Tune the tasks over `base` into directories of `place`, ask them in one batch, and print all that.

    Raises what :func:`lowbit_format.tune` does.
    """
    from ..tuning.tune import tune

    tuned = Table("task", "labels", "numbers", "on disk", "right before", "right after", "time")
    for name in TASKS:
        found = tune(base, DATA / f"{name}.tsv", place / name, eval=0.25, lr=1e-2)  # chosen before: it saves time
        numbers = found.numbers + found.saved_numbers
        tuned.add_row(
            name, ", ".join(found.labels), f"{numbers:,}", f"{found.nbytes / 1e3:.0f} kB",
            f"{found.before['accuracy']:.0%}", f"{found.after['accuracy']:.0%}", f"{found.seconds:.0f} s",
        )  # fmt: skip
        console.err.print(f"  task {name}: done", highlight=False)
    size = sum(f.stat().st_size for f in base.glob("*.safetensors"))
    console.out.print(f"\nTwo tasks over {base.name} ({size / 1e6:.1f} MB), judged on sentences that were held out:")
    console.out.print(tuned)
    answers, seconds = _answers(base, place)
    asked = Table("row", "task", "sentence", "answer")
    for row, ((name, text), answer) in enumerate(zip(ASKED, answers, strict=True), 1):
        asked.add_row(str(row), name, text, answer)
    console.out.print(f"One batch, each row with its task, from one base in memory ({seconds * 1e3:.0f} ms):")
    console.out.print(asked)


def _answers(base: Path, place: Path) -> tuple[list[str], float]:
    """The label that each row of one batch gets, and the seconds that the batch took."""
    import torch
    from transformers import AutoTokenizer

    from ..loading import from_pretrained
    from ..tasks.serving import list_tasks, load_task, use_tasks

    model = from_pretrained(base, task=place / TASKS[0]).eval()
    for name in TASKS[1:]:
        load_task(model, place / name)
    labels = {task.name: task.labels for task in list_tasks(model)}
    tasks, texts = zip(*ASKED, strict=True)
    batch = AutoTokenizer.from_pretrained(base)(list(texts), padding=True, return_tensors="pt")
    with torch.no_grad(), use_tasks(model, tasks):
        model(**batch)  # packs the planes, once
        began = time.perf_counter()
        found = model(**batch).logits.argmax(-1).tolist()
        seconds = time.perf_counter() - began
    return [labels[name][i] for name, i in zip(tasks, found, strict=True)], seconds
