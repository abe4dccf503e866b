"""``x @ weight.T`` for a few rows of x, straight from the packed form; the weight is never decoded.

A plane's part of a product over one group is ``scale * sum of ±x``. Four columns have 16 such sums, which are tabled
once for many rows of the matrix; four bits of a plane then look one up. With groups g, planes p, and X the sum of x:

* bcq: ``y = sum_g (sum_p scale[p] * S[p] + offset * X)``, S[p] being the signed sum by the bits of plane p.
* uniform: a code is ``(sum_p ±2**(n-1-p) + 2**n - 1) / 2``, so it is bcq with the scales ``scale * 2**(n-2-p)`` and the
  offset ``scale * ((2**n - 1) / 2 - zero)``.
* codebook: ``y = sum_g scale * sum codebook[code] * x``.

A task that multiplies the scales of planes p by ``1 + delta`` adds ``delta * part[p]``: parts of tuned planes are kept
apart from the rest, and rows of several tasks share all of the work but the last sum (TSK-8). What is added to the
scales of single groups is gathered by each row's task while these are read.

Work is cut into chunks of *strips*, four tiles each. A chunk goes group by group, makes the tables of x for one, and
uses them for all its strips while they are in the nearest cache. Every thread makes the tables anew: that takes no
longer than to fetch them from where another has put them, and there is nothing to keep between calls.
"""

from __future__ import annotations

import functools

import numba
import numpy as np
import torch
import torch.nn.functional as F
from numba import carray, literally  # type: ignore[attr-defined]
from torch import Tensor

from ...machine.llvm import LANES, features
from ..batch import check_bias, check_task_ids, check_tasks
from ..matrix import PlaneMatrix
from ..parameter_order import group_major
from . import parallel, tiles
from .intrinsics import (
    F16_KIND,
    F32_KIND,
    add_levels,
    add_planes,
    add_shift,
    address_of,
    bytes_at,
    floats_at,
    has_codebook_lookup,
    longs_at,
    set_tables,
    take,
    widen,
)
from .jobs import BCQ, CODEBOOK, CODECS, KINDS, UNIFORM
from .parallel import Kernel

TILES = 4  # of a strip
BLOCK = 8  # words whose tables are made at a time: 4 KiB for a row of x, in the nearest cache
SCRATCH = 1 << 14  # floats of results that a chunk keeps: 64 KiB, of the second-level cache
MOST_STRIPS = 8  # of a chunk, for one set of tables
ALONE = 1 << 20  # lookups' bits below which waking other threads costs more than it brings
CHUNKS = 4  # for each thread: evens out a busy core

# Fields of a job, int64 each, after the counter; addresses are 0 where there is nothing.
(
    _CHUNKS, _STRIPS, _ROWS, _BITS, _WORDS, _WHOLE, _GROUPS, _CODEC,
    _PLANES, _STARTS, _TILE_BITS, _ROW_BITS,
    _SCALES, _SCALES_KIND, _SHIFT, _SHIFT_KIND, _CODEBOOK,
    _X, _X_STRIDE, _BATCH, _PARTS, _BIAS,
    _TASK_IDS, _FACTORS, _TUNED, _TERMS, _TERM_PLANES, _OUT,
) = range(1, 29)  # fmt: skip
_FIELDS = 29


class Plan:
    """All that is the same in every product with one matrix.

    Args:
        w: in the packed form (:mod:`.tiles`).
    """

    def __init__(self, w: PlaneMatrix) -> None:
        shift = w.shift
        self.of = _identity(w)
        self.rows, self.groups = w.rows, w.groups
        self.planes = w.bits
        self.most_rows = most_rows(w.bits)
        self.cols, self.words, self.whole = w.cols, tiles.words(w), tiles.group_words(w)
        self.one_part = w.codec != "bcq"
        self.strips = -(-self.rows // (TILES * LANES))
        self.lookups = self.rows * w.cols * w.bits
        if w.codec == "uniform" and shift is None:
            shift = torch.zeros_like(w.scales[0])
        scales, shift = group_major(w.scales.detach()), None if shift is None else group_major(shift.detach())
        row_bits = None if w.row_bits is None else w.row_bits.detach().clamp(max=w.bits)
        bits = None if row_bits is None else tiles.tile_bits(w)
        starts = None if bits is None else tiles.tile_starts(w, bits)
        planes = w.planes.detach() if tiles.has_margin(w.planes) else F.pad(w.planes.detach().flatten(), (0, 64))
        self.alive = (planes, scales, shift, bits, starts, row_bits)
        self.codebook = w.codebook
        self.job = np.array([
            0, 0, 0, self.rows, w.bits, self.words, self.whole, self.groups, CODECS[w.codec], planes.data_ptr(),
            0 if starts is None else starts.ctypes.data, 0 if bits is None else bits.ctypes.data, _address(row_bits),
            scales.data_ptr(), KINDS[scales.dtype], _address(shift), 0 if shift is None else KINDS[shift.dtype],
            *[0] * (_FIELDS - _CODEBOOK),
        ], np.int64)  # fmt: skip

    def multiply(self, x: Tensor, bias: Tensor | None, deltas: Tensor | None, task_ids: Tensor | None) -> Tensor:
        """``x @ weight.T + bias``, float32 ``[batch, rows]``; tasks as in :func:`..naive.linear`.

        Args:
            x: ``[batch, cols]``, of whatever dtype.
            bias: float32 ``[rows]``, contiguous.
        """
        x = x.detach().float().contiguous()
        if self.cols % tiles.WORD:
            x = F.pad(x, (0, -self.cols % tiles.WORD))
        batch, tuned, parts = len(x), 0, 1
        out, job = torch.empty(batch, self.rows), self.job.copy()
        check_bias(self.rows, bias)
        if deltas is not None:
            deltas, task_ids = self._checked(deltas, task_ids, batch)
            job[_TASK_IDS] = task_ids.data_ptr()
            if deltas.dim() == 3:
                tuned = deltas.shape[1]
                parts = 1 if self.one_part else 1 + tuned
                job[_FACTORS], job[_TUNED] = deltas.data_ptr(), tuned
            else:
                deltas = group_major(deltas)
                job[_TERMS], job[_TERM_PLANES] = deltas.data_ptr(), deltas.shape[1]
        if self.codebook is not None:  # read anew: it may have been written to
            codebook = F.pad(self.codebook.detach(), (0, 16 - len(self.codebook)))
            job[_CODEBOOK] = codebook.data_ptr()
        threads = parallel.threads() if self.lookups * batch >= ALONE else 1
        room = min(MOST_STRIPS, SCRATCH // (batch * parts * TILES * LANES))
        strips = max(1, min(room, -(-self.strips // (threads * CHUNKS))))
        job[_CHUNKS], job[_STRIPS] = -(-self.strips // strips), strips
        job[_X : _BIAS + 1] = x.data_ptr(), x.shape[1] * 4, batch, parts, _address(bias)
        job[_OUT] = out.data_ptr()
        _multiply(job, threads)
        return out

    def _checked(self, deltas: Tensor, task_ids: Tensor | None, batch: int) -> tuple[Tensor, Tensor]:
        """Deltas and ids as the kernel reads them, which looks at no bounds."""
        check_tasks((1 if self.one_part else self.planes, self.rows, self.groups), deltas, task_ids, batch)
        if task_ids is None:
            task_ids = torch.zeros(batch, dtype=torch.int64)
        check_task_ids(deltas, task_ids)
        return deltas.detach().float().contiguous(), task_ids.long().contiguous()


def plan(w: PlaneMatrix) -> Plan | None:
    """The plan of `w`, kept with its planes for as long as it is the same memory that it is about.

    None for what is not multiplied by lookups: matrices without a packed form, and codebooks of more than 4 bits, with
    ragged rows, or on machines without a lookup for them.
    """
    kept: Plan | None = getattr(w.planes, "_lowbit_plan", None)
    if kept is not None and kept.of == _identity(w):
        return kept
    if not tiles.can_tile(w):
        return None
    if w.codebook is not None and (w.bits > 4 or w.row_bits is not None or not has_codebook_lookup(features())):
        return None
    made = Plan(w if w.is_tiled else tiles.tile(w))
    if tiles.has_product_kernel(w):
        w.planes._lowbit_plan = made  # type: ignore[attr-defined]
    return made


def forget_plan(planes: Tensor) -> None:
    """Let go of what is kept for `planes`, and of their memory with it."""
    planes.__dict__.pop("_lowbit_plan", None)


@functools.cache
def most_rows(bits: int) -> float:
    """Rows of x up to which lookups are faster than decoding the weight for the library's product.

    A row costs as many lookups as there are bits, and the library's row always the same; tools/benchmarks/README.md has the
    measurements.
    """
    if "avx512f" in features():
        return float("inf") if bits <= 3 else 192 // bits
    return (104 if "avx2" in features() else 14) // bits


def _identity(w: PlaneMatrix) -> tuple[int | bytes, ...]:
    """What tells one matrix from another: where its tensors are, and how its rows lie, which a plan has worked out."""
    planes, scales, offsets, zeros, codebook, row_bits, _, bits, *_ = w
    if codebook is None and row_bits is None:
        return planes.data_ptr(), scales.data_ptr(), _address(offsets), _address(zeros), bits
    rows = b"" if row_bits is None else row_bits.detach().numpy().tobytes()
    return planes.data_ptr(), scales.data_ptr(), _address(offsets), _address(zeros), _address(codebook), rows, bits


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@Kernel
def _multiply(pointer):
    """One chunk after another of a job (see :class:`Plan`)."""
    job = carray(pointer, _FIELDS)
    batch, parts, rows, whole = job[_BATCH], job[_PARTS], job[_ROWS], job[_WHOLE]
    all_tiles, words = (rows + 15) // 16, (job[_X_STRIDE] + 127) // 128
    most = job[_STRIPS] * TILES
    block = min(whole, BLOCK)
    y = np.empty(parts * batch * most * 16, np.float32)
    tables = np.empty(batch * block * 128, np.float32)
    room = np.empty(9 * TILES * 16 + batch, np.float32)
    scales = room.ctypes.data
    shift = scales + 8 * TILES * 64
    sums = shift + TILES * 64
    while True:
        chunk: int = take(address_of(pointer))
        if chunk >= job[_CHUNKS]:
            return
        first = chunk * most
        count = min(most, all_tiles - first)
        y[:] = 0
        for g in range(job[_GROUPS]):
            here = min(whole, words - g * whole)
            for b in range(0, here, block):
                n = min(block, here - b)
                _make_tables(pointer, g * whole + b, n, tables.ctypes.data, block * 512, sums)
                t = 0
                while t < count:
                    to = y.ctypes.data + t * 64
                    if job[_ROW_BITS] != 0 or count - t < TILES:
                        _block(pointer, g, b, n, tables.ctypes.data, first + t, to, most * 64, scales, shift, sums, 1)
                        t += 1
                    else:
                        _block(pointer, g, b, n, tables.ctypes.data, first + t, to, most * 64, scales, shift, sums, 4)
                        t += TILES
        _finish(job, first * 16, min(count * 16, rows - first * 16), y, most * 16)


@numba.njit
def _make_tables(pointer, first, n, tables, stride, sums):
    """Tables of words `first` to ``first + n`` of every row of x, `stride` bytes apart, and the sums of x over them."""
    job = carray(pointer, _FIELDS)
    totals = carray(floats_at(sums), job[_BATCH])
    for r in range(job[_BATCH]):
        totals[r] = set_tables(job[_X] + r * job[_X_STRIDE] + first * 128, tables + r * stride, n * 8)


@numba.njit(forceinline=True)
def _block(pointer, g, b, n, tables, tile, y, y_stride, scales, shift, sums, TILES):
    """Add what words b to b + n of group `g` give, of TILES tiles, to the parts at address `y`.

    These are ``[parts, batch, y_stride bytes]``. Parameters go through `scales` and `shift`: for every codec but the
    codebook, a product is planes times scales, plus the sum of x times a shift.
    """
    literally(TILES)
    job = carray(pointer, _FIELDS)
    batch, bits, start, stride = job[_BATCH], job[_BITS], tile * job[_WORDS] * job[_BITS], job[_WORDS] * job[_BITS] * 64
    if job[_ROW_BITS] != 0:
        bits, start = (
            carray(longs_at(job[_TILE_BITS]), tile + 1)[tile],
            carray(longs_at(job[_STARTS]), tile + 1)[tile],
        )
    words = job[_PLANES] + (start + g * job[_WHOLE] * bits + b) * 64
    if job[_TERMS] == 0:
        _parameters(pointer, g, tile, bits, scales, shift, -1, TILES)
        r = 0
        while r < batch:
            if batch - r >= 4:
                _rows(pointer, g, b, n, tables, words, stride, bits, r, y, y_stride, scales, shift, sums, TILES, 4)
                r += 4
            elif batch - r >= 2:
                _rows(pointer, g, b, n, tables, words, stride, bits, r, y, y_stride, scales, shift, sums, TILES, 2)
                r += 2
            else:
                _rows(pointer, g, b, n, tables, words, stride, bits, r, y, y_stride, scales, shift, sums, TILES, 1)
                r += 1
    else:
        ids = carray(longs_at(job[_TASK_IDS]), batch)
        for r in range(batch):
            _parameters(pointer, g, tile, bits, scales, shift, ids[r], TILES)
            _rows(pointer, g, b, n, tables, words, stride, bits, r, y, y_stride, scales, shift, sums, TILES, 1)


@numba.njit(forceinline=True)
def _rows(pointer, g, b, n, tables, words, stride, bits, r, y, y_stride, scales, shift, sums, TILES, ROWS):
    """The same for ROWS rows of x from `r` on."""
    literally(TILES)
    literally(ROWS)
    job = carray(pointer, _FIELDS)
    batch, parts, whole, x_stride = job[_BATCH], job[_PARTS], job[_WHOLE], job[_X_STRIDE]
    plane, table_stride = min(whole, job[_WORDS] - g * whole) * 64, min(whole, BLOCK) * 512
    x, table = job[_X] + r * x_stride + (g * whole + b) * 128, tables + r * table_stride
    to = y + r * y_stride
    ahead = n * 64  # the next block, or the next group, of the same tiles
    if b + n == min(whole, job[_WORDS] - g * whole):
        ahead = whole * bits * 64 - b * 64 if g + 1 < job[_GROUPS] else 0
    if job[_CODEC] == CODEBOOK:
        add_levels(words, stride, plane, n, bits, ahead, x, x_stride, job[_CODEBOOK], scales, to, y_stride, TILES, ROWS)
        return
    done = 0
    for part in range(parts):  # planes with a part of their own, then all that are left
        left = bits - done
        some = left if part == parts - 1 else min(1, left)
        if some > 0:
            add_planes(words + done * plane, stride, plane, n, some, ahead, table, table_stride, x, x_stride,
                       scales + done * TILES * 64, to, y_stride, TILES, ROWS)  # fmt: skip
        done += some
        if part < parts - 1:
            to += batch * y_stride
    if job[_SHIFT] != 0:
        add_shift(sums + r * 4, 4, shift, to, y_stride, TILES, ROWS)


@numba.njit(forceinline=True)
def _parameters(pointer, g, tile, bits, scales, shift, task, TILES):
    """Scales of the planes and the shift of group `g` of TILES tiles, of `task` where tasks add to scales.

    `scales` is filled as ``[bits, TILES * LANES]``. For the uniform codec it is ``scale * 2**(n - 2 - p)``, since a bit
    adds or takes half of what it counts in a code, around the middle code ``(2**n - 1) / 2``.
    """
    literally(TILES)
    job = carray(pointer, _FIELDS)
    width, codec, ragged = TILES * 16, job[_CODEC], job[_ROW_BITS] != 0
    _widen(job[_SCALES], job[_SCALES_KIND], pointer, bits if codec == BCQ else 1, g, tile, scales, TILES)
    scale_of, shift_of = carray(floats_at(scales), bits * width), carray(floats_at(shift), width)
    if task >= 0:
        padded = (job[_ROWS] + 15) // 16 * 16
        for p in range(min(job[_TERM_PLANES], bits)):
            index = ((task * job[_TERM_PLANES] + p) * job[_GROUPS] + g) * padded + tile * 16
            terms = carray(floats_at(job[_TERMS] + 4 * index), width)
            for i in range(width):
                scale_of[p * width + i] += terms[i]
    if job[_SHIFT] != 0:
        _widen(job[_SHIFT], job[_SHIFT_KIND], pointer, 1, g, tile, shift, TILES)
    if ragged:
        _ragged_parameters(pointer, tile, bits, scales, shift, TILES)
    elif codec == UNIFORM:
        middle = np.float32((1 << bits) - 1) * np.float32(0.5)
        for i in range(width):
            shift_of[i] = (middle - shift_of[i]) * scale_of[i]
        for p in range(bits - 1, -1, -1):  # plane 0 last: its place has the scale itself
            factor = np.float32(1 << (bits - 1 - p)) * np.float32(0.5)
            for i in range(width):
                scale_of[p * width + i] = scale_of[i] * factor


@numba.njit
def _ragged_parameters(pointer, tile, bits, scales, shift, TILES):
    """The same where rows have bits of their own: planes that a row lacks count nothing (MIX-4)."""
    literally(TILES)
    job = carray(pointer, _FIELDS)
    width = TILES * 16
    scale_of, shift_of = carray(floats_at(scales), bits * width), carray(floats_at(shift), width)
    of_rows = carray(bytes_at(job[_ROW_BITS]), job[_ROWS])
    for i in range(width):
        row, scale = tile * 16 + i, scale_of[i]
        n = np.int64(of_rows[row]) if row < job[_ROWS] else 1
        if job[_CODEC] == UNIFORM:
            shift_of[i] = (np.float32((1 << n) - 1) * np.float32(0.5) - shift_of[i]) * scale
            for p in range(n):
                scale_of[p * width + i] = scale * (np.float32(1 << (n - 1 - p)) * np.float32(0.5))
        for p in range(n, bits):
            scale_of[p * width + i] = np.float32(0.0)


@numba.njit(forceinline=True)
def _widen(address, kind, pointer, count, g, tile, out, TILES):
    """Parameters of TILES tiles for `count` planes, in float32."""
    literally(TILES)
    job = carray(pointer, _FIELDS)
    padded = (job[_ROWS] + 15) // 16 * 16
    index, stride = g * padded + tile * 16, job[_GROUPS] * padded
    ahead = padded if g + 1 < job[_GROUPS] else 0
    if kind == F32_KIND:
        widen(address + 4 * index, 4 * stride, count, 4 * ahead, out, TILES, 0)
    elif kind == F16_KIND:
        widen(address + 2 * index, 2 * stride, count, 2 * ahead, out, TILES, 1)
    else:
        widen(address + 2 * index, 2 * stride, count, 2 * ahead, out, TILES, 2)


@numba.njit
def _finish(job, first, count, y, width):
    """Rows `first` and on of the result, `count` of them, from their parts ``[parts, batch, width]``."""
    batch, parts, tuned, rows = job[_BATCH], job[_PARTS], job[_TUNED], job[_ROWS]
    for r in range(batch):
        out = carray(floats_at(job[_OUT] + (r * rows + first) * 4), count)
        rest = y[((parts - 1) * batch + r) * width :]
        for i in range(count):
            out[i] = rest[i]
        if job[_BIAS] != 0:
            bias = carray(floats_at(job[_BIAS] + first * 4), count)
            for i in range(count):
                out[i] += bias[i]
        task = carray(longs_at(job[_TASK_IDS]), batch)[r] if tuned > 0 else -1
        for p in range(tuned):
            part = y[(p * batch + r) * width :]
            if p < parts - 1:
                for i in range(count):
                    out[i] += part[i]
            if task >= 0:
                delta = carray(floats_at(job[_FACTORS] + ((task * tuned + p) * rows + first) * 4), count)
                for i in range(count):
                    out[i] += delta[i] * part[i]
