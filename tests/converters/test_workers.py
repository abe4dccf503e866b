"""Conversions by several processes: the bytes of one process, also where workers are lost."""

from __future__ import annotations

import functools
import inspect
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import edit_weights
from support.conversions import content
from support.killed import CALIBRATED, OPTIONS

from lowbit_format import errors
from lowbit_format.converters import convert_hf_to_lowbit, plan_conversion, workers
from lowbit_format.converters.driver import work_directory
from lowbit_format.errors import FormatError, LowbitError, NonFiniteWeightError, WorkerError

Checkpoint = Callable[..., Path]


def test_a_worker_is_killed_and_the_bytes_are_those_of_one_process(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, killed = str(checkpoint("mixtral")), list[int]()

    def kill(step: object, steps: int) -> None:
        if not killed:
            worker = multiprocessing.active_children()[0]
            killed.append(worker.pid or 0)
            os.kill(killed[0], signal.SIGKILL)

    convert_hf_to_lowbit(source, tmp_path / "one" / "out", **OPTIONS)
    made, make = list[Path](), tempfile.TemporaryDirectory

    def noted(*args: Any, **options: Any) -> Any:
        directory = make(*args, **options)
        made.append(Path(directory.name))
        return directory

    monkeypatch.setattr(workers.tempfile, "TemporaryDirectory", noted)
    convert_hf_to_lowbit(source, tmp_path / "two" / "out", **OPTIONS, workers=2, report=kill)
    assert killed
    assert made  # where the workers' files were
    assert not any(directory.exists() for directory in made)
    assert content(tmp_path / "two" / "out") == content(tmp_path / "one" / "out")
    for worker in multiprocessing.active_children():  # those that were ended are collected
        worker.join(10)
    assert not multiprocessing.active_children()


@pytest.mark.exhaustive
def test_on_a_ray_cluster_a_worker_is_killed_too(checkpoint: Checkpoint, tmp_path: Path) -> None:
    ray, psutil = pytest.importorskip("ray"), pytest.importorskip("psutil")
    source, killed = str(checkpoint("llama")), list[int]()

    def kill(step: object, steps: int) -> None:
        if not killed:
            here = psutil.Process().children(recursive=True)
            killed.extend(p.pid for p in here if p.cmdline()[:1] == ["ray::_work"])
            for worker in killed:
                os.kill(worker, signal.SIGKILL)

    convert_hf_to_lowbit(source, tmp_path / "one" / "out", **OPTIONS)
    ray.init("local", num_cpus=2)
    try:
        convert_hf_to_lowbit(source, tmp_path / "two" / "out", **OPTIONS, workers=2, ray="local", report=kill)
        assert ray.is_initialized()  # a cluster that was there before stays
    finally:
        ray.shutdown()
    assert killed
    assert content(tmp_path / "two" / "out") == content(tmp_path / "one" / "out")


def test_workers_resume_what_one_process_began(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(step: object, steps: int) -> None:
        if list(work_directory(tmp_path / "out").glob("part-*.safetensors")):
            raise KeyboardInterrupt

    monkeypatch.setattr(workers, "_LocalPool", HerePool)
    source = str(checkpoint("llama"))
    with pytest.raises(KeyboardInterrupt):
        convert_hf_to_lowbit(source, tmp_path / "out", **OPTIONS, report=stop)
    convert_hf_to_lowbit(source, tmp_path / "out", **OPTIONS, resume=True, workers=3)
    convert_hf_to_lowbit(source, tmp_path / "whole" / "out", **OPTIONS)
    assert content(tmp_path / "out") == content(tmp_path / "whole" / "out")


class HerePool:
    """A pool whose workers are this process; `losses` says how often each step is lost before it ends."""

    hint = ""

    def __init__(self, number: int, losses: dict[int, int] | None = None) -> None:
        self.number = number
        self.losses = dict(losses or {})
        self.most_open, self._open = 0, 0

    def submit(self, order: bytes, index: int) -> tuple[bytes, int]:
        self._open += 1
        self.most_open = max(self.most_open, self._open)
        return order, index

    def result(self, work: tuple[bytes, int]) -> Any:
        order, index = work
        self._open -= 1
        if self.losses.get(index, 0):
            self.losses[index] -= 1
            raise workers._Lost("killed")
        return index if order == b"numbers" else workers._work(order, index)

    def is_lost(self, work: tuple[bytes, int]) -> bool:
        return False

    def close(self) -> None:
        pass


class BreakingPool(HerePool):
    """One whose loss of one worker loses all work that is open, as a local pool's does."""

    def __init__(self, number: int, losses: dict[int, int]) -> None:
        super().__init__(number, losses)
        self._lost = set[int]()

    def submit(self, order: bytes, index: int) -> Any:
        work = (order, index, object())
        return work

    def result(self, work: Any) -> Any:
        if id(work[2]) in self._lost:
            raise workers._Lost("broken")
        return super().result(work[:2])

    def is_lost(self, work: Any) -> bool:
        return True


@given(st.integers(0, 30), st.integers(1, 4), st.dictionaries(st.integers(0, 30), st.integers(0, 2)))
def test_results_come_in_order_with_a_bounded_number_ahead(steps: int, number: int, losses: dict[int, int]) -> None:
    for kind in (HerePool, BreakingPool):
        pool = kind(number, losses)
        assert list(workers._in_order(pool, b"numbers", list(range(steps)))) == list(range(steps))
        assert pool.most_open <= workers.AHEAD * number + 1  # one is given again before it is counted as ended


def test_a_step_that_loses_its_worker_again_and_again_ends_the_conversion() -> None:
    pool = HerePool(2, {3: workers.LOSSES})
    with pytest.raises(WorkerError, match=r"workers were lost 3 times before step 4 of the plan.*want of memory"):
        list(workers._in_order(pool, b"numbers", list(range(9))))


def test_work_that_is_lost_can_be_resumed(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = functools.partial(HerePool, losses={8: workers.LOSSES})
    monkeypatch.setattr(workers, "_LocalPool", pool)
    source = str(checkpoint("llama"))
    with pytest.raises(WorkerError, match="workers were lost"):
        convert_hf_to_lowbit(source, tmp_path / "out", **OPTIONS, workers=2)
    assert work_directory(tmp_path / "out").is_dir()
    convert_hf_to_lowbit(source, tmp_path / "out", **OPTIONS, resume=True)
    convert_hf_to_lowbit(source, tmp_path / "whole" / "out", **OPTIONS)
    assert content(tmp_path / "out") == content(tmp_path / "whole" / "out")


def test_a_worker_that_sees_another_checkpoint_refuses(checkpoint: Checkpoint) -> None:
    opening = functools.partial(plan_conversion, str(checkpoint("llama")), OPTIONS["recipe"])
    order = pickle.dumps(workers._Order(opening, "another"))
    with pytest.raises(WorkerError, match=r"a worker on .* sees another checkpoint in .*same files"):
        workers._work(order, 0)


def test_the_error_of_a_step_is_the_driver_s(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_LocalPool", HerePool)
    source = Path(shutil.copytree(checkpoint("llama"), tmp_path / "source"))

    def spoil(weights: dict[str, Any]) -> None:
        weights["model.layers.1.mlp.up_proj.weight"][0, 0] = np.nan

    edit_weights(source, spoil)
    with pytest.raises(NonFiniteWeightError, match=r"layers\.1\.mlp\.up_proj"):
        convert_hf_to_lowbit(str(source), tmp_path / "out", **OPTIONS, workers=2)
    assert not (tmp_path / "out").exists()


def test_every_error_of_ours_survives_the_way_from_a_worker() -> None:
    classes = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, LowbitError)]
    assert len(classes) > 20
    for cls in classes:
        error = cls("TEN-3", "is NaN", file="a", tensor="b") if issubclass(cls, FormatError) else cls("a: is NaN")
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), again.__dict__) == (cls, str(error), error.__dict__)


class Stubborn(Exception):
    """One that cannot be made again from its text."""

    def __init__(self, text: str, *, code: int) -> None:
        super().__init__(text)


def test_an_error_that_cannot_be_sent_is_said(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise Stubborn("no more", code=7)

    opening = functools.partial(plan_conversion, str(checkpoint("llama")), OPTIONS["recipe"])
    source, plan, _ = opening()
    order = pickle.dumps(workers._Order(opening, workers.identity(source, plan)))
    monkeypatch.setattr(workers, "carry_out", fail)
    with pytest.raises(WorkerError, match=r"step 6 of the plan: Stubborn: no more"):
        workers._work(order, 5)


def test_a_pool_is_closed_where_its_work_cannot_begin(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []
    monkeypatch.setattr(HerePool, "close", lambda self: closed.append(True))
    monkeypatch.setattr(workers, "_LocalPool", HerePool)
    source, plan, config = plan_conversion(str(checkpoint("llama")), OPTIONS["recipe"])
    unsendable = workers.Workers(lambda: (source, plan, config), 2)
    with pytest.raises((pickle.PicklingError, AttributeError)):
        next(unsendable.carried_out(source, plan, 0))
    assert closed


def test_workers_do_not_calibrate(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"one after the other.*leave the workers out"):
        convert_hf_to_lowbit(str(checkpoint("llama")), tmp_path / "out", **CALIBRATED, workers=2)


def test_a_local_worker_ends_with_its_driver() -> None:
    """Killed too, which leaves it no time to tell its workers."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    driver = context.Process(target=_drive, args=(sender,))
    driver.start()
    sender.close()
    worker = receiver.recv()
    driver.kill()
    driver.join()
    assert receiver.poll(30), f"process {worker} still runs"  # it has the last copy of the other end
    with pytest.raises(EOFError):
        receiver.recv()


def _drive(sender: Any) -> None:
    worker = multiprocessing.get_context("fork").Process(target=_wait_for_ever, args=(sender,))
    worker.start()
    time.sleep(600)


def _wait_for_ever(sender: Any) -> None:
    workers._begin(1, tempfile.gettempdir())
    sender.send(os.getpid())
    time.sleep(600)
