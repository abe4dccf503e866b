"""The safetensors header: read with every check of spec/FORMAT.md section 3 before any tensor is used, and written.

The safetensors library does not check names and duplicate keys, and does not give byte ranges, which digests, partial
reads and streaming writes need.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from ..dtypes import DTYPES
from ..errors import DigestError, HeaderError
from ..schema import is_int, is_sha256, is_text
from . import strict_json

MAX_HEADER = 1 << 25  # bytes, HDR-1; no model needs the 100 MB of safetensors, and parsed JSON is many times larger
MAX_NAME = 1024  # characters, HDR-3
DIGESTS = "lowbit.digests"  # key of __metadata__, DIG-1


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: name, safetensors dtype, shape, and the file's bytes ``begin`` to ``end`` that hold it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Header:
    """A checked header.

    Attributes:
        tensors: by name, in file order.
        metadata: the ``__metadata__`` object.
        digests: SHA-256 in hex by tensor name (DIG-1); empty if the file has none.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    digests: dict[str, str]


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of the file at `path`; raises HeaderError or DigestError."""
    with open(path, "rb") as f:
        return parse_header(f, os.fstat(f.fileno()).st_size, path)


def parse_header(f: BinaryIO, size: int, path: object) -> Header:
    """Read and check the header at the start of `f`, a file of `size` bytes (HDR-1 to HDR-7). `path`: for messages."""

    def fail(rule: str, message: str) -> HeaderError:
        return HeaderError("HDR-2" if rule == "JSON" else rule, message, file=path)

    if size < 8:
        raise fail("HDR-1", f"the file has {size} bytes, expected at least 8; it is cut off or no safetensors file")
    (n,) = struct.unpack("<Q", f.read(8))
    if not 2 <= n <= MAX_HEADER:
        raise fail("HDR-1", f"header length is {n}, expected 2 to {MAX_HEADER}")
    if 8 + n > size:
        raise fail("HDR-1", f"header length is {n}, but only {size - 8} bytes follow; the file is cut off")
    raw = f.read(n)
    if raw[:1] != b"{":
        raise fail("HDR-2", "the header does not begin with '{'")
    text = raw.rstrip(b" ")
    if not text.endswith(b"}"):
        raise fail("HDR-2", "the header does not end with '}' and spaces")
    obj = strict_json.loads(text, fail)
    metadata = obj.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise fail("HDR-7", "__metadata__ is not an object from string to string")
    infos = [_tensor_info(name, entry, 8 + n, path) for name, entry in obj.items()]
    infos.sort(key=lambda t: (t.begin, t.end))
    at = 8 + n
    for t in infos:
        if t.end > size:
            message = f"extends past the end of the file at byte {size}; the file is cut off"
            raise HeaderError("HDR-6", message, file=path, tensor=t.name)
        if t.begin != at:
            what = "a hole before it" if t.begin > at else "an overlap with the tensor before it"
            raise HeaderError("HDR-6", f"{what}: begins at byte {t.begin}, expected {at}", file=path, tensor=t.name)
        at = t.end
    if at != size:
        raise fail(
            "HDR-6", f"tensors end at byte {at}, the file at {size}: the bytes after the last tensor belong to none"
        )
    return Header({t.name: t for t in infos}, metadata, parse_digests(metadata, path))


def _tensor_info(name: str, entry: object, base: int, path: object) -> TensorInfo:
    def fail(rule: str, message: str) -> HeaderError:
        return HeaderError(rule, message, file=path, tensor=name[:80])

    if not 1 <= len(name) <= MAX_NAME or not is_text(name):
        raise fail("HDR-3", "a tensor's name is empty, too long or has a control character")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise fail("HDR-3", "the entry does not have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise fail("HDR-4", f"unknown dtype {str(dtype)[:40]!r}")
    if not isinstance(shape, list) or not all(is_int(d) and d >= 0 for d in shape):
        raise fail("HDR-5", f"shape is {str(shape)[:80]}, expected a list of non-negative integers")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_int(o) and o >= 0 for o in offsets):
        raise fail("HDR-5", f"data_offsets is {str(offsets)[:80]}, expected two non-negative integers")
    begin, end = offsets
    if not _takes(shape, DTYPES[dtype].nbytes, end - begin):
        found = f"data_offsets span {str(end - begin)[:40]} bytes"
        raise fail("HDR-5", f"{found}, which is not what shape {str(shape)[:80]} of {dtype} takes")
    return TensorInfo(name, dtype, tuple(shape), base + begin, base + end)


def _takes(shape: list[int], item_bytes: int, nbytes: int) -> bool:
    """Whether a shape takes `nbytes`; stops once it takes more, before a hostile product grows without bound."""
    if 0 in shape:
        return nbytes == 0
    total = item_bytes
    for n in shape:
        total *= n
        if total > nbytes:
            return False
    return total == nbytes


def parse_digests(metadata: Mapping[str, str], path: object) -> dict[str, str]:
    """Digests in a header's metadata: tensor name to hex SHA-256 (DIG-1), empty if it has none. Raises DigestError."""

    def fail(rule: str, message: str) -> DigestError:
        return DigestError("DIG-1" if rule == "JSON" else rule, f"{DIGESTS}: {message}", file=path)

    if DIGESTS not in metadata:
        return {}
    digests = strict_json.loads(metadata[DIGESTS], fail)
    if not isinstance(digests, dict):
        raise fail("DIG-1", "not an object from tensor name to SHA-256")
    for name, digest in digests.items():
        if not is_sha256(digest):
            raise fail("DIG-1", f"the digest of {name[:80]!r} is not 64 lower-case hexadecimal digits")
    return digests


def build_header(tensors: list[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The header of a file with `tensors` (name, dtype, shape), in this order.

    The length comes first; spaces pad the header to a multiple of 8 bytes (HDR-2).
    """
    obj: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    at = 0
    for name, dtype, shape in tensors:
        end = at + math.prod(shape) * DTYPES[dtype].nbytes
        obj[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(obj, separators=(",", ":"), ensure_ascii=False).encode()
    length = len(text) + -len(text) % 8
    return struct.pack("<Q", length) + text.ljust(length, b" ")
