"""Weights from the packed form, bit for bit as the spec decodes them (DEC-1 to DEC-5): all rows, some, or chosen ones.

Every operation is one of float32, rounded; the compiler may not join two of them (``enable_fp_fusion=False``).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..lanes import in_lanes
from ..naive import Packed
from . import tiles
from .products import CODECS, group_of


def decode(w: Packed, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
    """Rows from `start` (a multiple of 16) to `stop` of packed `w`, as weights ``[stop - start, cols]`` of `dtype`."""
    stop = w.scales.shape[1] if stop is None else stop
    out = torch.empty((stop - start, w.cols), dtype=dtype, device=w.planes.device)
    _launch(w, out, None, None, None, start // tiles.ROWS)
    return out


def decode_chosen(
    w: Packed, rows: Tensor, deltas: Tensor | None, task_ids: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Rows `rows` (int64 ``[n]``) of packed `w`, with the scales of a task each: ``[n, cols]`` of `dtype`.

    Rows that `w` does not have are NaN: to refuse them would take a wait for the device.
    """
    out = torch.empty((len(rows), w.cols), dtype=dtype, device=w.planes.device)
    _launch(w, out, rows.contiguous(), deltas, task_ids, 0)
    return out


def _launch(
    w: Packed, out: Tensor, rows: Tensor | None, deltas: Tensor | None, task_ids: Tensor | None, first: int
) -> None:
    if not out.numel():
        return
    steps, macros = tiles.steps(w), w.planes.shape[1]
    shift = w.offsets if w.codec == "bcq" else w.zeros
    lanes, none = w.planes.shape[0] * tiles.ROWS, w.planes
    ids = None if deltas is None or task_ids is None else task_ids.long().contiguous()
    deltas = None if deltas is None else deltas.float()
    _decode[(-(-len(out) // tiles.ROWS) * macros,)](
        w.planes, in_lanes(w.scales), none if shift is None else in_lanes(shift),
        none if w.codebook is None else w.codebook, none if rows is None else rows,
        none if deltas is None else deltas, none if ids is None else ids, out,
        len(out), w.scales.shape[1], w.cols, macros, w.scales.shape[2], first, lanes * w.scales.shape[2], lanes,
        0 if deltas is None else deltas.shape[1],
        *((0, 0, 0) if deltas is None else deltas.stride()[:3]),
        0 if deltas is None or deltas.dim() == 3 else deltas.stride(3),
        BITS=w.bits, STEPS=steps, BLOCKS=tiles.blocks_of_group(w, steps), CODEC=CODECS[w.codec],
        SHIFT=shift is not None, CHOSEN=rows is not None,
        DELTAS=0 if deltas is None else deltas.dim() - 2, IDS=ids is not None,
        num_warps=4, num_stages=1, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def _decode(
    planes, scales, shift, codebook, chosen, deltas, task_ids, out,
    n, rows, cols, macros, groups, first, scale_plane, lanes, tuned, delta_task, delta_plane, delta_row, delta_group,
    BITS: tl.constexpr, STEPS: tl.constexpr, BLOCKS: tl.constexpr, CODEC: tl.constexpr,
    SHIFT: tl.constexpr, CHOSEN: tl.constexpr, DELTAS: tl.constexpr, IDS: tl.constexpr,
):  # fmt: skip
    """16 rows of one macro block: block by block, all planes."""
    pid = tl.program_id(0)
    tile, m = pid // macros, pid % macros
    BLOCK: tl.constexpr = STEPS * 32
    PIECES: tl.constexpr = 512 * STEPS
    slot = tile * 16 + tl.arange(0, 16)
    c = tl.arange(0, BLOCK)
    if CHOSEN:
        r = tl.load(chosen + slot, mask=slot < n, other=0)
        known = (r >= 0) & (r < rows)
        r = tl.where(known, r, 0)
    else:
        r = first * 16 + slot.to(tl.int64)
    byte = (c // 32) * 512 + ((c // 4) % 4) * 16 + ((c // 16) % 2) * 8 + c % 4  # tiles.py has this order
    row_byte = (r % 8) * 64 + ((r // 8) % 2) * 4
    at = planes + (((r // 16) * macros + m) * (BITS * PIECES) + row_byte)[:, None] + byte[None, :]
    if DELTAS:
        task = tl.load(task_ids + slot, mask=slot < n, other=-1) if IDS else tl.zeros((16,), tl.int64)
        last = tl.where(task >= 0, tuned, 0)
        at_task = deltas + tl.maximum(task, 0) * delta_task + r * delta_row
    for s in tl.static_range(8):
        group = group_of(m, s, groups, BLOCKS)
        at_group = group.to(tl.int64) * lanes + r
        if SHIFT:
            moved = tl.load(shift + at_group).to(tl.float32)[:, None]
        if CODEC == 0:
            value = tl.zeros((16, BLOCK), tl.float32) + moved if SHIFT else tl.zeros((16, BLOCK), tl.float32)
        else:
            code = tl.zeros((16, BLOCK), tl.int32)
        for p in tl.static_range(BITS):
            bit = (tl.load(at + p * PIECES) >> s) & 1
            if CODEC == 0:
                scale = tl.load(scales + p * scale_plane + at_group).to(tl.float32)
                if DELTAS:
                    scale = _tuned(scale, at_task + p * delta_plane + group * delta_group, p < last, DELTAS)
                value = tl.where(bit == 1, value + scale[:, None], value - scale[:, None])
            else:
                code = code * 2 + bit.to(tl.int32)
        if CODEC != 0:
            scale = tl.load(scales + at_group).to(tl.float32)
            if DELTAS:
                scale = _tuned(scale, at_task + group * delta_group, last > 0, DELTAS)
            level = tl.load(codebook + code) if CODEC == 2 else code.to(tl.float32)
            level = level - moved if SHIFT else level
            value = level * scale[:, None]
        if CHOSEN:  # a row that is not there must not look like one
            value = tl.where(known[:, None], value, float("nan"))
        column = (m * 8 + s) * BLOCK + c
        at_out = out + slot.to(tl.int64)[:, None] * cols + column[None, :]
        tl.store(at_out, value.to(out.dtype.element_ty), mask=(slot < n)[:, None] & (column < cols)[None, :])


@triton.jit
def _tuned(scale, at, tuned, DELTAS: tl.constexpr):
    """Scales ``[16]`` of the tasks of the rows (TSK-6, TSK-8)."""
    delta = tl.load(at, mask=tuned, other=0.0)
    return scale * (1.0 + delta) if DELTAS == 1 else scale + delta
