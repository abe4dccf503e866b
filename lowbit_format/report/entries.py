"""What a model's files hold: an entry for each quantized module and each kept tensor, with its layer and kind."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..container.reader import ModelReader
from ..integrations.card import scheme_text

VECTORS = "norms, biases and the like"  # the kind of all tensors that are kept and no matrices


@dataclass(frozen=True)
class Entry:
    """A quantized module, or a tensor that was kept.

    Attributes:
        path: of the module, or name of the tensor.
        kind: the path without its layer, such as ``self_attn.q_proj``; later numbers are ``*``.
        stack: path of the list of layers that it belongs to; empty outside of one.
        layer: number in this list.
        stored: scheme in words, or dtype.
        shape: of the weight.
        numel: number of weights.
        nbytes: of all its tensors.
        is_quantized: a module of ``quantization_config``.
        error: ``||W - Q|| / ||W||`` of its weight W in the original and Q here, if it is known.
        squared_norm: ``||W||**2``, if it is known.
        reason: why it was kept, if it is known.
    """

    path: str
    kind: str
    stack: str
    layer: int | None
    stored: str
    shape: tuple[int, ...]
    numel: int
    nbytes: int
    is_quantized: bool
    error: float | None = None
    squared_norm: float | None = None
    reason: str = ""

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each weight, parameters included."""
        return 8 * self.nbytes / self.numel


@dataclass(frozen=True)
class Kind:
    """All entries of one kind.

    Attributes:
        name: of the kind.
        stored: how they are stored, in words.
        entries: at least one.
    """

    name: str
    stored: str
    entries: tuple[Entry, ...]

    @property
    def numel(self) -> int:
        return sum(e.numel for e in self.entries)

    @property
    def nbytes(self) -> int:
        return sum(e.nbytes for e in self.entries)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.numel

    @property
    def error(self) -> float | None:
        """The relative error over all its modules, see :func:`joint_error`."""
        return joint_error(self.entries)


def joint_error(entries: Iterable[Entry]) -> float | None:
    """``||W - Q|| / ||W||`` over the weights of all `entries`; None where a part of it is not known."""
    entries = list(entries)
    if len(entries) == 1:
        return entries[0].error
    distance = norm = 0.0
    for e in entries:
        if e.error is None or e.squared_norm is None:
            return None
        distance += e.squared_norm * e.error**2
        norm += e.squared_norm
    return math.sqrt(distance / norm) if norm else None


def entries_of(reader: ModelReader) -> tuple[Entry, ...]:
    """All entries of a model, in the order of its paths; tensors without elements are left out."""
    found = []
    for m in reader.config:
        nbytes = sum(reader.info(spec.name).nbytes for spec in reader.specs(m.path))
        stored = scheme_text(m.scheme) + (", fewer in some rows" if m.scheme.row_bits else "")
        found.append(Entry(m.path, *_place(m.path), stored, m.shape, m.numel, nbytes, is_quantized=True))
    for name in sorted(set(reader.names()) - reader.lowbit_names()):
        info = reader.info(name)
        kind, stack, layer = _place(name.removesuffix(".weight"))
        numel = math.prod(info.shape)
        kind = kind if sum(n > 1 for n in info.shape) > 1 else VECTORS
        if numel:
            found.append(
                Entry(name, kind, stack, layer, info.dtype, info.shape, numel, info.nbytes, is_quantized=False)
            )
    return _with_stacks(found)


def kinds_of(entries: Iterable[Entry]) -> tuple[Kind, ...]:
    """The kinds of `entries`, that of the most bytes first; what was kept is apart from what is quantized."""
    groups: dict[tuple[str, bool], list[Entry]] = {}
    for e in entries:
        groups.setdefault((e.kind, e.is_quantized), []).append(e)
    kinds = [Kind(name, _stored(group), tuple(group)) for (name, _), group in groups.items()]
    return tuple(sorted(kinds, key=lambda k: (-k.nbytes, k.name)))


def _stored(entries: list[Entry]) -> str:
    ways = sorted({e.stored for e in entries})
    return ways[0] if len(ways) == 1 else f"{len(ways)} schemes" if entries[0].is_quantized else " and ".join(ways)


def _place(path: str) -> tuple[str, str, int | None]:
    """Kind, stack and layer of a path. ``model.layers.3.mlp.up_proj`` is an ``mlp.up_proj`` in layer 3."""
    parts = path.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal() and i > 0), None)
    if at is None:
        return path, "", None
    inside = ["*" if part.isdecimal() else part for part in parts[at + 1 :]]
    return ".".join(inside) or parts[at - 1], ".".join(parts[:at]), int(parts[at])


def _with_stacks(entries: list[Entry]) -> tuple[Entry, ...]:
    """`entries` with the stack in front of their kind, where matrices lie in several: ``encoder: fc1``."""
    stacks = sorted({e.stack for e in entries if e.stack and e.kind != VECTORS})
    if len(stacks) < 2:
        return tuple(entries)
    levels = zip(*(s.split(".") for s in stacks), strict=False)
    common = sum(1 for _ in itertools.takewhile(lambda names: len(set(names)) == 1, levels))
    short = {s: s.split(".")[min(common, s.count("."))] for s in stacks}
    if len(set(short.values())) < len(stacks):
        short = {s: s for s in stacks}
    return tuple(
        replace(e, kind=f"{short[e.stack]}: {e.kind}") if e.stack in short and e.kind != VECTORS else e for e in entries
    )
