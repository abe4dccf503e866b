"""Weights from the packed form, bit for bit as the spec decodes them (DEC-1 to DEC-5): all rows, some, or chosen ones.

Every operation is one of float32, rounded; the compiler may not join two of them (``enable_fp_fusion=False``).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..matrix import PlaneMatrix
from ..parameter_order import group_major
from . import tiles
from .products import CODECS, delta_sizes, group_of


def decode(w: PlaneMatrix, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
    """Rows from `start` (a multiple of 16) to `stop` of packed `w`, as weights ``[stop - start, cols]`` of `dtype`."""
    stop = w.rows if stop is None else stop
    out = torch.empty((stop - start, w.cols), dtype=dtype, device=w.planes.device)
    _launch(w, out, None, None, None, start // tiles.ROWS)
    return out


def decode_chosen(
    w: PlaneMatrix, rows: Tensor, deltas: Tensor | None, task_ids: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Rows `rows` (int64 ``[n]``) of packed `w`, with the scales of a task each: ``[n, cols]`` of `dtype`.

    Rows that `w` does not have are NaN: to refuse them would take a wait for the device.
    """
    out = torch.empty((len(rows), w.cols), dtype=dtype, device=w.planes.device)
    _launch(w, out, rows.contiguous(), deltas, task_ids, 0)
    return out


def _launch(
    w: PlaneMatrix, out: Tensor, rows: Tensor | None, deltas: Tensor | None, task_ids: Tensor | None, first: int
) -> None:
    if not out.numel():
        return
    steps, macros = tiles.steps(w), w.planes.shape[1]
    shift = w.shift
    lanes, none = w.planes.shape[0] * tiles.ROWS, w.planes
    ids = None if deltas is None or task_ids is None else task_ids.long().contiguous()
    deltas = None if deltas is None else deltas.float()
    _decode[(-(-len(out) // tiles.ROWS) * macros,)](
        w.planes, group_major(w.scales), none if shift is None else group_major(shift),
        none if w.codebook is None else w.codebook, none if rows is None else rows,
        none if deltas is None else deltas, none if ids is None else ids, out,
        len(out), w.rows, w.cols, macros, w.groups, first, lanes * w.groups, lanes,
        *delta_sizes(deltas),
        BITS=w.bits, STEPS=steps, BLOCKS=tiles.blocks_of_group(w, steps), CODEC=CODECS[w.codec],
        SHIFT=shift is not None, CHOSEN=rows is not None,
        DELTAS=0 if deltas is None else deltas.dim() - 2, IDS=ids is not None,
        num_warps=2, num_stages=1, enable_fp_fusion=False,
    )  # fmt: skip


_SIZES = (
    "n", "rows", "macros", "groups", "first", "scale_plane", "lanes",
    "tasks", "tuned", "delta_task", "delta_plane", "delta_row", "delta_group",
)  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)  # cols, if a multiple of 16, makes wider stores
def _decode(
    planes, scales, shift, codebook, chosen, deltas, task_ids, out,
    n, rows, cols, macros, groups, first, scale_plane, lanes,
    tasks, tuned, delta_task, delta_plane, delta_row, delta_group,
    BITS: tl.constexpr, STEPS: tl.constexpr, BLOCKS: tl.constexpr, CODEC: tl.constexpr,
    SHIFT: tl.constexpr, CHOSEN: tl.constexpr, DELTAS: tl.constexpr, IDS: tl.constexpr,
):  # fmt: skip
    """16 rows of one macro block: block by block, all planes. Four bytes are loaded as a word, of four columns."""
    pid = tl.program_id(0)
    tile, m = pid // macros, pid % macros
    BLOCK: tl.constexpr = STEPS * 32
    WORDS: tl.constexpr = STEPS * 128  # of a plane
    slot = tile * 16 + tl.arange(0, 16)
    if CHOSEN:
        r = tl.load(chosen + slot, mask=slot < n, other=0)
        known = (r >= 0) & (r < rows)
        r = tl.where(known, r, 0)
    else:
        r = first * 16 + slot.to(tl.int64)
    at = planes.to(tl.pointer_type(tl.int32))
    if CHOSEN:
        at += ((r // 16) * macros + m)[:, None] * (BITS * WORDS) + _order(r, STEPS)
    else:
        at += ((first + tile).to(tl.int64) * macros + m) * (BITS * WORDS) + tl.arange(0, WORDS)
    # Loaded once for all blocks, before anything is stored: a store would have them loaded again.
    w0 = _words(at, STEPS, CHOSEN)
    w1 = _words(at + WORDS, STEPS, CHOSEN) if BITS > 1 else w0
    w2 = _words(at + 2 * WORDS, STEPS, CHOSEN) if BITS > 2 else w0
    w3 = _words(at + 3 * WORDS, STEPS, CHOSEN) if BITS > 3 else w0
    w4 = _words(at + 4 * WORDS, STEPS, CHOSEN) if BITS > 4 else w0
    w5 = _words(at + 5 * WORDS, STEPS, CHOSEN) if BITS > 5 else w0
    w6 = _words(at + 6 * WORDS, STEPS, CHOSEN) if BITS > 6 else w0
    w7 = _words(at + 7 * WORDS, STEPS, CHOSEN) if BITS > 7 else w0
    if DELTAS:
        task = tl.load(task_ids + slot, mask=slot < n, other=-1) if IDS else tl.zeros((16,), tl.int64)
        known = known & (task < tasks) if CHOSEN else task < tasks
        task = tl.where(task < tasks, task, 0)
        last = tl.where(task >= 0, tuned, 0)
        at_task = deltas + tl.maximum(task, 0) * delta_task + r * delta_row
    for s in tl.static_range(8):
        group = group_of(m, s, groups, BLOCKS)
        at_group = group.to(tl.int64) * lanes + r
        if SHIFT:
            moved = tl.load(shift + at_group).to(tl.float32)[:, None]
        # a, b, c, d: the columns of the four bytes of each word
        if CODEC == 0:
            a = tl.broadcast_to(moved if SHIFT else tl.zeros((16, 1), tl.float32), (16, BLOCK // 4))
            b, c, d = a, a, a
            for p in tl.static_range(BITS):
                w = _word(p, w0, w1, w2, w3, w4, w5, w6, w7)
                scale = tl.load(scales + tl.cast(scale_plane, tl.int64) * p + at_group).to(tl.float32)
                if DELTAS:
                    scale = _tuned(
                        scale, at_task + tl.cast(delta_plane, tl.int64) * p + group * delta_group, p < last, DELTAS
                    )
                a, b = _add(a, w, s, scale[:, None]), _add(b, w, s + 8, scale[:, None])
                c, d = _add(c, w, s + 16, scale[:, None]), _add(d, w, s + 24, scale[:, None])
        else:
            codes = (w0 >> s) & 0x01010101
            for p in tl.static_range(1, BITS):
                codes = codes * 2 + ((_word(p, w0, w1, w2, w3, w4, w5, w6, w7) >> s) & 0x01010101)
            a, b, c, d = codes & 255, (codes >> 8) & 255, (codes >> 16) & 255, (codes >> 24) & 255
        value = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (16, BLOCK))
        if CODEC != 0:
            scale = tl.load(scales + at_group).to(tl.float32)
            if DELTAS:
                scale = _tuned(scale, at_task + group * delta_group, last > 0, DELTAS)
            level = tl.load(codebook + value) if CODEC == 2 else value.to(tl.float32)
            value = (level - moved if SHIFT else level) * scale[:, None]
        if CHOSEN:  # a row that is not there must not look like one
            value = tl.where(known[:, None], value, float("nan"))
        column = (m * 8 + s) * BLOCK + tl.arange(0, BLOCK)
        at_out = out + slot.to(tl.int64)[:, None] * cols + column[None, :]
        tl.store(at_out, value.to(out.dtype.element_ty), mask=(slot < n)[:, None] & (column < cols)[None, :])


@triton.jit
def place_of_row(r):
    """Where the bytes of rows `r` begin in a piece; tiles.py has this order."""
    return (r % 8) * 64 + ((r // 8) % 2) * 4


@triton.jit
def place_of_column(c):
    """Where the bytes of columns `c` of a block are from there on, counted over the pieces of its steps."""
    return (c // 32) * 512 + ((c // 4) % 4) * 16 + ((c // 16) % 2) * 8 + c % 4


@triton.jit
def _order(r, STEPS: tl.constexpr):
    """Where the words of rows `r` are in a plane of a macro block: int64 ``[16, STEPS * 8]``, in order of columns."""
    i = tl.arange(0, STEPS * 8)
    return (place_of_row(r) // 4)[:, None] + (place_of_column(4 * i) // 4)[None, :]


@triton.jit
def _words(at, STEPS: tl.constexpr, CHOSEN: tl.constexpr):
    """Words of one plane, int32 ``[16, STEPS * 8]``: from where they are, or of a whole tile, which is in one piece."""
    words = tl.load(at)
    if not CHOSEN:
        words = tl.permute(tl.reshape(words, (STEPS, 8, 4, 2, 2)), (4, 1, 0, 3, 2))
        words = tl.reshape(words, (16, STEPS * 8))
    return words


@triton.jit
def _word(p: tl.constexpr, w0, w1, w2, w3, w4, w5, w6, w7):
    """The words of plane `p`."""
    low = (w0 if p == 0 else w1) if p < 2 else (w2 if p == 2 else w3)
    high = (w4 if p == 4 else w5) if p < 6 else (w6 if p == 6 else w7)
    return low if p < 4 else high


@triton.jit
def _add(value, words, bit: tl.constexpr, step):
    """``value + step`` where a bit of the words is 1, ``value - step`` where it is 0: the bit becomes a sign."""
    sign = (words << (31 - bit)) & -2147483648
    negative = step.to(tl.int32, bitcast=True) ^ -2147483648  # not -step, which can be 0 - step
    return value + (sign ^ negative).to(tl.float32, bitcast=True)


@triton.jit
def _tuned(scale, at, tuned, DELTAS: tl.constexpr):
    """Scales ``[16]`` of the tasks of the rows (TSK-6, TSK-8)."""
    delta = tl.load(at, mask=tuned, other=0.0)
    return scale * (1.0 + delta) if DELTAS == 1 else scale + delta
