"""The container: header, metadata and table of tensors of a GGUF file, validated before anything else reads it.

The layout is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. Every
length is compared with what is left of the file before it is used, and with a limit, since a file may have holes: no
file makes a large allocation.
"""

from __future__ import annotations

import itertools
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import SourceError
from ...schema import is_text

MAGIC, VERSIONS = b"GGUF", (2, 3)
MOST_KEYS, MOST_TENSORS = 1 << 16, 1 << 20
LONGEST_NAME, LONGEST_STRING, MOST_DIMENSIONS = 512, 1 << 26, 4
MOST_VALUES, MOST_OF_ALL = 1 << 20, 1 << 22  # of an array, which no vocabulary or its merges reach; of all arrays
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_KEY_BYTES, _TENSOR_BYTES = 8 + 1 + 4 + 1, 8 + 1 + 4 + 8 + 4 + 8  # the least that one takes
_LARGEST = 1 << 53  # bytes of a tensor: beyond any disk


@dataclass(frozen=True)
class BlockSize:
    """A type of tensors: `weights` of a row are `nbytes` bytes."""

    name: str
    weights: int
    nbytes: int


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file.

    Attributes:
        name: in the file, such as ``blk.0.attn_q.weight``.
        type: id of its type.
        shape: row-major: the last dimension is contiguous.
        begin: first byte in the file.
        nbytes: number of bytes.
    """

    name: str
    type: int
    shape: tuple[int, ...]
    begin: int
    nbytes: int


@dataclass(frozen=True)
class Array:
    """An array among the metadata, of which nothing but its size is kept."""

    count: int


@dataclass(frozen=True)
class GgufFile:
    """A validated file.

    Attributes:
        path: of the file.
        metadata: values by key: numbers, strings, :class:`Array`.
        tensors: by name.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def read_gguf(path: Path, types: dict[int, BlockSize]) -> GgufFile:
    """Read and validate all but the data of the file at `path`.

    Args:
        path: of the file.
        types: sizes of all types of tensors by id, also of those that cannot be converted.

    Raises:
        SourceError: it is not such a file, it is cut off, or what it says does not fit it.
    """
    try:
        with open(path, "rb") as f:
            if path.stat().st_size < 24:
                raise SourceError(f"{path}: has {path.stat().st_size} bytes, and is no GGUF file; download it again")
            with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _Reader(path, content).file(types)
    except OSError as e:
        raise SourceError(f"{path}: cannot be read: {e.strerror}") from e


class _Reader:
    """A place in the file, which moves as values are read."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self._path, self._content, self._at, self._size = path, content, 0, len(content)
        self._values = 0  # of all arrays up to here

    def file(self, types: dict[int, BlockSize]) -> GgufFile:
        if self._take(4, "the first bytes") != MAGIC:
            raise self._error("does not begin with GGUF, and is no GGUF file; give a model's .gguf file")
        (version,) = self._unpack("I", "the version")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            what = "is big-endian" if swapped else f"has version {version}"
            raise self._error(f"{what}, expected little-endian of version 2 or 3; convert it with llama.cpp's tools")
        tensors, keys = self._unpack("QQ", "the counts")
        for count, least, most, what in (
            (tensors, _TENSOR_BYTES, MOST_TENSORS, "tensors"),
            (keys, _KEY_BYTES, MOST_KEYS, "keys"),
        ):
            if count > most or count * least > self._size - self._at:
                raise self._error(
                    f"says that it has {count} {what}, which its {self._size} bytes cannot hold; download it again"
                )
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self._text("a key of the metadata")
            if key in metadata:
                raise self._error(f"has the key {key!r} twice")
            metadata[key] = self._value(key, *self._unpack("I", key))
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self._error(f"has general.alignment {alignment!r}, expected a power of two")
        infos = [self._info() for _ in range(tensors)]
        return GgufFile(
            self._path, metadata, self._placed(infos, -(-self._at // alignment) * alignment, alignment, types)
        )

    def _placed(
        self,
        infos: list[tuple[str, tuple[int, ...], int, int]],
        data: int,
        alignment: int,
        types: dict[int, BlockSize],
    ) -> dict[str, Tensor]:
        """The tensors, each inside of the file and none in another; `data` is where their data begin."""
        found: dict[str, Tensor] = {}
        for name, shape, kind, offset in infos:
            if name in found:
                raise self._error(f"has the tensor {name!r} twice")
            if kind not in types:
                raise self._error(f"{name}: has the type {kind}, which is unknown; a newer package gguf may know it")
            size = types[kind]
            if shape[-1] % size.weights:
                raise self._error(
                    f"{name}: has rows of {shape[-1]} weights, expected a multiple of {size.weights} for {size.name}"
                )
            nbytes = math.prod(shape) // size.weights * size.nbytes
            if nbytes > _LARGEST or offset % alignment or data + offset + nbytes > self._size:
                raise self._error(
                    f"{name}: {size.name} of shape {list(shape)} takes {nbytes} bytes from byte {data + offset} on, "
                    f"which a file of {self._size} bytes, aligned to {alignment}, does not have; download it again"
                )
            found[name] = Tensor(name, kind, shape, data + offset, nbytes)
        ordered = sorted(found.values(), key=lambda t: t.begin)
        for one, after in itertools.pairwise(ordered):
            if one.begin + one.nbytes > after.begin:
                raise self._error(f"{after.name}: begins inside of {one.name}; download it again")
        return found

    def _info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._text("a tensor's name")
        (dimensions,) = self._unpack("I", name)
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise self._error(f"{name}: has {dimensions} dimensions, expected 1 to {MOST_DIMENSIONS}")
        shape = self._unpack("Q" * dimensions, name)[::-1]  # the file counts the contiguous one first
        if not all(1 <= n < 1 << 31 for n in shape):
            raise self._error(f"{name}: has the shape {list(shape)}, expected numbers from 1 to 2^31 - 1")
        kind, offset = self._unpack("IQ", name)
        return name, shape, kind, offset

    def _value(self, key: str, kind: int) -> Any:
        if kind == _STRING:
            return self._string(key)
        if kind in _SCALARS:
            return self._unpack(_SCALARS[kind], key)[0]
        if kind != _ARRAY:
            raise self._error(f"{key}: has a value of type {kind}, which is unknown")
        inner, count = self._unpack("IQ", key)
        if inner != _STRING and inner not in _SCALARS:
            raise self._error(f"{key}: is an array of type {inner}, which is unknown")
        least = 8 if inner == _STRING else struct.calcsize(f"<{_SCALARS[inner]}")
        what = "strings" if inner == _STRING else "values"
        if count * least > self._size - self._at:
            raise self._error(f"{key}: says that it has {count} {what}, which the file cannot hold")
        self._values += count
        if count > MOST_VALUES or self._values > MOST_OF_ALL:
            raise self._error(
                f"{key}: has {count} {what}, expected at most {MOST_VALUES}, and {MOST_OF_ALL} in all arrays"
            )
        if inner == _STRING:
            for _ in range(count):
                self._skip(self._unpack("Q", key)[0], key)
        else:
            self._skip(count * least, key)
        return Array(count)

    def _text(self, what: str) -> str:
        """A string to name something by."""
        found = self._string(what)
        if not 1 <= len(found) <= LONGEST_NAME or not is_text(found):
            raise self._error(
                f"{what} is {found[:80]!r}, expected 1 to {LONGEST_NAME} characters, no control characters"
            )
        return found

    def _string(self, what: str) -> str:
        (length,) = self._unpack("Q", what)
        if LONGEST_STRING < length <= self._size - self._at:
            raise self._error(f"{what} has {length} bytes, expected at most {LONGEST_STRING}")
        raw = self._take(length, what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as e:
            raise self._error(f"{what} is not UTF-8: {e}") from e

    def _unpack(self, form: str, what: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{form}", self._take(struct.calcsize(f"<{form}"), what))

    def _take(self, count: int, what: str) -> bytes:
        self._skip(count, what)
        return self._content[self._at - count : self._at]

    def _skip(self, count: int, what: str) -> None:
        if count > self._size - self._at:
            raise self._error(
                f"ends inside of {what}: {count} bytes from byte {self._at} on, of {self._size}; download it again"
            )
        self._at += count

    def _error(self, message: str) -> SourceError:
        return SourceError(f"{self._path}: {message}")
