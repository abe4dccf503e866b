"""The task bundle: a base's scales, adapted to one task (spec/BUNDLE.md). Reading, writing, and what needs no base.

:func:`read_bundle` checks at the door all that needs no base. Whether a bundle belongs to a base, and what it makes of
the base's parameters, is in :mod:`.matching`. Numpy only.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Container
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ..container.atomic import atomic_file, files_together, write_json
from ..container.header import Header, parse_header
from ..container.writer import StoredTensor, write_safetensors
from ..dtypes import DTYPES, FLOATS, from_float32, round_to, stored, to_float32
from ..errors import BundleError, DigestError
from ..matrix import F32
from .bundle_config import TASK_CONFIG_FILE, TaskConfig, read_task_config
from .operations import SAVED, split_delta

SCALES_FILE = "task_scales.safetensors"
CARD_FILE = "README.md"


@dataclass(frozen=True)
class TaskBundle:
    """A whole bundle in memory.

    Attributes:
        config: what it belongs to.
        deltas: float32 by name, ``"<module>.scales.mul"`` and the like, with the shapes of TSK-6.
        saved: tensors of ``config.modules_to_save``, named ``"<module>.<parameter>"`` (see :func:`saved_module`); read
            ones hold bytes, uint8.
    """

    config: TaskConfig
    deltas: dict[str, F32] = field(default_factory=dict)
    saved: tuple[StoredTensor, ...] = ()

    @property
    def delta_values(self) -> int:
        """Numbers in all deltas."""
        return sum(delta.size for delta in self.deltas.values())

    @property
    def saved_values(self) -> int:
        """Numbers in all tensors that are carried whole."""
        return sum(math.prod(tensor.shape) for tensor in self.saved)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, deltas in float32."""
        return sum(delta.nbytes for delta in self.deltas.values()) + sum(tensor.nbytes for tensor in self.saved)


@dataclass(frozen=True)
class StoredBundle:
    """A bundle as it was read from a directory.

    Attributes:
        bundle: all of it, in memory.
        directory: where its files lie.
        header: of the file of scales: dtypes and bytes as they are stored.
    """

    bundle: TaskBundle
    directory: Path
    header: Header

    @property
    def nbytes(self) -> int:
        """Size of the file of scales."""
        return (self.directory / SCALES_FILE).stat().st_size

    def files(self) -> dict[str, Path]:
        """The bundle's files by name; a card only if there is one. Other files of the directory are left out."""
        paths = {name: self.directory / name for name in (SCALES_FILE, CARD_FILE, TASK_CONFIG_FILE)}
        return {name: path for name, path in paths.items() if path.is_file()}


@dataclass(frozen=True)
class Loss:
    """What rounding the deltas to a smaller dtype costs.

    Attributes:
        largest: absolute difference of the value that moves most.
        relative_rms: root mean square of the differences, relative to that of the deltas; 0 where these are all 0.
        changed: how many values do not survive as they are.
    """

    largest: float
    relative_rms: float
    changed: int


def read_bundle(directory: str | Path) -> TaskBundle:
    """The bundle in `directory`; see :func:`read_stored_bundle`."""
    return read_stored_bundle(directory).bundle


def read_stored_bundle(directory: str | Path) -> StoredBundle:
    """The bundle in `directory`, checked by every rule that needs no base, digests included.

    Raises BundleError (TSK rules), VersionError, HeaderError (HDR rules) or DigestError (DIG rules).
    """
    directory = Path(directory)
    config, path = read_task_config(directory), directory / SCALES_FILE
    if not path.is_file():
        raise BundleError("TSK-6", "there is no such file; a task bundle has one", file=path)
    deltas, saved = dict[str, F32](), list[StoredTensor]()
    with open(path, "rb") as f:
        header = parse_header(f, path.stat().st_size, path)
        for info in header.tensors.values():
            f.seek(info.begin)
            content = f.read(info.nbytes)
            raw, digest = np.frombuffer(content, np.uint8), hashlib.sha256(content).hexdigest()
            if header.digests.get(info.name, digest) != digest:
                message = "the bytes do not have the digest that the header gives; the file is damaged, get it again"
                raise DigestError("DIG-3", message, file=path, tensor=info.name)
            if info.name.startswith(SAVED):
                saved.append(StoredTensor(info.name.removeprefix(SAVED), info.dtype, info.shape, raw))
            elif info.dtype in FLOATS:
                deltas[info.name] = to_float32(stored(raw, info.dtype, info.shape), info.dtype)
            else:
                message = f"is {info.dtype}, expected a delta in {', '.join(FLOATS)}"
                raise BundleError("TSK-6", message, file=path, tensor=info.name)
    bundle = TaskBundle(config, deltas, tuple(saved))
    check_bundle(bundle, path)
    return StoredBundle(bundle, directory, header)


def write_bundle(directory: str | Path, bundle: TaskBundle, *, dtype: str = "F32", card: str | None = None) -> None:
    """Write `bundle` into `directory`, with digests; the same bytes whatever the dicts' order.

    A bundle that is there already is replaced: it stays as it was if anything fails. The files get their names when
    all are whole, ``task_config.json`` last.

    Args:
        directory: made where it is missing; other files in it stay.
        bundle: what to write.
        dtype: of the stored deltas, ``"F32"``, ``"F16"`` or ``"BF16"``; :func:`rounding_loss` says what it costs.
        card: text of ``README.md``; None leaves a card that is there.

    Raises:
        BundleError: a reader would refuse the bundle, or `dtype` cannot hold a delta.
        OutputError: the disk refuses.
    """
    directory = Path(directory)
    TaskConfig.from_dict(bundle.config.to_dict(), file=directory / TASK_CONFIG_FILE)
    check_bundle(bundle, directory / SCALES_FILE)
    tensors = [
        StoredTensor(name, dtype, delta.shape, from_float32(_rounded(name, delta, dtype), dtype))
        for name, delta in bundle.deltas.items()
    ]
    tensors += [replace(t, name=SAVED + t.name) for t in bundle.saved]
    with files_together(directory, [SCALES_FILE, *([] if card is None else [CARD_FILE]), TASK_CONFIG_FILE]) as work:
        write_safetensors(work / SCALES_FILE, sorted(tensors, key=lambda t: t.name))
        if card is not None:
            with atomic_file(work / CARD_FILE) as f:
                f.write(card.encode())
        write_json(work / TASK_CONFIG_FILE, bundle.config.to_dict())


def rounding_loss(bundle: TaskBundle, dtype: str) -> Loss:
    """What :func:`write_bundle` with this `dtype` would lose; raises BundleError where `dtype` cannot hold a delta."""
    largest, squares, total, changed = 0.0, 0.0, 0.0, 0
    for name, delta in bundle.deltas.items():
        exact = delta.astype(np.float64)
        error = _rounded(name, delta, dtype) - exact
        largest = max(largest, float(np.abs(error).max(initial=0)))
        squares, total = squares + float(np.square(error).sum()), total + float(np.square(exact).sum())
        changed += int(np.count_nonzero(error))
    return Loss(largest, math.sqrt(squares / total) if total else 0.0, changed)


def saved_module(name: str, listed: Container[str]) -> str | None:
    """The path of `listed` to which a saved tensor belongs: the longest that fits; None if none does (TSK-10)."""
    at = name.rfind(".", 0, max(len(name) - 1, 0))  # what is behind the dot is not empty
    while at > 0 and name[:at] not in listed:
        at = name.rfind(".", 0, at)
    return name[:at] if at > 0 else None


def check_bundle(bundle: TaskBundle, file: Path | None = None) -> None:
    """Raise BundleError for tensors that break a rule which needs no base (TSK-6, TSK-9 to TSK-11)."""

    def fail(rule: str, message: str, tensor: str | None = None) -> BundleError:
        return BundleError(rule, message, file=file, tensor=tensor)

    if not bundle.deltas and not bundle.saved:
        raise fail("TSK-11", "holds no tensor")
    for name, delta in bundle.deltas.items():
        module, operation = split_delta(name, file)
        if operation.name == "scales.add" and f"{module}.scales.mul" in bundle.deltas:
            raise fail("TSK-9", "the module has scales.mul too", name)
        if not np.isfinite(delta).all():
            raise fail("TSK-9", "holds NaN or an infinity", name)
    listed, found, names = frozenset(bundle.config.modules_to_save), set[str](), set[str]()
    for tensor in bundle.saved:
        if tensor.name in names:
            raise fail("TSK-6", "another saved tensor has this name too", tensor.name)
        owner = saved_module(tensor.name, listed)
        if owner is None:
            raise fail("TSK-10", "belongs to no module of modules_to_save", tensor.name)
        if tensor.nbytes != math.prod(tensor.shape) * DTYPES[tensor.dtype].nbytes:
            raise fail("HDR-5", f"{tensor.nbytes} bytes are not {tensor.dtype} {list(tensor.shape)}", tensor.name)
        found.add(owner)
        names.add(tensor.name)
    for path in bundle.config.modules_to_save:
        if path not in found:
            raise fail("TSK-10", "modules_to_save lists this module, but it has no tensor of its own", path)


def _rounded(name: str, delta: F32, dtype: str) -> F32:
    """`delta` rounded to `dtype`, in float32."""
    if dtype not in FLOATS:
        raise BundleError("TSK-6", f"deltas cannot be stored in {dtype!r}, expected one of {', '.join(FLOATS)}")
    rounded = round_to(np.asarray(delta, np.float32), dtype)
    if not np.isfinite(rounded).all():
        bf16_will_do = dtype == "F16" and np.isfinite(round_to(delta, "BF16")).all()
        wider = "BF16 (bfloat16), which has the range of F32" if bf16_will_do else "F32 (float32)"
        worst = float(np.abs(delta).max())
        raise BundleError("TSK-9", f"{worst:g} is too large for {dtype}; store the deltas in {wider}", tensor=name)
    return rounded
