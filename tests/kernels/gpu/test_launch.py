"""How products are launched: the rule that ships, and the file of what was measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.gpu_device import on_device

from lowbit_format.kernels.gpu import launch, tiles
from lowbit_format.kernels.gpu.launch import FAMILIES, WARPS, Config
from lowbit_format.kernels.matrix import PlaneMatrix
from lowbit_format.testing.products import KINDS, drawn

CODECS = ["bcq", "uniform", "codebook"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of measured configurations, which is not there yet."""
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path))
    launch.forget()
    yield tmp_path / "gpu.json"
    monkeypatch.undo()
    launch.forget()


def matrix(bits: int = 4, rows: int = 33) -> PlaneMatrix:
    return on_device(tiles.tile(drawn(KINDS[1], bits, 64, rows, 600)))


def key_of(w: PlaneMatrix) -> str:
    return launch.key(w.planes.device, w.codec, w.bits, w.scales.shape[1], w.cols, w.group_size)


# --- the rule --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("multiprocessors", [1, 20, 132])
def test_every_warp_has_work(family: str, codec: str, multiprocessors: int) -> None:
    """No more warps than macro blocks, but for the least."""
    for rows in (1, 16, 500, 4096, 20000, 150000):
        for macros in (1, 2, 3, 4, 7, 8, 100):
            found = launch.predicted(FAMILIES[family], multiprocessors, rows, macros, codec, 4)
            assert found.warps in WARPS
            assert found.warps <= max(macros, min(WARPS))


def test_few_rows_take_all_warps_and_many_as_well() -> None:
    """In between, as many as find room at once."""
    family = launch.Family(warps=24, row_planes=280)
    found = [launch.predicted(family, 10, 16 * tiles, 8, "bcq", 2).warps for tiles in (1, 30, 31, 60, 61, 120, 240)]
    assert found == [8, 8, 4, 4, 2, 8, 8]  # 240 warps have room; four rounds of them are as good


@pytest.mark.parametrize("family", [name for name in FAMILIES if FAMILIES[name].row_planes])
@pytest.mark.parametrize("codec", CODECS)
def test_more_bits_leave_fewer_rows_to_planes(family: str, codec: str) -> None:
    most = [launch.predicted(FAMILIES[family], 132, 4096, 16, codec, bits).most_rows for bits in range(1, 9)]
    assert most == sorted(most, reverse=True)
    assert most[0] > most[3]
    assert min(most) >= 16
    assert all(n % 16 == 0 for n in most)


def test_what_triton_does_not_compile_is_decoded() -> None:
    assert {launch.predicted(FAMILIES["turing"], 40, 4096, 16, "bcq", bits).most_rows for bits in range(1, 9)} == {0}


def test_a_codebook_takes_longer_than_planes() -> None:
    for bits in (2, 3, 4):
        planes, codebook = (
            launch.predicted(FAMILIES["hopper"], 132, 4096, 16, codec, bits).most_rows for codec in ("bcq", "codebook")
        )
        assert codebook < planes


def test_what_is_chosen_is_predicted() -> None:
    w = matrix()
    device = w.planes.device
    family, multiprocessors = launch.family(device), launch.multiprocessors(device)
    assert family in FAMILIES.values()
    assert multiprocessors > 0
    want = launch.predicted(family, multiprocessors, 33, w.planes.shape[1], "bcq", 4)
    assert launch.choose(w) == want
    assert isinstance(launch.choose(w), Config)


# --- the file --------------------------------------------------------------------------------------


def test_where_the_file_is(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.cache_file() == cache
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    for unset in (lambda: monkeypatch.setenv("LOWBIT_CACHE", ""), lambda: monkeypatch.delenv("LOWBIT_CACHE")):
        unset()
        assert launch.cache_file() == tmp_path / "home" / ".cache" / "lowbit_format" / "gpu.json"


def test_measured_configurations_are_used(cache: Path) -> None:
    """For the matrices that they were measured for, and no others."""
    w, others = matrix(), (matrix(bits=3), matrix(rows=32))
    before = [launch.choose(o) for o in others]
    for warps in WARPS:
        cache.write_text(json.dumps({key_of(w): [warps, 48], "another GPU bcq 3 33x600": [2, 0]}))
        launch.forget()
        assert launch.choose(w) == Config(warps, 48)
        assert [launch.choose(o) for o in others] == before


def test_keys_tell_matrices_apart() -> None:
    device = torch.device("cpu")
    keys = {
        launch.key(device, codec, bits, rows, cols, group_size)
        for codec in CODECS
        for bits in (1, 11)
        for rows, cols in ((1, 11), (11, 1), (111, 1), (1, 111))
        for group_size in (0, 32)
    }
    assert len(keys) == 48


def test_the_file_is_read_once_until_told_to_forget(cache: Path) -> None:
    w = matrix()
    predicted = launch.choose(w)
    cache.write_text(json.dumps({key_of(w): [2, 7]}))
    assert launch.choose(w) == predicted
    launch.forget()
    assert launch.choose(w) == Config(2, 7)
    cache.unlink()
    assert launch.choose(w) == Config(2, 7)
    launch.forget()
    assert launch.choose(w) == predicted


DAMAGED = {
    "empty": "",
    "cut off": '{"KEY": [2, 1',
    "not an object": "[2, 16]",
    "a number": "3",
    "null": "null",
    "a number for a configuration": '{"KEY": 3}',
    "nothing for a configuration": '{"KEY": null}',
    "too short": '{"KEY": [2]}',
    "too long": '{"KEY": [2, 16, 1]}',
    "an object for a configuration": '{"KEY": {"warps": 2, "most_rows": 16}}',
    "warps that cannot be": '{"KEY": [3, 16]}',
    "warps that are no integer": '{"KEY": [8.0, 16]}',
    "warps in a list": '{"KEY": [[2], 16]}',
    "rows below none": '{"KEY": [2, -1]}',
    "rows that are no integer": '{"KEY": [2, 16.5]}',
    "rows that are no number": '{"KEY": [2, "16"]}',
    "rows that are a truth": '{"KEY": [2, true]}',
    "brackets": "[" * 100_000,
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_file_is_as_if_it_were_not_there(what: str, cache: Path) -> None:
    w = matrix()
    predicted = launch.choose(w)
    assert predicted != Config(2, 16)
    cache.write_text(DAMAGED[what].replace("KEY", key_of(w)))
    launch.forget()
    assert launch.measured() == {}
    assert launch.choose(w) == predicted


def test_a_file_that_is_no_text(cache: Path) -> None:
    cache.write_bytes(b"\xff\xfe\x00\x80")
    assert launch.measured() == {}
    cache.unlink()
    cache.mkdir()
    launch.forget()
    assert launch.measured() == {}
