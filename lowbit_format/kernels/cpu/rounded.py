"""8-bit activations of a product: its tables, made once for all matrices that the same x is multiplied with.

What is rounded, and how: :mod:`..rounded_sums`. The layout of the tables: :mod:`.byte_tables`. The float tables of an
exact product are made anew by every chunk, in its cache; a byte's are a quarter of their size, and take more
instructions than the lookups of a small chunk, which is why they are made before.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import parallel
from .byte_tables import MARGIN, WORD_MULTIPLIERS, WORD_TABLES, set_byte_tables
from .intrinsics import WORD_X
from .parallel import Job, job, kernel, take
from .tiles import BLOCK

ONE_THREAD_BELOW = 1 << 15  # activations: the tables of fewer take less time than waking other threads


@job
class RoundingJob(Job):
    """The tables of all rows of x, row by row. Addresses and strides as in :class:`.products.ProductJob`."""

    rows: int  # of x
    words: int  # of a row of x
    group_words: int
    groups: int
    groups_in_word: int
    x: int
    x_stride: int
    tables: int
    table_stride: int
    multipliers: int
    multiplier_stride: int
    units: int
    totals: int
    unit_stride: int


class Groups(NamedTuple):
    """How the columns of a matrix are grouped; all matrices with the same share the tables of x."""

    group_words: int  # in a whole group, or the one that groups share
    groups: int  # in a row
    groups_in_word: int

    @property
    def blocks(self) -> int:
        """Blocks of a group."""
        return -(-self.group_words // BLOCK)


class Rounded(NamedTuple):
    """x, rounded: addresses and strides as in :class:`.products.ProductJob`, in one piece of memory."""

    memory: Tensor  # must live as long as the products with it
    tables: int
    table_stride: int
    multipliers: int
    multiplier_stride: int
    units: int
    totals: int
    unit_stride: int

    def give(self, job: Any, first: int) -> None:
        """Tell a product's job where they are, from row `first` of x on."""
        job.table_stride, job.multiplier_stride = self.table_stride, self.multiplier_stride
        job.unit_stride = self.unit_stride
        job.tables = self.tables + first * self.table_stride
        job.multipliers = self.multipliers + first * self.multiplier_stride
        job.units, job.totals = self.units + first * self.unit_stride, self.totals + first * self.unit_stride


def rounded(x: Tensor, groups: Groups) -> Rounded:
    """`x` rounded for matrices that are grouped so.

    Args:
        x: float32 ``[n, columns padded to whole words]``, contiguous.
    """
    made, work = rounding(x, groups)
    round_rows(work, parallel.num_threads() if x.numel() >= ONE_THREAD_BELOW else 1)
    return made


def rounding(x: Tensor, groups: Groups) -> tuple[Rounded, RoundingJob]:
    """Room for what :func:`rounded` gives, and the job of :func:`round_rows` that fills it; `x` has to live as long."""
    rows, columns = x.shape
    work = RoundingJob.from_buffer_copy(_template(groups, columns))
    of_tables, of_multipliers, of_units = work.table_stride, work.multiplier_stride, work.unit_stride
    size = rows * (of_tables + of_multipliers + 2 * of_units) + MARGIN
    memory = torch.empty(size, dtype=torch.int8, device="cpu")
    tables = memory.data_ptr()
    units = tables + rows * of_tables
    totals = units + rows * of_units
    multipliers = totals + rows * of_units
    made = Rounded(memory, tables, of_tables, multipliers, of_multipliers, units, totals, of_units)
    work.rows, work.x = rows, x.data_ptr()
    work.tables, work.multipliers, work.units, work.totals = tables, multipliers, units, totals
    return made, work


@functools.lru_cache(maxsize=1024)
def _template(groups: Groups, columns: int) -> RoundingJob:
    """What is the same for all x of so many columns."""
    words = 4 * columns // WORD_X
    return RoundingJob(
        words=words,
        group_words=groups.group_words,
        groups=groups.groups,
        groups_in_word=groups.groups_in_word,
        x_stride=4 * columns,
        table_stride=words * WORD_TABLES,
        multiplier_stride=words * WORD_MULTIPLIERS,
        unit_stride=4 * groups.groups * groups.blocks,
    )


@kernel(RoundingJob)
def round_rows(job):
    """Take one row of x after another."""
    whole, in_word = job.group_words, job.groups_in_word
    while True:
        row: int = take(job)
        if row >= job.rows:
            break
        x, tables = job.x + row * job.x_stride, job.tables + row * job.table_stride
        multipliers = job.multipliers + row * job.multiplier_stride
        place = row * job.unit_stride
        for g in range(job.groups):
            word, half = g // in_word * whole, g % in_word
            here = min(whole, job.words - word)
            for b in range(0, whole, BLOCK):
                if b < here:
                    count = min(BLOCK, here - b) * 2 // in_word
                    first, unit, total = 2 * (word + b) + half, job.units + place, job.totals + place
                    set_byte_tables(x, tables, multipliers, first, count, unit, total)
                place += 4
