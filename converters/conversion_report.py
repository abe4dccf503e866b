"""``conversion_report.json``: what a conversion did, module by module, for programs that show it (``lowbit report``).

It is informative: no reader of the format looks at it. The same conversion writes the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..container.atomic import write_json
from ..integrations.card import scheme_text
from ..integrations.conversion_record import REPORT_FILE, REPORT_VERSION
from .budgeted import Choice
from .journal import Outcome
from .plan import Plan

if TYPE_CHECKING:
    from ..calibration.compare import Comparison
    from .student import Quality

HELD_OUT, OWN_TEXT = "held-out data", "a short text"  # what a model is compared on


@dataclass(frozen=True)
class Evaluated:
    """How the model was compared with its checkpoint in the end.

    Attributes:
        quality: at each precision (None is full).
        text: HELD_OUT or OWN_TEXT.
    """

    quality: Mapping[int | None, Quality]
    text: str


def conversion_report(
    plan: Plan,
    outcomes: Mapping[str, Outcome],
    *,
    blocks: Sequence[tuple[str, float, float]] = (),
    evaluated: Evaluated | None = None,
    choice: Choice | None = None,
) -> dict[str, Any]:
    """The content of the file.

    Args:
        plan: of the conversion.
        outcomes: of every quantized module, by path.
        blocks: path of each calibrated block, and the error of what it gives relative to its variance: with its layers
            quantized one by one, and in the end.
        evaluated: how it was compared with its checkpoint, if it was.
        choice: of bits for a budget, if one was given.
    """
    found: dict[str, Any] = {
        "version": REPORT_VERSION,
        "architecture": plan.architecture,
        "modules": {path: _module(o) for path, o in outcomes.items()},
        "kept": {
            s.destination.target or s.tensor.name: {
                "kind": s.destination.kind,
                "numel": s.tensor.numel,
                "nbytes": s.tensor.nbytes,
                "dtype": s.tensor.dtype,
                "reason": s.reason,
            }
            for s in plan.steps
            if s.target is None
        },
    }
    if blocks:
        found["blocks"] = [list(block) for block in blocks]
    if choice is not None:
        found["budget"] = choice.to_dict()
    if evaluated is not None and evaluated.quality:
        found["evaluation"] = [
            {"bits": bits, "text": evaluated.text, **_compared(quality.after)}
            for bits, quality in evaluated.quality.items()
            if quality.after.tokens
        ]
    return found


def write_report(directory: Path, report: Mapping[str, Any]) -> None:
    """Write the file into a model directory."""
    write_json(directory / REPORT_FILE, report)


def _module(o: Outcome) -> dict[str, Any]:
    return {
        "kind": o.module.kind,
        "scheme": scheme_text(o.module.scheme),
        "numel": o.module.numel,
        "nbytes": o.nbytes,
        "bits_per_weight": 8 * o.nbytes / o.module.numel,
        "relative_error": o.relative_error,
        "squared_norm": o.squared_norm,
        "lossless": o.lossless,
    }


def _compared(found: Comparison) -> dict[str, Any]:
    if not found.is_causal:
        return {"samples": found.tokens, "cosine": found.mean_cosine}
    return {
        "tokens": found.tokens,
        "perplexity": found.perplexity,
        "reference_perplexity": found.reference_perplexity,
        "divergence": found.mean_divergence,
        "agreement": found.agreement,
    }
