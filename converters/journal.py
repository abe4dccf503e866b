"""The journal of a conversion: its progress, from which an interrupted run resumes (DIR-7).

It is a file beside the unfinished shards. It is written atomically, after the data that it lists is on the disk.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..container.atomic import write_json
from ..container.header import read_header
from ..container.writer import ShardWriter, Written, shard_name
from ..errors import FormatError, OutputError
from ..schema import ModuleEntry, Scheme

JOURNAL = ".lowbit-progress.json"


@dataclass(frozen=True)
class Outcome:
    """The outcome of one quantized module.

    Attributes:
        module: its entry in the output.
        nbytes: bytes of its tensors.
        squared_error, squared_norm, lossless, widened: as in :class:`..quantize.Quantized`.
    """

    module: ModuleEntry
    nbytes: int
    squared_error: float
    squared_norm: float
    lossless: bool
    widened: str | None

    @property
    def relative_error(self) -> float:
        return (self.squared_error / self.squared_norm) ** 0.5 if self.squared_norm > 0 else 0.0


@dataclass
class Progress:
    """The finished part of a conversion.

    Attributes:
        shards: names of the tensors of each finished shard.
        nbytes: bytes of all tensors in finished shards.
        steps: number of finished steps of the plan, including those of the open shard.
        outcomes: the outcome of each quantized module, by path.
        open: tensors of the shard in progress.
        measured: what :meth:`.quantizer.Quantizer.improve` measured in the end; None before it is through.
    """

    shards: list[list[str]] = field(default_factory=list)
    nbytes: int = 0
    steps: int = 0
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    open: list[Written] = field(default_factory=list)
    measured: dict[str, Any] | None = None

    def save(self, work: Path, settings: str, writer: ShardWriter | None) -> None:
        """Write the journal to `work`; before it, sync the data of the open shard's `writer`."""
        if writer is not None:
            writer.sync()
        outcomes = {path: _outcome_to_json(o) for path, o in self.outcomes.items()}
        opened = [[t.name, t.dtype, list(t.shape), t.digest] for t in self.open]
        write_json(
            work / JOURNAL,
            {
                "settings": settings,
                "shards": self.shards,
                "nbytes": self.nbytes,
                "steps": self.steps,
                "open": opened,
                "outcomes": outcomes,
                "measured": self.measured,
            },
        )


def load_progress(work: Path, settings: str) -> Progress:
    """The progress of an interrupted run; empty if `work` has no journal.

    Raises OutputError if the run had other settings, or its files do not match the journal.
    """
    path = work / JOURNAL
    if not path.is_file():
        return Progress()
    try:
        obj = json.loads(path.read_text("utf-8"))
        if obj["settings"] != settings:
            raise OutputError(
                f"{work}: was begun with other options, another source or another version; "
                "run with the same ones to resume, or remove it"
            )
        outcomes = {p: _outcome_from_json(p, o) for p, o in obj["outcomes"].items()}
        opened = [Written(name, dtype, tuple(shape), digest) for name, dtype, shape, digest in obj["open"]]
        done = Progress(obj["shards"], obj["nbytes"], obj["steps"], outcomes, opened, obj["measured"])
        for i, names in enumerate(done.shards):
            file = finished_shard(work, i, len(done.shards))
            if sorted(read_header(file).tensors) != sorted(names):
                raise OutputError(f"{file}: does not hold what the journal says; remove {work} and begin again")
        return done
    except (ValueError, KeyError, TypeError, OSError, FormatError) as e:
        raise OutputError(f"{path}: cannot be resumed from: {e!r}; remove {work} and begin again") from e


def working_shard(work: Path, index: int) -> Path:
    """The file of shard `index` (from 0) until all shards are finished."""
    return work / f"part-{index + 1:05d}.safetensors"


def finished_shard(work: Path, index: int, total: int) -> Path:
    """The file of a finished shard: with its working name, or its final one if the run was killed while renaming."""
    part = working_shard(work, index)
    return part if part.exists() else work / shard_name(index + 1, total)


def _outcome_to_json(o: Outcome) -> dict[str, Any]:
    return {
        "scheme": o.module.scheme.to_dict(),
        "kind": o.module.kind,
        "shape": list(o.module.shape),
        "nbytes": o.nbytes,
        "squared_error": o.squared_error,
        "squared_norm": o.squared_norm,
        "lossless": o.lossless,
        "widened": o.widened,
    }


def _outcome_from_json(path: str, obj: dict[str, Any]) -> Outcome:
    module = ModuleEntry(path, Scheme.from_dict(obj["scheme"]), obj["kind"], tuple(obj["shape"]))
    return Outcome(module, obj["nbytes"], obj["squared_error"], obj["squared_norm"], obj["lossless"], obj["widened"])
