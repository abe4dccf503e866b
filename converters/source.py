"""The protocol of a checkpoint to convert: names and shapes at once, data one tensor at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..container.header import Header
from ..dtypes import stored, to_float32
from ..errors import LowbitError, SourceError
from ..matrix import F32, StoredMatrix
from ..schema import Scheme

FLOATS = ("F64", "F32", "BF16", "F16")


@dataclass(frozen=True)
class Grid:
    """How a release has quantized a weight, and the weight stored like that, without loss.

    Attributes:
        scheme: that it is stored with; the matrix may need parameters of a wider dtype.
        nbytes: of its tensors in the release.
        matrix: reads it, or the matrix of one expert.
        refusal: why it cannot be stored without loss; empty if it can.
    """

    scheme: Scheme
    nbytes: int
    matrix: Callable[[int | None], StoredMatrix]
    refusal: str = ""

    def rows(self, begin: int, end: int, of: int) -> Grid:
        """The grid of rows `begin` to `end`, of all `of`."""
        return replace(
            self,
            nbytes=self.nbytes * (end - begin) // of,
            matrix=lambda expert: self.matrix(expert).row_slice(begin, end),
        )


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of the checkpoint, as its header describes it.

    One with a `grid` is a weight that a release has quantized: dtype, shape and size are those that it has unpacked.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    grid: Grid | None = None

    @property
    def nbytes_there(self) -> int:
        """Bytes that it takes in the checkpoint."""
        return self.nbytes if self.grid is None else self.grid.nbytes

    @property
    def numel(self) -> int:
        return int(np.prod(self.shape, dtype=object)) if self.shape else 1


class Source(Protocol):
    """A checkpoint.

    Attributes:
        directory: of its config and side files.
        tensors: all tensors by name.
        files: names of the files that are read, of an index too.
        identity: a string that changes when the weights change; a conversion can resume only if it is the same.
        repo_id, revision: of the Hub, or None.
    """

    directory: Path
    tensors: dict[str, SourceTensor]
    files: tuple[str, ...]
    identity: str
    repo_id: str | None
    revision: str | None

    def read(self, name: str, begin: int = 0, nbytes: int | None = None) -> NDArray[np.uint8]:
        """The bytes of a tensor, row-major and little-endian, as a new uint8 array; or `nbytes` from `begin` on."""
        ...


@contextmanager
def named_as_shown(source: Source) -> Iterator[None]:
    """Errors name what the source is `shown_as`, if it says so, instead of its directory, which is a temporary one."""
    try:
        yield
    except LowbitError as e:
        place = getattr(source, "shown_as", None)
        if place is not None and e.args and isinstance(e.args[0], str):
            e.args = (e.args[0].replace(str(source.directory), str(place)), *e.args[1:])
        raise


class RenamedSource:
    """A source whose tensors have other names; `names` gives the new name of every tensor.

    Raises SourceError if two tensors would have the same name.
    """

    def __init__(self, source: Source, names: dict[str, str]) -> None:
        self.directory, self.repo_id, self.revision = source.directory, source.repo_id, source.revision
        self.files = source.files
        self._source, self._old = source, dict[str, str]()
        self.tensors: dict[str, SourceTensor] = {}
        for old, new in names.items():
            if new in self._old:
                raise SourceError(
                    f"{source.directory}: {old!r} and {self._old[new]!r} would both be {new!r} without the prefix; "
                    "take off only what stands before all names"
                )
            self._old[new], self.tensors[new] = old, replace(source.tensors[old], name=new)
        self.identity = hashlib.sha256("\n".join([source.identity, *self._old]).encode()).hexdigest()

    def read(self, name: str, begin: int = 0, nbytes: int | None = None) -> NDArray[np.uint8]:
        return self._source.read(self._old[name], begin, nbytes)


def as_float32(raw: NDArray[np.uint8], tensor: SourceTensor) -> F32:
    """Bytes of a float tensor as float32 in its shape; raises SourceError for other dtypes.

    Exact for all but F64, whose values are rounded.
    """
    if tensor.dtype not in FLOATS:
        raise SourceError(
            f"{tensor.name}: has dtype {tensor.dtype}, expected one of {', '.join(FLOATS)}; "
            "a checkpoint that is quantized already must be dequantized first"
        )
    return to_float32(stored(raw, tensor.dtype, tensor.shape), tensor.dtype, copy=False)


def check_index(path: object, expected: Iterable[str], found: Container[str]) -> None:
    """Raise SourceError unless the file at `path` has every tensor that the index lists for it."""
    for name in expected:
        if name not in found:
            raise SourceError(
                f"{path}: lacks the tensor {name!r}, which the index puts there; download the checkpoint again"
            )


def placed_tensors(
    headers: Mapping[str, Header], files: Mapping[str, Iterable[str]], directory: object
) -> tuple[dict[str, SourceTensor], dict[str, tuple[str, int]]]:
    """The tensors of safetensors files, and of each its file and its first byte there, by name.

    Args:
        headers: of the files, by name.
        files: the tensors that an index puts into each file.
        directory: for messages.

    Raises SourceError if one stands in two files, or not where the index puts it.
    """
    tensors, places = dict[str, SourceTensor](), dict[str, tuple[str, int]]()
    for file, header in headers.items():
        check_index(f"{directory}/{file}", files[file], header.tensors)
        for t in header.tensors.values():
            if t.name in tensors:
                raise SourceError(f"{directory}/{file}: tensor {t.name!r} stands in another shard too")
            tensors[t.name], places[t.name] = SourceTensor(t.name, t.dtype, t.shape, t.nbytes), (file, t.begin)
    return tensors, places


def read_range(path: Path, begin: int, nbytes: int, name: str) -> NDArray[np.uint8]:
    """Bytes of a file as a new array; raises SourceError, which names the tensor `name`, if it lacks them."""
    out = np.empty(nbytes, np.uint8)
    try:
        with open(path, "rb", buffering=0) as f:
            f.seek(begin)
            done = 0
            while done < nbytes:  # one read call gives at most 2 GiB
                n = f.readinto(out[done:].data)
                if not n:
                    raise SourceError(f"{path}: ends inside tensor {name!r}; it changed while it was read")
                done += n
    except OSError as e:
        raise SourceError(f"{path}: cannot be read: {e.strerror}") from e
    return out


def identity_of(directory: Path, files: Iterable[str], repo_id: str | None, commit: str | None) -> str:
    """The identity of files on this machine, which are those of a commit on the Hub if `repo_id` is given."""
    if repo_id is None or commit is None:
        return file_identity([directory / file for file in files])
    return commit_identity(repo_id, commit, files)


def commit_identity(repo_id: str, commit: str, files: Iterable[str]) -> str:
    """A digest of files of one commit on the Hub, however and wherever they are read."""
    return hashlib.sha256("\n".join([repo_id, commit, *sorted(files)]).encode()).hexdigest()


def file_identity(paths: list[Path]) -> str:
    """A digest of names, sizes, modification times and first bytes (the tensors' names and shapes) of files.

    Cheap: the weights are not read. A checkpoint that is written again has another identity.
    """
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as f:
            stat = path.stat()
            digest.update(f"{path.name}\t{stat.st_size}\t{stat.st_mtime_ns}\n".encode() + f.read(1 << 20))
    return digest.hexdigest()
