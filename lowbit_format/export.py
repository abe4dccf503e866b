"""Converts a lowbit model directory back to an ordinary Hugging Face checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .container.atomic import atomic_directory, write_json
from .container.reader import CONFIG_FILE, INDEX_FILE, ModelReader
from .container.writer import SHARD_BYTES, ShardWriter, StoredTensor, shard_name, write_index
from .dtypes import BY_NAME, from_float32
from .errors import OutputError
from .integrations.conversion_record import KEY, REPORT_FILE, ConversionRecord, expert_name
from .reference import decode
from .schema import ModuleEntry


def dequantize_directory(
    reader: ModelReader,
    out: Path,
    *,
    dtype: str = "auto",
    bits: int | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    report: Callable[[], None] = lambda: None,
) -> str:
    """Write the model with its quantized weights decoded (DEC-5), one module in memory at a time, or one expert.

    The tensors get the names that they had in the checkpoint, where the model's ``config.json`` tells them.

    Args:
        reader: the lowbit model.
        out: directory to make; must not exist, or must be empty.
        dtype: ``"auto"`` (the model's own) or a key of BY_NAME.
        bits: nested precision to read at (NST-1).
        max_shard_bytes: most bytes of tensors in one file.
        report: called after each decoded module.

    Returns:
        The dtype written.

    Raises:
        OutputError: `dtype` is unknown, `out` exists or cannot be written, or float16 cannot hold a weight.
        PrecisionError: the model has no parameters for `bits`.
        TensorError: a module's values break a rule.
        DigestError: a tensor does not match its digest.
    """
    own = reader.model_config.get("dtype") or reader.model_config.get("torch_dtype") or "float32"
    chosen = own if dtype == "auto" else dtype
    if chosen not in BY_NAME:
        raise OutputError(f"dtype is {chosen!r}, expected auto or one of {', '.join(BY_NAME)}")
    reader.check_precision(bits)
    lowbit = reader.lowbit_names()
    planes = {m.tensor("planes"): m for m in reader.config}
    named = _Names(ConversionRecord.of(reader.model_config), reader)
    joined = _Joined(ConversionRecord.of(reader.model_config), set(named))
    with atomic_directory(out) as work:
        shards: list[list[str]] = []
        writer: ShardWriter | None = None
        total = 0
        for name in reader.names():
            if name in planes:
                module = planes[name]
                decoded = _decoded(reader, module, chosen, bits, named.experts(module))
                report()
            elif name in lowbit:
                continue
            else:
                reader.check_digest(name)
                info = reader.info(name)
                decoded = iter([StoredTensor(name, info.dtype, info.shape, reader.raw(name))])
            for one in joined(replace(tensor, name=name) for tensor in decoded for name in named(tensor.name)):
                if writer is not None and writer.nbytes + one.nbytes > max_shard_bytes:
                    shards.append(writer.close())
                    total, writer = total + writer.nbytes, None
                if writer is None:
                    writer = ShardWriter(work / f"part-{len(shards)}.safetensors")
                writer.add(one)
        if writer is not None:
            shards.append(writer.close())
            total += writer.nbytes
        _finish(reader, work, shards, total, chosen)
    return chosen


class _Names:
    """The names in the original checkpoint of each tensor; a tied one may have stood there twice."""

    def __init__(self, record: ConversionRecord, reader: ModelReader) -> None:
        lowbit = reader.lowbit_names()
        given = [m.weight for m in reader.config] + [name for name in reader.names() if name not in lowbit]
        self._names = {name: [record.source_names.get(name, name)] for name in given}
        for copy, owner in record.copies.items():
            if owner in self._names:
                self._names[owner].append(copy)
        self._experts = {m.path: record.experts[m.path] for m in reader.config if _has_parts(m, record)}
        if len({name for names in self._names.values() for name in names}) < sum(map(len, self._names.values())):
            self._names = {name: [name] for name in given}  # the record is of another model
            self._experts = {}

    def __call__(self, name: str) -> list[str]:
        return self._names.get(name, [name])

    def experts(self, module: ModuleEntry) -> list[str]:
        """Names of the tensors of each expert, ``*`` being its number, or of parts of all; empty where one held all."""
        return self._experts.get(module.path, [])

    def __iter__(self) -> Iterator[str]:
        return (name for names in self._names.values() for name in names)


class _Joined:
    """Makes one tensor again of the blocks of rows that a conversion cut the checkpoint's tensor into.

    Blocks that are not all there, or have several dtypes, stay as they are: transformers knows these names too.
    """

    def __init__(self, record: ConversionRecord, names: set[str]) -> None:
        whole = {key: parts for key, parts in record.joined.items() if names.issuperset(parts) and key not in names}
        self._key = {part: key for key, parts in whole.items() for part in parts}
        if len(self._key) < sum(map(len, whole.values())):
            self._key = {}  # the record is not one of ours
        self._parts, self._waiting = whole, dict[str, dict[str, StoredTensor]]()

    def __call__(self, tensors: Iterable[StoredTensor]) -> Iterator[StoredTensor]:
        for tensor in tensors:
            key = self._key.get(tensor.name)
            if key is None:
                yield tensor
                continue
            found = self._waiting.setdefault(key, {})
            found[tensor.name] = tensor
            if len(found) == len(self._parts[key]):
                yield from _join(key, [found[name] for name in self._parts[key]])
                del self._waiting[key]


def _join(key: str, parts: list[StoredTensor]) -> Iterator[StoredTensor]:
    first = parts[0]
    if any((part.dtype, part.shape[1:]) != (first.dtype, first.shape[1:]) for part in parts):
        yield from parts
        return
    data = np.concatenate([np.ascontiguousarray(part.data).reshape(-1).view(np.uint8) for part in parts])
    yield StoredTensor(key, first.dtype, (sum(part.shape[0] for part in parts), *first.shape[1:]), data)


def _has_parts(module: ModuleEntry, record: ConversionRecord) -> bool:
    patterns = record.experts.get(module.path, [])
    whole = bool(patterns) and module.rows % len(patterns) == 0 and len(set(patterns)) == len(patterns)
    return whole and module.kind == "experts" and {p.count("*") for p in patterns} in ({0}, {1})


def _decoded(
    reader: ModelReader, module: ModuleEntry, dtype: str, bits: int | None, patterns: list[str]
) -> Iterator[StoredTensor]:
    """The model's parameter (CFG-5), decoded and rounded once; of experts with `patterns`, the tensors of each."""
    for spec in reader.specs(module.path):
        reader.check_digest(spec.name)
    if module.experts is None:
        weight = reader.decode(module.path, bits)
        yield _rounded(module.weight, weight.T if module.kind == "conv1d" else weight, dtype)
        return
    stacks: dict[str, NDArray[Any]] = {}
    for expert in range(module.experts):
        weight = decode(reader.matrix(module.path, expert, only=bits))
        weight = weight.T if module.kind == "experts_transposed" else weight
        parts = np.split(weight, len(patterns)) if patterns else [weight]
        for pattern, part in zip(patterns or [module.weight], parts, strict=True):
            one = _rounded(expert_name(pattern, expert), part, dtype)
            if "*" in pattern:  # a tensor of its own
                yield one
                continue
            if pattern not in stacks:
                stacks[pattern] = np.empty((module.experts, *one.shape), one.data.dtype)
            stacks[pattern][expert] = one.data
    for name, whole in stacks.items():
        yield StoredTensor(name, BY_NAME[dtype], whole.shape, whole)


def _rounded(name: str, weight: NDArray[np.float32], dtype: str) -> StoredTensor:
    data = from_float32(np.ascontiguousarray(weight), BY_NAME[dtype])
    if dtype == "float16" and not np.isfinite(data).all():
        raise OutputError(f"{name}: has values that float16 cannot hold; use --dtype bfloat16 or float32")
    return StoredTensor(name, BY_NAME[dtype], data.shape, data)


def _finish(reader: ModelReader, work: Path, shards: list[list[str]], total: int, dtype: str) -> None:
    """Name the shards, copy side files, write the index and the config without ``quantization_config``."""
    named = {}
    for i, names in enumerate(shards):
        name = shard_name(i + 1, len(shards))
        (work / f"part-{i}.safetensors").replace(work / name)
        named[name] = names
    if len(shards) > 1:
        write_index(work, named, total)
    for path in sorted(reader.directory.rglob("*")):
        relative = path.relative_to(reader.directory)
        if path.is_file() and not _is_own(relative, reader) and not any(p.startswith(".") for p in relative.parts):
            (work / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, work / relative)
    config: dict[str, Any] = {k: v for k, v in reader.model_config.items() if k not in ("quantization_config", KEY)}
    config.pop("torch_dtype", None)
    write_json(work / CONFIG_FILE, json.loads(json.dumps({**config, "dtype": dtype})))


def _is_own(relative: Path, reader: ModelReader) -> bool:
    """Whether a file (weights, index, config, card, report) describes the lowbit model and not the result."""
    return str(relative) in {CONFIG_FILE, INDEX_FILE, REPORT_FILE, "README.md", *reader.headers}
