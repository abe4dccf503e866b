"""Writes safetensors files tensor by tensor, in bounded memory.

A header comes before the data, but has digests and shapes that are known only after all data is written. The data is
therefore streamed into a second file first, and copied after the header at the end. This costs one more copy on the
disk, and needs neither the whole shard in memory nor a guess at the header's size.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DTYPES, from_float32
from ..errors import OutputError
from ..matrix import StoredMatrix
from ..schema import ModuleEntry
from .atomic import atomic_file, disk_errors, write_json
from .header import DIGESTS, build_header, read_header
from .reader import INDEX_FILE, WEIGHTS_FILE

SHARD_BYTES = 5 << 30  # size at which a new file is begun, unless a caller says otherwise
_COPY = 1 << 24  # bytes at a time when a file is copied


@dataclass(frozen=True)
class StoredTensor:
    """A tensor to write: name, safetensors dtype, shape, and its bytes as a C-contiguous array."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: NDArray[Any]

    @property
    def nbytes(self) -> int:
        return int(self.data.nbytes)


def module_tensors(module: ModuleEntry, matrices: StoredMatrix | list[StoredMatrix]) -> list[StoredTensor]:
    """The tensors of a module entry, planes first (TEN-1, EXP-1).

    Args:
        module: the entry; its scheme must be that of the matrices.
        matrices: the matrix, or one for each expert.
    """
    stack = matrices if isinstance(matrices, list) else [matrices]
    scheme, first = module.scheme, stack[0]

    def joined(role: str, arrays: list[NDArray[Any]], dtype: str) -> StoredTensor:
        data = arrays[0] if module.experts is None else np.stack(arrays)
        data = np.ascontiguousarray(data if dtype == "U8" else from_float32(data, dtype))
        return StoredTensor(module.tensor(role), dtype, data.shape, data)

    out = [joined("planes", [m.planes for m in stack], "U8")]
    for suffix, of in [
        ("", [m.params for m in stack]),
        *((f"_k{k}", [m.nested[k] for m in stack]) for k in scheme.nested),
    ]:
        out.append(joined(f"scales{suffix}", [p.scales for p in of], scheme.scale_dtype))
        if scheme.shift:
            shifts = [p.shift for p in of if p.shift is not None]
            out.append(joined(f"{scheme.shift}{suffix}", shifts, scheme.scale_dtype))
    if first.codebook is not None:
        out.append(StoredTensor(module.tensor("codebook"), "F32", first.codebook.shape, first.codebook.astype("<f4")))
    if first.row_bits is not None:
        out.append(StoredTensor(module.tensor("row_bits"), "U8", first.row_bits.shape, first.row_bits))
    return out


@dataclass(frozen=True)
class Written:
    """A written tensor: name, safetensors dtype, shape, SHA-256 in hex."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    digest: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].nbytes


class ShardWriter:
    """One safetensors file, written tensor by tensor in bounded memory.

    Args:
        path: the file; it appears under its name only when :meth:`complete` or :meth:`close` has written all of it.
        written: tensors to append to, which an earlier writer of the same path synced before :meth:`leave`.

    Raises:
        OutputError: the earlier writer's data is missing.
    """

    def __init__(self, path: Path, written: Sequence[Written] = ()) -> None:
        self.path, self.written = path, list(written)
        self.is_complete = False  # or about to be
        self.nbytes = sum(t.nbytes for t in self.written)
        data = data_file(path)
        if self.written and (not data.is_file() or data.stat().st_size < self.nbytes):
            raise OutputError(f"{data}: does not hold what was written before; remove {path.parent} and begin again")
        self._data: BinaryIO = open(data, "r+b" if self.written else "w+b")  # noqa: SIM115 - close(), leave()
        if self.written:
            self._data.truncate(self.nbytes)  # data after the last save is written again
            self._data.seek(self.nbytes)

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of each tensor, by name."""
        return {t.name: t.digest for t in self.written}

    def add(self, tensor: StoredTensor) -> None:
        """Append one tensor."""
        data = tensor.data.reshape(-1).view(np.uint8).data if tensor.nbytes else memoryview(b"")
        self._data.write(data)
        self.written.append(Written(tensor.name, tensor.dtype, tensor.shape, hashlib.sha256(data).hexdigest()))
        self.nbytes += tensor.nbytes

    def sync(self) -> None:
        """Force the data written so far to the disk."""
        self._data.flush()
        os.fsync(self._data.fileno())

    def close(self) -> list[str]:
        """Write the file and remove the data that was collected for it; returns the names of its tensors."""
        names = self.complete()
        self.abort()
        return names

    def complete(self) -> list[str]:
        """Write header and data to the file, atomically; returns the names of its tensors.

        The data stays for a journal that still lists it, until :meth:`abort`.
        """
        self.is_complete = True
        self._data.seek(0)
        with atomic_file(self.path) as f:
            f.write(build_header([(t.name, t.dtype, t.shape) for t in self.written], file_metadata(self.digests)))
            shutil.copyfileobj(self._data, f, _COPY)
        return [t.name for t in self.written]

    def leave(self) -> None:
        """Stop writing and keep the data: a later writer can continue with the tensors that a journal lists."""
        with contextlib.suppress(OSError):  # a full disk refuses the last flush too
            self._data.close()

    def abort(self) -> None:
        """Stop writing and remove the data."""
        self.leave()
        Path(self._data.name).unlink(missing_ok=True)


def data_file(path: Path) -> Path:
    """The file in which a :class:`ShardWriter` of `path` keeps its data until it is closed."""
    return path.with_name(f"{path.name}.data")


def file_metadata(digests: Mapping[str, str]) -> dict[str, str]:
    """``__metadata__`` of a file: ``format``, which transformers wants, and the digests (DIG-1)."""
    return {"format": "pt", DIGESTS: json.dumps(dict(sorted(digests.items())), separators=(",", ":"))}


def write_safetensors(path: Path, tensors: list[StoredTensor]) -> dict[str, str]:
    """Write a small file atomically; returns the digests of its tensors by name."""
    with disk_errors(path):
        writer = ShardWriter(path)
        try:
            for tensor in tensors:
                writer.add(tensor)
            writer.close()
        except BaseException:
            writer.abort()
            raise
    return writer.digests


def seal(path: Path) -> None:
    """Add digests of all its tensors to the header of a file (DIG-1); its data stays the same."""
    header = read_header(path)
    base = next(iter(header.tensors.values())).begin if header.tensors else path.stat().st_size
    with open(path, "rb") as f:
        digests = {}
        for t in header.tensors.values():
            f.seek(t.begin)
            digests[t.name] = hashlib.sha256(f.read(t.nbytes)).hexdigest()
        tensors = [(t.name, t.dtype, t.shape) for t in header.tensors.values()]
        f.seek(base)
        with atomic_file(path) as out:
            out.write(build_header(tensors, {**header.metadata, **file_metadata(digests)}))
            shutil.copyfileobj(f, out, _COPY)


def replace_tensors(path: Path, new: Mapping[str, StoredTensor]) -> None:
    """Write a file again, atomically, in which some tensors have other data of the same dtype and shape."""
    header = read_header(path)
    writer = ShardWriter(path)
    try:
        with open(path, "rb") as f:
            for t in sorted(header.tensors.values(), key=lambda t: t.begin):
                tensor = new.get(t.name)
                if tensor is None:
                    f.seek(t.begin)
                    tensor = StoredTensor(t.name, t.dtype, t.shape, np.frombuffer(f.read(t.nbytes), np.uint8))
                if (tensor.dtype, tensor.shape) != (t.dtype, t.shape):
                    raise ValueError(f"{t.name}: is {t.dtype} {t.shape}, not {tensor.dtype} {tensor.shape}")
                writer.add(tensor)
        writer.close()
    except BaseException:
        writer.abort()
        raise


def write_index(directory: Path, shards: Mapping[str, list[str]], nbytes: int) -> None:
    """Write the index of `shards` (file name to tensor names); `nbytes` is the size of all tensors (DIR-4).

    Call it last (DIR-7).
    """
    weight_map = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(directory / INDEX_FILE, index)


def shard_name(number: int, total: int) -> str:
    """The file name that the Hub expects of shard `number` (from 1) of `total`."""
    return WEIGHTS_FILE if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"
