"""Everything that a report says of a model, as numbers and words: no HTML, no plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..container.reader import ModelReader
from ..differences import FloatSide, LowbitSide, compare_matrices
from ..dtypes import BY_NAME, DTYPES
from ..errors import DirectoryError, LowbitError
from ..integrations.card import source_facts
from .bundles import Tasks, find_tasks_beside
from .conversion import Block, Budget, ConversionFacts, Evaluation, Quantized, read_conversion
from .distribution import Distribution, distribution
from .entries import Entry, Kind, entries_of, joint_error, kinds_of

WORST = 3  # modules whose distribution is shown for their error
UNRELATED = 1.0  # relative error from which the original is hardly the one that the model was made of

Other = FloatSide | LowbitSide
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Original:
    """What the model is compared with.

    Attributes:
        what: in words, such as ``"bfloat16"`` or the name of a directory.
        nbytes: of all its tensors.
        is_measured: it was given, and not only computed from numbers of weights.
    """

    what: str
    nbytes: int
    is_measured: bool


@dataclass(frozen=True)
class ModelFacts:
    """All facts.

    Attributes:
        name: of the model's directory.
        architecture: that the config names.
        format_version: of the files.
        fingerprint: of the base; `by_digests` says that it rests on those in the headers (FPR-5).
        source: license and original from the model card, by key of its front matter.
        files: bytes of tensors by weight file.
        precisions: at which it can be read, ascending.
        tied: path of a tied place -> path of the module that has its matrix.
        original: what its size is compared with; None if nothing is known of it.
        errors_from: where errors come from, in words; empty if none is known.
        entries: every quantized module and kept tensor.
        blocks, budget, evaluations: from the conversion.
        distributions: of some modules.
        tasks: bundles beside it.
        notes: what could not be shown, and why.
    """

    name: str
    architecture: str
    format_version: str
    fingerprint: str
    by_digests: bool
    source: dict[str, str]
    files: dict[str, int]
    precisions: tuple[int, ...]
    tied: dict[str, str]
    original: Original | None
    errors_from: str
    entries: tuple[Entry, ...]
    blocks: tuple[Block, ...]
    budget: Budget | None
    evaluations: tuple[Evaluation, ...]
    distributions: tuple[Distribution, ...]
    tasks: Tasks
    notes: tuple[str, ...]

    @property
    def modules(self) -> tuple[Entry, ...]:
        """The quantized modules, those of the largest error first, then by size."""
        found = (e for e in self.entries if e.is_quantized)
        return tuple(sorted(found, key=lambda e: (-(e.error or 0.0), -e.nbytes, e.stack, e.layer or 0, e.kind)))

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return kinds_of(self.entries)

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(e.nbytes for e in self.entries)

    @property
    def numel(self) -> int:
        """Of all tensors, each quantized weight counted once."""
        return sum(e.numel for e in self.entries)

    @property
    def bits_per_weight(self) -> float:
        """Of the whole model."""
        return 8 * self.nbytes / self.numel

    @property
    def error(self) -> float | None:
        """The relative error over all quantized weights."""
        return joint_error(self.modules)


def model_facts(
    reader: ModelReader,
    *,
    against: str = "",
    other: Other | None = None,
    modules: Sequence[str] = (),
    report: Progress = lambda done, total: None,
) -> ModelFacts:
    """Collect the facts of a model; of the two models one matrix each is in memory at a time.

    Args:
        reader: the model.
        against: name of the original, for people.
        other: the original, a float model or another lowbit one, as :func:`.differences.open_side` opens it.
        modules: paths of modules whose distribution to show beside those that are chosen.
        report: called with the number of modules compared and of all.

    Raises:
        ConfigError: `modules` has a path that is no quantized module.
        DirectoryError: the original has none of the model's modules, or the model has no weights.
        FormatError: values of the model that the spec forbids.
    """
    for path in modules:
        reader.module(path)
    fingerprint, notes = reader.fingerprint(), list[str]()
    converted = _conversion(reader.directory, notes)
    entries = entries_of(reader)
    if not entries:
        raise DirectoryError("DIR-1", "holds no weights, there is nothing to show", file=reader.directory)
    origin = f"the comparison with {against}"
    if other is not None:
        entries = _compared(reader, entries, other, against, notes, report)
    else:
        entries, origin = _with_errors(entries, converted.modules), "the conversion"
    entries = tuple(replace(e, reason=converted.reasons.get(e.path, "")) for e in entries)
    chosen = _chosen([e for e in entries if e.is_quantized], [reader.config.tied.get(p, p) for p in modules])
    config = reader.model_config
    return ModelFacts(
        name=reader.directory.resolve().name,
        architecture=", ".join(map(str, config.get("architectures") or ["unknown architecture"])),
        format_version=reader.config.format_version,
        fingerprint=fingerprint.body,
        by_digests=reader.has_lowbit_digests(),
        source=source_facts(reader.directory),
        files={f: sum(t.nbytes for t in h.tensors.values()) for f, h in reader.headers.items()},
        precisions=tuple(reader.config.precisions()),
        tied=dict(reader.config.tied),
        original=_original(config, entries, other, against),
        errors_from=origin if any(e.error is not None for e in entries) else "",
        entries=entries,
        blocks=converted.blocks,
        budget=converted.budget,
        evaluations=converted.evaluations,
        distributions=tuple(
            distribution(reader, path, why, _having(other, reader, path)) for path, why in chosen.items()
        ),
        tasks=find_tasks_beside(reader, fingerprint),
        notes=tuple(notes),
    )


def _conversion(directory: Path, notes: list[str]) -> ConversionFacts:
    try:
        return read_conversion(directory) or ConversionFacts()
    except LowbitError as e:
        notes.append(f"The report of the conversion is left out: {e}")
        return ConversionFacts()


def _with_errors(entries: Iterable[Entry], modules: Mapping[str, Quantized]) -> tuple[Entry, ...]:
    """`entries` with the errors of those modules that are of the same size still."""

    def known(e: Entry) -> Entry:
        found = modules.get(e.path)
        if not e.is_quantized or found is None or found.nbytes != e.nbytes:
            return e
        return replace(e, error=found.error, squared_norm=found.squared_norm)

    return tuple(map(known, entries))


def _compared(
    reader: ModelReader, entries: Sequence[Entry], other: Other, name: str, notes: list[str], report: Progress
) -> tuple[Entry, ...]:
    """`entries` with the errors of quantized modules against the same modules of `other`."""
    here, found, missing = LowbitSide(reader), list[Entry](), list[str]()
    total = sum(e.is_quantized for e in entries)
    for e in entries:
        if e.is_quantized:
            difference = compare_matrices(other, here, e.path)
            if not math.isfinite(difference.relative):
                missing.append(e.path)
            else:
                e = replace(e, error=difference.relative, squared_norm=difference.squared_norm)
            report(len(found) + 1, total)
        found.append(e)
    if total and len(missing) == total:
        message = f"has no module of {reader.directory} with the same shape and finite weights, such as {missing[0]!r}"
        raise DirectoryError("DIR-1", f"{message}; is it the model that this one was made from?", file=name)
    if missing:
        notes.append(
            f"{len(missing)} modules, such as {missing[0]}, are not in {name} with the same shape and finite "
            "weights: their errors are not known."
        )
    error = joint_error([e for e in found if e.error is not None])
    if error is not None and error >= UNRELATED:
        notes.append(
            f"The weights differ from those of {name} by as much as they are: it is hardly the model that this one "
            "was made from."
        )
    return tuple(found)


def _having(other: Other | None, reader: ModelReader, path: str) -> Other | None:
    """`other` if it has the module at `path` too."""
    if other is None or other.scheme(path) is None:
        return None
    return other if other.shape(path) == reader.module(path).shape else None


def _chosen(modules: Sequence[Entry], named: Iterable[str]) -> dict[str, str]:
    """Paths of the modules to look at closely, and why: first those that the user named."""
    chosen = dict.fromkeys(named, "asked for")
    worst = sorted((e for e in modules if e.error is not None), key=lambda e: (-(e.error or 0.0), e.path))
    for i, e in enumerate(worst[:WORST]):
        chosen.setdefault(e.path, "the largest error" if i == 0 else f"error number {i + 1} from the top")
    if not modules:
        return chosen
    by_size = sorted(modules, key=lambda e: (-e.numel, e.path))
    chosen.setdefault(by_size[0].path, "the largest module")
    layered = [e for e in modules if e.layer is not None]
    if layered:
        like = next((e for e in worst if e.layer is not None), max(layered, key=lambda e: e.numel))
        same = sorted((e for e in layered if (e.stack, e.kind) == (like.stack, like.kind)), key=lambda e: e.layer or 0)
        chosen.setdefault(same[0].path, "in the first layer")
        chosen.setdefault(same[-1].path, "in the last layer")
    return chosen


def _original(config: dict[str, Any], entries: Iterable[Entry], other: Other | None, name: str) -> Original | None:
    if other is not None:
        return Original(name, other.nbytes, is_measured=True)
    dtype = config.get("dtype") or config.get("torch_dtype")
    if not isinstance(dtype, str) or dtype not in BY_NAME:
        return None
    width = DTYPES[BY_NAME[dtype]].nbytes
    nbytes = sum(e.numel * width if e.is_quantized else e.nbytes for e in entries)
    return Original(dtype, nbytes, is_measured=False)
