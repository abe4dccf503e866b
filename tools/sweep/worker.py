"""Processes that try classes, and may crash or hang over one without harm to the others."""

from __future__ import annotations

import math
import multiprocessing
import resource
import signal
import time
from typing import Any

_PER_WORKER = 60  # classes; then a new process, so that memory does not pile up
_WAIT = 20  # times the limit, on a machine that does other things too: then the process hangs


class Worker:
    """A process that tries classes one after the other; it is replaced when it crashes or takes too long.

    Args:
        limit: seconds of the processor for a class.
    """

    def __init__(self, limit: float) -> None:
        self._limit, self._context = limit, multiprocessing.get_context("spawn")
        self._process: Any = None
        self._served = 0

    def __call__(self, name: str) -> dict[str, Any]:
        """The result of the class, also if the process dies over it."""
        if self._process is None or self._served >= _PER_WORKER:
            self.stop()
            self._pipe, far = self._context.Pipe()
            self._process = self._context.Process(target=_serve, args=(far, self._limit), daemon=True)
            self._process.start()
            far.close()
            self._served = 0
            self._pipe.recv()  # it is ready: importing is not the first class's time
        self._served += 1
        began = time.perf_counter()
        self._pipe.send(name)
        result: dict[str, Any]
        try:
            result = self._pipe.recv() if self._pipe.poll(_WAIT * self._limit) else {"status": "too slow"}
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            result = {"status": "crashed", "message": f"exit status {code}"}
            if code == -signal.SIGXCPU:
                result = {"status": "too slow"}
        if result["status"] in ("too slow", "crashed"):
            self.stop()
        return {"class": name, "seconds": round(time.perf_counter() - began, 1), **result}

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def _serve(pipe: Any, limit: float) -> None:
    """In the worker: a name in, a result out."""
    import torch

    import lowbit_format  # noqa: F401 - registers the format with transformers

    from .trial import run

    torch.set_num_threads(1)
    pipe.send("ready")
    while True:
        name = pipe.recv()
        used = resource.getrusage(resource.RUSAGE_SELF)
        _, most = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(used.ru_utime + used.ru_stime + limit), most))
        try:
            result = run(name)
        except Exception as e:
            result = {"status": "error of the sweep", "message": f"{type(e).__name__}: {e}"[:500]}
        pipe.send(result)
