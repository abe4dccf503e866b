"""The task bundles of a model that lie in its directory or beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..container.fingerprint import Fingerprint
from ..container.reader import ModelReader
from ..errors import FingerprintError, LowbitError
from ..tasks.bundle import read_stored_bundle
from ..tasks.bundle_config import TASK_CONFIG_FILE
from ..tasks.matching import check_matches


@dataclass(frozen=True)
class Task:
    """A bundle that can be applied to the model.

    Attributes:
        name: of its directory.
        method: how it was tuned.
        bits: precision at which it was tuned; None is the model's own.
        modules: number of quantized modules that it changes.
        delta_values, saved_values: numbers in its deltas, and in the modules that it carries whole.
        saved: paths of these modules.
        nbytes: of its file of scales.
        rms, largest: of the relative deltas of scales, absolute; None where it has other deltas or none.
    """

    name: str
    method: str
    bits: int | None
    modules: int
    delta_values: int
    saved_values: int
    saved: tuple[str, ...]
    nbytes: int
    rms: float | None
    largest: float | None


@dataclass(frozen=True)
class Tasks:
    """What was found.

    Attributes:
        fitting: bundles of this model, by name.
        others: number of bundles of other models.
        faults: name and error of bundles that cannot be read or applied.
    """

    fitting: tuple[Task, ...] = ()
    others: int = 0
    faults: tuple[tuple[str, str], ...] = ()


def find_tasks_beside(reader: ModelReader, fingerprint: Fingerprint) -> Tasks:
    """The bundles in directories of the model's directory, and in those beside it; `fingerprint` is the model's."""
    directory = reader.directory.resolve()
    fitting, others, faults = list[Task](), 0, list[tuple[str, str]]()
    for place in (directory, directory.parent):
        for file in sorted(place.glob(f"*/{TASK_CONFIG_FILE}")):
            try:
                fitting.append(_read(file.parent, reader, fingerprint))
            except FingerprintError:
                others += 1
            except LowbitError as e:
                faults.append((file.parent.name, str(e)))
    return Tasks(tuple(fitting), others, tuple(faults))


def _read(directory: Path, reader: ModelReader, fingerprint: Fingerprint) -> Task:
    stored = read_stored_bundle(directory)
    bundle = stored.bundle
    check_matches(bundle, reader.config, fingerprint, bundle.config.bits)
    relative = [delta.ravel() for name, delta in bundle.deltas.items() if name.endswith(".scales.mul")]
    values = np.concatenate(relative).astype(np.float64) if relative else np.empty(0)
    return Task(
        directory.name,
        bundle.config.method,
        bundle.config.bits,
        len({name.rsplit(".", 2)[0] for name in bundle.deltas}),
        bundle.delta_values,
        bundle.saved_values,
        bundle.config.modules_to_save,
        stored.nbytes,
        float(np.sqrt(np.mean(values**2))) if values.size else None,
        float(np.abs(values).max()) if values.size else None,
    )
