"""How far a quantized model's outputs are from those of the float model, and how well it predicts a text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_AT_ONCE = 1 << 24  # logits that are looked at together


@dataclass
class Comparison:
    """Sums over the tokens of a text.

    Attributes:
        tokens: number of predicted tokens (of a causal model), or of compared vectors.
        loss, reference_loss: summed negative log likelihoods of the next tokens, in nats.
        divergence: summed Kullback-Leibler divergence of the model's predictions from the reference's, in nats.
        agreed: tokens for which both predict the same.
        cosine: summed cosine of the outputs (of a model without logits for tokens).
        is_causal: the model has logits for tokens.
    """

    tokens: int = 0
    loss: float = 0.0
    reference_loss: float = 0.0
    divergence: float = 0.0
    agreed: int = 0
    cosine: float = 0.0
    is_causal: bool = False

    def add(self, found: Any, wanted: Any, batch: Mapping[str, Any]) -> None:
        """Add the outputs for a batch: of the model, and of the reference (None: there is none)."""
        logits, ids = getattr(found, "logits", None), batch.get("input_ids")
        if isinstance(logits, Tensor) and isinstance(ids, Tensor) and logits.shape[:2] == ids.shape:
            self.is_causal = True
            mask = batch.get("attention_mask")
            for i in range(len(ids)):
                reference = None if wanted is None else wanted.logits[i]
                self._add_row(logits[i], reference, ids[i], None if mask is None else mask[i])
            return
        a, b = _vectors(found, batch), _vectors(wanted, batch)
        self.tokens += len(a)
        self.cosine += float(torch.nn.functional.cosine_similarity(a, b, dim=-1).sum())

    def _add_row(self, logits: Tensor, reference: Tensor | None, ids: Tensor, mask: Tensor | None) -> None:
        if mask is not None:
            ids, logits = ids[mask != 0], logits[mask != 0]
            reference = None if reference is None else reference[mask != 0]
        step = max(1, _AT_ONCE // logits.shape[-1])
        for start in range(0, len(ids) - 1, step):
            here = slice(start, min(len(ids) - 1, start + step))
            following = ids[here.start + 1 : here.stop + 1, None]
            p = logits[here].float().log_softmax(-1)
            self.tokens += len(p)
            self.loss -= float(p.gather(1, following).sum())
            if reference is not None:
                q = reference[here].float().log_softmax(-1)
                self.reference_loss -= float(q.gather(1, following).sum())
                self.divergence += float((q.exp() * (q - p)).sum())
                self.agreed += int((p.argmax(-1) == q.argmax(-1)).sum())

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss / max(1, self.tokens), 700.0))

    @property
    def reference_perplexity(self) -> float:
        return math.exp(min(self.reference_loss / max(1, self.tokens), 700.0))

    @property
    def mean_divergence(self) -> float:
        return self.divergence / max(1, self.tokens)

    @property
    def agreement(self) -> float:
        """Part of the tokens for which both models predict the same."""
        return self.agreed / max(1, self.tokens)

    @property
    def distance(self) -> float:
        """How far the model is from the reference: the mean divergence, or what the mean cosine lacks of 1."""
        return self.mean_divergence if self.is_causal else 1 - self.mean_cosine

    @property
    def mean_cosine(self) -> float:
        return self.cosine / max(1, self.tokens)


def _vectors(output: Any, batch: Mapping[str, Any]) -> Tensor:
    """One vector for each sample: the mean of the last hidden states over its tokens, or the first output."""
    hidden = getattr(output, "last_hidden_state", None)
    if not isinstance(hidden, Tensor):
        first = output[0]
        assert isinstance(first, Tensor)  # noqa: S101 - models give tensors first
        return first.float().flatten(1)
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != hidden.shape[:2]:
        return hidden.float().mean(1)
    weight = mask[..., None].float()
    return (hidden.float() * weight).sum(1) / weight.sum(1)
