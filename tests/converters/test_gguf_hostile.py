"""GGUF files that are cut off, lie or are damaged: a named error, no large allocation, and nothing half-written."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.conversions import assert_nothing_looks_finished

pytest.importorskip("gguf")

from support.gguf_files import VOCABULARY, of_config, write_gguf

from lowbit_format.converters import convert_hf_to_lowbit
from lowbit_format.converters.gguf.checkpoint import block_sizes
from lowbit_format.converters.gguf.container import GgufFile, read_gguf
from lowbit_format.errors import QuantizedSourceError, SourceError

TYPES = block_sizes()
HUGE = 1 << 62
Parts = dict[str, Any]


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def info(name: str | bytes = "a", dims: tuple[int, ...] = (64, 2), kind: int = 2, offset: int = 0) -> bytes:
    """A tensor of the table; by default Q4_0, two rows of 64 columns, 72 bytes."""
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def file_of(
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    keys: tuple[bytes, ...] = (key("general.architecture", 8, text("llama")),),
    infos: tuple[bytes, ...] = (info(),),
    counts: tuple[int, int] | None = None,
    data: bytes = bytes(72),
) -> bytes:
    tensors, values = counts or (len(infos), len(keys))
    head = magic + struct.pack("<IQQ", version, tensors, values) + b"".join(keys) + b"".join(infos)
    return head + bytes(-len(head) % 32) + data


def read(tmp_path: Path, content: bytes) -> GgufFile:
    """Read a file; it must not take memory by what it says."""
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        return read_gguf(path, TYPES)
    finally:
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert most < 4 << 20


def test_a_good_one(tmp_path: Path) -> None:
    found = read(tmp_path, file_of())
    assert found.metadata == {"general.architecture": "llama"}
    (one,) = found.tensors.values()
    assert (one.shape, one.nbytes, one.begin % 32) == ((2, 64), 72, 0)


WRONG: dict[str, tuple[Parts, str]] = {
    "magic": ({"magic": b"GGML"}, "does not begin with GGUF"),
    "version 1": ({"version": 1}, "has version 1, expected"),
    "big-endian": ({"version": 3 << 24}, "is big-endian"),
    "tensors": ({"counts": (HUGE, 1)}, f"says that it has {HUGE} tensors"),
    "keys": ({"counts": (1, HUGE)}, f"says that it has {HUGE} keys"),
    "one tensor more": ({"counts": (2, 1)}, "ends inside of|expected 1 to"),
    "key twice": ({"keys": (key("k", 4, b"abcd"), key("k", 4, b"abcd"))}, "has the key 'k' twice"),
    "key UTF-8": ({"keys": (key(b"\xff\xfe", 4, b"abcd"),)}, "a key of the metadata is not UTF-8"),
    "key of control": ({"keys": (key("a\nb", 4, b"abcd"),)}, "a key of the metadata is 'a"),
    "key too long": ({"keys": (struct.pack("<Q", HUGE) + b"k" * 99,)}, f"a key of the metadata: {HUGE} bytes"),
    "value's type": ({"keys": (key("k", 99, b"abcd"),)}, "k: has a value of type 99"),
    "string": ({"keys": (key("k", 8, struct.pack("<Q", HUGE)),)}, f"ends inside of k: {HUGE} bytes"),
    "array of arrays": ({"keys": (key("k", 9, struct.pack("<IQ", 9, 1)),)}, "k: is an array of type 9"),
    "array": ({"keys": (key("k", 9, struct.pack("<IQ", 4, HUGE)),)}, f"k: says that it has {HUGE} values"),
    "strings": ({"keys": (key("k", 9, struct.pack("<IQ", 8, HUGE)),)}, f"k: says that it has {HUGE} strings"),
    "alignment": ({"keys": (key("general.alignment", 4, struct.pack("<I", 24)),)}, "general.alignment 24"),
    "alignment 0": ({"keys": (key("general.alignment", 4, struct.pack("<I", 0)),)}, "general.alignment 0"),
    "name UTF-8": ({"infos": (info(b"\xc3"),)}, "a tensor's name is not UTF-8"),
    "name empty": ({"infos": (info(""),)}, "a tensor's name is ''"),
    "name twice": ({"infos": (info(), info(offset=96)), "data": bytes(168)}, "has the tensor 'a' twice"),
    "no dimensions": ({"infos": (info(dims=()),)}, "a: has 0 dimensions"),
    "nine dimensions": ({"infos": (info(dims=(1,) * 9),)}, "a: has 9 dimensions"),
    "zero": ({"infos": (info(dims=(64, 0)),)}, r"a: has the shape \[0, 64\]"),
    "many rows": ({"infos": (info(dims=(64, HUGE)),)}, "a: has the shape"),
    "large": ({"infos": (info(dims=(64, 1 << 30, 1 << 30, 1 << 30)),)}, "a: Q4_0 of shape"),
    "columns": ({"infos": (info(dims=(48, 2)),)}, "a: has rows of 48 weights, expected a multiple of 32 for Q4_0"),
    "type": ({"infos": (info(kind=4000),)}, "a: has the type 4000, which is unknown"),
    "offset": ({"infos": (info(offset=HUGE),)}, "which a file of"),
    "alignment of data": ({"infos": (info(offset=8),), "data": bytes(99)}, "aligned to 32"),
    "behind the end": ({"data": bytes(71)}, "which a file of"),
    "inside of another": ({"infos": (info(), info("b", offset=64)), "data": bytes(160)}, "b: begins inside of a"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_named(what: str, tmp_path: Path) -> None:
    parts, message = WRONG[what]
    with pytest.raises(SourceError, match=message):
        read(tmp_path, file_of(**parts))


def test_cut_off_anywhere(tmp_path: Path) -> None:
    """At every byte of header, metadata and table, and in the data."""
    content = file_of()
    for end in range(len(content)):
        with pytest.raises(SourceError):
            read(tmp_path, content[:end])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_is_a_named_error_or_none(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(file_of(infos=(info(), info("b", (32,), 0, 96)), data=bytes(300)))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 150))] = data.draw(st.integers(0, 255))
    try:
        found = read(tmp_path, bytes(content))
    except SourceError:
        return
    assert all(t.begin + t.nbytes <= len(content) for t in found.tensors.values())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model: Q4_K, and F32 norms."""
    config = hf.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        tie_word_embeddings=True,
    )  # fmt: skip
    file = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(file, *of_config(config), lambda name, shape: "Q4_K")
    return file


@pytest.mark.parametrize("bad", [0x7E00, 0x7C00], ids=["nan", "infinity"])
def test_scales_that_are_not_finite(bad: int, model: Path, tmp_path: Path) -> None:
    """They are found when the data are read, and nothing is left behind that looks finished."""
    place = read_gguf(model, TYPES).tensors["blk.0.ffn_up.weight"]
    content = bytearray(model.read_bytes())
    content[place.begin : place.begin + 2] = struct.pack("<H", bad)
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(QuantizedSourceError, match=r"blk\.0\.ffn_up\.weight: holds 8 NaN or infinite scales"):
        convert_hf_to_lowbit(str(file), tmp_path / "out")
    assert_nothing_looks_finished(tmp_path / "out")


def test_metadata_that_transformers_cannot_read(model: Path, tmp_path: Path) -> None:
    content = model.read_bytes().replace(b"llama.embedding_length", b"llama.embedding_lengtX")
    content = content.replace(b"llama.attention.head_count\x04", b"llama.attention.head_counX\x04")
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(SourceError):
        convert_hf_to_lowbit(str(file), tmp_path / "out")
    assert_nothing_looks_finished(tmp_path / "out")


def test_a_file_that_shrinks_while_it_is_read(model: Path, tmp_path: Path) -> None:
    from lowbit_format.converters.huggingface import open_checkpoint

    file = tmp_path / "model.gguf"
    content = model.read_bytes()
    file.write_bytes(content)
    source = open_checkpoint(str(file))
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(SourceError, match="ends inside tensor"):
        source.read(list(source.tensors)[-1])


@pytest.mark.parametrize("kind", [0, 6, 8])
def test_arrays_in_the_holes_of_a_file(kind: int, tmp_path: Path) -> None:
    """A file takes no room on the disk for bytes that are zero, so its size is no bound for what it may ask for."""
    count = 1 << 27
    path = tmp_path / "x.gguf"
    path.write_bytes(file_of(keys=(key("k", 9, struct.pack("<IQ", kind, count)),), infos=(), data=b""))
    with open(path, "r+b") as f:
        f.truncate(8 * count + 4096)
    tracemalloc.start()
    try:
        with pytest.raises(SourceError, match=f"k: has {count} (strings|values), expected at most 1048576"):
            read_gguf(path, TYPES)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_many_arrays_in_the_holes_of_a_file(tmp_path: Path) -> None:
    array = struct.pack("<IQ", 0, 1 << 20) + bytes(1 << 20)
    content = file_of(keys=tuple(key(f"k{n}", 9, array) for n in range(5)), infos=(), data=b"")
    with pytest.raises(SourceError, match="k4: has 1048576 values, expected at most 1048576, and 4194304 in all"):
        read(tmp_path, content)


def test_a_string_in_the_hole_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(file_of(keys=(key("k", 8, struct.pack("<Q", 1 << 30)),), infos=(), data=b""))
    with open(path, "r+b") as f:
        f.truncate(2 << 30)
    with pytest.raises(SourceError, match=f"k has {1 << 30} bytes, expected at most"):
        read_gguf(path, TYPES)
