"""The one way this package runs Numba code on several cores.

Kernels are ``nogil`` and take a half-open range of rows; this module cuts the rows into chunks and runs
them on a thread pool of its own. Numba's own layers were weighed and left out: ``workqueue`` aborts when
two Python threads call it at once, GNU OpenMP does not survive ``fork`` and fights with torch's pool.
A pool of Python threads has none of these troubles, costs some tens of microseconds for a call, and
gives the same result whatever the number of threads, since no chunk depends on another.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

CHUNKS_PER_THREAD = 4  # chunks are handed out as threads come free: evens out a busy core

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_inside = threading.local()


def num_threads() -> int:
    """Threads that kernels use: ``LOWBIT_NUM_THREADS``, or the cores this process may run on."""
    if wanted := wanted_threads():
        return wanted
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def wanted_threads() -> int:
    """What ``LOWBIT_NUM_THREADS`` says; 0 if it says nothing."""
    wanted = os.environ.get("LOWBIT_NUM_THREADS", "")
    return int(wanted) if wanted.isdecimal() else 0


def parallel_rows(kernel: Callable[..., Any], rows: int, *args: Any, grain: int = 1) -> None:
    """Run ``kernel(start, stop, *args)`` over disjoint ranges that cover ``range(rows)``; return when all are done.

    Safe to call from several Python threads at once, after ``fork``, and from inside a kernel's own
    thread (it then runs inline, so that the pool cannot wait for itself).

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
    """The pool of this package, of at least `threads` threads."""
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
