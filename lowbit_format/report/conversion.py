"""What ``conversion_report.json`` says, which a conversion leaves in the model's directory.

The file is informative, and may be of anyone: what is not as expected is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..container.strict_json import load_file
from ..errors import DirectoryError, FormatError
from ..integrations.conversion_record import REPORT_FILE, REPORT_VERSION

MEASURES = {  # of the damage that fewer bits do -> in words
    "error of weights": "the relative squared error of weights, summed over modules",
    "error of outputs": "the relative squared error of what modules give, summed over them",
    "divergence": "the divergence of predictions from the original's, in nats a token",
}


@dataclass(frozen=True)
class Quantized:
    """A module as the conversion left it: bytes of its tensors, relative error, squared norm of its weight if given."""

    nbytes: int
    error: float
    squared_norm: float | None = None


@dataclass(frozen=True)
class Block:
    """The error of what a block gives, relative to its variance: with its layers quantized alone, and in the end."""

    path: str
    before: float
    after: float


@dataclass(frozen=True)
class Budget:
    """Bits that were chosen for a size.

    Attributes:
        curve: bits for each weight of the whole file, and the damage expected there.
        target, reached: bits for each weight that were asked for and found, if the file says so.
        damage: of what was found.
        lower_bound: of the damage at the target.
        measure: what damage is, one of MEASURES; empty if the file does not say.
    """

    curve: tuple[tuple[float, float], ...]
    target: float | None = None
    reached: float | None = None
    damage: float | None = None
    lower_bound: float | None = None
    measure: str = ""


@dataclass(frozen=True)
class Evaluation:
    """How the model was compared with its original in the end.

    Attributes:
        bits: the precision at which it was read; None is its own.
        text: what it was compared on.
        tokens: number of tokens, or of samples.
        perplexity, reference_perplexity: of the model and of the original (causal models).
        divergence: of its predictions from the original's, in nats for each token.
        agreement: part of the tokens for which both predict the same.
        cosine: of the outputs of both (other models).
    """

    bits: int | None
    text: str
    tokens: int
    perplexity: float | None = None
    reference_perplexity: float | None = None
    divergence: float | None = None
    agreement: float | None = None
    cosine: float | None = None


@dataclass(frozen=True)
class ConversionFacts:
    """The whole file.

    Attributes:
        modules: by path.
        reasons: name of a kept tensor -> why it was kept.
        blocks, budget, evaluations: see there.
    """

    modules: dict[str, Quantized] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    blocks: tuple[Block, ...] = ()
    budget: Budget | None = None
    evaluations: tuple[Evaluation, ...] = ()


def read_conversion(directory: Path) -> ConversionFacts | None:
    """The facts of the file in `directory`, or None if there is no such file.

    Raises DirectoryError for a file that is no JSON object, or of another version.
    """
    path = directory / REPORT_FILE

    def fail(rule: str, message: str) -> FormatError:
        return DirectoryError("DIR-8" if rule == "JSON" else rule, message, file=path)

    if not path.is_file():
        return None
    found = load_file(path, fail, constants=True)
    if not isinstance(found, Mapping):
        raise DirectoryError("DIR-8", "is not a JSON object", file=path)
    if found.get("version") != REPORT_VERSION:
        raise DirectoryError(
            "DIR-8", f"version {found.get('version')!r} is not known, expected {REPORT_VERSION}", file=path
        )
    kept = _objects(found.get("kept"))
    return ConversionFacts(
        {path: q for path, module in _objects(found.get("modules")).items() if (q := _quantized(module))},
        {name: reason for name, entry in kept.items() if isinstance(reason := entry.get("reason"), str) and reason},
        tuple(block for item in _list(found.get("blocks")) if (block := _block(item))),
        _budget(found.get("budget")),
        tuple(one for item in _list(found.get("evaluation")) if (one := _evaluation(item))),
    )


def _quantized(module: Mapping[str, Any]) -> Quantized | None:
    nbytes, error = _number(module.get("nbytes")), _number(module.get("relative_error"))
    if nbytes is None or error is None:
        return None
    return Quantized(int(nbytes), error, _number(module.get("squared_norm")))


def _block(item: object) -> Block | None:
    if not isinstance(item, list) or len(item) != 3 or not isinstance(item[0], str):
        return None
    before, after = _number(item[1]), _number(item[2])
    return None if before is None or after is None else Block(item[0], before, after)


def _budget(found: object) -> Budget | None:
    if not isinstance(found, Mapping):
        return None
    pairs = [p for p in _list(found.get("curve")) if isinstance(p, list) and len(p) == 2]
    curve = [(x, y) for a, b in pairs if (x := _number(a)) is not None and (y := _number(b)) is not None]
    numbers = {key: _number(found.get(key)) for key in ("target", "reached", "damage", "lower_bound")}
    measure = str(found.get("measure"))
    return Budget(tuple(sorted(curve)), **numbers, measure=measure if measure in MEASURES else "") if curve else None


def _evaluation(item: object) -> Evaluation | None:
    if not isinstance(item, Mapping):
        return None
    text, bits = item.get("text"), _number(item.get("bits"))
    tokens = _number(item.get("tokens", item.get("samples")))
    keys = ("perplexity", "reference_perplexity", "divergence", "agreement", "cosine")
    numbers = {key: _number(item.get(key)) for key in keys}
    if all(value is None for value in numbers.values()):
        return None
    text = text if isinstance(text, str) else ""
    return Evaluation(None if bits is None else int(bits), text, int(tokens or 0), **numbers)


def _objects(value: object) -> dict[str, Mapping[str, Any]]:
    return {k: v for k, v in value.items() if isinstance(v, Mapping)} if isinstance(value, Mapping) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _number(value: object) -> float | None:
    """`value` if it is a finite number that is not negative, as all in this file are."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) and value >= 0 else None
