"""Two models side by side, matrix by matrix: what ``lowbit diff`` and ``lowbit report`` compare.

One of the two may be a float checkpoint. Only one matrix of each is in memory at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .container.reader import CONFIG_FILE, ModelReader
from .container.strict_json import load_file
from .errors import DirectoryError, LowbitError
from .matrix import F32
from .reference import decode

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .converters.source import Source

_AT_ONCE = 1 << 24  # weights of which differences are taken together, in float64


class Side(Protocol):
    """One side of a comparison. Module paths and names of other tensors are those of a lowbit file."""

    def scheme(self, path: str) -> str | None:
        """How the module at `path` is stored, in words; None if there is none."""

    def shape(self, path: str) -> tuple[int, ...]:
        """``(rows, cols)`` or ``(experts, rows, cols)`` of the module at `path`, which there is."""

    def decode(self, path: str, expert: int | None) -> F32:
        """The weight of the module at `path`, or of one of its experts: float32 ``[rows, cols]``."""

    def others(self, modules: set[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype and shape of every tensor that belongs to none of `modules`, by name."""

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a tensor of :meth:`others`."""


class LowbitSide:
    """A lowbit model."""

    def __init__(self, reader: ModelReader) -> None:
        self.reader = reader

    def scheme(self, path: str) -> str | None:
        if path not in self.reader.config.modules:
            return None
        s = self.reader.module(path).scheme
        return f"{s.label or s.codec} {s.bits} g{s.group_size} {s.scale_dtype}"

    def shape(self, path: str) -> tuple[int, ...]:
        return self.reader.module(path).shape

    def decode(self, path: str, expert: int | None) -> F32:
        return decode(self.reader.matrix(path, expert))

    def others(self, modules: set[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
        names = set(self.reader.names()) - self.reader.lowbit_names()
        return {n: (self.reader.info(n).dtype, self.reader.info(n).shape) for n in names}

    def raw(self, name: str) -> NDArray[np.uint8]:
        return self.reader.raw(name)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for header in self.reader.headers.values() for t in header.tensors.values())


class FloatSide:
    """A Hugging Face checkpoint, with the module paths of its conversion (needs torch and transformers)."""

    def __init__(self, directory: Path) -> None:
        from .converters.huggingface import open_checkpoint
        from .converters.names import map_names

        self.source: Source = open_checkpoint(str(directory))
        names = map_names(directory, {t.name: t.shape for t in self.source.tensors.values()})
        found = names.destinations.values()
        self.weights = {d.path: d for d in found if d.stack or d.kind in ("linear", "conv1d", "embedding")}
        for place, owner in names.tied.items():  # one matrix, which a checkpoint may hold under either name
            for path, twin in ((owner, place), (place, owner)):
                if path not in self.weights and twin in self.weights:
                    self.weights[path] = self.weights[twin]
        self.tied = names.tied

    def scheme(self, path: str) -> str | None:
        return f"float {self.source.tensors[self.weights[path].key].dtype}" if path in self.weights else None

    def shape(self, path: str) -> tuple[int, ...]:
        destination = self.weights[path]
        if destination.stack is not None:
            return destination.stack.shape
        shape = self.source.tensors[destination.key].shape
        return shape[::-1] if destination.kind == "conv1d" else shape

    def decode(self, path: str, expert: int | None) -> F32:
        from .converters.source import as_float32

        destination = self.weights[path]
        if destination.stack is not None:
            return destination.stack.matrix(self.source, expert or 0)
        weight = as_float32(self.source.read(destination.key), self.source.tensors[destination.key])
        return weight.T if destination.kind == "conv1d" else weight

    def others(self, modules: set[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
        modules = modules | {place for place, owner in self.tied.items() if owner in modules}
        inside = {name for path in modules if path in self.weights for name in self._names(path)}
        return {n: (t.dtype, t.shape) for n, t in self.source.tensors.items() if n not in inside}

    def raw(self, name: str) -> NDArray[np.uint8]:
        return self.source.read(name)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.source.tensors.values())

    def _names(self, path: str) -> list[str]:
        """The checkpoint's tensors that make a weight."""
        destination = self.weights[path]
        if destination.stack is None:
            return [destination.key]
        return [name for part in destination.stack.parts for name in part]


@dataclass(frozen=True)
class Difference:
    """How the matrix of one module differs between A and B.

    Attributes:
        path: of the module.
        schemes: how each has it, in words; ``"-"`` where it lacks it.
        why_not: why the two cannot be compared; empty if they can.
        squared_distance, squared_norm: sums over the weights, of ``(A - B)**2`` and of ``A**2``.
    """

    path: str
    schemes: tuple[str, str]
    why_not: str = ""
    squared_distance: float = 0.0
    squared_norm: float = 0.0

    @property
    def is_none(self) -> bool:
        """Both are stored alike and decode to the same values."""
        return not self.why_not and self.schemes[0] == self.schemes[1] and self.squared_distance == 0

    @property
    def relative(self) -> float:
        """``||A - B|| / ||A||``; infinite where the two cannot be compared."""
        if self.why_not:
            return np.inf
        if self.squared_norm == 0:
            return float(self.squared_distance > 0)
        return float((self.squared_distance / self.squared_norm) ** 0.5)


def open_side(directory: Path) -> LowbitSide | FloatSide:
    """The model in `directory`: a lowbit one if its config has a quantization_config, else a float checkpoint.

    Raises:
        FormatError: an ill-formed lowbit model. SourceError: an ill-formed checkpoint.
    """

    def fail(rule: str, message: str) -> LowbitError:
        return DirectoryError("DIR-1", message, file=directory / CONFIG_FILE)

    path = directory / CONFIG_FILE
    config: Any = load_file(path, fail, constants=True) if path.is_file() else {"quantization_config": None}
    is_float = isinstance(config, dict) and "quantization_config" not in config
    return FloatSide(directory) if is_float else LowbitSide(ModelReader(directory))


def compare_matrices(one: Side, two: Side, path: str) -> Difference:
    """How the module at `path` differs; its experts one after the other."""
    x, y = one.scheme(path), two.scheme(path)
    schemes = (x or "-", y or "-")
    if x is None or y is None:
        return Difference(path, schemes, "only in A" if y is None else "only in B")
    shape = one.shape(path)
    if shape != two.shape(path):
        return Difference(path, schemes, "shapes differ")
    distance = norm = 0.0
    for expert in range(shape[0]) if len(shape) == 3 else [None]:
        a, b = one.decode(path, expert), two.decode(path, expert)
        rows = max(1, _AT_ONCE // shape[-1])
        for begin in range(0, len(a), rows):
            exact = a[begin : begin + rows].astype(np.float64)
            distance += float(np.sum((exact - b[begin : begin + rows]) ** 2))
            norm += float(np.sum(exact**2))
    return Difference(path, schemes, "", distance, norm)
