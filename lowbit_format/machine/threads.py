"""Threads for loops over rows, and how many threads this package uses.

There are two pools, each for one kind of compiled code:

* :func:`parallel_rows` runs a loop over rows (quantizing, the reference decoder, changes of layout) on a pool of Python
  threads, this module's own. Loops release the GIL (``nogil``).
* :mod:`lowbit_format.kernels.cpu.parallel` runs kernels on torch's OpenMP threads, since they alternate with torch's
  operations within one forward pass. It uses the pool here where it cannot enter torch's.

:func:`num_threads` decides the number of threads of both. No result depends on it, since no range of rows depends on
another.

Numba's own threading layers are not used: ``workqueue`` aborts when two Python threads call it at once; GNU OpenMP does
not survive ``fork`` and competes with torch's pool. A pool of Python threads has none of these troubles, and costs some
tens of microseconds a call.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

CHUNKS_PER_THREAD = 4  # threads take chunks as they come free, so a busy core delays the rest less

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_inside = threading.local()


def num_threads(otherwise: int = 0) -> int:
    """Threads to use: ``LOWBIT_NUM_THREADS``, or `otherwise`, or as many as cores that this process may run on."""
    wanted = os.environ.get("LOWBIT_NUM_THREADS", "")
    number = int(wanted) if wanted.isdecimal() else 0
    if number or otherwise:
        return number or otherwise
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def parallel_rows(kernel: Callable[..., Any], rows: int, *args: Any, grain: int = 1) -> None:
    """Run ``kernel(start, stop, *args)`` over disjoint ranges that cover ``range(rows)``; return when all are done.

    Safe to call from several Python threads at once, after ``fork``, and from a thread of the pool (the kernel then
    runs in that thread, so that the pool cannot wait for itself).

    Args:
        kernel: releases the GIL (``nogil=True``), and writes only rows ``start`` to ``stop``.
        rows: number of rows.
        grain: every range but the last starts at a multiple of this.
    """
    threads = num_threads()
    blocks = -(-rows // grain)
    if threads == 1 or blocks <= 1 or getattr(_inside, "worker", False):
        kernel(0, rows, *args)
        return
    step = grain * max(1, -(-blocks // (threads * CHUNKS_PER_THREAD)))
    starts = range(0, rows, step)
    futures = [thread_pool(threads).submit(_run, kernel, s, min(s + step, rows), args) for s in starts]
    for future in futures:
        future.result()


def _run(kernel: Callable[..., Any], start: int, stop: int, args: tuple[Any, ...]) -> None:
    _inside.worker = True
    kernel(start, stop, *args)


def thread_pool(threads: int) -> ThreadPoolExecutor:
    """The pool of Python threads, of at least `threads` threads."""
    global _pool, _pool_size
    with _lock:
        if _pool is None or _pool_size < threads:  # a smaller pool finishes what it has and is collected
            _pool, _pool_size = ThreadPoolExecutor(threads, thread_name_prefix="lowbit"), threads
        return _pool


def _forget_pool() -> None:
    """Threads do not survive a fork: the child starts with no pool and a fresh lock."""
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)
