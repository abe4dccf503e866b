"""Runs compiled kernels over *jobs*, on all threads of torch's pool.

A job is a struct of named integers: everything that a kernel must know. A kernel is a C function of a pointer to a
job. Any number of threads run it at once on the same job. Each takes pieces of the job (:func:`take`) until none are
left, so results depend neither on the number of threads nor on the pool that they come from.

Kernels alternate with torch's operations, some of which run on torch's OpenMP threads. Those spin for a while
afterwards, and a second pool would wait for their cores. So kernels enter the same threads, by the function that
compilers emit for parallel regions. Where OpenMP has no such function (macOS, Windows), and in a process made by
``fork``, in which the OpenMP threads are gone, the pool of Python threads of :mod:`lowbit_format.machine.threads`
takes their place.

Kernels that follow one another can be run by one call (:func:`run_in_turn`): threads go through all of them together.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import itertools
import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numba
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ...machine import threads
from ...machine.llvm import I32, I64, call

log = logging.getLogger(__name__)

PATIENCE = 1 << 10  # looks at a kernel that others are in, before they are given this thread's core

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
        return builder.atomic_rmw("add", _field(builder, args[0], 0), I64(1), "acq_rel")

    return types.int64(job), codegen


def _field(builder: Any, job: Any, number: int) -> Any:
    """Pointer to a field of a job."""
    return builder.gep(builder.bitcast(job, I64.as_pointer()), [I64(number)])


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


@job
class Step(Job):
    """A kernel that is run in turn with others."""

    inside: int  # threads that are in the kernel
    kernel: int  # address of the C function
    job: int  # address of its job
    next: int  # address of the step after it


@intrinsic
def _enter(typingctx, step):
    """Run the kernel of `step`, and be counted as long as it runs."""

    def codegen(context, builder, signature, args):
        inside, kernel, job = (_field(builder, args[0], number) for number in (1, 2, 3))
        builder.atomic_rmw("add", inside, I64(1), "acq_rel")
        function = ir.FunctionType(ir.VoidType(), [I64]).as_pointer()
        builder.call(builder.inttoptr(builder.load(kernel), function), [builder.load(job)])
        builder.atomic_rmw("sub", inside, I64(1), "acq_rel")
        return context.get_dummy_value()

    return types.void(step), codegen


@intrinsic
def _inside(typingctx, step):
    """How many threads are in the kernel of `step`."""

    def codegen(context, builder, signature, args):
        return builder.load_atomic(_field(builder, args[0], 1), "acquire", 8)

    return types.int64(step), codegen


@intrinsic
def _give_way(typingctx):
    """Let another thread have this one's core, if it waits for one."""

    def codegen(context, builder, signature, args):
        if os.name == "posix":
            call(builder, "sched_yield", I32)
        return context.get_dummy_value()

    return types.void(), codegen


@kernel(Step)
def _in_turn(step):
    """Run kernels one after another.

    A thread leaves a kernel when no piece is left. All pieces are done when nobody is inside any more: who took one had
    entered before. A thread that comes late finds nothing to do, so it does not matter how many there are.
    """
    while True:
        _enter(step)
        turns = 0
        while _inside(step) != 0:
            turns += 1
            if turns % PATIENCE == 0:
                _give_way()
        if step.next == 0:
            break
        step = job_at(step, step.next)


def steps_of(work: Sequence[tuple[Kernel, Job]]) -> list[Step]:
    """Kernels with their jobs to be run in turn, at least one; each job has to live as long as its step."""
    steps = [Step(kernel=kernel._address, job=ctypes.addressof(job)) for kernel, job in work]
    for step, after in itertools.pairwise(steps):
        step.next = ctypes.addressof(after)
        step.alive = after
    return steps


def run_in_turn(first: Step, count: int) -> None:
    """Run kernels one after another, see :func:`steps_of`, in one call on up to `count` threads."""
    _in_turn(first, count)


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
