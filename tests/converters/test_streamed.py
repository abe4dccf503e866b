"""Conversions of checkpoints on the Hub whose weight files are never here: the same bytes, or a named error."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import with_tokenizer
from support.conversions import assert_nothing_looks_finished, content
from support.hub_server import HubServer, running_hub, serving
from support.quantized_releases import gptq, write_release
from typer.testing import CliRunner

from lowbit_format.calibration.effort import Effort
from lowbit_format.converters import Calibration, Recipe, convert_hf_to_lowbit, streamed
from lowbit_format.converters.command import app
from lowbit_format.converters.driver import work_directory
from lowbit_format.converters.huggingface import open_checkpoint
from lowbit_format.converters.streamed import StreamedSource
from lowbit_format.errors import HubError, SourceError
from lowbit_format.quantize import Target
from lowbit_format.remote import FIRST

REPO = "owner/model"
RECIPE = Recipe(Target(bits=2, group_size=32), lm_head=True)
Checkpoint = Callable[..., Path]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with running_hub(tmp_path / "server", monkeypatch) as hub:
        hub.create(REPO)
        yield hub


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny tensors are fetched as large ones are."""
    monkeypatch.setattr(streamed, "SMALL", 1)


def publish(hub: HubServer, directory: Path) -> Path:
    hub.commit(REPO, {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()})
    hub.sent = 0
    return directory


def weights_here(root: Path) -> list[Path]:
    """Weight files below a directory, whatever they are called."""
    return [p for p in root.rglob("*") if p.is_file() and (p.suffix == ".safetensors" or p.stat().st_size > 100_000)]


def weight_bytes(directory: Path) -> int:
    return sum(p.stat().st_size for p in directory.glob("*.safetensors"))


@pytest.mark.parametrize("name", ["llama-tied", "mixtral"])
@pytest.mark.parametrize("small", [1, 10_000, 1 << 20])
def test_the_same_bytes_as_from_files(
    name: str, small: int, checkpoint: Checkpoint, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From several files too; each byte is fetched about once, and no weight file is ever on the disk."""
    monkeypatch.setattr(streamed, "SMALL", small)
    source = publish(hub, checkpoint(name, shard="150KB"))
    shards, here = len(list(source.glob("*.safetensors"))), list[Path]()
    assert shards > 1
    cache, far, near = tmp_path / "server" / "cache", tmp_path / "far" / "out", tmp_path / "near" / "out"
    with serving(hub) as hub.store:
        done = convert_hf_to_lowbit(
            REPO, far, RECIPE, stream=True, report=lambda step, steps: here.extend(weights_here(cache))
        )
        sent = hub.sent
        assert not here
        assert not weights_here(cache)
        assert done.traffic is not None
        convert_hf_to_lowbit(REPO, near, RECIPE, stream=False)
    assert weights_here(cache)
    assert content(far) == content(near)
    beside = sum(p.stat().st_size for p in source.glob("*.json"))
    assert done.traffic.nbytes <= sent <= done.traffic.nbytes + beside
    samples = 1.5 if name == "mixtral" else 1.3  # the check reads the smallest modules again
    assert weight_bytes(source) <= done.traffic.nbytes <= samples * weight_bytes(source) + shards * FIRST
    if small == 1 << 20:
        assert done.traffic.requests <= 2 * shards
        assert done.traffic.nbytes <= weight_bytes(source) + shards * FIRST  # all of it stayed in memory


def test_a_commit_is_the_same_checkpoint_however_and_wherever_it_is_read(
    checkpoint: Checkpoint, hub: HubServer, tmp_path: Path
) -> None:
    """Machines of a cluster have caches of their own, with times of their own."""
    publish(hub, checkpoint("llama"))
    with serving(hub) as hub.store:
        far, near = (open_checkpoint(REPO, stream=stream) for stream in (True, False))
        assert far.identity == near.identity
        for file in near.directory.glob("*.safetensors"):
            os.utime(file.resolve(), (1, 1))
        assert open_checkpoint(REPO, stream=False).identity == near.identity


def weights_of(found: dict[str, str]) -> dict[str, str]:
    """Without the card, which names the source."""
    return {name: digest for name, digest in found.items() if name not in ("README.md", "config.json")}


def test_small_tensors_come_with_the_large_one_before_them(hub: HubServer, tmp_path: Path) -> None:
    big, small = torch.arange(1 << 20, dtype=torch.int16), torch.arange(100, dtype=torch.int16)
    tensors = {"a": big, "b": small, "c": small + 1, "d": big + 2, "e": small + 3, "f": torch.empty(0)}
    (tmp_path / "source").mkdir()
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    (tmp_path / "source" / "config.json").write_text("{}")
    source = publish(hub, tmp_path / "source")
    opened = open_checkpoint(REPO, stream=True)
    assert isinstance(opened, StreamedSource)
    near = open_checkpoint(str(source))
    assert opened.tensors == near.tensors
    asked = [len(hub.log)]
    for name in near.tensors:
        assert (opened.read(name) == near.read(name)).all()
        asked.append(len(hub.log))
    ordered = [b - a for a, b in itertools.pairwise(asked)]
    assert dict(zip(near.tensors, ordered, strict=True)) == {"a": 1, "b": 0, "c": 0, "d": 1, "e": 0, "f": 0}
    assert opened.traffic.nbytes == FIRST + sum(t.nbytes for t in near.tensors.values())
    assert (opened.read("d", 1000, 50) == near.read("d", 1000, 50)).all()
    assert (opened.read("e", 3, 20) == near.read("e", 3, 20)).all()
    assert (opened.read("a") == near.read("a")).all()  # again, and without what came with it
    assert opened.traffic.requests == 1 + 2 + 2


def test_memory_of_small_tensors_is_bounded(
    checkpoint: Checkpoint, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed, "RUN", 20_000)
    monkeypatch.setattr(streamed, "KEPT", 60_000)
    near = open_checkpoint(str(publish(hub, checkpoint("llama"))))
    opened = open_checkpoint(REPO, stream=True)
    assert isinstance(opened, StreamedSource)
    for name in [*near.tensors, *near.tensors]:
        assert (opened.read(name) == near.read(name)).all()
        assert sum(map(len, opened._kept.values())) <= 60_000


FAULTS: dict[str, list[dict[str, Any]]] = {
    "cut": [{"cut": 3000}, {"cut": 0}],
    "busy": [
        {"status": 429, "headers": {"Retry-After": "0"}},
        {"status": 503},
    ],  # twice in a row is no reason to give up
}


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)
@pytest.mark.usefixtures("one_by_one")
def test_faults_on_the_way_change_nothing(
    faults: list[dict[str, Any]], checkpoint: Checkpoint, hub: HubServer, tmp_path: Path
) -> None:
    source, happened = publish(hub, checkpoint("llama")), []

    def fail(step: object, steps: int) -> None:
        if not any(fault.times for fault in hub.faults):
            happened.extend(hub.faults)
            hub.faults.clear()
            for fault in faults:
                hub.fail("GET", "model.safetensors", **fault)

    fail(None, 0)
    done = convert_hf_to_lowbit(REPO, tmp_path / "far", RECIPE, stream=True, report=fail)
    assert len(happened) > len(done.outcomes)
    convert_hf_to_lowbit(str(source), tmp_path / "near", RECIPE)
    assert content(tmp_path / "far").items() >= weights_of(content(tmp_path / "near")).items()


@pytest.mark.parametrize("again", [True, False], ids=["streamed", "downloaded"])
@pytest.mark.usefixtures("one_by_one")
def test_given_up_it_resumes_to_the_same_bytes(
    again: bool, checkpoint: Checkpoint, hub: HubServer, tmp_path: Path
) -> None:
    """Without a look at times of files, and at the commit that it was begun with, though the branch has moved on."""
    publish(hub, checkpoint("llama"))
    commit, out = hub.head(REPO), tmp_path / "far"
    convert_hf_to_lowbit(REPO, tmp_path / "whole" / "far", RECIPE, stream=True)

    def fail_later(step: object, steps: int) -> None:
        hub.fail("GET", "model.safetensors", status=503, times=99)

    with pytest.raises(HubError, match=r"the Hub has trouble of its own.*--resume"):
        convert_hf_to_lowbit(REPO, out, RECIPE, stream=True, report=fail_later)
    assert_nothing_looks_finished(out)
    assert work_directory(out).is_dir()
    hub.faults.clear()
    hub.commit(REPO, {"model.safetensors": b"something else"})
    with pytest.raises(SourceError):
        convert_hf_to_lowbit(REPO, out, RECIPE, stream=True, resume=True)
    shutil.rmtree(tmp_path / "server" / "cache")
    convert_hf_to_lowbit(REPO, out, RECIPE, revision=commit, stream=again, resume=True)
    assert content(out) == content(tmp_path / "whole" / "far")


@pytest.mark.usefixtures("one_by_one")
def test_a_file_that_changes_in_mid_way(checkpoint: Checkpoint, hub: HubServer, tmp_path: Path) -> None:
    publish(hub, checkpoint("llama"))
    file = hub.place(REPO) / "commits" / hub.head(REPO) / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    seen: list[int] = []

    def change(step: object, steps: int) -> None:
        seen.append(1)
        if len(seen) == 3:
            file.write_bytes(data)

    with pytest.raises(HubError, match="the file has changed: its ETag was"):
        convert_hf_to_lowbit(REPO, tmp_path / "far", RECIPE, stream=True, report=change)
    assert_nothing_looks_finished(tmp_path / "far")


def test_a_release_that_is_quantized_is_streamed_too(hub: HubServer, tmp_path: Path) -> None:
    write_release(tmp_path / "release", *gptq())
    publish(hub, tmp_path / "release")
    convert_hf_to_lowbit(REPO, tmp_path / "far", stream=True)
    convert_hf_to_lowbit(str(tmp_path / "release"), tmp_path / "near")
    assert content(tmp_path / "far").items() >= weights_of(content(tmp_path / "near")).items()


def test_calibrated_with_weights_that_are_fetched(
    own_checkpoint: Checkpoint, hub: HubServer, tmp_path: Path, one_thread: None
) -> None:
    source = publish(hub, with_tokenizer(own_checkpoint("llama")))
    (tmp_path / "text.txt").write_text(" ".join(f"w{i * i % 92}" for i in range(4000)))
    work = Effort(sweeps=1, steps=0, learning_rate=0.0, drift=False, samples=8)
    data = Calibration(str(tmp_path / "text.txt"), work, length=24)
    far = convert_hf_to_lowbit(REPO, tmp_path / "far", RECIPE, calibration=data, stream=True)
    near = convert_hf_to_lowbit(str(source), tmp_path / "near", RECIPE, calibration=data)
    assert content(tmp_path / "far").items() >= weights_of(content(tmp_path / "near")).items()
    assert far.quality == near.quality
    assert far.traffic is not None
    assert not weights_here(tmp_path / "server" / "cache")


# --- when -------------------------------------------------------------------------------------------


def test_what_has_no_room_is_streamed(
    checkpoint: Checkpoint,
    hub: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = publish(hub, checkpoint("llama"))
    need = weight_bytes(source)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10**9, 10**9 - need + 1, need - 1))
    with caplog.at_level(logging.WARNING):
        assert isinstance(open_checkpoint(REPO), StreamedSource)
    assert "has 0.0 GB left: they are streamed" in caplog.text
    assert not isinstance(open_checkpoint(REPO, stream=False), StreamedSource)
    assert not isinstance(open_checkpoint(REPO), StreamedSource)  # they are in the cache now
    shutil.rmtree(tmp_path / "server" / "cache")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10**9, 10**9 - need, need))
    assert not isinstance(open_checkpoint(REPO), StreamedSource)


def test_pickles_are_not_streamed(checkpoint: Checkpoint, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(hub, checkpoint("bert", pickled=True))
    with pytest.raises(SourceError, match=r"pytorch_model.bin only, and a pickle cannot be read in parts"):
        open_checkpoint(REPO, stream=True)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(1, 1, 0))
    assert open_checkpoint(REPO).files[0] == "pytorch_model.bin"


def test_a_directory_is_not_streamed(checkpoint: Checkpoint) -> None:
    with pytest.raises(SourceError, match="is a directory on this machine, not a repository; leave --stream out"):
        open_checkpoint(str(checkpoint("bert")), stream=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model-00002-of-00002.safetensors": None}, "the shard model-00002-of-00002.safetensors is missing"),
        ({"model-00001-of-00002.safetensors": b"\xff" * 100}, "HDR-1"),
        ({"model.safetensors.index.json": b"{"}, "is not an index with a weight_map"),
    ],
)
def test_damaged_repositories(
    change: dict[str, bytes | None], message: str, checkpoint: Checkpoint, hub: HubServer, tmp_path: Path
) -> None:
    source = checkpoint("llama", shard="150KB")
    assert len(list(source.glob("*.safetensors"))) == 2
    publish(hub, source)
    hub.commit(REPO, change)
    with pytest.raises(SourceError, match=message):
        convert_hf_to_lowbit(REPO, tmp_path / "far", stream=True)
    assert not list(tmp_path.glob("*far*"))


def test_the_command_says_what_it_fetched(own_checkpoint: Checkpoint, hub: HubServer, tmp_path: Path) -> None:
    """And does not fetch everything again to measure."""
    publish(hub, with_tokenizer(own_checkpoint("llama")))
    command = [REPO, str(tmp_path / "far"), "--bits", "2", "--group-size", "32", "--stream"]
    runner = CliRunner(env={"COLUMNS": "200"})
    done = runner.invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "fetched of the weights" in done.output
    assert "MB in 2 requests" in done.output
    assert "was not measured: its weights are streamed" in done.output
    plan = runner.invoke(app, [REPO, "--dry-run", "--stream"])
    assert plan.exit_code == 0, plan.output
    refused = runner.invoke(app, [str(tmp_path / "far"), str(tmp_path / "again"), "--stream"])
    assert refused.exit_code == 2
