"""Runs a compiled kernel on all threads of torch's own pool.

Kernels are C functions of one pointer, a *job*. Any number of threads enter one at once, and each takes pieces of the
job by :func:`.vectors.take` until none are left; so the same kernel serves any pool, and answers do not depend on it.

Between two products of a model torch's operations run, some on torch's OpenMP threads, which go on spinning for a
while, and a pool beside them would have to wait for their cores. So kernels enter torch's own threads, through the
function that compilers emit for parallel regions. Where OpenMP has no such function (macOS, Windows), and in a process
made by ``fork``, in which OpenMP's threads are gone, a pool of Python threads serves.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import threading
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numba import types
from numpy.typing import NDArray

from ...machine.threads import thread_pool, wanted_threads

log = logging.getLogger(__name__)

SIGNATURE = types.void(types.CPointer(types.int64))
COUNTER = 0  # field of every job, in which threads count the pieces they take

_forked = False
_compiling = threading.Lock()


class Kernel:
    """A function of a pointer to a job, compiled when first used, and kept in Numba's cache on disk."""

    def __init__(self, function: Callable[[Any], None]) -> None:
        self.function = function
        functools.update_wrapper(self, function)

    @functools.cached_property
    def compiled(self) -> Any:
        """Numba's object of the C function."""
        with _compiling:
            notice = threading.Timer(1.0, log.warning, ["compiling kernels for this CPU; kept for later processes"])
            notice.daemon = True
            notice.start()
            try:
                return numba.cfunc(SIGNATURE, nopython=True, cache=True, error_model="numpy")(self.function)
            finally:
                notice.cancel()

    @functools.cached_property
    def _alone(self) -> Any:
        return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.compiled.address)

    @functools.cached_property
    def _address(self) -> int:
        address: int = self.compiled.address
        return address

    def __call__(self, job: NDArray[np.int64], threads: int) -> None:
        """Run until every piece of `job` is done, on up to `threads` threads. The GIL is free meanwhile."""
        pointer = job.ctypes.data
        if threads <= 1:
            self._alone(pointer)
            return
        region = None if _forked else _openmp()
        if region is not None:
            region(self._address, pointer, threads, 0)
            return
        others = [thread_pool(threads).submit(self._alone, pointer) for _ in range(threads - 1)]
        self._alone(pointer)
        for other in others:
            other.result()


def threads() -> int:
    """Threads for a kernel: ``LOWBIT_NUM_THREADS``, or as many as torch uses."""
    return wanted_threads() or torch.get_num_threads()


@functools.cache
def _openmp() -> Any:
    """OpenMP's entry for parallel regions in the library that torch has loaded; None if there is none."""
    try:
        region = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):  # another OpenMP; another system
        return None
    region.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    region.restype = None
    return region


def _after_fork() -> None:
    global _forked, _compiling
    _forked, _compiling = True, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
