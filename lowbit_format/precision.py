"""One precision of a model, in a model directory of its own: fewer planes, with the parameters stored for them.

The first planes of a matrix are the first bytes of its tensor (BIT-4), and at a precision k only ``codebook`` and the
``_k`` parameters are needed beside them (TEN-3): so what is written is read in a few ranges of the whole model's files.
"""

from __future__ import annotations

import hashlib
import math
import re
import shutil
from collections.abc import Callable, Container, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .container.atomic import atomic_directory, disk_errors, write_json
from .container.header import TensorInfo
from .container.reader import CONFIG_FILE, ModelReader
from .container.writer import ShardWriter, StoredTensor, shard_name, write_index
from .errors import DigestError
from .hub import CARD_FILE, is_plain_folder
from .integrations.conversion_record import REPORT_FILE
from .schema import ModuleEntry
from .tensors import TensorSpec


@dataclass(frozen=True)
class Piece:
    """A tensor of the new directory, and the bytes of the whole model's file that it has.

    Attributes:
        name, dtype, shape: as it is written.
        ranges: bytes of the file, from and to.
        source: the tensor of the whole model that they are of.
        is_whole: they are all of that tensor, and have its digest.
        data: content that is known already, in the place of `ranges`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    ranges: tuple[tuple[int, int], ...]
    source: str
    is_whole: bool = False
    data: NDArray[Any] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return sum(end - begin for begin, end in self.ranges)


@dataclass(frozen=True)
class Verified:
    """How many tensors were written, and of how many the digest agreed with the whole model's (DIG-3)."""

    tensors: int = 0
    agreed: int = 0


def pieces(reader: ModelReader, bits: int) -> dict[str, list[Piece]]:
    """What precision `bits` of a model consists of, by weight file, in the order of the file.

    Raises PrecisionError if the model does not have it (NST-3), and TensorError for bad ``row_bits`` (MIX-1, MIX-2).
    """
    reader.check_precision(bits)
    lowbit = {spec.name: (module, spec) for module in reader.config for spec in reader.specs(module.path)}
    found: dict[str, list[Piece]] = {}
    for file, header in reader.headers.items():
        infos = sorted(header.tensors.values(), key=lambda t: (t.begin, t.end))
        kept = (_lowbit_piece(reader, *lowbit[t.name], t, bits) if t.name in lowbit else _all_of(t) for t in infos)
        found[file] = [piece for piece in kept if piece is not None]
    return found


def comes_along(name: str, weights: Container[str]) -> bool:
    """Whether a file of a model, by its path there, is copied with a precision; `weights` are those of the model.

    Not its own weights, which are written anew, nor other copies of them, pickles (DIR-5) and hidden files; nor the
    report of its conversion, which tells of all its planes.
    """
    folder, _, file = name.rpartition("/")
    is_other = file.endswith(_OTHER) or (not folder and file.endswith((".safetensors", ".safetensors.index.json")))
    return name not in (CONFIG_FILE, REPORT_FILE) and name not in weights and not is_other and is_plain_folder(name)


_OTHER = (
    ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf",
    ".ot", ".tflite", ".npz",
)  # fmt: skip


def copy_precision(
    reader: ModelReader, bits: int, out: Path, *, report: Callable[[int], object] = lambda nbytes: None
) -> Verified:
    """Write precision `bits` of a model as the directory `out`, which appears when it is complete (DIR-7).

    The files beside the weights come along. Otherwise as :func:`write_precision`; raises OutputError also if `out`
    exists.
    """
    with atomic_directory(out) as work:
        for path in sorted(reader.directory.rglob("*")):
            name = path.relative_to(reader.directory).as_posix()
            if path.is_file() and comes_along(name, reader.headers):
                (work / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, work / name)
        if (card := work / CARD_FILE).is_file():
            card.write_bytes(_card_of_part(card.read_bytes(), bits))
        return write_precision(reader, bits, work, report=report)


def _card_of_part(card: bytes, bits: int) -> bytes:
    """The whole model's card with a sentence on top of its text, behind what the Hub reads."""
    front = re.match(rb"---\r?\n.*?\n---\r?\n", card, re.DOTALL)
    end = front.end() if front else 0
    note = f"\n> These are the first {bits} planes of the model that this card describes, with the scales for them.\n\n"
    return card[:end] + note.encode() + card[end:]


def write_precision(
    reader: ModelReader, bits: int, out: Path, *, report: Callable[[int], object] = lambda nbytes: None
) -> Verified:
    """Write precision `bits` of a model into `out`, an empty directory: weights, index and, last, the config (DIR-7).

    Args:
        reader: of the whole model.
        bits: the precision.
        out: gets a lowbit model whose matrices have at most `bits` planes and no nested precisions. Files beside the
            weights are the caller's.
        report: called after every tensor with the bytes that it was made from.

    Raises:
        PrecisionError: the model does not have this precision (NST-3).
        DigestError: a tensor of which all bytes were read differs from its digest (DIG-3).
        OutputError: the disk refuses.
    """
    files = {file: some for file, some in pieces(reader, bits).items() if some}
    shards, total, agreed = dict[str, list[str]](), 0, 0
    with disk_errors(out):
        for number, (file, wanted) in enumerate(files.items(), 1):
            name = shard_name(number, len(files))
            writer = ShardWriter(out / name)
            try:
                for piece, data in _read(reader, file, wanted):
                    agreed += piece.is_whole and _check(reader, piece, data)
                    writer.add(StoredTensor(piece.name, piece.dtype, piece.shape, data))
                    report(piece.nbytes)
                    del data
                shards[name] = writer.close()
            except BaseException:
                writer.abort()
                raise
            total += writer.nbytes
        if len(shards) > 1:
            write_index(out, shards, total)
        modules = {m.path: replace(m, scheme=_scheme(m, bits)) for m in reader.config}
        config = replace(reader.config, modules=modules, format_version="")  # the lowest that it needs (VER-3)
        write_json(out / CONFIG_FILE, {**reader.model_config, "quantization_config": config.to_dict()})
    return Verified(sum(map(len, shards.values())), agreed)


def _scheme(module: ModuleEntry, bits: int) -> Any:
    return replace(module.scheme, bits=module.scheme.planes_at(bits), nested=())


def _all_of(info: TensorInfo) -> Piece:
    return Piece(info.name, info.dtype, info.shape, ((info.begin, info.end),), info.name, is_whole=True)


def _lowbit_piece(
    reader: ModelReader, module: ModuleEntry, spec: TensorSpec, info: TensorInfo, bits: int
) -> Piece | None:
    """What becomes of a tensor of a module: all of it, a part, or nothing."""
    role, _, of = spec.role.partition("_k") if "_k" in spec.role else (spec.role, "", "")
    is_cut = bits < module.scheme.bits
    if role not in ("planes", "codebook", "row_bits"):  # parameters of groups: NST-1
        if of != (str(bits) if is_cut else ""):
            return None
        return replace(_all_of(info), name=module.tensor(role))
    if not is_cut or role == "codebook":
        return _all_of(info)
    row_bits, shape = reader.row_bits(module.path), (*info.shape[:-3], bits, *info.shape[-2:])
    if role == "row_bits":
        assert row_bits is not None  # noqa: S101 - for the type checker: the tensor is there
        return Piece(info.name, info.dtype, info.shape, (), info.name, data=np.minimum(row_bits, np.uint8(bits)))
    if row_bits is not None:  # NST-2
        shape = (int(np.minimum(row_bits, bits).sum(dtype=np.int64)), info.shape[1])
    stacks = module.experts or 1  # BIT-4 holds for each expert alone (EXP-2)
    stride, size = info.nbytes // stacks, math.prod(shape) // stacks
    begins = range(info.begin, info.end, stride)
    return Piece(info.name, info.dtype, shape, tuple((begin, begin + size) for begin in begins), info.name)


def _read(reader: ModelReader, file: str, wanted: list[Piece]) -> Iterator[tuple[Piece, NDArray[np.uint8]]]:
    """Each piece with its bytes."""
    ranges = [r for piece in wanted for r in piece.ranges]
    found = reader.ranges(file, ranges)
    try:
        for piece in wanted:
            parts = [piece.data] if piece.data is not None else [next(found) for _ in piece.ranges]
            yield piece, parts[0] if len(parts) == 1 else np.concatenate(parts)
            del parts
    finally:
        with suppress(AttributeError):  # an iterator that is no generator has nothing to close
            found.close()  # type: ignore[attr-defined]


def _check(reader: ModelReader, piece: Piece, data: NDArray[np.uint8]) -> bool:
    """Whether the tensor has a digest; raises DigestError if these are not its bytes."""
    expected = reader.stored_digest(piece.source)
    if expected is None:
        return False
    found = hashlib.sha256(data.data if data.nbytes else b"").hexdigest()
    if found != expected:
        raise DigestError(
            "DIG-3",
            f"the bytes have SHA-256 {found}, the header says {expected}; the file is damaged",
            file=reader.directory / reader.file_of(piece.source),
            tensor=piece.source,
        )
    return True
