"""Weights decoded from the tiled layout, bit for bit as the spec says (section 6): rows in order, or chosen ones.

Every operation is one of float32, rounded; the compiler may not fuse two of them (``enable_fp_fusion=False``).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..matrix import PlaneMatrix
from ..parameter_order import TILE_ROWS, group_major
from . import tiles
from .products import delta_kind, delta_sizes
from .tiles import PIECE, STEP, group_of, place_of_column, place_of_row


def decode(w: PlaneMatrix, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
    """Rows from `start` (a multiple of 16) to `stop` of tiled `w`, as weights ``[stop - start, cols]`` of `dtype`."""
    stop = w.rows if stop is None else stop
    out = torch.empty((stop - start, w.cols), dtype=dtype, device=w.planes.device)
    _launch(w, out, None, None, None, start // TILE_ROWS)
    return out


def decode_chosen(
    w: PlaneMatrix, rows: Tensor, deltas: Tensor | None, task_ids: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Rows `rows` (int64 ``[n]``) of tiled `w`, each with the scales of its task: ``[n, cols]`` of `dtype`.

    A row that `w` does not have is NaN: a check would have to wait for the device.
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
    padded_rows = w.planes.shape[0] * TILE_ROWS
    ids = None if deltas is None or task_ids is None else task_ids.long().contiguous()
    deltas = None if deltas is None else deltas.float()
    unused = w.planes  # stands for a tensor that a variant of the kernel does not read
    _decode[(-(-len(out) // TILE_ROWS) * macros,)](
        # pointers
        w.planes,
        group_major(w.scales),
        unused if shift is None else group_major(shift),
        unused if w.codebook is None else w.codebook,
        unused if rows is None else rows,
        unused if deltas is None else deltas,
        unused if ids is None else ids,
        out,
        # sizes
        len(out),
        w.rows,
        w.cols,
        macros,
        w.groups,
        first,
        # strides of scales and shift
        padded_rows * w.groups,
        padded_rows,
        # sizes and strides of deltas
        *delta_sizes(deltas),
        # what makes a variant of the kernel
        BITS=w.bits,
        STEPS=steps,
        BLOCKS=tiles.blocks_of_group(w, steps),
        CODEC=w.codec,
        SHIFT=shift is not None,
        CHOSEN=rows is not None,
        DELTAS=delta_kind(deltas),
        IDS=ids is not None,
        num_warps=2,
        num_stages=1,
        enable_fp_fusion=False,
    )


_SIZES = (
    "n", "rows", "macros", "groups", "first_tile", "stride_scale_plane", "stride_scale_group",
    "tasks", "tuned_planes", "stride_delta_task", "stride_delta_plane", "stride_delta_row", "stride_delta_group",
)  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)  # cols, if a multiple of 16, makes wider stores
def _decode(
    # Pointers. The last dimension is contiguous unless a stride below says otherwise.
    planes_ptr,  # uint8 [tiles, macros, BITS * STEPS, PIECE], see tiles.py
    scales_ptr,  # float [BITS (bcq) or 1, groups, rows padded to whole tiles]
    shift_ptr,  # float [groups, rows padded to whole tiles]: offsets (bcq, affine) or zeros (uniform)
    codebook_ptr,  # float32 [2**BITS]
    chosen_ptr,  # int64 [n]: rows of the weight
    deltas_ptr,  # float32 [tasks, tuned_planes, rows] or [tasks, tuned_planes, rows, groups], any strides
    task_ids_ptr,  # int64 [n]: the task of each row of the result, -1 for the base
    out_ptr,  # float [n, cols]
    # Sizes, in elements of their dimension.
    n,  # rows of the result
    rows,  # of the weight
    cols,
    macros,  # macro blocks of a row
    groups,  # of a row
    first_tile,  # of the result, if rows are not chosen
    # Strides, in elements.
    stride_scale_plane,
    stride_scale_group,  # rows padded to whole tiles; of shift as well
    # Deltas: how many tasks, how many planes have deltas, and strides in elements.
    tasks,
    tuned_planes,
    stride_delta_task,
    stride_delta_plane,
    stride_delta_row,
    stride_delta_group,
    # What makes a variant.
    BITS: tl.constexpr,  # planes
    STEPS: tl.constexpr,  # of STEP columns in a block: 1, 2, 4
    BLOCKS: tl.constexpr,  # in a group; 0: a row has one group
    CODEC: tl.constexpr,  # "bcq", "uniform", "affine", "codebook"
    SHIFT: tl.constexpr,  # whether there are offsets or zeros
    CHOSEN: tl.constexpr,  # whether rows are chosen; otherwise they follow each other from first_tile
    DELTAS: tl.constexpr,  # "none", "rows", "groups": see products.delta_kind
    IDS: tl.constexpr,  # whether rows have tasks of their own; otherwise all have task 0
    # The tiled layout.
    TILE_ROWS: tl.constexpr = TILE_ROWS,
    STEP: tl.constexpr = STEP,
    PIECE: tl.constexpr = PIECE,
):
    """16 rows of one macro block, block by block, all planes. Four bytes are loaded as a word, of four columns."""
    BLOCK: tl.constexpr = STEPS * STEP  # columns
    WORDS: tl.constexpr = STEPS * PIECE // 4  # of a plane

    # ---- which rows, and where their words are --------------------------------------------------------------------
    pid = tl.program_id(0)
    tile, m = pid // macros, pid % macros
    slot = tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    if CHOSEN:
        r = tl.load(chosen_ptr + slot, mask=slot < n, other=0)
        known = (r >= 0) & (r < rows)
        r = tl.where(known, r, 0)
    else:
        r = first_tile * TILE_ROWS + slot.to(tl.int64)
    at = planes_ptr.to(tl.pointer_type(tl.int32))
    if CHOSEN:
        at += ((r // TILE_ROWS) * macros + m)[:, None] * (BITS * WORDS) + _order(r, STEPS)
    else:
        at += ((first_tile + tile).to(tl.int64) * macros + m) * (BITS * WORDS) + tl.arange(0, WORDS)

    # ---- the words of all planes ----------------------------------------------------------------------------------
    # Loaded once for all blocks, before anything is stored: a store would have them loaded again.
    w0 = _words(at, STEPS, CHOSEN)
    w1 = _words(at + WORDS, STEPS, CHOSEN) if BITS > 1 else w0
    w2 = _words(at + 2 * WORDS, STEPS, CHOSEN) if BITS > 2 else w0
    w3 = _words(at + 3 * WORDS, STEPS, CHOSEN) if BITS > 3 else w0
    w4 = _words(at + 4 * WORDS, STEPS, CHOSEN) if BITS > 4 else w0
    w5 = _words(at + 5 * WORDS, STEPS, CHOSEN) if BITS > 5 else w0
    w6 = _words(at + 6 * WORDS, STEPS, CHOSEN) if BITS > 6 else w0
    w7 = _words(at + 7 * WORDS, STEPS, CHOSEN) if BITS > 7 else w0

    # ---- the task of each row -------------------------------------------------------------------------------------
    if DELTAS != "none":
        task = tl.load(task_ids_ptr + slot, mask=slot < n, other=-1) if IDS else tl.zeros((TILE_ROWS,), tl.int64)
        known = known & (task < tasks) if CHOSEN else task < tasks
        task = tl.where(task < tasks, task, 0)
        last = tl.where(task >= 0, tuned_planes, 0)  # planes before this one have deltas
        at_task = deltas_ptr + tl.maximum(task, 0) * stride_delta_task + r * stride_delta_row

    # ---- weights, block by block ----------------------------------------------------------------------------------
    for s in tl.static_range(8):
        group = group_of(m, s, groups, BLOCKS)
        at_group = group.to(tl.int64) * stride_scale_group + r
        if SHIFT:
            moved = tl.load(shift_ptr + at_group).to(tl.float32)[:, None]
        # a, b, c, d: the columns of the four bytes of each word
        if CODEC == "bcq":
            a = tl.broadcast_to(moved if SHIFT else tl.zeros((TILE_ROWS, 1), tl.float32), (TILE_ROWS, BLOCK // 4))
            b, c, d = a, a, a
            for p in tl.static_range(BITS):
                w = _word(p, w0, w1, w2, w3, w4, w5, w6, w7)
                scale = tl.load(scales_ptr + tl.cast(stride_scale_plane, tl.int64) * p + at_group).to(tl.float32)
                if DELTAS != "none":
                    at_delta = at_task + tl.cast(stride_delta_plane, tl.int64) * p + group * stride_delta_group
                    scale = _tuned(scale, at_delta, p < last, DELTAS)
                a, b = _add(a, w, s, scale[:, None]), _add(b, w, s + 8, scale[:, None])
                c, d = _add(c, w, s + 16, scale[:, None]), _add(d, w, s + 24, scale[:, None])
        else:
            codes = (w0 >> s) & 0x01010101
            for p in tl.static_range(1, BITS):
                codes = codes * 2 + ((_word(p, w0, w1, w2, w3, w4, w5, w6, w7) >> s) & 0x01010101)
            a, b, c, d = codes & 255, (codes >> 8) & 255, (codes >> 16) & 255, (codes >> 24) & 255
        value = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (TILE_ROWS, BLOCK))
        if CODEC != "bcq":
            scale = tl.load(scales_ptr + at_group).to(tl.float32)
            if DELTAS != "none":
                scale = _tuned(scale, at_task + group * stride_delta_group, last > 0, DELTAS)
            level = tl.load(codebook_ptr + value) if CODEC == "codebook" else value.to(tl.float32)
            if CODEC == "affine":
                value = level * scale[:, None] + moved if SHIFT else level * scale[:, None]
            else:
                value = (level - moved if SHIFT else level) * scale[:, None]
        if CHOSEN:  # a row that is not there must not look like one
            value = tl.where(known[:, None], value, float("nan"))
        column = (m * 8 + s) * BLOCK + tl.arange(0, BLOCK)
        at_out = out_ptr + slot.to(tl.int64)[:, None] * cols + column[None, :]
        tl.store(at_out, value.to(out_ptr.dtype.element_ty), mask=(slot < n)[:, None] & (column < cols)[None, :])


@triton.jit
def _order(r, STEPS: tl.constexpr):
    """Where the words of rows `r` are in a plane of a macro block: int64 ``[TILE_ROWS, STEPS * 8]``, by columns."""
    i = tl.arange(0, STEPS * 8)
    return (place_of_row(r) // 4)[:, None] + (place_of_column(4 * i) // 4)[None, :]


@triton.jit
def _words(at, STEPS: tl.constexpr, CHOSEN: tl.constexpr, TILE_ROWS: tl.constexpr = TILE_ROWS):
    """Words of one plane, int32 ``[TILE_ROWS, STEPS * 8]``: of chosen rows, or of a whole tile, which is contiguous."""
    words = tl.load(at)
    if not CHOSEN:
        words = tl.permute(tl.reshape(words, (STEPS, 8, 4, 2, 2)), (4, 1, 0, 3, 2))
        words = tl.reshape(words, (TILE_ROWS, STEPS * 8))
    return words


@triton.jit
def _word(p: tl.constexpr, w0, w1, w2, w3, w4, w5, w6, w7):
    """The one of `w0` to `w7` that is of plane `p`."""
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
def _tuned(scale, at, is_tuned, DELTAS: tl.constexpr):
    """Scales ``[TILE_ROWS]``, with the deltas of the rows' tasks at `at` (TSK-6, TSK-8)."""
    delta = tl.load(at, mask=is_tuned, other=0.0)
    return scale * (1.0 + delta) if DELTAS == "rows" else scale + delta
