"""Interrupted conversions: kill -9 leaves nothing that looks finished, and --resume gives the same bytes."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import edit_weights
from support.config_files import edit_config
from support.conversions import assert_nothing_looks_finished, content
from support.killed import CALIBRATED, OPTIONS, convert_until

from lowbit_format.container.reader import ModelReader
from lowbit_format.container.writer import ShardWriter
from lowbit_format.converters import Recipe, Rule, convert_hf_to_lowbit, driver
from lowbit_format.converters.driver import work_directory
from lowbit_format.converters.journal import JOURNAL
from lowbit_format.converters.plan import Step
from lowbit_format.errors import OutputError
from lowbit_format.quantize import Target

Checkpoint = Callable[..., Path]

TARGET = OPTIONS["recipe"].default
KILLS = [  # moments, evenly spread over all that touch the disk
    ("llama", OPTIONS, 4),
    ("mixtral", OPTIONS, 4),
    ("llama", CALIBRATED, 3),
    pytest.param("llama", OPTIONS, 20, marks=pytest.mark.exhaustive),
    pytest.param("llama", CALIBRATED, 20, marks=pytest.mark.exhaustive),
    pytest.param("mixtral", CALIBRATED, 20, marks=pytest.mark.exhaustive),
]


def run_until(source: Path, out: Path, moment: int, options: dict[str, Any]) -> int | None:
    """Run :func:`support.killed.convert_until` in a process of its own; returns its exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.killed"])
    out.parent.mkdir(parents=True, exist_ok=True)
    process = context.Process(target=convert_until, args=(source, out, moment, options))
    process.start()
    process.join()
    return process.exitcode


def interrupted(source: Path, out: Path) -> Path:
    """Leave an unfinished conversion to `out`, two shards of it done."""

    def stop(step: object, steps: int) -> None:
        if len(list(work_directory(out).glob("part-*.safetensors"))) >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_hf_to_lowbit(str(source), out, **OPTIONS, report=stop)
    return work_directory(out)


@pytest.mark.parametrize(("name", "options", "kills"), KILLS)
def test_killed_at_any_moment_it_resumes_to_the_same_bytes(
    name: str,
    options: dict[str, Any],
    kills: int,
    checkpoint: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """DIR-7, for stacks of experts too, and with data: also while the scales of all layers are trained together."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))  # the fork server finds support.killed there
    source = checkpoint(name)
    touches = run_until(source, tmp_path / "whole" / "out", 0, options)
    assert touches is not None
    assert kills < touches < 255
    whole = content(tmp_path / "whole" / "out")
    for moment in sorted({1 + i * (touches - 1) // (kills - 1) for i in range(kills)}):
        out = tmp_path / str(moment) / "out"
        assert run_until(source, out, moment, options) == -signal.SIGKILL
        if out.exists():  # killed after the rename that makes it a model: then it is whole
            assert ModelReader(out).verify() == 0
            assert content(out) == whole
            continue
        assert_nothing_looks_finished(out, killed=True)
        convert_hf_to_lowbit(str(source), out, **options, resume=True)
        assert content(out) == whole
        assert [p.name for p in out.parent.iterdir()] == ["out"]


class KilledError(BaseException):
    """Nothing is done any more."""


def test_data_that_the_journal_lists_are_there_until_it_lists_the_shard(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed right after it has removed the data of its first shard resumes."""
    source, out, remove = checkpoint("llama"), tmp_path / "out", ShardWriter.abort
    convert_hf_to_lowbit(str(source), tmp_path / "whole" / "out", **OPTIONS)
    removed = []

    def remove_and_die(writer: ShardWriter) -> None:
        removed.append(writer.path)
        if len(removed) == 1:
            remove(writer)
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(driver, "SAVE_SECONDS", -1)  # each step is in the journal
        patch.setattr(ShardWriter, "abort", remove_and_die)
        with pytest.raises(KilledError):
            convert_hf_to_lowbit(str(source), out, **OPTIONS)
    convert_hf_to_lowbit(str(source), out, **OPTIONS, resume=True)
    assert content(out) == content(tmp_path / "whole" / "out")


def test_resume_without_anything_to_resume_is_a_plain_run(checkpoint: Checkpoint, tmp_path: Path) -> None:
    convert_hf_to_lowbit(str(checkpoint("llama")), tmp_path / "out", **OPTIONS, resume=True)
    assert ModelReader(tmp_path / "out").verify() == 0


def test_resume_does_not_do_finished_shards_again(checkpoint: Checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "out"
    work = interrupted(checkpoint("llama"), out)
    before = {p.name: p.stat().st_ino for p in work.glob("part-*.safetensors")}
    assert len(before) == 2
    done = convert_hf_to_lowbit(str(checkpoint("llama")), out, **OPTIONS, resume=True)
    after = {p.stat().st_ino for p in out.glob("*.safetensors")}
    assert set(before.values()) <= after
    assert set(done.outcomes) == {step.path for step in done.plan.quantized}


@pytest.mark.parametrize("steps", [1, 5, 10])
def test_a_stopped_conversion_goes_on_inside_of_a_shard(
    steps: int, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all in one shard: what was done before Ctrl-C is not done again, and the bytes are the same."""
    source, options = str(checkpoint("llama")), {"recipe": OPTIONS["recipe"]}
    whole = convert_hf_to_lowbit(source, tmp_path / "whole" / "out", **options).directory
    seen: list[str] = []

    def stop(step: Step, total: int) -> None:
        seen.append(step.tensor.name)
        if len(seen) == steps:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_hf_to_lowbit(source, tmp_path / "out", **options, report=stop)
    assert_nothing_looks_finished(tmp_path / "out")
    carried = []
    carry_out = driver.carry_out

    def noting(quantizer: Any, source: Any, step: Any, data: Any) -> Any:
        carried.append(step.tensor.name)
        return carry_out(quantizer, source, step, data)

    monkeypatch.setattr(driver, "carry_out", noting)
    done = convert_hf_to_lowbit(source, tmp_path / "out", **options, resume=True)
    assert not set(seen) & set(carried)
    assert content(tmp_path / "out") == content(whole)
    assert set(done.outcomes) == {step.path for step in done.plan.quantized}


def test_lost_data_of_an_open_shard_is_noticed(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source, options = str(checkpoint("llama")), {"recipe": OPTIONS["recipe"]}

    def stop(step: Step, total: int) -> None:
        if step.tensor.name.endswith("1.mlp.up_proj.weight"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_hf_to_lowbit(source, tmp_path / "out", **options, report=stop)
    (data,) = work_directory(tmp_path / "out").glob("*.data")
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(OutputError, match="begin again"):
        convert_hf_to_lowbit(source, tmp_path / "out", **options, resume=True)


def test_an_unfinished_conversion_is_not_overwritten(checkpoint: Checkpoint, tmp_path: Path) -> None:
    work = interrupted(checkpoint("llama"), tmp_path / "out")
    before = content(work)
    with pytest.raises(OutputError, match=r"unfinished conversion.*--resume"):
        convert_hf_to_lowbit(str(checkpoint("llama")), tmp_path / "out", **OPTIONS)
    assert content(work) == before


@pytest.mark.parametrize(
    "change",
    [
        {"recipe": Recipe(Target(bits=3, group_size=32))},
        {"recipe": Recipe(TARGET, lm_head=True)},
        {"recipe": Recipe(TARGET, (Rule("*.0.mlp.up_proj", Target(bits=2, group_size=32, rounds=1)),))},
        {"max_shard_bytes": 30_000},
    ],
)
def test_resume_with_other_options_is_refused(change: dict, checkpoint: Checkpoint, tmp_path: Path) -> None:
    work = interrupted(checkpoint("llama"), tmp_path / "out")
    before = content(work)
    with pytest.raises(OutputError, match="begun with other options"):
        convert_hf_to_lowbit(str(checkpoint("llama")), tmp_path / "out", **{**OPTIONS, **change}, resume=True)
    assert content(work) == before


def test_resume_with_another_source_is_refused(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = own_checkpoint("llama")
    interrupted(source, tmp_path / "out")
    for change in (
        lambda: edit_config(source, rms_norm_eps=1e-3),
        lambda: edit_weights(edit_config(source, rms_norm_eps=1e-6), lambda t: t["model.norm.weight"].add_(1)),
    ):
        change()
        with pytest.raises(OutputError, match="another source"):
            convert_hf_to_lowbit(str(source), tmp_path / "out", **OPTIONS, resume=True)


@pytest.mark.parametrize("damage", ["cut journal", "other journal", "cut shard", "no shard"])
def test_a_damaged_unfinished_conversion_is_refused(damage: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    work = interrupted(checkpoint("llama"), tmp_path / "out")
    journal, shard = work / JOURNAL, work / "part-00001.safetensors"
    if damage == "cut journal":
        journal.write_bytes(journal.read_bytes()[:-20])
    elif damage == "other journal":
        journal.write_text("[]")
    elif damage == "cut shard":
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        shard.unlink()
    with pytest.raises(OutputError, match="begin again"):
        convert_hf_to_lowbit(str(checkpoint("llama")), tmp_path / "out", **OPTIONS, resume=True)
    assert not (tmp_path / "out").exists()


def test_a_source_that_was_written_again_is_another_one(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Even with the same names, shapes, size and first tensors: half of each model would be a model of its own."""
    source = own_checkpoint("llama")
    interrupted(source, tmp_path / "out")
    file = source / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(OutputError, match="another source"):
        convert_hf_to_lowbit(str(source), tmp_path / "out", **OPTIONS, resume=True)


def test_two_conversions_to_one_place_do_not_meet(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """While one conversion works in a directory, another neither begins nor resumes there."""
    tried = []

    def meet(step: Step, total: int) -> None:
        for resume in (False, True):
            with pytest.raises(OutputError, match=r"another process is converting there|unfinished conversion"):
                convert_hf_to_lowbit(str(checkpoint("llama")), tmp_path / "out", **OPTIONS, resume=resume)
            tried.append(resume)

    convert_hf_to_lowbit(str(checkpoint("llama")), tmp_path / "out", **OPTIONS, report=meet)
    assert True in tried
    assert ModelReader(tmp_path / "out").verify() == 0


def test_a_failing_rename_can_be_resumed(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(work: Path, out: Path) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(driver, "publish", fail)
        with pytest.raises(OutputError, match="Permission denied"):
            convert_hf_to_lowbit(str(checkpoint("llama")), tmp_path / "out", **OPTIONS)
    carried = []
    monkeypatch.setattr(driver, "carry_out", lambda quantizer, source, step, data: carried.append(step))
    convert_hf_to_lowbit(str(checkpoint("llama")), tmp_path / "out", **OPTIONS, resume=True)
    assert carried == []
    assert ModelReader(tmp_path / "out").verify() == 0
