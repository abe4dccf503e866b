"""``x @ weight.T`` for a few rows of x, straight from the packed form; the weight is never decoded.

A plane's part of a product over one group is ``scale * sum of ±x``. Four columns have 16 such sums, which are tabled
once for all rows of the matrix; four bits of a plane then look one up. With groups g, planes p, and X the sum of x:

* bcq: ``y = sum_g (sum_p scale[p] * S[p] + offset * X)``, S[p] being the signed sum by the bits of plane p.
* uniform: a code is ``(sum_p ±2**(n-1-p) + 2**n - 1) / 2``, so ``y = sum_g scale * (H / 2 + ((2**n - 1) / 2 - zero) * X)``
  with ``H = 2 * (2 * S[0] + S[1]) + …``.
* codebook: ``y = sum_g scale * sum codebook[code] * x``.

A task that multiplies the scales of planes p by ``1 + delta`` adds ``delta * part[p]``: parts of tuned planes are kept
apart from the rest, and rows of several tasks share all of the work but the last sum (TSK-8). What is added to the
scales of single groups is gathered by each row's task while these are read.

Work is cut into chunks of *strips*, four tiles each; a chunk goes group by group over its strips, so that the tables of
a group stay in the nearest cache while all its planes are read.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from numba import carray, literally
from torch import Tensor

from ...vector_ir import LANES
from ..naive import Packed
from . import team, tiles
from .team import Kernel
from .vectors import (
    BF16_KIND,
    F16_KIND,
    F32_KIND,
    add_levels,
    add_lookups,
    add_scaled,
    add_shift,
    address_of,
    bytes_at,
    floats_at,
    longs_at,
    set_tables,
    take,
    widen,
)

TILES = 4  # of a strip
SCRATCH = 4096  # floats of results that a chunk keeps: 16 KiB, half of the nearest cache
ALONE = 1 << 20  # lookups' bits below which waking other threads costs more than it brings
CHUNKS = 4  # for each thread: evens out a busy core

BCQ, UNIFORM, CODEBOOK = 0, 1, 2
_CODECS = {"bcq": BCQ, "uniform": UNIFORM, "codebook": CODEBOOK}
_KINDS = {torch.float32: F32_KIND, torch.float16: F16_KIND, torch.bfloat16: BF16_KIND}

# Fields of a job, int64 each, after the counter; addresses are 0 where there is nothing.
(
    _CHUNKS, _STRIPS, _ROWS, _BITS, _WORDS, _WHOLE, _GROUPS, _CODEC,
    _PLANES, _STARTS, _TILE_BITS, _ROW_BITS,
    _SCALES, _SCALES_KIND, _SHIFT, _SHIFT_KIND, _CODEBOOK,
    _X, _TABLES, _SUMS, _BATCH, _PARTS,
    _BIAS, _TASK_IDS, _FACTORS, _TUNED, _TERMS, _TERM_PLANES, _OUT,
) = range(1, 30)  # fmt: skip
_FIELDS = 30


class Activations:
    """Rows of x with their tables and sums, which products with several matrices of one shape of groups can share.

    Args:
        x: float32 ``[batch, cols]``.
        words, whole: of a row of the matrix, and of its groups (see :mod:`.tiles`).
    """

    def __init__(self, x: Tensor, words: int, whole: int, threads: int) -> None:
        self.batch, width, groups = len(x), words * tiles.WORD, -(-x.shape[1] // (whole * tiles.WORD))
        if x.shape[1] == width:
            self.x = x.contiguous()
        else:
            self.x = x.new_zeros(self.batch, width)
            self.x[:, : x.shape[1]] = x
        self.tables = torch.empty(self.batch * width * 4)  # 16 sums of every 4 columns
        self.sums = torch.empty(self.batch, groups)
        addresses = (t.data_ptr() for t in (self.x, self.tables, self.sums))
        _make_tables(
            np.array([0, words, whole, groups, self.batch, *addresses], np.int64),
            threads if self.batch * width > 1 << 14 else 1,
        )


def multiply(
    w: Packed,
    x: Activations,
    bias: Tensor | None,
    deltas: Tensor | None,
    task_ids: Tensor | None,
    threads: int,
) -> Tensor:
    """``x @ weight.T + bias``, float32 ``[batch, rows]``; tasks as in :func:`..naive.linear`.

    Args:
        w: in the packed form (:mod:`.tiles`); a codebook has at most 4 bits.
        x: made for the words of `w`.
        bias: float32 ``[rows]``.
        threads: how many to use.
    """
    rows, groups = w.scales.shape[1:]
    scales, shift = tiles.in_lanes(w.scales), w.offsets if w.codec == "bcq" else w.zeros
    shift = None if shift is None else tiles.in_lanes(shift)
    out = torch.empty(x.batch, rows)
    factors = deltas.contiguous() if deltas is not None and deltas.dim() == 3 else None
    terms = tiles.in_lanes(deltas) if deltas is not None and deltas.dim() == 4 else None
    if deltas is not None:
        task_ids = torch.zeros(x.batch, dtype=torch.int64) if task_ids is None else task_ids.contiguous()
    tuned = 0 if factors is None else factors.shape[1]
    parts = 1 + tuned if w.codec == "bcq" else 1
    codebook = None
    if w.codebook is not None:
        codebook = torch.zeros(16)
        codebook[: len(w.codebook)] = w.codebook
    ragged = w.row_bits is not None
    bits = tiles.tile_bits(w) if ragged else None
    starts = None if bits is None else np.concatenate([[0], np.cumsum(bits * tiles.words(w))])
    if w.scales.numel() * w.cols * x.batch // max(1, groups) < ALONE:
        threads = 1
    strips = -(-rows // (TILES * LANES))
    each = min(SCRATCH // (x.batch * parts * TILES * LANES), -(-strips // (threads * CHUNKS)))
    each = max(1, each)
    job = np.array([
        0, -(-strips // each), each, rows, w.bits, tiles.words(w), tiles.group_words(w), groups, _CODECS[w.codec],
        w.planes.data_ptr(),
        0 if starts is None else starts.ctypes.data, 0 if bits is None else bits.ctypes.data, _address(w.row_bits),
        scales.data_ptr(), _KINDS[scales.dtype], _address(shift), 0 if shift is None else _KINDS[shift.dtype],
        _address(codebook),
        x.x.data_ptr(), x.tables.data_ptr(), x.sums.data_ptr(), x.batch, parts,
        _address(bias), _address(task_ids), _address(factors), tuned,
        _address(terms), 0 if terms is None else terms.shape[1], out.data_ptr(),
    ], np.int64)  # fmt: skip
    _multiply(job, threads)
    return out


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@Kernel
def _make_tables(pointer):
    """Fields of the job after the counter: words, words of a whole group, groups, batch; addresses of x, tables, sums."""
    job = carray(pointer, 8)
    words, whole, groups = job[1], job[2], job[3]
    while True:
        piece = take(address_of(pointer))
        if piece >= job[4] * groups:
            return
        row, g = piece // groups, piece % groups
        first, here = g * whole, min(whole, words - g * whole)
        table = job[6] + (row * words + first) * 512
        set_tables(job[5] + (row * words + first) * 128, table, here * 8)
        sums = carray(floats_at(table), here * 128)
        total = np.float32(0.0)
        for i in range(15, here * 128, 16):  # the last of 16 sums adds all four columns
            total += sums[i]
        carray(floats_at(job[7]), job[4] * groups)[piece] = total


@Kernel
def _multiply(pointer):
    """One chunk after another of a job (see :func:`multiply`)."""
    job = carray(pointer, 30)
    batch, parts, groups, rows = job[_BATCH], job[_PARTS], job[_GROUPS], job[_ROWS]
    all_tiles = (rows + 15) // 16
    most = job[_STRIPS] * TILES
    y = np.empty(parts * batch * most * 16, np.float32)
    acc = np.empty(2 * batch * TILES * 16, np.float32)
    params = np.empty(2 * TILES * 16, np.float32)
    while True:
        chunk = take(address_of(pointer))
        if chunk >= job[_CHUNKS]:
            return
        first = chunk * most
        count = min(most, all_tiles - first)
        y[:] = 0
        for g in range(groups):
            t = 0
            while t < count:
                to = y.ctypes.data + t * 64
                if job[_ROW_BITS] != 0 or count - t < TILES:
                    _group(job, g, first + t, to, most * 64, acc, params, 1)
                    t += 1
                else:
                    _group(job, g, first + t, to, most * 64, acc, params, 4)
                    t += TILES
        _finish(job, first * 16, min(count * 16, rows - first * 16), y, most * 16)


@numba.njit
def _group(job, g, tile, y, y_stride, acc, params, TILES):
    """Add what group `g` of TILES tiles gives to the parts at address `y`, ``[parts, batch, y_stride bytes]``."""
    literally(TILES)
    batch, codec, whole, ragged = job[_BATCH], job[_CODEC], job[_WHOLE], job[_ROW_BITS] != 0
    here = min(whole, job[_WORDS] - g * whole)
    bits, start, stride = job[_BITS], tile * job[_WORDS] * job[_BITS], job[_WORDS] * job[_BITS] * 64
    if ragged:
        bits, start = carray(longs_at(job[_TILE_BITS]), tile + 1)[tile], carray(longs_at(job[_STARTS]), tile + 1)[tile]
    words = job[_PLANES] + (start + g * whole * bits) * 64
    tables, x = job[_TABLES] + g * whole * 512, job[_X] + g * whole * 128
    at_acc, scale, shift = acc.ctypes.data, params.ctypes.data, params.ctypes.data + TILES * 64
    last = y + (job[_PARTS] - 1) * batch * y_stride
    if codec == CODEBOOK:
        acc[:] = 0
        _levels(job, words, stride, here, x, at_acc, TILES)
    else:
        if ragged:
            acc[:] = 0
        for p in range(bits):
            carry = np.float32(2.0) if codec == UNIFORM and p > 0 and not ragged else np.float32(0.0)
            _lookups(job, words + p * here * 64, stride, here, tables, x, at_acc, carry, TILES)
            if ragged:
                _only_present(job, tile, p, acc, codec)
            if codec == BCQ:
                _parameters(job[_SCALES], job[_SCALES_KIND], job, p, g, tile, scale, TILES)
                part = y + min(p, job[_PARTS] - 1) * batch * y_stride
                _add(job, p, g, tile, at_acc, scale, np.float32(1.0), part, y_stride, params, TILES)
    if codec == BCQ:
        if job[_SHIFT] != 0:
            _parameters(job[_SHIFT], job[_SHIFT_KIND], job, 0, g, tile, shift, TILES)
            _shift(job, g, shift, last, y_stride, TILES)
        return
    _parameters(job[_SCALES], job[_SCALES_KIND], job, 0, g, tile, scale, TILES)
    if codec == CODEBOOK:
        _add(job, 0, g, tile, at_acc, scale, np.float32(1.0), last, y_stride, params, TILES)
        return
    if ragged:
        at_acc += batch * TILES * 64
    _parameters(job[_SHIFT], job[_SHIFT_KIND], job, 0, g, tile, shift, TILES)
    for i in range(TILES * 16):  # sums of ± are half of what codes make, around the middle code
        n = bits
        if ragged:
            n = _bits_of_row(job, tile * 16 + i)
        params[TILES * 16 + i] = np.float32((1 << n) - 1) * np.float32(0.5) - params[TILES * 16 + i]
    _add(job, 0, g, tile, at_acc, scale, np.float32(0.5), last, y_stride, params, TILES)
    if job[_TERMS] == 0:
        for i in range(TILES * 16):
            params[TILES * 16 + i] *= params[i]
        _shift(job, g, shift, last, y_stride, TILES)


@numba.njit
def _lookups(job, words, stride, here, tables, x, acc, carry, TILES):
    """:func:`add_lookups` for all rows of x, four at a time."""
    literally(TILES)
    batch, x_stride = job[_BATCH], job[_WORDS] * 128
    r = 0
    while r < batch:
        t, v, a = tables + r * 4 * x_stride, x + r * x_stride, acc + r * TILES * 64
        if batch - r >= 4:
            add_lookups(words, stride, here, t, 4 * x_stride, v, x_stride, a, carry, TILES, 4)
            r += 4
        elif batch - r >= 2:
            add_lookups(words, stride, here, t, 4 * x_stride, v, x_stride, a, carry, TILES, 2)
            r += 2
        else:
            add_lookups(words, stride, here, t, 4 * x_stride, v, x_stride, a, carry, TILES, 1)
            r += 1


@numba.njit
def _levels(job, words, stride, here, x, acc, TILES):
    """:func:`add_levels` for all rows of x."""
    literally(TILES)
    x_stride, book, plane = job[_WORDS] * 128, job[_CODEBOOK], here * 64
    for r in range(job[_BATCH]):
        v, a = x + r * x_stride, acc + r * TILES * 64
        if job[_BITS] == 1:
            add_levels(words, stride, plane, here, v, x_stride, book, a, TILES, 1, 1)
        elif job[_BITS] == 2:
            add_levels(words, stride, plane, here, v, x_stride, book, a, TILES, 1, 2)
        elif job[_BITS] == 3:
            add_levels(words, stride, plane, here, v, x_stride, book, a, TILES, 1, 3)
        else:
            add_levels(words, stride, plane, here, v, x_stride, book, a, TILES, 1, 4)


@numba.njit
def _parameters(address, kind, job, p, g, tile, out, TILES):
    """Parameters of TILES tiles in float32 at address `out`."""
    literally(TILES)
    index = (p * job[_GROUPS] + g) * ((job[_ROWS] + 15) // 16) * 16 + tile * 16
    if kind == F32_KIND:
        widen(address + 4 * index, out, TILES, 0)
    elif kind == F16_KIND:
        widen(address + 2 * index, out, TILES, 1)
    else:
        widen(address + 2 * index, out, TILES, 2)


@numba.njit
def _add(job, p, g, tile, acc, scale, factor, y, y_stride, params, TILES):
    """``y += acc * scale * factor`` for all rows of x; with what their tasks add to the scales, if they do."""
    literally(TILES)
    batch = job[_BATCH]
    if job[_TERMS] != 0 and p < job[_TERM_PLANES]:
        _add_with_terms(job, p, g, tile, acc, factor, y, y_stride, params, TILES)
        return
    r = 0
    while r < batch:
        a, to = acc + r * TILES * 64, y + r * y_stride
        if batch - r >= 4:
            add_scaled(a, scale, factor, to, y_stride, TILES, 4)
            r += 4
        else:
            add_scaled(a, scale, factor, to, y_stride, TILES, 1)
            r += 1


@numba.njit
def _add_with_terms(job, p, g, tile, acc, factor, y, y_stride, params, TILES):
    """One row of x at a time, each with scales of its own; with the uniform codec the shift goes by them too."""
    literally(TILES)
    padded = (job[_ROWS] + 15) // 16 * 16
    ids = carray(longs_at(job[_TASK_IDS]), job[_BATCH])
    own = np.empty(2 * TILES * 16, np.float32)
    for r in range(job[_BATCH]):
        own[:] = params[: 2 * TILES * 16]
        if ids[r] >= 0:
            index = ((ids[r] * job[_TERM_PLANES] + p) * job[_GROUPS] + g) * padded + tile * 16
            terms = carray(floats_at(job[_TERMS] + 4 * index), TILES * 16)
            for i in range(TILES * 16):
                own[i] += terms[i]
        add_scaled(acc + r * TILES * 64, own.ctypes.data, factor, y + r * y_stride, y_stride, TILES, 1)
        if job[_CODEC] == UNIFORM:
            for i in range(TILES * 16):
                own[TILES * 16 + i] *= own[i]
            sums = job[_SUMS] + (r * job[_GROUPS] + g) * 4
            add_shift(sums, 0, own.ctypes.data + TILES * 64, y + r * y_stride, y_stride, TILES, 1)


@numba.njit
def _shift(job, g, shift, y, y_stride, TILES):
    """``y += X * shift`` for all rows of x."""
    literally(TILES)
    for r in range(job[_BATCH]):
        add_shift(job[_SUMS] + (r * job[_GROUPS] + g) * 4, 0, shift, y + r * y_stride, y_stride, TILES, 1)


@numba.njit
def _bits_of_row(job, row):
    return carray(bytes_at(job[_ROW_BITS]), job[_ROWS])[row] if row < job[_ROWS] else np.uint8(1)


@numba.njit
def _only_present(job, tile, p, acc, codec):
    """Sums of plane `p` of one ragged tile count for rows that have this plane (MIX-4).

    For bcq the others become 0; for the uniform codec ``H`` goes on in the second half of `acc`.
    """
    half = job[_BATCH] * 16
    for lane in range(16):
        present = p < _bits_of_row(job, tile * 16 + lane)
        for r in range(job[_BATCH]):
            i = r * 16 + lane
            if codec == BCQ:
                acc[i] = acc[i] if present else np.float32(0.0)
            elif present:
                acc[half + i] = np.float32(2.0) * acc[half + i] + acc[i]


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
