"""Results of a task by name: what a model gives is reduced batch by batch, and then counted."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .columns import LANGUAGE, REGRESSION, TOKENS
from .encoding import IGNORED

Array = npt.NDArray[Any]


def reduced(kind: str, logits: Any, labels: Tensor) -> Tensor:
    """What :func:`results` needs of a batch, float32 with a row for each example.

    Of language modelling ``[n, 2]``: the sum of the negative log-likelihoods of an example's tokens, and their number.
    Of others the logits.
    """
    first: Tensor = logits[0] if isinstance(logits, tuple) else logits
    if kind != LANGUAGE:
        return first.float()
    found, wanted = first[:, :-1].float(), labels[:, 1:]
    each = torch.nn.functional.cross_entropy(found.transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none")
    return torch.stack([each.sum(1), (wanted != IGNORED).sum(1).float()], dim=1)


def results(kind: str, predictions: Array, labels: Array) -> dict[str, float]:
    """Results by name, the mean loss among them.

    Args:
        kind: of task.
        predictions: what :func:`reduced` gave, of all examples.
        labels: as the data have them, :data:`IGNORED` where nothing is asked.

    Classification and token classification: accuracy, and F1 averaged over the labels that occur. Regression: mean
    squared error and Pearson's correlation. Language modelling: perplexity of a token.
    """
    if kind == LANGUAGE:
        sums = predictions.astype(np.float64).sum(0)
        loss = float(sums[0] / max(1.0, float(sums[1])))
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    if kind == REGRESSION:
        found, wanted = predictions.reshape(-1).astype(np.float64), labels.reshape(-1).astype(np.float64)
        error = float(np.square(found - wanted).mean())
        return {"loss": error, "mse": error, "pearson": pearson(found, wanted)}
    if kind == TOKENS:
        asked = labels.reshape(-1) != IGNORED
        predictions, labels = predictions.reshape(-1, predictions.shape[-1])[asked], labels.reshape(-1)[asked]
    best = predictions.argmax(-1)
    return {
        "loss": _cross_entropy(predictions.astype(np.float64), labels),
        "accuracy": float((best == labels).mean()),
        "f1": macro_f1(best, labels),
    }


def macro_f1(found: Array, wanted: Array) -> float:
    """F1 of each label that is wanted or found somewhere, averaged: each label counts the same."""
    scores = []
    for label in np.union1d(found, wanted):
        right = np.count_nonzero((found == label) & (wanted == label))
        scores.append(2 * right / (np.count_nonzero(found == label) + np.count_nonzero(wanted == label)))
    return float(np.mean(scores))


def pearson(found: Array, wanted: Array) -> float:
    """Pearson's correlation; 0 where one side does not vary."""
    a, b = found - found.mean(), wanted - wanted.mean()
    size = math.sqrt(float((a * a).sum()) * float((b * b).sum()))
    return float((a * b).sum()) / size if size else 0.0


def _cross_entropy(logits: Array, labels: Array) -> float:
    shifted = logits - logits.max(-1, keepdims=True)
    log_sums = np.log(np.exp(shifted).sum(-1))
    return float((log_sums - np.take_along_axis(shifted, labels[:, None].astype(np.int64), 1)[:, 0]).mean())
