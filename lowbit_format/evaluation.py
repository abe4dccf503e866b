"""How good a model is: how well it predicts a text, and how far it is from the float model that it was made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .calibration.compare import Comparison
from .calibration.data import causal_batches, is_causal, padded_batches, read_texts, windows
from .errors import CalibrationError


def evaluate(
    model: Any,
    tokenizer: Any,
    text: str | Path,
    *,
    reference: Any = None,
    samples: int = 32,
    length: int = 512,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """Compare a model with a text, and with a reference.

    A causal model is measured by the perplexity of windows of the text, and by the divergence of its predictions from
    the reference's. Another model is measured by the cosine of its outputs and the reference's for each paragraph.

    Args:
        model: of transformers, quantized or not.
        tokenizer: of both.
        text: a text file, or JSON lines with ``text`` or ``messages``.
        reference: the float model; needed unless the model is causal.
        samples: windows or paragraphs.
        length: most tokens of each.
        report: called after every batch with the number of batches done and of all.

    Raises:
        CalibrationError: the text is too short, or a reference is missing.
    """
    import torch

    path = Path(text)
    options: dict[str, Any] = {"samples": samples, "length": length, "where": str(path)}
    texts = read_texts(path, tokenizer)
    if is_causal(model):
        batches = causal_batches(windows(texts, tokenizer, **options))
    elif reference is None:
        raise CalibrationError(f"{type(model).__name__} predicts no next token: give the float model as the reference")
    else:
        batches = padded_batches(texts, tokenizer, **options)
    comparison = Comparison()
    for i, batch in enumerate(batches):
        with torch.no_grad():
            found, wanted = (
                None if one is None else one(**{k: v.to(one.device) for k, v in batch.items()})
                for one in (model, reference)
            )
        comparison.add(found, wanted, {k: v.to(model.device) for k, v in batch.items()})
        report(i + 1, len(batches))
    return comparison
