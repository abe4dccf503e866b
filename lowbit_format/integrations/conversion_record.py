"""What ``config.json`` tells about the checkpoint that a lowbit model was made from, beside the format itself.

transformers keeps the key when it saves a model, so that ``lowbit dequantize`` finds the names of the original.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

KEY = "lowbit_conversion"
REPORT_FILE = "conversion_report.json"  # what a conversion did, module by module; it is of this one directory
REPORT_VERSION = 1  # of that file: a reader that knows this one need not know others


@dataclass(frozen=True)
class ConversionRecord:
    """A conversion.

    Attributes:
        source_names: name of a tensor in the model -> its name in the checkpoint, where the two differ.
        copies: name in the checkpoint of a second copy of a tied tensor -> name of the parameter that has its values.
        absent: parameters of the model that the checkpoint does not have, and that its use does not need.
        experts: parameter of stacked experts -> names of the checkpoint's tensors, see :func:`expert_name`, or without
            a ``*`` of those that have a part of all experts; the rows of an expert's matrix are those of the tensors,
            in equal parts.
        joined: name of a tensor in the checkpoint -> names in the model of the blocks of rows that it was cut into.
    """

    source_names: dict[str, str] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    experts: dict[str, list[str]] = field(default_factory=dict)
    joined: dict[str, list[str]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object, without what is empty; deterministic."""
        found: dict[str, Any] = {
            "source_names": dict(sorted(self.source_names.items())),
            "copies": dict(sorted(self.copies.items())),
            "absent": sorted(self.absent),
            "experts": dict(sorted(self.experts.items())),
            "joined": dict(sorted(self.joined.items())),
        }
        return {key: value for key, value in found.items() if value}

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ConversionRecord:
        """The record in a ``config.json``; empty where there is none, or where it is ill-formed: it is informative."""
        found = config.get(KEY)
        if not isinstance(found, Mapping):
            return cls()
        absent = found.get("absent")
        return cls(
            _names(found.get("source_names")),
            _names(found.get("copies")),
            tuple(name for name in absent if isinstance(name, str)) if isinstance(absent, list) else (),
            _lists(found.get("experts")),
            _parts(found.get("joined")),
        )


def expert_name(pattern: str, expert: int) -> str:
    """The name of an expert's tensor: `pattern` with its number in the place of ``*``; ``*+8`` begins at 8."""
    return re.sub(r"\*(?:\+(\d+))?", lambda found: str(expert + int(found[1] or 0)), pattern)


def _names(found: object) -> dict[str, str]:
    pairs = found.items() if isinstance(found, Mapping) else ()
    return {k: v for k, v in pairs if isinstance(k, str) and isinstance(v, str)}


def _lists(found: object) -> dict[str, list[str]]:
    pairs = found.items() if isinstance(found, Mapping) else ()
    return {
        k: list(v)
        for k, v in pairs
        if isinstance(k, str) and isinstance(v, list) and v and all(isinstance(n, str) for n in v)
    }


def _parts(found: object) -> dict[str, list[str]]:
    pairs = found.items() if isinstance(found, Mapping) else ()
    return {k: v for k, v in pairs if isinstance(k, str) and isinstance(v, list) and all(isinstance(n, str) for n in v)}
