"""The driver: carries out a plan, from a source to an output directory. It knows no source format.

It quantizes one tensor at a time while it reads the next. Everything is written into a hidden sibling of OUT, which
is renamed to OUT once it is complete (DIR-7); a journal in it lets an interrupted conversion resume.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..container.atomic import check_absent, disk_errors, publish, write_json
from ..container.reader import CONFIG_FILE
from ..container.writer import ShardWriter, data_file, shard_name, write_index
from ..errors import HubError, OutputError, SourceError, WorkerError
from ..schema import QuantizationConfig
from .journal import JOURNAL, Outcome, Progress, finished_shard, load_progress, working_shard
from .plan import Plan, Step
from .quantizer import Quantizer, WithoutData
from .source import Source
from .steps import Carried, carry_out, identity, load_step
from .workers import Workers

SAVE_SECONDS = 20.0  # between two saves of the journal: a killed conversion loses at most this much work


def run(
    source: Source,
    plan: Plan,
    config: dict[str, Any],
    out: Path,
    *,
    side: Callable[[Path], None],
    tell: Callable[[Path, dict[str, Outcome]], None],
    max_shard_bytes: int,
    quantizer: Quantizer | None = None,
    workers: Workers | None = None,
    check: Callable[[Path, dict[str, Outcome]], None] = lambda directory, outcomes: None,
    resume: bool = False,
    report: Callable[[Step, int], None] = lambda step, total: None,
) -> dict[str, Outcome]:
    """Carry out a plan.

    Args:
        source: the checkpoint.
        plan: what to do.
        config: the checkpoint's ``config.json``; gets ``quantization_config``.
        out: the directory to make; must not exist, or must be empty.
        side: writes the files beside the weights into a directory.
        tell: writes what there is to tell of the outcomes into a directory: card and report.
        max_shard_bytes: most bytes of tensors in one shard.
        quantizer: of the weights; None quantizes each alone. The plan's steps are in its order.
        workers: other processes that carry out the steps, which then quantize each weight alone; None does it here.
        check: looks at the finished directory and raises if it is not what was meant; then it is not published.
        resume: continue an interrupted run.
        report: called after each step with the step and the number of all steps.

    Returns:
        The outcome of each quantized module, by path.

    Raises:
        OutputError: `out` exists, the disk is full, or the interrupted run had other settings.
        SourceError, QuantizationError: a tensor cannot be read or quantized.
        WorkerError: a worker was lost too often, or does not see what this process sees.
    """
    out = out.absolute()
    work = work_directory(out)
    quantizer = quantizer or WithoutData()
    settings = _settings(source, plan, config, max_shard_bytes, quantizer)
    _check_free(out, work, resume)
    with disk_errors(work):
        work.mkdir(parents=True, exist_ok=resume)
    with _locked(work):
        done = load_progress(work, settings) if resume else Progress()
        try:
            with disk_errors(work):
                _clean(work, done)
                _compare_dropped(source, plan)
                quantizer.begin(work, done.steps)
                carried_out = _carried_out(source, plan.steps[done.steps :], quantizer)
                if workers is not None:
                    carried_out = workers.carried_out(source, plan, done.steps)
                with contextlib.closing(carried_out):
                    _write_shards(plan, carried_out, quantizer, work, settings, done, max_shard_bytes, report)
                _finish(plan, config, work, done, side)
                _improve(quantizer, work, settings, done)
                tell(work, done.outcomes)
                _check(work, done.outcomes, check)
                _publish(work, out, settings, done)
        except BaseException:
            if not (work / JOURNAL).is_file():  # nothing to resume
                shutil.rmtree(work, ignore_errors=True)
            raise
    return done.outcomes


def work_directory(out: Path) -> Path:
    """The directory of an unfinished conversion to `out`."""
    return out.with_name(f".{out.name}.lowbit-partial")


def _check_free(out: Path, work: Path, resume: bool) -> None:
    check_absent(out)
    if work.exists() and not resume:
        raise OutputError(
            f"{work}: holds an unfinished conversion to {out.name}; pass --resume to complete it, or remove it"
        )


@contextlib.contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Let only one process work on an unfinished conversion; the lock ends with the process, however that ends."""
    if sys.platform == "win32":  # no flock on Windows: the exclusive mkdir prevents all but two resumes at once
        yield
        return
    import fcntl

    descriptor = os.open(work, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"{work}: another process is converting there; wait for it, or end it") from None
        yield
    finally:
        os.close(descriptor)


def _check(work: Path, outcomes: dict[str, Outcome], check: Callable[[Path, dict[str, Outcome]], None]) -> None:
    """Let `check` look at the finished directory; if it finds a fault, take the config away, which makes it a model."""
    try:
        check(work, outcomes)
    except BaseException:
        (work / CONFIG_FILE).unlink(missing_ok=True)
        raise


def _publish(work: Path, out: Path, settings: str, done: Progress) -> None:
    """Rename the finished directory, without its journal; if that fails, write the journal again."""
    (work / JOURNAL).unlink()
    try:
        publish(work, out)
    except BaseException:
        if work.is_dir():
            done.save(work, settings, None)
        raise


def _clean(work: Path, done: Progress) -> None:
    """Remove the files of an interrupted run that its journal does not name: temporary files, data of other shards."""
    if not (work / JOURNAL).is_file():  # killed before the first save, or between the last one and the rename
        for path in work.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    keep = data_file(working_shard(work, len(done.shards))) if done.open else None
    for file in [*work.glob("*.tmp"), *work.glob("*.data")]:
        if file != keep:
            file.unlink()


def _settings(source: Source, plan: Plan, config: dict[str, Any], max_shard_bytes: int, quantizer: Quantizer) -> str:
    """A digest of everything that the output's bytes depend on."""
    text = json.dumps([identity(source, plan), config, max_shard_bytes, quantizer.identity], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _write_shards(
    plan: Plan,
    carried_out: Iterator[tuple[Step, Carried]],
    quantizer: Quantizer,
    work: Path,
    settings: str,
    done: Progress,
    max_shard_bytes: int,
    report: Callable[[Step, int], None],
) -> None:
    for step in plan.steps[: done.steps]:
        report(step, len(plan.steps))
    for i in range(len(done.shards)):  # a run that was killed may have left it
        data_file(working_shard(work, i)).unlink(missing_ok=True)
    writer = ShardWriter(working_shard(work, len(done.shards)), done.open) if done.open else None
    saved = time.monotonic()
    try:
        for step, (tensors, outcome) in carried_out:
            if writer is not None and writer.nbytes + sum(t.nbytes for t in tensors) > max_shard_bytes:
                _close(writer, work, settings, done)
                writer = None
            if writer is None:
                writer = ShardWriter(working_shard(work, len(done.shards)))
            for tensor in tensors:
                writer.add(tensor)
            done.open = list(writer.written)
            done.steps += 1
            if outcome is not None:
                done.outcomes[outcome.module.path] = outcome
            report(step, len(plan.steps))
            if quantizer.must_save(step) or time.monotonic() - saved > SAVE_SECONDS:
                done.save(work, settings, writer)
                saved = time.monotonic()
        if writer is not None:
            _close(writer, work, settings, done)
            writer = None
    except (KeyboardInterrupt, SystemExit, OSError, OutputError, HubError, WorkerError):
        if writer is not None:  # stopped from outside: save the work, to resume
            if not writer.is_complete:  # else the last journal holds: the shard's data are still there
                with contextlib.suppress(OSError, OutputError):
                    done.save(work, settings, writer)
            writer.leave()
        raise
    except BaseException:
        if writer is not None:
            writer.abort()
        raise


def _close(writer: ShardWriter, work: Path, settings: str, done: Progress) -> None:
    """Finish a shard, then save the journal: what a journal names, a shard or the data of one, is on the disk."""
    done.shards.append(writer.complete())
    done.nbytes += writer.nbytes
    done.open = []
    done.save(work, settings, None)
    writer.abort()


def _carried_out(
    source: Source, steps: tuple[Step, ...], quantizer: Quantizer
) -> Generator[tuple[Step, Carried], None, None]:
    """Each step with what it comes to, one after the other in this process."""
    for step, data in _read_ahead(source, steps):
        carried = carry_out(quantizer, source, step, data)
        del data  # the next tensor is in memory already
        yield step, carried
        del carried


def _read_ahead(source: Source, steps: tuple[Step, ...]) -> Iterator[tuple[Step, NDArray[Any]]]:
    """Each step with its tensor (see :func:`load_step`); while the caller works on one tensor, the next is read."""
    with ThreadPoolExecutor(1, thread_name_prefix="lowbit-read") as reader:
        following = reader.submit(load_step, source, steps[0]) if steps else None
        for i, step in enumerate(steps):
            assert following is not None  # noqa: S101 - for the type checker: every step has one
            data = following.result()
            following = reader.submit(load_step, source, steps[i + 1]) if i + 1 < len(steps) else None
            yield step, data
            del data


def _compare_dropped(source: Source, plan: Plan) -> None:
    """Raise SourceError if the copies of a tied matrix in the checkpoint differ: only one is stored (TIE-1)."""
    owners = {s.path: s.tensor.name for s in plan.quantized}
    for key, path in plan.dropped.items():
        owner = owners[path]
        if not np.array_equal(source.read(key), source.read(owner)):
            raise SourceError(
                f"{key}: is tied to {owner} by the config, but their values differ; keep both in full "
                f"precision (--keep {path!r}), or untie them in the checkpoint's config.json (tie_word_embeddings)"
            )


def _improve(quantizer: Quantizer, work: Path, settings: str, done: Progress) -> None:
    """Let the quantizer work on all weights together; what came of it is in the journal, so that it is done once."""
    if done.measured is None:
        outcomes, done.measured = quantizer.improve(work, done.outcomes)
        done.outcomes.update(outcomes)
        done.save(work, settings, None)
    quantizer.end(done.measured)


def _finish(plan: Plan, config: dict[str, Any], work: Path, done: Progress, side: Callable[[Path], None]) -> None:
    """Name the shards, write the side files, index and config. The config is last: it makes the model valid."""
    total = len(done.shards)
    shards = {}
    for i, names in enumerate(done.shards):
        name = shard_name(i + 1, total)
        os.replace(finished_shard(work, i, total), work / name)
        shards[name] = names
    if total > 1:
        write_index(work, shards, done.nbytes)
    side(work)
    modules = {o.module.path: o.module for o in done.outcomes.values()}
    quantization = QuantizationConfig(modules, dict(plan.tied), plan.base_model_prefix)
    write_json(work / CONFIG_FILE, {**config, "quantization_config": quantization.to_dict()})
