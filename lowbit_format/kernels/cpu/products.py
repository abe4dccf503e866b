"""``x @ weight.T`` for a few rows of x, straight from the tiled layout; the weight is never decoded.

The part of a plane in a product over one group is ``scale * sum of ±x``. Four columns have 16 such sums. They are
tabled once for many rows of the matrix; then four bits of a plane look one up. With groups g, planes p, and X the sum
of x:

* bcq: ``y = sum_g (sum_p scale[p] * S[p] + offset * X)``, S[p] being the signed sum by the bits of plane p.
* uniform: a code is ``(sum_p ±2**(n-1-p) + 2**n - 1) / 2``, so it is bcq with the scales ``scale * 2**(n-2-p)`` and the
  offset ``scale * ((2**n - 1) / 2 - zero)``.
* affine: the same with the offset ``scale * (2**n - 1) / 2 + offset``.
* codebook: ``y = sum_g scale * sum codebook[code] * x``.

A task that multiplies the scales of plane p by ``1 + delta`` adds ``delta * part[p]``: parts of tuned planes are kept
apart from the rest, and rows of several tasks share all of the work but the last sum (TSK-8). A task that adds to the
scales of single groups changes them as they are read, for its own rows of x. So does one that multiplies the scales of
affine codes: their sum of x times the offset, which it leaves as it is, is not kept apart.

Work is cut into chunks of *strips* of four tiles. For each group a chunk makes the tables of x once, and uses them for
all its strips while they are in the nearest cache. Every chunk makes the tables anew: that takes no longer than
fetching those that another thread made, and nothing need be kept between calls.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numba
import numpy as np
import torch
import torch.nn.functional as F
from numba import literally  # type: ignore[attr-defined]
from torch import Tensor

from ...machine.llvm import LANES, features
from .. import ragged
from ..batch import Share, check_task_ids
from ..matrix import EXACT, INT8, PlaneMatrix
from ..parameter_order import group_major
from . import levels, parallel, tiles
from .byte_tables import TABLE as BYTE_TABLE
from .byte_tables import WORD_MULTIPLIERS, add_planes_of_bytes, has_byte_lookup
from .byte_tables import WORD_TABLES as WORD_BYTE_TABLES
from .intrinsics import (
    AFFINE,
    BCQ,
    CODEBOOK,
    CODEC_NUMBERS,
    DTYPE_NUMBERS,
    UNIFORM,
    VECTOR,
    WORD_TABLES,
    WORD_X,
    add_levels,
    add_planes,
    add_shift,
    floats_at,
    has_codebook_lookup,
    longs_at,
    read_parameters,
    set_tables,
)
from .parallel import Job, Kernel, job, job_at, keep, kernel, take
from .rounded import Groups, Rounded, RoundingJob, round_rows, rounded, rounding
from .tiles import BLOCK, MOST_PLANES, STRIP, WORD

ROWS_AT_ONCE = 64  # of x in one product: the tables of more rows (4 KiB each) leave the cache
CHANGES_AT_ONCE = 32  # of x where only what tasks change is computed, so that tables serve more rows of the matrix
SCRATCH = 1 << 14  # floats of results that a chunk keeps: 64 KiB, of the second-level cache
MOST_STRIPS = 8  # in a chunk: rows of the matrix that one set of tables serves
CHUNKS_PER_THREAD = 4  # threads take chunks as they come free, so a busy core delays the rest less
ONE_THREAD_BELOW = 1 << 20  # bits to look up: fewer take less time than waking other threads
CODEBOOK_SIZE = 16  # levels in a vector register
WHOLE_WORD, HALF_WORD = 4, 2  # bytes


@job
class ProductJob(Job):
    """A product with one matrix, chunk by chunk. Addresses are 0 where there is no such tensor, strides are bytes."""

    # pieces of the job
    chunks: int  # number of chunks
    strips: int  # in a chunk
    next: int  # address of the job to go on with
    # the matrix: sizes
    rows: int
    padded_rows: int  # rounded up to whole tiles
    bits: int  # planes to read
    words: int  # in a row of a plane
    group_words: int  # in a whole group, or the one that groups share
    groups: int  # in a row
    groups_in_word: int  # 1, or 2 where two groups share each word
    codec: int  # BCQ, UNIFORM, AFFINE or CODEBOOK
    # the matrix: addresses
    planes: int  # uint32 [vectors, LANES]: the tiled layout
    scales: int  # [bits or 1, groups, padded_rows]
    scales_dtype: int  # one of DTYPE_NUMBERS
    shift: int  # [groups, padded_rows], or [STRIP * LANES] if it is the same for all
    shift_dtype: int  # one of DTYPE_NUMBERS
    shift_step: int  # 1, or 0 if it is the same for all
    codebook: int  # float32 [CODEBOOK_SIZE]
    # the matrix, if it is a part of a ragged one
    places: int  # address, int64 [padded_rows]: which rows of the whole matrix its rows are; 0: it is the whole
    all_rows: int  # of the whole matrix, which bias, result and deltas have
    # the product
    x: int  # address, float32 [batch (x_stride), columns padded to whole words]
    x_stride: int
    batch: int  # rows of x
    tables: int  # address, with 8-bit activations: int8 [batch (table_stride), words, WORD_BYTE_TABLES]
    table_stride: int
    multipliers: int  # address, uint8 [batch (multiplier_stride), words, WORD_MULTIPLIERS]
    multiplier_stride: int
    units: int  # address, float32 [batch (unit_stride), groups, blocks of a group]: of the tables' entries
    totals: int  # address, likewise: sums of x
    unit_stride: int
    parts: int  # sums that are kept apart: one for each tuned plane, and one for the others
    bias: int  # address, float32 [all_rows]
    out: int  # address, float32 [batch, all_rows]
    # tasks
    task_ids: int  # address, int64 [batch]; negative: no task
    factors: int  # address, float32 [tasks, factor_planes, all_rows]: deltas that multiply scales
    factor_planes: int
    row_factors: int  # address, float32 [tasks, all_rows]: deltas that multiply the scales of affine codes
    terms: int  # address, float32 [tasks, term_planes, groups, all rows padded]: deltas that add to scales
    term_planes: int
    changes_only: int  # 1: only what factors change, without the rest of the product


class Product(NamedTuple):
    """One of several products with the same x: arguments of :meth:`Plan.multiply`."""

    plan: Plan
    bias: Tensor | None
    deltas: Tensor | None
    task_ids: Tensor | None
    activations: str


class Plan:
    """All that is the same in every product with one matrix.

    Args:
        w: in the tiled layout (:mod:`.tiles`).

    Attributes:
        bits: of a row, on average, rounded up.
        groups: how columns are grouped.
        can_round: whether there is a product with 8-bit activations.
    """

    def __init__(self, w: PlaneMatrix) -> None:
        self.of = _identity(w)
        self.rows, self.cols, self.planes = w.rows, w.cols, w.bits
        self.one_part, self.is_affine = not w.scale_per_plane, w.codec == "affine"
        self.groups = Groups(tiles.group_words(w), w.groups, tiles.groups_in_word(w))
        self.can_round = (w.codebook is None or zero_of(w) is not None) and has_byte_lookup(features())
        if not tiles.has_margin(w.planes):
            w = w._replace(planes=_with_margin(w.planes.detach()))
        if w.row_bits is None:
            self.jobs = [_job(w, None, self.rows)]
            self.lookups = self.rows * w.cols * w.bits
        else:
            parts = tiles.parts(w)
            self.jobs = [_job(part.matrix, part.rows, self.rows) for part in parts]
            self.lookups = w.cols * sum(len(part.rows) * part.bits for part in parts)
        self.bits = -(-self.lookups // (self.rows * self.cols))
        # The jobs of a ragged matrix have copies: while they do, the memory of its parameters is not to be another's.
        self.alive = [t.detach() for t in w[1:4] if t is not None]

    def multiply(
        self,
        x: Tensor,
        bias: Tensor | None,
        deltas: Tensor | None,
        task_ids: Tensor | None,
        activations: str = EXACT,
    ) -> Tensor:
        """``x @ weight.T + bias``, float32 ``[batch, rows]``; tasks as in :func:`..naive.linear`.

        The kernel checks no bounds: shapes are checked before (:func:`..batch.check_linear`), task ids here.

        Args:
            x: ``[batch, cols]``, of any dtype.
            bias: float32 ``[rows]``, contiguous.
            activations: INT8 rounds them, if :attr:`can_round`.

        Raises:
            IndexError: a task does not exist.
        """
        x, out = padded(x), torch.empty(len(x), self.rows, dtype=torch.float32, device="cpu")
        threads = _threads(self.lookups * len(x))
        tables = rounded(x, self.groups) if activations == INT8 and self.can_round else None
        jobs = self.prepare(x, out, 0, len(x), deltas, task_ids, threads * CHUNKS_PER_THREAD, tables)
        for one in jobs:
            one.bias = _address(bias)
        _run(jobs, threads)
        return out

    def changes(self, x: Tensor, deltas: Tensor, task_ids: Tensor) -> Tensor:
        """What tasks add to a product: ``delta * part`` for each tuned plane; other planes are not read.

        Arguments and result as of :meth:`multiply`, for bcq and deltas that multiply scales.
        """
        x, out = padded(x), torch.empty(len(x), self.rows, dtype=torch.float32, device="cpu")
        threads = _threads(self.lookups // self.planes * deltas.shape[1] * len(x))
        for start in range(0, len(x), CHANGES_AT_ONCE):
            end = min(start + CHANGES_AT_ONCE, len(x))
            jobs = self.prepare(x, out, start, end, deltas, task_ids, threads * CHUNKS_PER_THREAD)
            for one in jobs:
                one.changes_only, one.shift = 1, 0
            _run(jobs, threads)
        return out

    def prepare(
        self,
        x: Tensor,
        out: Tensor,
        begin: int,
        end: int,
        deltas: Tensor | None,
        task_ids: Tensor | None,
        chunks: int,
        tables: Rounded | None = None,
    ) -> list[ProductJob]:
        """The jobs of a product. `x` and `out` must live as long as they; other tensors they keep alive.

        Args:
            x, out: float32 ``[n, columns padded to whole words]`` and ``[n, rows]``, contiguous.
            begin, end: the rows of both that the product is for.
            deltas, task_ids: as in :meth:`multiply`, the ids of all n rows.
            chunks: to cut the rows of the matrix into, more or less.
            tables: of all n rows of x, if it is rounded; must live as long as `x`.
        """
        batch, parts, by_group = end - begin, 1, False
        if deltas is not None:
            if task_ids is None:
                task_ids = torch.zeros(end, dtype=torch.int64, device="cpu")
            task_ids = task_ids.long().contiguous()
            check_task_ids(deltas, task_ids)
            deltas, by_group = deltas.detach().float().contiguous(), deltas.dim() == 4
            if by_group:
                deltas = group_major(deltas)
            elif not self.is_affine:
                parts = 1 if self.one_part else 1 + deltas.shape[1]
        room = min(MOST_STRIPS, SCRATCH // (batch * parts * STRIP * LANES))
        jobs = []
        for template in self.jobs:
            job = ProductJob.from_buffer_copy(template)
            if deltas is not None and task_ids is not None:
                job.task_ids = task_ids.data_ptr() + 8 * begin
                if by_group:
                    job.terms, job.term_planes = deltas.data_ptr(), deltas.shape[1]
                elif self.is_affine:
                    job.row_factors = deltas.data_ptr()
                else:
                    job.factors, job.factor_planes = deltas.data_ptr(), deltas.shape[1]
            all_strips = -(-job.rows // (STRIP * LANES))
            wanted = max(1, chunks * job.rows * job.bits * self.cols // self.lookups)
            job.strips = strips = max(1, min(room, -(-all_strips // wanted)))
            job.chunks = -(-all_strips // strips)
            job.x_stride = 4 * x.shape[1]
            job.x, job.out = x.data_ptr() + begin * job.x_stride, out.data_ptr() + 4 * begin * self.rows
            job.batch, job.parts = batch, parts
            if tables is not None:
                tables.give(job, begin)
            job.alive = deltas, task_ids  # the fields know only their addresses
            jobs.append(job)
        return jobs


def _job(w: PlaneMatrix, places: Tensor | None, all_rows: int) -> ProductJob:
    """What is the same in every product with `w`, whose rows are not ragged.

    Args:
        places: int64 ``[rows]``: which rows of a matrix of `all_rows` those of `w` are; None: they are all.
    """
    shift, zero = w.shift, zero_of(w)
    if shift is not None:
        shift = group_major(shift.detach())
    elif zero is not None:
        shift = torch.full((STRIP * LANES,), zero, dtype=torch.float32, device="cpu")
    scales, codebook = group_major(w.scales.detach()), w.codebook
    if codebook is not None:
        codebook = F.pad(codebook.detach().float(), (0, max(0, CODEBOOK_SIZE - len(codebook))))
    padded_rows = -(-w.rows // LANES) * LANES
    if places is not None:
        places = F.pad(places, (0, padded_rows - w.rows))  # lanes that only pad count for a row that exists
    job = ProductJob(
        rows=w.rows,
        padded_rows=padded_rows,
        bits=w.bits,
        words=tiles.words(w),
        group_words=tiles.group_words(w),
        groups=w.groups,
        groups_in_word=tiles.groups_in_word(w),
        codec=UNIFORM if zero is not None and w.codec == "codebook" else CODEC_NUMBERS[w.codec],
        planes=w.planes.data_ptr(),
        scales=scales.data_ptr(),
        scales_dtype=DTYPE_NUMBERS[scales.dtype],
        shift=_address(shift),
        shift_dtype=0 if shift is None else DTYPE_NUMBERS[shift.dtype],
        shift_step=int(w.shift is not None),
        codebook=_address(codebook),
        places=_address(places),
        all_rows=all_rows,
    )
    job.alive = w.planes.detach(), scales, shift, codebook, places  # the fields know only their addresses
    return job


def _with_margin(planes: Tensor) -> Tensor:
    """A copy of tiled planes behind which there is the memory that kernels may read."""
    room = torch.empty(planes.numel() + VECTOR, dtype=torch.uint8, device="cpu")
    return room[:-VECTOR].view(planes.shape).copy_(planes)


def _run(jobs: Sequence[ProductJob], threads: int) -> None:
    """All `jobs` as one piece of work for the threads; as two, if only some have 8-bit activations."""
    for work, first in _in_chains(jobs):
        work(first, threads)


def _in_chains(jobs: Sequence[ProductJob]) -> list[tuple[Kernel, Job]]:
    """Jobs that go on with one another: the kernel and the first job of those that are exact, and of the others."""
    exact, others = [one for one in jobs if one.tables == 0], [one for one in jobs if one.tables != 0]
    found: list[tuple[Kernel, Job]] = []
    for work, some in ((_multiply, exact), (_multiply_rounded, others)):
        for one, after in itertools.pairwise(some):
            one.next = ctypes.addressof(after)
        if some:
            found.append((work, some[0]))
    return found


class _Tables:
    """The tables of `x`, made once for all plans whose columns are grouped alike.

    Attributes:
        jobs: of :func:`.rounded.round_rows`, that make them.
    """

    def __init__(self, x: Tensor) -> None:
        self.x, self.made, self.jobs = x, dict[Groups, Rounded](), list[RoundingJob]()

    def of(self, plan: Plan, activations: str) -> Rounded | None:
        """Room for those for `plan`; None for an exact product."""
        if activations == EXACT or not plan.can_round:
            return None
        found = self.made.get(plan.groups)
        if found is None:
            found, own = rounding(self.x, plan.groups)
            self.made[plan.groups] = found
            self.jobs.append(own)
        return found


def multiply_each(x: Tensor, shares: Sequence[tuple[Plan, Share]], task_ids: Tensor | None, out: Tensor) -> None:
    """Each plan's product with the rows of its share, all as one piece of work for the threads.

    Args:
        x: ``[n, cols]``, of any dtype.
        shares: at least one; other rows of `out` stay as they are.
        task_ids: integers ``[n]``.
        out: float32 ``[n, rows]``, contiguous, to fill.

    Raises:
        IndexError: a task does not exist.
    """
    x = padded(x)
    threads = _threads(sum(plan.lookups * (share.end - share.begin) for plan, share in shares))
    chunks, tables, jobs = -(-threads * CHUNKS_PER_THREAD // len(shares)), _Tables(x), list[ProductJob]()
    for plan, s in shares:
        own = tables.of(plan, s.w.activations)
        jobs += plan.prepare(x, out, s.begin, s.end, s.deltas, task_ids, chunks, own)
    for own_job in tables.jobs:
        round_rows(own_job, threads)
    _run(jobs, threads)


class Together:
    """The products of the same rows of x with several matrices, ready to be computed as often as x changes.

    Args:
        x: float32 ``[batch, columns padded to whole words]``, contiguous; has to live as long.
        factors: plan, bias, deltas, task ids and activations of each, as in :meth:`Plan.multiply`; at least one.
        outs: float32 ``[batch, rows]`` for each, contiguous, to be filled; have to live as long.
        threads: that will work.

    Attributes:
        work: kernels and jobs, to be run in turn.

    Raises:
        IndexError: a task does not exist.
    """

    def __init__(self, x: Tensor, factors: Sequence[Product], outs: Sequence[Tensor], threads: int) -> None:
        self._tables = _Tables(x)
        chunks = -(-threads * CHUNKS_PER_THREAD // len(factors))
        self._jobs: list[list[ProductJob]] = []
        for (plan, bias, deltas, task_ids, activations), out in zip(factors, outs, strict=True):
            own = self._tables.of(plan, activations)
            jobs = plan.prepare(x, out, 0, x.shape[0], deltas, task_ids, chunks, own)
            for one in jobs:
                one.bias = _address(bias)
            self._jobs.append(jobs)
        every = [one for jobs in self._jobs for one in jobs]
        rounds: list[tuple[Kernel, Job]] = [(round_rows, one) for one in self._tables.jobs]
        self.work = [*rounds, *_in_chains(every)]

    def reset(self) -> None:
        """Be ready to be computed again."""
        for rounding_job in self._tables.jobs:
            rounding_job.taken = 0
        for jobs in self._jobs:
            for one in jobs:
                one.taken = 0

    def read_from(self, x: Tensor) -> None:
        """Another x of the same shape from now on."""
        for rounding_job in self._tables.jobs:
            rounding_job.x = x.data_ptr()
        for jobs in self._jobs:
            for one in jobs:
                one.x = x.data_ptr()

    def write_to(self, outs: Sequence[Tensor]) -> None:
        """Other results of the same shapes from now on."""
        for jobs, out in zip(self._jobs, outs, strict=True):
            for one in jobs:
                one.out = out.data_ptr()

    def add(self, biases: Sequence[Tensor | None]) -> None:
        """Other biases of the same shapes from now on."""
        for jobs, bias in zip(self._jobs, biases, strict=True):
            for one in jobs:
                one.bias = _address(bias)


def multiply_together(x: Tensor, factors: Sequence[Product]) -> list[Tensor]:
    """The product of the same rows of x with several matrices, as one piece of work for the threads.

    Args:
        x: ``[batch, cols]``, of any dtype.
        factors: as of :class:`Together`.

    Returns:
        For each float32 ``[batch, rows]``.

    Raises:
        IndexError: a task does not exist.
    """
    x = padded(x)
    batch = x.shape[0]  # len(x) takes longer
    found = [torch.empty(batch, plan.rows, dtype=torch.float32, device="cpu") for plan, *_ in factors]
    threads = threads_for(factors, batch)
    together = Together(x, factors, found, threads)  # keeps the jobs, of which the kernel knows only addresses
    for work, one in together.work:
        work(one, threads)
    return found


def threads_for(factors: Sequence[Product], batch: int) -> int:
    """How many threads are worth waking for products with `batch` rows of x."""
    return _threads(sum([plan.lookups for plan, *_ in factors]) * batch)


def _threads(lookups: int) -> int:
    """How many are worth waking for so many bits to look up."""
    return parallel.num_threads() if lookups >= ONE_THREAD_BELOW else 1


def padded(x: Tensor) -> Tensor:
    """`x` as kernels read it: float32, contiguous, columns up to whole words."""
    if x.dtype != torch.float32 or not x.is_contiguous():
        x = x.detach().float().contiguous()
    return F.pad(x, (0, -x.shape[1] % WORD)) if x.shape[1] % WORD else x


def plan(w: PlaneMatrix) -> Plan | None:
    """The plan of `w`, kept with its planes for as long as all tensors of `w` stay in the same memory.

    None for matrices that lookups cannot multiply: those that cannot be tiled, and codebooks whose levels are not
    consecutive integers, if they have more than 4 bits, or the machine has no lookup for them.
    """
    kept: Plan | None = getattr(w.planes, "_lowbit_plan", None)
    if kept is not None and kept.of == _identity(w):
        return kept
    if not tiles.can_tile(w):
        return None
    looked_up = w.bits <= 4 and has_codebook_lookup(features())
    if w.codebook is not None and not looked_up and zero_of(w) is None:
        return None
    made = Plan(w if w.is_tiled else tiles.tile(w))
    if tiles.is_ready(w):
        w.planes._lowbit_plan = made  # type: ignore[attr-defined]
    return made


def forget_plan(planes: Tensor) -> None:
    """Drop the plan that is kept with `planes`; it holds on to their memory."""
    planes.__dict__.pop("_lowbit_plan", None)


def zero_of(w: PlaneMatrix) -> float | None:
    """The code that is a weight of 0, if it is the same for the whole matrix and codes count in steps of one scale.

    So it is for the uniform codec without zeros, affine without offsets, and a codebook of consecutive integers such as
    GGUF's ``(d * s) * (q - 32)``. A product with it has the same terms; decoding keeps to the codec's own operations.
    """
    if w.codec in ("uniform", "affine"):
        return 0.0 if w.shift is None else None
    if w.codebook is None:
        return None
    levels = w.codebook.detach()
    steps = torch.arange(len(levels), dtype=levels.dtype, device="cpu")
    return -float(levels[0]) if torch.equal(levels, levels[0] + steps) else None


@functools.cache
def most_rows(bits: int, dtype: torch.dtype, mixed: bool, rounds: bool = False) -> float:
    """Rows of x up to which lookups are faster than decoding the weight for ``torch.mm``.

    The lookups for a row grow with `bits`; a row of ``torch.mm`` always takes as long: in bfloat16 half of what it
    takes in float32, where the machine has instructions for it. Rows of several tasks (`mixed`) take more than one
    product then. Lookups of bytes take less than half as long (`rounds`). The measurements are in
    tools/benchmarks/README.md.
    """
    if rounds:
        if bits <= 6 and dtype != torch.bfloat16 and "avx512vbmi" in features():
            return float("inf")
        return 2.5 * most_rows(bits, dtype, mixed)
    if "avx512f" not in features():
        return (104 if "avx2" in features() else 14) // bits
    if dtype == torch.bfloat16 and "avx512bf16" in features():
        if bits <= levels.MOST_BITS and not mixed:  # weights are looked up, in a quarter of the time of full decoding
            return 60 // bits
        return float("inf") if bits == 1 else (128 if mixed else 64) // (bits - 1)
    return float("inf") if bits <= 3 else 192 // bits


def _identity(w: PlaneMatrix) -> tuple[int | bytes, ...]:
    """What a plan depends on: where the tensors are, the precision, the values of the codebook, and those of parameters
    of ragged rows, of which it has copies in another order: torch counts their changes.
    """
    planes, scales, offsets, zeros, codebook, row_bits, _, bits, *_ = w
    if codebook is None and row_bits is None:
        return planes.data_ptr(), scales.data_ptr(), _address(offsets), _address(zeros), bits
    levels = b"" if codebook is None else tiles.array_of(codebook).tobytes()
    changes = () if row_bits is None else tuple(ragged.changes(t) for t in (*w[1:4], row_bits))
    return planes.data_ptr(), scales.data_ptr(), _address(offsets), _address(zeros), levels, *changes, bits


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class Scratch(NamedTuple):
    """Memory of one thread, by address."""

    tables: int  # float32 [batch, block, 8, 16]: signed sums of x, block being min(BLOCK, words in a group)
    sums: int  # float32 [batch]: sums of x; both only where x is not rounded
    scales: int  # float32 [MOST_PLANES, TILES * LANES]
    shift: int  # float32 [TILES * LANES]
    parts: int  # float32 [parts, batch (stride), rows of a chunk]: the results
    stride: int


class Block(NamedTuple):
    """Some words of one group: those whose tables are made together."""

    group: int
    word: int  # of the row, in which the group begins
    byte: int  # of that word, likewise
    first: int  # word of the block, counted from the group's first
    words: int
    group_words: int  # of this group, which may be short


@kernel(ProductJob)
def _multiply(job):
    """Take one chunk after another of `job`, see the head of this file; then go on with the next job."""
    _work(job, 0)


@kernel(ProductJob)
def _multiply_rounded(job):
    """The same for jobs that have tables: with 8-bit activations."""
    _work(job, 1)


@numba.njit(forceinline=True)
def _work(job, ROUNDED):
    literally(ROUNDED)
    while True:
        all_tiles = job.padded_rows // LANES
        x_words = (job.x_stride + WORD_X - 1) // WORD_X  # the file may pad rows to one word more
        whole, most = job.group_words, job.strips * STRIP
        block = min(whole, BLOCK)
        parts = np.empty(job.parts * job.batch * most * LANES, np.float32)
        tables = np.empty(0 if ROUNDED else job.batch * block * (WORD_TABLES // 4), np.float32)
        room = np.empty((MOST_PLANES + 1) * STRIP * LANES + job.batch, np.float32)
        scales = room.ctypes.data
        shift = scales + MOST_PLANES * STRIP * VECTOR
        scratch = Scratch(tables.ctypes.data, shift + STRIP * VECTOR, scales, shift, parts.ctypes.data, most * VECTOR)
        while True:
            chunk: int = take(job)
            if chunk >= job.chunks:
                break
            first = chunk * most
            count = min(most, all_tiles - first)
            parts[:] = 0
            for g in range(job.groups):
                word, byte = g // job.groups_in_word * whole, g % job.groups_in_word * HALF_WORD
                here, stored = min(whole, x_words - word), min(whole, job.words - word)
                for b in range(0, here, block):
                    words = Block(g, word, byte, b, min(block, here - b), stored)
                    if not ROUNDED:
                        _make_tables(job, words, scratch)
                    t = 0
                    while t < count:
                        if count - t < STRIP:
                            _add_block(job, words, scratch, first + t, scratch.parts + t * VECTOR, 1, ROUNDED)
                            t += 1
                        else:
                            _add_block(job, words, scratch, first + t, scratch.parts + t * VECTOR, STRIP, ROUNDED)
                            t += STRIP
            _finish(job, scratch, first * LANES, min(count * LANES, job.rows - first * LANES))
        keep((parts, tables, room))
        if job.next == 0:
            break
        job = job_at(job, job.next)


@numba.njit
def _make_tables(job, block, scratch):
    """Tables of every row of x over `block`, and the sums of x."""
    sums, stride = floats_at(scratch.sums), min(job.group_words, BLOCK) * WORD_TABLES
    x = _x_of(job, block)
    for r in range(job.batch):
        if job.groups_in_word == 1:
            sums[r] = set_tables(x + r * job.x_stride, scratch.tables + r * stride, block.words, WHOLE_WORD)
        else:
            sums[r] = set_tables(x + r * job.x_stride, scratch.tables + r * stride, block.words, HALF_WORD)


@numba.njit(forceinline=True)
def _x_of(job, block):
    """Address of the first activation of `block`, in the first row of x."""
    return job.x + (block.word + block.first) * WORD_X + block.byte * (WORD_X // 4)


@numba.njit(forceinline=True)
def _add_block(job, block, scratch, tile, y, TILES, ROUNDED):
    """Add the product over `block` of TILES tiles from `tile` on to their results at address `y`.

    For every codec but the codebook, a product is planes times scales, plus the sum of x times a shift.
    """
    literally(TILES)
    literally(ROUNDED)
    batch, bits = job.batch, job.bits
    words = job.planes + ((tile * job.words + block.word) * bits + block.first) * VECTOR + block.byte
    if job.terms == 0 and job.row_factors == 0:
        _set_parameters(job, block.group, scratch, tile, bits, np.int64(-1), TILES)
        r = np.int64(0)  # a literal 0 would be a type, and the functions compiled for it once more
        while r < batch:
            if batch - r >= 4:
                _add_rows(job, block, scratch, words, bits, r, y, TILES, 4, ROUNDED)
                r += 4
            elif batch - r >= 2:
                _add_rows(job, block, scratch, words, bits, r, y, TILES, 2, ROUNDED)
                r += 2
            else:
                _add_rows(job, block, scratch, words, bits, r, y, TILES, 1, ROUNDED)
                r += 1
    else:
        task_ids = longs_at(job.task_ids)
        for r in range(batch):
            _set_parameters(job, block.group, scratch, tile, bits, task_ids[r], TILES)
            _add_rows(job, block, scratch, words, bits, r, y, TILES, 1, ROUNDED)


@numba.njit(forceinline=True)
def _add_rows(job, block, scratch, words, bits, r, y, TILES, ROWS, ROUNDED):
    """The same for ROWS rows of x from `r` on; `words` is the address of the first word, `bits` the planes to read."""
    literally(TILES)
    literally(ROWS)
    literally(ROUNDED)
    tile_stride = job.words * job.bits * VECTOR
    plane_stride, table_stride = block.group_words * VECTOR, min(job.group_words, BLOCK) * WORD_TABLES
    x = _x_of(job, block) + r * job.x_stride
    tables = scratch.tables + r * table_stride
    to = y + r * scratch.stride
    ahead = block.words * VECTOR  # the next block, or the next group, of the same tiles
    if block.first + block.words == block.group_words:
        next_group = job.group_words * bits * VECTOR - block.first * VECTOR
        ahead = next_group if block.group + 1 < job.groups else 0
    sums, sum_stride = scratch.sums + r * 4, 4
    if ROUNDED:
        unit = (block.group * ((job.group_words + BLOCK - 1) // BLOCK) + block.first // BLOCK) * 4
        unit += r * job.unit_stride
        sums, sum_stride = job.totals + unit, job.unit_stride
    if job.codec == CODEBOOK and not ROUNDED:
        if job.groups_in_word == 1:
            add_levels(
                words, x, job.codebook, scratch.scales, to,
                block.words, bits,
                tile_stride, plane_stride, job.x_stride, scratch.stride, ahead,
                TILES, ROWS, WHOLE_WORD,
            )  # fmt: skip
        else:
            add_levels(
                words, x, job.codebook, scratch.scales, to,
                block.words, bits,
                tile_stride, plane_stride, job.x_stride, scratch.stride, ahead,
                TILES, ROWS, HALF_WORD,
            )  # fmt: skip
        return
    done = 0
    for part in range(job.parts - job.changes_only):  # each tuned plane alone, then all others
        left = bits - done
        planes = left if part == job.parts - 1 else min(1, left)
        if planes > 0 and ROUNDED:
            _add_rounded(job, block, scratch, words, done, planes, r, job.units + unit, to, ahead, TILES, ROWS)
        elif planes > 0 and job.groups_in_word == 1:
            add_planes(
                words + done * plane_stride, tables, x, scratch.scales + done * TILES * VECTOR, to,
                block.words, planes,
                tile_stride, plane_stride, table_stride, job.x_stride, scratch.stride, ahead,
                TILES, ROWS, WHOLE_WORD,
            )  # fmt: skip
        elif planes > 0:
            add_planes(
                words + done * plane_stride, tables, x, scratch.scales + done * TILES * VECTOR, to,
                block.words, planes,
                tile_stride, plane_stride, table_stride, job.x_stride, scratch.stride, ahead,
                TILES, ROWS, HALF_WORD,
            )  # fmt: skip
        done += planes
        if part < job.parts - 1:
            to += job.batch * scratch.stride
    if job.shift != 0:
        add_shift(sums, scratch.shift, to, sum_stride, scratch.stride, TILES, ROWS)


@numba.njit(forceinline=True)
def _add_rounded(job, block, scratch, words, done, planes, r, units, to, ahead, TILES, ROWS):
    """Of :func:`_add_rows` what `planes` planes from `done` on add at address `to`, with 8-bit activations."""
    literally(TILES)
    literally(ROWS)
    tile_stride, plane_stride = job.words * job.bits * VECTOR, block.group_words * VECTOR
    tables = job.tables + r * job.table_stride
    tables += (block.word + block.first) * WORD_BYTE_TABLES + block.byte * BYTE_TABLE
    multipliers = job.multipliers + r * job.multiplier_stride
    multipliers += (block.word + block.first) * WORD_MULTIPLIERS + block.byte
    words, scales = words + done * plane_stride, scratch.scales + done * TILES * VECTOR
    if job.groups_in_word == 1:
        add_planes_of_bytes(
            words, tables, multipliers, units, scales, to,
            block.words, planes,
            tile_stride, plane_stride, job.table_stride, job.multiplier_stride, job.unit_stride, scratch.stride, ahead,
            TILES, ROWS, WHOLE_WORD,
        )  # fmt: skip
    else:
        add_planes_of_bytes(
            words, tables, multipliers, units, scales, to,
            block.words, planes,
            tile_stride, plane_stride, job.table_stride, job.multiplier_stride, job.unit_stride, scratch.stride, ahead,
            TILES, ROWS, HALF_WORD,
        )  # fmt: skip


@numba.njit(forceinline=True)
def _set_parameters(job, g, scratch, tile, bits, task, TILES):
    """Fill scales and shift of `scratch` for group `g` of TILES tiles, with what `task` adds to scales, if it is >= 0.

    Scales of the uniform and the affine codec are ``scale * 2**(n - 2 - p)``, since a bit adds or subtracts half of
    what it counts in a code, around the middle code ``(2**n - 1) / 2``.
    """
    literally(TILES)
    width, index, stride = TILES * LANES, g * job.padded_rows + tile * LANES, job.groups * job.padded_rows
    ahead = job.padded_rows if g + 1 < job.groups else 0
    scale_planes = bits if job.codec == BCQ else 1
    read_parameters(job.scales, scratch.scales, scale_planes, index, stride, ahead, job.scales_dtype, TILES)
    scales, shift = floats_at(scratch.scales), floats_at(scratch.shift)
    if task >= 0:
        all_padded = (job.all_rows + LANES - 1) // LANES * LANES
        for p in range(min(job.term_planes, bits)):
            terms = floats_at(job.terms + 4 * ((task * job.term_planes + p) * job.groups + g) * all_padded)
            for i in range(width):
                scales[p * width + i] += terms[_place(job, tile * LANES + i)]
        if job.row_factors != 0:
            factors = floats_at(job.row_factors + 4 * task * job.all_rows)
            for i in range(min(width, job.rows - tile * LANES)):
                scales[i] *= np.float32(1.0) + factors[_place(job, tile * LANES + i)]
    if job.shift != 0:
        read_parameters(
            job.shift, scratch.shift, 1, index * job.shift_step, stride, ahead * job.shift_step, job.shift_dtype, TILES
        )
    if job.codec == UNIFORM or job.codec == AFFINE:
        middle = np.float32((1 << bits) - 1) * np.float32(0.5)
        for i in range(width):
            shift[i] = (middle - shift[i]) * scales[i] if job.codec == UNIFORM else middle * scales[i] + shift[i]
        for p in range(bits - 1, -1, -1):  # plane 0 last: its place has the scale itself
            factor = np.float32(1 << (bits - 1 - p)) * np.float32(0.5)
            for i in range(width):
                scales[p * width + i] = scales[i] * factor


@numba.njit(forceinline=True)
def _place(job, row):
    """Which row of the whole matrix `row` of the job's is."""
    return row if job.places == 0 else longs_at(job.places)[row]


@numba.njit
def _finish(job, scratch, first, count):
    """Sum up the parts of rows `first` to ``first + count`` and write them to the result."""
    batch, parts, tuned = job.batch, job.parts, job.factor_planes
    for r in range(batch):
        sums = floats_at(scratch.parts + ((parts - 1) * batch + r) * scratch.stride)
        task = longs_at(job.task_ids)[r] if tuned > 0 else -1
        for p in range(tuned):
            part = floats_at(scratch.parts + (p * batch + r) * scratch.stride)
            if p < parts - 1 and job.changes_only == 0:
                for i in range(count):
                    sums[i] += part[i]
            if task >= 0:
                delta = floats_at(job.factors + (task * tuned + p) * job.all_rows * 4)
                for i in range(count):
                    sums[i] += delta[_place(job, first + i)] * part[i]
        out, bias = floats_at(job.out + r * job.all_rows * 4), floats_at(job.bias)
        if job.bias == 0:
            for i in range(count):
                out[_place(job, first + i)] = sums[i]
        else:
            for i in range(count):
                place = _place(job, first + i)
                out[place] = sums[i] + bias[place]
