"""One precision of a model in a directory of its own: it decodes to what the whole model does at that precision."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.config_files import edit_config
from support.directories import Matrices, random_matrices, tensors_of, write_directory
from support.hub_server import HubServer, running_hub
from typer.testing import CliRunner

import lowbit_format as lb
from lowbit_format import partial_download, remote
from lowbit_format.cli.main import app
from lowbit_format.container.header import build_header, read_header
from lowbit_format.container.reader import INDEX_FILE, ModelReader
from lowbit_format.container.writer import StoredTensor
from lowbit_format.errors import DigestError, FormatError, HubError, PrecisionError
from lowbit_format.partial_download import FACTS
from lowbit_format.precision import copy_precision, pieces, write_precision
from lowbit_format.schema import ModuleEntry, QuantizationConfig, Scheme
from lowbit_format.testing.strategies import modules
from lowbit_format.testing.vectors import assert_same_bits

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")
REPO = "owner/model"
NESTED = [
    ModuleEntry("model.fc", Scheme("bcq", 4, 16, "F16", True, nested=(1, 2)), "linear", (33, 130)),
    ModuleEntry("model.up", Scheme("uniform", 3, 0, "BF16", nested=(2,)), "conv1d", (20, 70)),
    ModuleEntry("model.lut", Scheme("codebook", 2, 5, "F32"), "embedding", (4, 9)),
    ModuleEntry("model.mixed", Scheme("bcq", 4, 0, "F16", row_bits=True, nested=(2,)), "linear", (50, 60)),
    ModuleEntry("model.low", Scheme("bcq", 2, 0, "F16", nested=(1,)), "linear", (5, 6)),
    ModuleEntry("model.experts.w", Scheme("uniform", 4, 4, "F16", nested=(2, 3)), "experts", (3, 30, 64)),
    ModuleEntry("head", Scheme("bcq", 1, 0, "F32"), "linear", (2, 3)),
]


def write_model(directory: Path, entries: list[ModuleEntry] = NESTED, shards: int = 1) -> Matrices:
    config = QuantizationConfig({m.path: m for m in entries}, {"tied": entries[0].path}, "model")
    matrices = random_matrices(entries)
    norm = StoredTensor("model.norm.weight", "F32", (3,), np.arange(3, dtype="<f4"))
    write_directory(directory, config, [*tensors_of(entries, matrices), [norm]], shards)
    return matrices


@pytest.fixture(params=[1, 3])
def whole(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    write_model(tmp_path / "whole", shards=request.param)
    beside = [
        "tokenizer.json",
        "2_Dense/model.safetensors",
        "training.pt",
        "consolidated.safetensors",
        ".hidden/a.json",
    ]
    for name in beside:
        (tmp_path / "whole" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "whole" / name).write_text("{}")
    return tmp_path / "whole"


@pytest.fixture
def hub(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr(remote, "FIRST", 64)
    monkeypatch.setattr(remote, "GAP", 0)
    with running_hub(tmp_path / "server", monkeypatch) as hub:
        hub.create(REPO)
        hub.commit(REPO, {p.relative_to(whole).as_posix(): p.read_bytes() for p in whole.rglob("*") if p.is_file()})
        hub.sent = 0
        yield hub


def files_beside(directory: Path) -> list[str]:
    own = {"config.json", INDEX_FILE, *ModelReader(directory).headers}
    return sorted({p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()} - own)


def assert_is_precision(directory: Path, whole: Path, bits: int) -> None:
    """A model of its own (verified, every digest there) that decodes to the same bits as the whole one at `bits`."""
    reader, before = ModelReader(directory), ModelReader(whole)
    assert reader.verify() == 0
    assert reader.config.tied == before.config.tied
    for module in before.config:
        assert reader.module(module.path).scheme == replace(
            module.scheme, bits=min(bits, module.scheme.bits), nested=()
        )
        assert_same_bits(reader.decode(module.path), before.decode(module.path, bits))
    plain = set(before.names()) - before.lowbit_names()
    assert plain == set(reader.names()) - reader.lowbit_names()
    for name in plain:
        assert np.array_equal(reader.raw(name), before.raw(name))


def test_of_files_here(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    verified = write_precision(ModelReader(whole), 2, tmp_path / "out")
    assert_is_precision(tmp_path / "out", whole, 2)
    kept = [p for some in pieces(ModelReader(whole), 2).values() for p in some]
    assert (verified.tensors, verified.agreed) == (len(kept), sum(p.is_whole for p in kept))
    cut = {p.source for p in kept if not p.is_whole}
    assert cut == {
        "model.fc.planes", "model.up.planes", "model.mixed.planes", "model.mixed.row_bits", "model.experts.w_planes"
    }  # fmt: skip


@given(st.lists(modules(), min_size=1, max_size=3, unique_by=lambda m: m.path), st.integers(1, 8), st.integers(1, 2))
def test_of_any_model(
    tmp_path_factory: pytest.TempPathFactory, some: list[ModuleEntry], bits: int, shards: int
) -> None:
    """NST-1 to NST-4, MIX-2, BIT-4, EXP-2: it is refused just where the whole model refuses the precision."""
    directory = tmp_path_factory.mktemp("any")
    entries = [replace(m, path=f"model.m{i}.{m.path}") for i, m in enumerate(some)]
    write_model(directory / "whole", entries, shards)
    reader = ModelReader(directory / "whole")
    (directory / "out").mkdir()
    try:
        reader.check_precision(bits)
    except PrecisionError:
        with pytest.raises(PrecisionError):
            write_precision(reader, bits, directory / "out")
        assert not list((directory / "out").iterdir())
    else:
        write_precision(reader, bits, directory / "out")
        assert_is_precision(directory / "out", directory / "whole", bits)


def test_from_the_hub_just_the_bytes_of_the_precision(hub: HubServer, whole: Path, tmp_path: Path) -> None:
    found = lb.fetch_precision(REPO, 2)
    assert_is_precision(found.directory, whole, 2)
    assert files_beside(found.directory) == ["2_Dense/model.safetensors", "tokenizer.json"]
    reader = ModelReader(whole)
    needed = sum(p.nbytes for some in pieces(reader, 2).values() for p in some)
    headers = sum(min(t.begin for t in h.tensors.values()) for h in reader.headers.values())
    row_bits = reader.info("model.mixed.row_bits").nbytes
    assert needed + headers <= found.nbytes <= needed + headers + row_bits
    assert found.total == sum((whole / file).stat().st_size for file in reader.headers)
    assert found.nbytes < 0.7 * found.total
    beside = 10 + sum(p.stat().st_size for p in whole.iterdir() if p.suffix == ".json")
    assert found.nbytes <= hub.sent <= found.nbytes + beside
    assert not list((tmp_path / "server" / "cache").glob("**/snapshots/*/*.safetensors"))
    assert found.origin is not None
    assert found.origin.identity.fingerprint() == reader.fingerprint()
    assert found.origin.bits == 2
    # Once more: from the cache, and nothing is asked for but the commit.
    asked = len(hub.log)
    again = lb.fetch_precision(REPO, 2)
    assert again == replace(found, nbytes=0, requests=0)
    assert [r.path for r in hub.log[asked:]] == [f"/api/models/{REPO}"]
    assert lb.fetch_precision(REPO, 2, force_download=True) == found


def test_gaps_that_cost_less_than_a_request_are_fetched_along(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    apart = lb.fetch_precision(REPO, 2)
    monkeypatch.setattr(remote, "GAP", 1 << 17)
    together = lb.fetch_precision(REPO, 2, force_download=True)
    assert together.requests < apart.requests
    assert apart.nbytes < together.nbytes <= together.total + 100


def test_a_commit_is_a_directory_of_its_own(hub: HubServer, whole: Path) -> None:
    first = lb.fetch_precision(REPO, 2)
    hub.commit(REPO, {"notes.txt": b"new"})
    second = lb.fetch_precision(REPO, 2)
    assert first.commit != second.commit
    assert first.directory != second.directory
    assert lb.fetch_precision(REPO, 2, revision=first.commit) == replace(first, nbytes=0, requests=0)


FAULTS: dict[str, list[dict[str, Any]]] = {
    "cut": [{"cut": 40}, {"cut": 0}, {"cut": 1}],
    "busy": [{"status": 429, "headers": {"Retry-After": "1"}}, {"status": 500}],
}


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)
def test_faults_on_the_way_change_nothing(hub: HubServer, whole: Path, faults: list[dict[str, Any]]) -> None:
    for fault in faults:
        hub.fail("GET", r"\.safetensors$", **fault)
    assert_is_precision(lb.fetch_precision(REPO, 2).directory, whole, 2)
    assert not any(fault.times for fault in hub.faults)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"status": 500, "times": 99}, "trouble of its own.*Nothing was loaded"),
        ({"whole": True, "times": 99}, "sends whole files"),
        ({"headers": {"X-Linked-Etag": '"x"'}}, "has changed"),
    ],
)
def test_what_cannot_be_had_leaves_nothing(hub: HubServer, tmp_path: Path, fault: dict[str, Any], message: str) -> None:
    hub.fail("GET", r"\.safetensors$", **fault)
    with pytest.raises(HubError, match=message):
        lb.fetch_precision(REPO, 2)
    assert not list((tmp_path / "server" / "cache").glob("models--*/**/*-bits*"))


def test_damaged_bytes_are_found_where_a_digest_covers_them(hub: HubServer, whole: Path, tmp_path: Path) -> None:
    reader = ModelReader(whole)
    name = "model.fc.scales_k2"
    file, info = reader.file_of(name), reader.info(name)
    data = bytearray((whole / file).read_bytes())
    data[info.begin] ^= 1
    hub.commit(REPO, {file: bytes(data)})
    with pytest.raises(DigestError, match="DIG-3"):
        lb.fetch_precision(REPO, 2)
    assert not list((tmp_path / "server" / "cache").glob("models--*/**/*-bits*"))


@pytest.mark.parametrize("bits", [1, 3, 5, 0])
def test_a_precision_that_it_does_not_have(hub: HubServer, tmp_path: Path, bits: int) -> None:
    with pytest.raises(PrecisionError, match="NST-3"):
        lb.fetch_precision(REPO, bits)
    assert not list((tmp_path / "server" / "cache").glob("models--*/**/*-bits*"))


@pytest.mark.parametrize(
    "change",
    [
        {"config.json": b"{}"},
        {"config.json": None},
        {INDEX_FILE: b'{"weight_map": {"a": "../model.safetensors"}}', "model.safetensors": None},
    ],
)
def test_what_is_no_lowbit_model(hub: HubServer, change: dict[str, bytes | None]) -> None:
    hub.commit(REPO, change)
    with pytest.raises(FormatError):
        lb.fetch_precision(REPO, 2)


def test_files_without_digests_give_no_identity(hub: HubServer, whole: Path, caplog: pytest.LogCaptureFixture) -> None:
    """So that no task can be taken to fit."""
    for file in whole.glob("model*.safetensors"):
        header = read_header(file)
        data = file.read_bytes()[min(t.begin for t in header.tensors.values()) :]
        tensors = [(t.name, t.dtype, t.shape) for t in header.tensors.values()]
        hub.commit(REPO, {file.name: build_header(tensors, {"format": "pt"}) + data})
    found = lb.fetch_precision(REPO, 2)
    assert_is_precision(found.directory, whole, 2)
    assert found.verified.agreed == 0
    assert found.origin is None
    assert "have no digests" in caplog.text
    assert lb.fetch_precision(REPO, 2).origin is None


def test_what_is_damaged_in_the_cache_is_fetched_again(hub: HubServer, whole: Path) -> None:
    found = lb.fetch_precision(REPO, 2)
    (found.directory.parent / FACTS).write_text("{")
    assert lb.fetch_precision(REPO, 2) == found
    assert_is_precision(found.directory, whole, 2)


@pytest.mark.parametrize("place", ["here", "there"])
def test_the_command(hub: HubServer, whole: Path, tmp_path: Path, place: str) -> None:
    runner, out = CliRunner(env={"COLUMNS": "200"}), tmp_path / "out"
    command = ["cut", REPO if place == "there" else str(whole), str(out), "--bits"]
    refused = runner.invoke(app, [*command, "3"])
    assert refused.exit_code == 2, refused.output
    assert not out.exists()
    done = runner.invoke(app, [*command, "2"])
    assert done.exit_code == 0, done.output
    assert ("; fetched 0.0 MB in" in done.output) == (place == "there")
    assert_is_precision(out, whole, 2)
    assert files_beside(out) == ["2_Dense/model.safetensors", "tokenizer.json"]


def test_two_that_fetch_at_once_do_not_disturb_each_other(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have seen that nothing is there; the second waits for the first, and takes what that has fetched."""
    opened, open_remote = threading.Barrier(2), partial_download.open_remote

    def open_together(*args: Any, **options: Any) -> Any:
        reader = open_remote(*args, **options)
        opened.wait(30)
        return reader

    monkeypatch.setattr(partial_download, "open_remote", open_together)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: lb.fetch_precision(REPO, 2), range(2))
    assert first.directory == second.directory
    assert 0 in (first.nbytes, second.nbytes)
    assert ModelReader(first.directory).verify() == 0


def test_what_is_there_stays_until_it_is_replaced(hub: HubServer) -> None:
    found = lb.fetch_precision(REPO, 2)
    hub.fail("GET", "safetensors", status=404, times=99)
    with pytest.raises(HubError):
        lb.fetch_precision(REPO, 2, force_download=True)
    assert ModelReader(found.directory).verify() == 0
    hub.faults.clear()
    shutil.rmtree(found.directory)
    assert ModelReader(lb.fetch_precision(REPO, 2).directory).verify() == 0


def test_without_the_hub_a_branch_is_the_commit_that_it_was(hub: HubServer) -> None:
    found = lb.fetch_precision(REPO, 2)
    part = partial_download.find_part(REPO, 2, local_files_only=True)
    assert part is not None
    assert part.directory == found.directory
    assert partial_download.find_part(REPO, 2, revision="other", local_files_only=True) is None


def test_a_cut_model_says_the_lowest_version(whole: Path, tmp_path: Path) -> None:
    """VER-3."""
    edit_config(whole, lambda config: config["quantization_config"].update(format_version="1.7"))
    write_precision(ModelReader(whole), 2, tmp_path)
    assert ModelReader(tmp_path).config.format_version == "1.0"


def test_its_card_says_what_it_is(whole: Path, tmp_path: Path) -> None:
    (whole / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    copy_precision(ModelReader(whole), 2, tmp_path / "out")
    front, text = (tmp_path / "out" / "README.md").read_text().split("---\n\n")
    assert front == "---\nlicense: mit\n"
    assert text.startswith("> These are the first 2 planes of the model that this card describes")
    assert text.endswith("# A model\n")
