"""``lowbit diff``: how two models differ, module by module."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import numpy as np
import typer
from numpy.typing import NDArray
from rich.progress import track
from rich.table import Column, Table

from ..container.reader import CONFIG_FILE, ModelReader
from ..container.strict_json import load_file
from ..errors import DirectoryError, LowbitError
from . import console
from .opening import check_directory

if TYPE_CHECKING:
    from ..converters.source import Source

MOST = 30  # modules listed, those that differ most first


def diff(
    a: Annotated[Path, typer.Argument(help="A lowbit model directory, or a float one.")],
    b: Annotated[Path, typer.Argument(help="Another one; one of the two is a lowbit model.")],
) -> None:
    """Compare two lowbit models, or one and a float model: schemes, decoded weights, other tensors.

    The difference of a module is ``||A - B|| / ||A||`` of the decoded weights. Exits with 0 if the models are the
    same bit for bit, with 1 if they differ, with 2 if one cannot be read.

    Examples: `lowbit diff ./llama ./llama-4bit`, `lowbit diff ./llama-4bit ./llama-3bit`
    """
    with console.named_errors():
        one, two = _open(a), _open(b)
        if isinstance(one, _FloatModel) and isinstance(two, _FloatModel):
            raise DirectoryError("DIR-1", "both are float models; one of the two must be a lowbit model", file=a)
        rows = _compare_modules(one, two)
        others = _other_differences(one, two)
    differing = sorted((r for r in rows if not r.same), key=lambda r: -r.relative)
    same = len(rows) - len(differing)
    table = Table(Column("module", overflow="fold"), "A", "B", "difference", title="Modules that differ")
    for row in differing[:MOST]:
        table.add_row(row.path, *row.schemes, row.what)
    if len(differing) > MOST:
        table.add_row(f"… and {len(differing) - MOST} more", "", "", "")
    if table.row_count:
        console.out.print(table)
    for name, what in others[:MOST]:
        console.out.print(f"{name}: {what}", highlight=False, soft_wrap=True)
    if len(others) > MOST:
        console.out.print(f"… and {len(others) - MOST} other tensors more", highlight=False)
    if norm := sum(r.squared_norm for r in rows):
        error = (sum(r.squared_distance for r in rows) / norm) ** 0.5
        console.out.print(f"difference over all modules in both: {error:.4f}", highlight=False)
    console.out.print(
        f"{same} modules are the same, {len(differing)} differ; {len(others)} other tensors differ; {_bases(one, two)}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    raise typer.Exit(0 if not differing and not others else 1)


class _Model(Protocol):
    """One side of a comparison. Module paths and names of other tensors are those of a lowbit file."""

    def scheme(self, path: str) -> str | None:
        """How the module at `path` is stored, in words; None if there is none."""

    def decode(self, path: str) -> NDArray[np.float32]:
        """The weight of the module at `path`, float32 ``[rows, cols]`` (or ``[experts, rows, cols]``)."""

    def others(self, modules: set[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype and shape of every tensor that belongs to none of `modules`, by name."""

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a tensor of :meth:`others`."""


class _LowbitModel:
    def __init__(self, directory: Path) -> None:
        self.reader = ModelReader(directory)

    def scheme(self, path: str) -> str | None:
        if path not in self.reader.config.modules:
            return None
        s = self.reader.module(path).scheme
        return f"{s.label or s.codec} {s.bits} g{s.group_size} {s.scale_dtype}"

    def decode(self, path: str) -> NDArray[np.float32]:
        return self.reader.decode(path)

    def others(self, modules: set[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
        names = set(self.reader.names()) - self.reader.lowbit_names()
        return {n: (self.reader.info(n).dtype, self.reader.info(n).shape) for n in names}

    def raw(self, name: str) -> NDArray[np.uint8]:
        return self.reader.raw(name)


class _FloatModel:
    """A Hugging Face checkpoint, with the module paths of its conversion (needs torch and transformers)."""

    def __init__(self, directory: Path) -> None:
        from ..converters.huggingface import open_checkpoint
        from ..converters.names import map_names

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

    def decode(self, path: str) -> NDArray[np.float32]:
        from ..converters.source import as_float32

        destination = self.weights[path]
        if (stack := destination.stack) is not None:
            return np.stack([stack.matrix(self.source, expert) for expert in range(stack.shape[0])])
        weight = as_float32(self.source.read(destination.key), self.source.tensors[destination.key])
        return weight.T if destination.kind == "conv1d" else weight

    def others(self, modules: set[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
        modules = modules | {place for place, owner in self.tied.items() if owner in modules}
        inside = {name for path in modules if path in self.weights for name in self._names(path)}
        return {n: (t.dtype, t.shape) for n, t in self.source.tensors.items() if n not in inside}

    def raw(self, name: str) -> NDArray[np.uint8]:
        return self.source.read(name)

    def _names(self, path: str) -> list[str]:
        """The checkpoint's tensors that make a weight."""
        destination = self.weights[path]
        if destination.stack is None:
            return [destination.key]
        return [name for part in destination.stack.parts for name in part]


def _open(directory: Path) -> _LowbitModel | _FloatModel:
    """The model in `directory`: a lowbit one if its config has a quantization_config, else a float checkpoint."""
    check_directory(directory)

    def fail(rule: str, message: str) -> LowbitError:
        return DirectoryError("DIR-1", message, file=directory / CONFIG_FILE)

    path = directory / CONFIG_FILE
    config: Any = load_file(path, fail, constants=True) if path.is_file() else {"quantization_config": None}
    is_float = isinstance(config, dict) and "quantization_config" not in config
    return _FloatModel(directory) if is_float else _LowbitModel(directory)


@dataclass(frozen=True)
class _Row:
    """One module of either model: its difference in words and numbers, and the two schemes."""

    path: str
    schemes: tuple[str, str]
    what: str
    same: bool = False
    squared_distance: float = 0.0
    squared_norm: float = 0.0

    @property
    def relative(self) -> float:
        """``||A - B|| / ||A||``; infinite where the two cannot be compared."""
        if self.what in ("only in A", "only in B", "shapes differ"):
            return np.inf
        if self.squared_norm == 0:
            return float(self.squared_distance > 0)
        return float((self.squared_distance / self.squared_norm) ** 0.5)


def _quantized(*models: _Model) -> set[str]:
    """Paths of the quantized modules of either model."""
    return {path for model in models if isinstance(model, _LowbitModel) for path in model.reader.config.modules}


def _compare_modules(one: _Model, two: _Model) -> list[_Row]:
    rows = []
    for path in track(sorted(_quantized(one, two)), "comparing", console=console.err, transient=True):
        x, y = one.scheme(path), two.scheme(path)
        schemes = (x or "-", y or "-")
        if x is None or y is None:
            rows.append(_Row(path, schemes, "only in A" if y is None else "only in B"))
            continue
        a, b = one.decode(path), two.decode(path)
        if a.shape != b.shape:
            rows.append(_Row(path, schemes, "shapes differ"))
            continue
        a64 = a.astype(np.float64)
        row = _Row(path, schemes, "", False, float(np.sum((a64 - b) ** 2)), float(np.sum(a64**2)))
        same = x == y and row.squared_distance == 0
        numbers = row.squared_distance, row.squared_norm
        rows.append(_Row(path, schemes, "same" if same else f"{row.relative:.6f}", same, *numbers))
    return rows


def _other_differences(one: _Model, two: _Model) -> list[tuple[str, str]]:
    """Tensors outside of quantized modules that are not the same bytes."""
    modules = _quantized(one, two)
    mine, theirs = one.others(modules), two.others(modules)
    found = [(n, "only in A" if n in mine else "only in B") for n in sorted(mine.keys() ^ theirs.keys())]
    for name in sorted(mine.keys() & theirs.keys()):
        (x, x_shape), (y, y_shape) = mine[name], theirs[name]
        if mine[name] != theirs[name]:
            found.append((name, f"{x} {list(x_shape)} in A, {y} {list(y_shape)} in B"))
        elif not np.array_equal(one.raw(name), two.raw(name)):
            found.append((name, "values differ"))
    return found


def _bases(one: _Model, two: _Model) -> str:
    """Whether tasks of one model can be used with the other."""
    if isinstance(one, _LowbitModel) and isinstance(two, _LowbitModel):
        mine, theirs = (model.reader.fingerprint(trust_digests=False) for model in (one, two))  # FPR-5
        same = mine.body == theirs.body
        return "the same base" if same else "different bases"
    return f"{'A' if isinstance(one, _FloatModel) else 'B'} is a float model"
