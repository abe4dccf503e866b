"""Other processes that carry out the steps of a plan: on this machine, or on the machines of a Ray cluster.

A worker opens the checkpoint and makes the plan itself, and is told only the numbers of steps; it refuses if its plan
is not the driver's. What it makes comes back to the driver, which writes it in the order of the plan: the output has
the bytes that one process would write. A step whose worker was lost is carried out again.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
import pickle
import signal
import socket
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from multiprocessing.connection import wait
from typing import Any, Protocol, TypeVar

from ..errors import WorkerError
from ..machine.threads import num_threads
from .plan import BASE_MEMORY, Plan, Step
from .quantizer import WithoutData
from .source import Source
from .steps import Carried, carry_out, identity, load_step

Opening = Callable[[], tuple[Source, Plan, Any]]  # opens the checkpoint and makes the plan; can be pickled

AHEAD = 2  # steps for each worker that are begun before the one that is written next is finished
LOSSES = 3  # of workers over one step, after which the conversion ends


@dataclass(frozen=True)
class Workers:
    """Workers that carry out the steps of a plan, each weight alone.

    Attributes:
        opening: opens the checkpoint and makes the plan, in every worker.
        number: of workers; None: as many as the cluster has machines, or 1 without a cluster.
        ray: address of a Ray cluster: ``auto`` for the one that runs here, ``ray://host:10001`` for one elsewhere,
            ``local`` for one that is begun for this conversion. None: processes on this machine.
    """

    opening: Opening
    number: int | None = None
    ray: str | None = None

    def carried_out(self, source: Source, plan: Plan, begin: int) -> Generator[tuple[Step, Carried], None, None]:
        """The steps of the driver's plan from number `begin` on, each with what it comes to, in order.

        Tensors that are kept are read here: that is faster than sending them.

        Raises:
            WorkerError: workers were lost :data:`LOSSES` times over one step, or a worker's plan is another one.
            LowbitError: of the step that failed.
        """
        far = [i for i in range(begin, len(plan.steps)) if plan.steps[i].target is not None]
        pool: _Pool[Any] = _LocalPool(self.number or 1) if self.ray is None else _RayPool(self.ray, self.number)
        try:
            order = pickle.dumps(_Order(self.opening, identity(source, plan)))
            results = _in_order(pool, order, far)
            for step in plan.steps[begin:]:
                if step.target is None:
                    yield step, carry_out(WithoutData(), source, step, load_step(source, step))
                else:
                    yield step, next(results)
        finally:
            pool.close()


def workers_memory(plan: Plan, number: int) -> int:
    """Expected peak of resident memory of all workers and the driver together, in bytes, on one machine."""
    results = max((step.tensor.nbytes for step in plan.quantized), default=0)
    return number * plan.peak_memory() + BASE_MEMORY + AHEAD * number * results


def _in_order(pool: _Pool[Any], order: bytes, steps: list[int]) -> Generator[Carried, None, None]:
    """The results of steps in their order, with a bounded number of them begun ahead: the first ones at once."""
    following = iter(steps)
    begun = deque((i, pool.submit(order, i)) for i in islice(following, AHEAD * pool.number))
    return _results(pool, order, begun, following)


def _results(
    pool: _Pool[Any], order: bytes, begun: deque[tuple[int, Any]], following: Iterator[int]
) -> Generator[Carried, None, None]:
    losses = 0
    while begun:
        i, work = begun[0]
        try:
            result = pool.result(work)
        except _Lost as e:
            losses += 1
            if losses == LOSSES:
                raise WorkerError(
                    f"workers were lost {losses} times before step {i + 1} of the plan was done ({e}). Were they ended "
                    f"for want of memory? Take fewer of them, and resume. {pool.hint}"
                ) from e
            begun = deque((i, pool.submit(order, i) if pool.is_lost(work) else work) for i, work in begun)
            continue
        begun.popleft()
        begun.extend((i, pool.submit(order, i)) for i in islice(following, 1))
        losses = 0
        yield result
        del result


# --- in a worker ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Order:
    """What a worker needs to know; `identity` is that of the driver's steps."""

    opening: Opening
    identity: str


def _work(order: bytes, index: int) -> Carried:
    """Carry out step `index` of the plan."""
    try:
        source, plan = _opened(order)
        step = plan.steps[index]
        return carry_out(WithoutData(), source, step, load_step(source, step))
    except Exception as e:
        raise _sendable(e, index) from e


def _sendable(error: Exception, index: int) -> Exception:
    """The error, or a WorkerError that says it where it would not survive the way to the driver."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class does on that way
        return WorkerError(f"step {index + 1} of the plan: {type(error).__name__}: {error}")
    return error


@functools.lru_cache(1)
def _opened(order: bytes) -> tuple[Source, Plan]:
    """The checkpoint and plan of an order, which this process has from its first step to its last."""
    wanted: _Order = pickle.loads(order)  # made by the driver, in this program
    source, plan, _ = wanted.opening()
    if identity(source, plan) != wanted.identity:
        raise WorkerError(
            f"a worker on {socket.gethostname()} sees another checkpoint in {source.directory} than this process, or "
            "has other versions of lowbit_format or transformers; give all machines the same files (copied with their "
            "times of modification) and the same packages"
        )
    return source, plan


# --- pools ------------------------------------------------------------------------------------------


class _Lost(Exception):
    """The process that worked on a step has ended."""


Work = TypeVar("Work")  # of one step, as a pool knows it


class _Pool(Protocol[Work]):
    """Processes that work.

    Attributes:
        number: of workers.
        hint: what else may be wrong where workers are lost again and again.
    """

    number: int
    hint: str

    def submit(self, order: bytes, index: int) -> Work:
        """Begin a step as soon as a worker is free."""
        ...

    def result(self, work: Work) -> Carried:
        """Wait for a step; raises :class:`_Lost`, or what the step raised."""
        ...

    def is_lost(self, work: Work) -> bool:
        """Whether the process that worked on it has ended; does not wait."""
        ...

    def close(self) -> None:
        """End all work."""
        ...


class _LocalPool:
    """Processes on this machine. They end with the driver, however that ends."""

    hint = "A script that converts with workers needs its main part under `if __name__ == '__main__':`."

    def __init__(self, number: int) -> None:
        self.number, self._threads = number, max(1, num_threads() // number)
        self._scratch = tempfile.TemporaryDirectory(prefix="lowbit-")
        # Not forked from this process, whose threads may hold locks, but from a server that has our modules imported.
        kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        self._context = multiprocessing.get_context(kind)
        self._context.set_forkserver_preload(["lowbit_format.converters", "transformers.modeling_utils"])
        self._pool = self._new()

    def _new(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            self.number, self._context, initializer=_begin, initargs=(self._threads, self._scratch.name)
        )

    def submit(self, order: bytes, index: int) -> Future[Carried]:
        try:
            return self._pool.submit(_work, order, index)
        except BrokenProcessPool:  # one lost worker breaks the whole pool
            self._pool.shutdown(wait=False)
            self._pool = self._new()
            return self._pool.submit(_work, order, index)

    def result(self, work: Future[Carried]) -> Carried:
        try:
            return work.result()
        except BrokenProcessPool as e:
            raise _Lost(str(e)) from e

    def is_lost(self, work: Future[Carried]) -> bool:
        return work.done() and isinstance(work.exception(), BrokenProcessPool)

    def close(self) -> None:
        processes = list((self._pool._processes or {}).values())  # the public way to end them is of Python 3.14
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
            process.join()
        self._scratch.cleanup()


def _begin(threads: int, scratch: str) -> None:
    """Begin a local worker: an interruption is the driver's to handle, and without a driver there is no work.

    Its temporary files are in a directory that the driver removes: a worker that is ended cannot do it.
    """
    os.environ["LOWBIT_NUM_THREADS"] = str(threads)
    tempfile.tempdir = scratch
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None  # noqa: S101 - a worker is spawned
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(parent: int) -> None:
    wait([parent])
    os._exit(1)


class _RayPool:
    """Tasks of a Ray cluster: https://docs.ray.io/en/latest/ray-core/tasks.html."""

    hint = "`ray status` tells of the machines."

    def __init__(self, address: str, number: int | None) -> None:
        try:
            ray: Any = import_module("ray")
        except ImportError as e:
            raise WorkerError("the package ray is missing: pip install 'lowbit-format[ray]'") from e
        self._ray, self._begun = ray, not ray.is_initialized()
        if self._begun:
            options = {"include_dashboard": False} if address == "local" else {}
            try:
                ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)
            except (ConnectionError, RuntimeError, ValueError) as e:
                raise WorkerError(f"{address}: no Ray cluster can be reached there: {e}") from e
        cores = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        self.number = number or max(1, sum(n > 0 for n in cores))
        threads = max(1, min(sum(cores) // self.number, max(cores)))
        self._scratch = tempfile.TemporaryDirectory(prefix="lowbit-") if self._begun else None
        variables = {"LOWBIT_NUM_THREADS": str(threads)}
        if self._scratch is not None:  # the cluster is begun here and ends here, and so do its workers' files
            variables["TMPDIR"] = self._scratch.name
        environment = {"env_vars": variables}
        self._task = ray.remote(num_cpus=threads, max_retries=0, runtime_env=environment)(_work)

    def submit(self, order: bytes, index: int) -> Any:
        return self._task.remote(order, index)

    def result(self, work: Any) -> Carried:
        try:
            return self._ray.get(work)  # type: ignore[no-any-return]
        except self._ray.exceptions.RayTaskError as e:
            raise e.cause from e
        except self._ray.exceptions.RayError as e:
            raise _Lost(str(e)) from e

    def is_lost(self, work: Any) -> bool:
        if not self._ray.wait([work], timeout=0)[0]:
            return False
        try:
            self.result(work)
        except _Lost:
            return True
        except Exception:  # of the step, which raises it again in its turn
            return False
        return False

    def close(self) -> None:
        if self._begun:
            self._ray.shutdown()
        if self._scratch is not None:
            self._scratch.cleanup()
