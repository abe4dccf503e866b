"""From the words after ``--calibrate`` to the inputs of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..calibration.effort import EFFORTS, Effort
from ..errors import CalibrationError
from .architecture import meta_model

if TYPE_CHECKING:
    from ..calibration.data import Data

SELF = "self"
SENTENCES = Path(__file__).parent / "sentences.txt"  # a text of our own, to measure on where there is no other
HELD_OUT = 16  # samples that measure what came of it


@dataclass(frozen=True)
class Calibration:
    """How to calibrate.

    Attributes:
        source: a text file; JSON lines with ``text`` or ``messages``; safetensors with the arguments of ``forward``; a
            data set of the Hub; ``"self"``: the float model writes the text; or :class:`Data` that the caller made.
        effort: a name in EFFORTS, or a number of one's own for each thing.
        samples: to calibrate with; None takes the effort's number.
        length: of a sample, in tokens.
        seed: of what is drawn at random.
        device: to compute on.
    """

    source: str | Data
    effort: str | Effort = "default"
    samples: int | None = None
    length: int = 512
    seed: int = 0
    device: str = "cpu"

    @property
    def work(self) -> Effort:
        """The effort, spelled out."""
        if isinstance(self.effort, Effort):
            return self.effort
        if self.effort not in EFFORTS:
            raise CalibrationError(f"effort is {self.effort!r}, expected one of {', '.join(EFFORTS)}")
        return EFFORTS[self.effort]


def read_data(calibration: Calibration, directory: Path) -> Data:
    """The inputs of the model in `directory`.

    Raises:
        CalibrationError: there is too little data, or it is not what the model takes.
    """
    from ..calibration import data  # a leaf that imports torch

    if not isinstance(calibration.source, str):
        return calibration.source
    samples = calibration.samples or calibration.work.samples
    path, model = Path(calibration.source), meta_model(directory)
    if path.suffix == ".safetensors":
        batches = data.tensor_batches(path)
        return data.Data.of(batches, held_out=min(HELD_OUT, len(batches) // 4))
    if model.main_input_name != "input_ids":
        raise CalibrationError(
            f"{type(model).__name__} takes {model.main_input_name}, not text; give --calibrate a safetensors file with "
            "the arguments of its forward, such as what its processor makes"
        )
    count = samples + HELD_OUT
    if calibration.source == SELF:
        return _causal_data(_self_written(calibration, directory, model, count), samples, model)
    tokenizer = load_tokenizer(directory)
    if path.is_file() or path.suffix in (".txt", ".jsonl", ".json"):
        texts = data.read_texts(path, tokenizer)
    else:
        texts = data.hub_texts(calibration.source, count * max(1, calibration.length // 16), tokenizer)
    where = str(calibration.source)
    options: dict[str, Any] = {"samples": count, "length": calibration.length, "where": where}
    if data.is_causal(model) or model.config.is_encoder_decoder:
        found = _causal_data(data.windows(texts, tokenizer, **options), samples, model)
    else:
        texts = data.whole_texts(texts, tokenizer, **options)
        cut = min(round(len(texts) * samples / count), len(texts) - 1)
        used, measured = (
            data.padded_batches(part, tokenizer, samples=len(part), length=calibration.length, where=where)
            for part in (texts[:cut], texts[cut:])
        )
        found = data.Data.of(used + measured, held_out=len(measured))
    _check_ids(found.batches, model, where)
    return found


def _causal_data(rows: list[Any], samples: int, model: Any) -> Data:
    """Windows of text, of which those after `samples` are held out; the decoder of two halves gets them too."""
    from ..calibration import data

    used, measured = (data.causal_batches(part) for part in (rows[:samples], rows[samples:]))
    batches = used + measured
    if model.config.is_encoder_decoder:
        batches = [{**batch, "decoder_input_ids": batch["input_ids"]} for batch in batches]
    return data.Data.of(batches, held_out=len(measured))


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a checkpoint. Raises CalibrationError if it has none."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(directory)
    except Exception as e:  # of many kinds, by what is missing
        raise CalibrationError(
            f"{directory}: has no tokenizer that transformers can load, which text needs: {e}"
        ) from e


def _self_written(calibration: Calibration, directory: Path, meta: Any, samples: int) -> Any:
    import torch
    import transformers

    from ..calibration.data import is_causal, self_written

    if not is_causal(meta):
        raise CalibrationError(f"{type(meta).__name__} writes no text: give --calibrate a file instead of {SELF!r}")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model = model.to(torch.device(calibration.device)).eval()
    return self_written(model, samples=samples, length=calibration.length, seed=calibration.seed)


def _check_ids(batches: Sequence[Any], model: Any, where: str) -> None:
    known = model.get_input_embeddings().weight.shape[0]
    largest = max(int(batch["input_ids"].max()) for batch in batches)
    if largest >= known:
        raise CalibrationError(
            f"{where}: the tokenizer gives the id {largest}, and the model knows {known} tokens; is the tokenizer of "
            "another model?"
        )
