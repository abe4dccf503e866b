"""Writing and reading directories: round trips, determinism, and nothing half-written under a final name."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from support.directories import (
    random_matrices,
    sample_model,
    sample_modules,
    tensors_of,
    tiny_model,
    weights,
    write_directory,
)

from lowbit_format.container import writer as writing
from lowbit_format.container.atomic import atomic_directory, atomic_file
from lowbit_format.container.header import build_header, read_header
from lowbit_format.container.reader import INDEX_FILE, ModelReader
from lowbit_format.container.writer import ShardWriter, StoredTensor, file_metadata, seal, shard_name, write_safetensors
from lowbit_format.dtypes import DTYPES, from_float32, round_to, to_float32
from lowbit_format.errors import ConfigError, DirectoryError, OutputError, PrecisionError, TensorError
from lowbit_format.reference import decode_numpy
from lowbit_format.schema import ModuleEntry, QuantizationConfig
from lowbit_format.tensors import tensor_specs
from lowbit_format.testing.strategies import modules
from lowbit_format.testing.vectors import assert_same_bits

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")


def names_in(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


# --- round trips -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 2, 7])
def test_round_trip(tmp_path: Path, shards: int) -> None:
    config, matrices = sample_model(tmp_path, shards)
    reader = ModelReader(tmp_path)
    assert reader.config == config
    assert len(reader.headers) == shards
    assert reader.verify() == 0  # every tensor has a digest
    for module in config:
        for bits in (None, *module.scheme.nested):
            expected = np.stack([decode_numpy(m, bits) for m in matrices[module.path]])
            assert_same_bits(reader.decode(module.path, bits), expected if module.experts else expected[0])
    assert_same_bits(reader.decode("tied"), reader.decode("model.lut"))  # TIE-1


@settings(max_examples=40, deadline=None)
@given(module=modules(), seed=st.integers(0, 99))
def test_any_module_round_trips(tmp_path_factory: pytest.TempPathFactory, module: ModuleEntry, seed: int) -> None:
    directory = tmp_path_factory.getbasetemp() / "any-module"
    shutil.rmtree(directory, ignore_errors=True)
    matrices = random_matrices([module], seed)
    write_directory(directory, QuantizationConfig({module.path: module}), tensors_of([module], matrices))
    reader = ModelReader(directory)
    assert reader.verify() == 0
    assert {n: reader.info(n).dtype for n in reader.names()} == {s.name: s.dtype for s in tensor_specs(module)}
    for bits in (None, *module.scheme.nested):
        expected = np.stack([decode_numpy(m, bits) for m in matrices[module.path]])
        assert_same_bits(reader.decode(module.path, bits), expected if module.experts else expected[0])


def test_the_fingerprint_does_not_depend_on_shards(tmp_path: Path) -> None:
    """Section 12: of the content, however it is sharded and headed."""
    for shards in (1, 3):
        sample_model(tmp_path / str(shards), shards)
    one, three = (ModelReader(tmp_path / n).fingerprint() for n in ("1", "3"))
    assert one == three
    assert len(one.body) == len(one.head) == 64
    assert one.body != one.head


def test_safetensors_reads_what_we_write_and_we_what_it_writes(tmp_path: Path) -> None:
    tiny_model(tmp_path)
    theirs = load_file(weights(tmp_path))
    reader = ModelReader(tmp_path)
    assert set(theirs) == set(reader.names())
    for name, values in theirs.items():
        assert values.tobytes() == reader.raw(name).tobytes()
    save_file({"x": np.arange(5, dtype=np.int16)}, tmp_path / "theirs.safetensors", {"a": "b"})
    header = read_header(tmp_path / "theirs.safetensors")
    assert header.metadata == {"a": "b"}
    assert (header.tensors["x"].dtype, header.tensors["x"].shape) == ("I16", (5,))


def test_planes_are_views_of_the_file(tmp_path: Path) -> None:
    tiny_model(tmp_path)
    planes = ModelReader(tmp_path).matrix("a").planes
    assert not planes.flags.owndata
    assert not planes.flags.writeable


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    sample_model(tmp_path)
    reader = ModelReader(tmp_path)
    with pytest.raises(TensorError, match="no such tensor"):
        reader.raw("absent")
    with pytest.raises(ConfigError, match="no such module"):
        reader.decode("absent")
    with pytest.raises(PrecisionError, match=r"model\.fc|head|model"):
        reader.check_precision(2)
    for path, expert in (("model.fc", 0), ("model.experts.w", None), ("model.experts.w", 2), ("model.experts.w", -1)):
        with pytest.raises(ConfigError, match="EXP-2"):
            reader.matrix(path, expert)


# --- determinism -----------------------------------------------------------------------------------


def test_the_same_bytes_whatever_the_order(tmp_path: Path) -> None:
    found = sample_modules()
    matrices = random_matrices(found)
    for name, order in (("a", found), ("b", found[::-1])):
        config = QuantizationConfig({m.path: m for m in order})
        write_directory(tmp_path / name, config, tensors_of(found, matrices), 2)
    assert names_in(tmp_path / "a") == names_in(tmp_path / "b")
    for file in names_in(tmp_path / "a"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_headers_do_not_depend_on_the_order_of_metadata() -> None:
    tensors = [("x", "F32", (2,))]
    assert build_header(tensors, {"a": "1", "b": "2"}) == build_header(tensors, {"b": "2", "a": "1"})
    assert file_metadata({"x": "0" * 64, "a": "1" * 64}) == file_metadata({"a": "1" * 64, "x": "0" * 64})


# --- headers ---------------------------------------------------------------------------------------

NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=12)


@settings(max_examples=80, deadline=None)
@given(
    st.dictionaries(
        NAMES.filter(lambda n: n != "__metadata__"),
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 3), max_size=5)),
        max_size=5,
    )
)
def test_any_tensors_round_trip(
    tmp_path_factory: pytest.TempPathFactory, specs: dict[str, tuple[str, list[int]]]
) -> None:
    """All names and dtypes that HDR-3 and HDR-4 allow, empty tensors too."""
    rng, path = np.random.default_rng(0), tmp_path_factory.getbasetemp() / "any.safetensors"
    tensors = [
        StoredTensor(
            name, dtype, tuple(shape), rng.integers(0, 256, int(np.prod(shape)) * DTYPES[dtype].nbytes).astype(np.uint8)
        )
        for name, (dtype, shape) in specs.items()
    ]
    digests = write_safetensors(path, tensors)
    header, content = read_header(path), path.read_bytes()
    assert header.digests == digests
    assert {n: (t.dtype, t.shape, content[t.begin : t.end]) for n, t in header.tensors.items()} == {
        t.name: (t.dtype, t.shape, t.data.tobytes()) for t in tensors
    }


def test_long_and_awkward_names(tmp_path: Path) -> None:
    worst = ["\U0001f40d" * 200, '"' * 200, "é" * 200, "\u2028" * 200, "n" * 1024]
    path = tmp_path / "x.safetensors"
    write_safetensors(path, [StoredTensor(n, "F32", (1,) * 5, np.zeros(1, "<f4")) for n in worst])
    assert set(read_header(path).digests) == set(worst)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_float_dtypes(dtype: str) -> None:
    """Exact to float32, and one rounding to nearest even back."""
    if dtype == "F32":
        values = np.array([0.0, -0.0, 1.0, 2.0**-149, 3.4e38], np.float32)
        assert_same_bits(round_to(values, dtype), values)
        return
    words = np.arange(2**16, dtype=np.uint16).view("<f2" if dtype == "F16" else "<u2")
    values = to_float32(words, dtype)
    finite = np.isfinite(values)
    back = from_float32(values, dtype)
    np.testing.assert_array_equal(back.view(np.uint16)[finite], words.view(np.uint16)[finite])
    positive = np.sort(values[finite & (values >= 0) & ~np.signbit(values)]).astype(np.float64)
    middle = ((positive[:-1] + positive[1:]) / 2).astype(np.float32)  # exact: float32 has bits to spare
    word = np.searchsorted(positive, middle) - 1  # of a tie's two neighbours the one with the even word is taken
    assert_same_bits(round_to(middle, dtype), np.where(word % 2 == 0, positive[:-1], positive[1:]).astype(np.float32))


# --- sealing ---------------------------------------------------------------------------------------


def test_seal_adds_digests_and_keeps_data(tmp_path: Path) -> None:
    """DIG-1: after a re-sharding tool dropped or staled them."""
    path = tmp_path / "model.safetensors"
    save_file({"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.arange(3, dtype=np.uint8)}, path, {"k": "v"})
    before = {n: v.tobytes() for n, v in load_file(path).items()}
    seal(path)
    header = read_header(path)
    assert {n: v.tobytes() for n, v in load_file(path).items()} == before
    assert header.digests == {n: hashlib.sha256(v).hexdigest() for n, v in before.items()}
    assert header.metadata["k"] == "v"
    sealed = path.read_bytes()
    seal(path)
    assert path.read_bytes() == sealed
    assert names_in(tmp_path) == ["model.safetensors"]


def test_seal_of_a_file_without_tensors(tmp_path: Path) -> None:
    path = tmp_path / "empty.safetensors"
    write_safetensors(path, [])
    seal(path)
    assert read_header(path).tensors == {}


def test_a_failed_seal_leaves_the_file(tmp_path: Path, full_disk: None) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": np.arange(3, dtype=np.uint8)}, path)
    before = path.read_bytes()
    with pytest.raises(OutputError):
        seal(path)
    assert path.read_bytes() == before
    assert names_in(tmp_path) == ["model.safetensors"]


# --- nothing half-written --------------------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on no file can be synced: the disk is full."""

    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)


def some_tensor(name: str = "x") -> StoredTensor:
    return StoredTensor(name, "F32", (4,), np.arange(4, dtype="<f4"))


def test_a_shard_has_no_name_before_it_is_whole(tmp_path: Path) -> None:
    """DIR-7."""
    path = tmp_path / "model.safetensors"
    writer = ShardWriter(path)
    for name in ("x", "y"):
        writer.add(some_tensor(name))
        assert not path.exists()
    assert not any(p.endswith(".safetensors") for p in names_in(tmp_path))
    assert writer.close() == ["x", "y"]
    assert names_in(tmp_path) == ["model.safetensors"]
    assert set(read_header(path).tensors) == {"x", "y"}


def test_an_aborted_shard_leaves_nothing(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "model.safetensors")
    writer.add(some_tensor())
    writer.abort()
    assert names_in(tmp_path) == []


def test_a_full_disk_leaves_no_file(tmp_path: Path, full_disk: None) -> None:
    with pytest.raises(OutputError, match=r"x\.safetensors: cannot write: No space left"):
        write_safetensors(tmp_path / "x.safetensors", [some_tensor()])
    assert names_in(tmp_path) == []


class _FullFile:
    """A file on a full disk: what is written fails, and so does the flush of closing it."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)

    def write(self, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_while_data_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_full(path: Path, mode: str) -> _FullFile:
        path.touch()
        return _FullFile(path)

    monkeypatch.setattr(writing, "open", open_full, raising=False)
    with pytest.raises(OutputError, match="No space left"):
        write_safetensors(tmp_path / "x.safetensors", [some_tensor()])
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("error", [RuntimeError("mine"), KeyboardInterrupt()])
def test_an_error_inside_an_atomic_file_passes_and_leaves_the_old_one(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "f.json"
    path.write_bytes(b"old")

    def fail() -> None:
        with atomic_file(path) as f:
            f.write(b"new")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == ["f.json"]


def test_an_atomic_file_appears_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    with atomic_file(path) as f:
        f.write(b"new")
        f.flush()
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert names_in(tmp_path) == ["f.json"]


def test_a_directory_that_is_not_there_is_an_output_error(tmp_path: Path) -> None:
    for write in (lambda p: writing.write_json(p, {}), lambda p: write_safetensors(p, [some_tensor()])):
        with pytest.raises(OutputError, match="cannot write"):
            write(tmp_path / "absent" / "file")


def test_an_atomic_directory(tmp_path: Path) -> None:
    out = tmp_path / "model"

    def fill(*, fail: bool) -> None:
        with atomic_directory(out) as work:
            tiny_model(work)
            assert not out.exists()
            if fail:
                raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fill(fail=True)
    assert names_in(tmp_path) == []
    fill(fail=False)
    assert ModelReader(out).verify() == 0
    with pytest.raises(OutputError, match="not empty"):
        fill(fail=False)


# --- shards and their index ------------------------------------------------------------------------


def test_an_index_over_shards(tmp_path: Path) -> None:
    sample_model(tmp_path, 3)
    shards = [shard_name(i, 3) for i in (1, 2, 3)]
    assert names_in(tmp_path) == sorted([*shards, "config.json", INDEX_FILE])
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert list(index["weight_map"]) == sorted(index["weight_map"])
    reader = ModelReader(tmp_path)
    assert index["metadata"]["total_size"] == sum(reader.info(n).nbytes for n in reader.names())
    assert {n: reader.file_of(n) for n in reader.names()} == index["weight_map"]


def test_shard_names() -> None:
    assert shard_name(1, 1) == "model.safetensors"
    assert shard_name(2, 12) == "model-00002-of-00012.safetensors"


def test_every_missing_shard_is_found(tmp_path: Path) -> None:
    """DIR-4."""
    for i in range(1, 4):
        directory = tmp_path / str(i)
        sample_model(directory, 3)
        (directory / shard_name(i, 3)).unlink()
        with pytest.raises(DirectoryError, match=f"{shard_name(i, 3)}, which is missing"):
            ModelReader(directory)


def test_no_moment_of_writing_looks_finished(tmp_path: Path) -> None:
    """DIR-7: with any one of its files missing, a directory is refused."""
    sample_model(tmp_path / "model", 2)
    for file in names_in(tmp_path / "model"):
        copy = tmp_path / f"without-{file}"
        shutil.copytree(tmp_path / "model", copy)
        (copy / file).unlink()
        with pytest.raises(DirectoryError):
            ModelReader(copy)
