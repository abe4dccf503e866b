"""Runs compiled kernels over *jobs*, on all threads of torch's pool.

A job is a struct of named integers: everything that a kernel must know. A kernel is a C function of a pointer to a
job. Any number of threads run it at once on the same job. Each takes pieces of the job (:func:`take`) until none are
left, so results depend neither on the number of threads nor on the pool that they come from.

Kernels alternate with torch's operations, some of which run on torch's OpenMP threads. Those spin for a while
afterwards, and a second pool would wait for their cores. So kernels enter the same threads, by the function that
compilers emit for parallel regions. Where OpenMP has no such function (macOS, Windows), and in a process made by
``fork``, in which the OpenMP threads are gone, the pool of Python threads of :mod:`lowbit_format.machine.threads`
takes their place.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import logging
import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import numba
import torch
from numba import types
from numba.extending import intrinsic

from ...machine import threads
from ...machine.llvm import I64

log = logging.getLogger(__name__)

_forked = False
_compiling = threading.Lock()


class Job(ctypes.Structure):
    """Base of all jobs. In Python and in its kernel alike, `job.name` is the int64 field `name`; addresses are ints."""

    taken: int  # pieces that threads have taken so far
    alive: object  # no field of the struct: what must live as long as the job, which knows only addresses


AnyJob = TypeVar("AnyJob", bound=type[Job])


def job(declaration: AnyJob) -> AnyJob:
    """Decorator: the fields of a :class:`Job` are the annotations of its class, all int64, in their order."""
    names = ["taken", *inspect.get_annotations(declaration)]
    declaration._fields_ = [(name, ctypes.c_int64) for name in names]
    return declaration


@intrinsic
def take(typingctx, job):
    """Number of the next piece of `job`: 0, 1, 2, …, to each thread another."""

    def codegen(context, builder, signature, args):
        taken = builder.bitcast(args[0], I64.as_pointer())  # the first field
        return builder.atomic_rmw("add", taken, I64(1), "monotonic")

    return types.int64(job), codegen


@intrinsic
def job_at(typingctx, job, address):
    """The job of the same type as `job` at this address."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[1], args[0].type)

    return job(job, types.int64), codegen


@intrinsic
def keep(typingctx, arrays):
    """Do nothing; but the arrays of this tuple are in memory until here.

    Numba frees an array after the last use of its name. Uses of its address do not count.
    """

    def codegen(context, builder, signature, args):
        return context.get_dummy_value()

    return types.void(arrays), codegen


def kernel(job: type[Job]) -> Callable[[Callable[[Any], None]], Kernel]:
    """Decorator: a kernel that works on jobs of this type."""
    return functools.partial(Kernel, job)


class Kernel:
    """A C function of a job, compiled when first used, and kept in Numba's cache on disk."""

    def __init__(self, job: type[Job], function: Callable[[Any], None]) -> None:
        self.function = function
        # Numba passes a record by reference: the C function takes its address.
        self.signature = types.void(types.Record.make_c_struct([(name, types.int64) for name, *_ in job._fields_]))
        functools.update_wrapper(self, function)

    @functools.cached_property
    def compiled(self) -> Any:
        """The C function, as Numba's object."""
        with _compiling:
            notice = threading.Timer(1.0, log.warning, ["compiling kernels for this CPU; kept for later processes"])
            notice.daemon = True
            notice.start()
            try:
                return numba.cfunc(self.signature, nopython=True, cache=True, error_model="numpy")(self.function)
            finally:
                notice.cancel()

    @functools.cached_property
    def _alone(self) -> Any:
        return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.compiled.address)

    @functools.cached_property
    def _address(self) -> int:
        address: int = self.compiled.address
        return address

    def __call__(self, job: Job, count: int) -> None:
        """Run until every piece of `job` is done, on up to `count` threads. The GIL is free meanwhile."""
        pointer = ctypes.addressof(job)
        if count <= 1:
            self._alone(pointer)
            return
        region = None if _forked else _openmp()
        if region is not None:
            region(self._address, pointer, count, 0)
            return
        others = [threads.thread_pool(count).submit(self._alone, pointer) for _ in range(count - 1)]
        self._alone(pointer)
        for other in others:
            other.result()


def num_threads() -> int:
    """Threads for a kernel: ``LOWBIT_NUM_THREADS``, or as many as torch uses."""
    return threads.num_threads(otherwise=torch.get_num_threads())


@functools.cache
def _openmp() -> Any:
    """``GOMP_parallel`` of the OpenMP library that torch has loaded; None if there is none."""
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
