"""Activations as int8 slices: what the tensor cores multiply by the bits of a plane.

Each block (see tiles.py) of a row of x is rounded to integers q, ``x = unit * q``, where the block's largest value
sets the unit. q is written in base 128 with digits from -64 to 63, the highest from -127 to 127. A *slice* is one
digit, one column of the int8 operand. Two slices are 15 bits of the block's largest value, more than float16 and
bfloat16 have; float32 takes four. Sums of slices are exact, so the only error is that of the rounding here. A block
without a value of at least 2**-92 counts as zero.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import STEP, macro_blocks

SLICES = {torch.float16: 2, torch.bfloat16: 2, torch.float32: 4}


class Operand(NamedTuple):
    """Activations as the product kernel reads them. A *panel* is the rows of x that one program takes.

    Attributes:
        slices: int8 ``[panels, macro blocks, 8, steps * 32 * columns]``, columns = rows of a panel times slices; in the
            order in which a warp's lanes hold the right operand of ``mma.m16n8k32``.
        units: float32 ``[panels * macro blocks + 1, 8, rows of a panel, 2]``. For block s, ``[.., 0]`` is
            ``2 * unit / 2**s`` (for s = 7 over -128, which that bit is as int8); ``[.., 1]`` is the sum of x over the
            block. The final entry is zeros, read by warps that have no macro block left.
    """

    slices: Tensor
    units: Tensor


def to_slices(x: Tensor, steps: int, rows: int) -> Operand:
    """The slices and units of x.

    Args:
        x: float16, bfloat16 or float32 ``[n, cols]``, any strides.
        steps: of a block (:func:`.tiles.steps`).
        rows: rows of x in a panel; times the slices of x it is 8 or 16.
    """
    n, cols = x.shape
    count = SLICES[x.dtype]
    panels, macros, columns = -(-n // rows), macro_blocks(cols, steps), rows * count
    slices = torch.empty((panels, macros, 8, steps * STEP * columns), dtype=torch.int8, device=x.device)
    units = torch.empty((panels * macros + 1, 8, rows, 2), dtype=torch.float32, device=x.device)
    _to_slices[(panels * macros * 8 + 8,)](
        x, slices, units, n, cols, macros, *x.stride(), PANEL=rows, STEPS=steps, SLICES=count,
        num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip
    return Operand(slices, units)


@triton.jit(do_not_specialize=("n", "cols", "macros"))
def _to_slices(
    # Pointers.
    x_ptr,  # float [n, cols], any strides
    slices_ptr,  # int8 [panels, macros, 8, STEPS * STEP * PANEL * SLICES]
    units_ptr,  # float32 [panels * macros + 1, 8, PANEL, 2]
    # Sizes, in elements of their dimension.
    n,
    cols,
    macros,  # macro blocks of a row
    # Strides, in elements.
    stride_x_row,
    stride_x_col,
    # What makes a variant.
    PANEL: tl.constexpr,  # rows of x in a panel
    STEPS: tl.constexpr,  # of STEP columns in a block: 1, 2, 4
    SLICES: tl.constexpr,  # of an element of x: 2, 4
    # The tiled layout.
    STEP: tl.constexpr = STEP,
):
    """One block of the rows of one panel."""
    BLOCK: tl.constexpr = STEPS * STEP  # columns

    # ---- the block ------------------------------------------------------------------------------------------------
    pid = tl.program_id(0)
    panel, block = pid // (macros * 8), pid % (macros * 8)  # the last eight programs are past the end of x: zeros
    r, c = tl.arange(0, PANEL), tl.arange(0, BLOCK)
    row, col = panel * PANEL + r, block * BLOCK + c
    at = row.to(tl.int64)[:, None] * stride_x_row + col.to(tl.int64)[None, :] * stride_x_col
    v = tl.load(x_ptr + at, mask=(row < n)[:, None] & (col < cols)[None, :], other=0.0).to(tl.float32)

    # ---- integers, units and sums ---------------------------------------------------------------------------------
    most: tl.constexpr = 16319.0 if SLICES == 2 else 266338304.0  # digits 127, 63; and 127, 0, 0, 0
    largest = tl.max(tl.abs(v), 1)
    unit = tl.where(largest < 2.0**-92, 0.0, largest / most)  # smaller ones would be no normal numbers any more
    unit += tl.sum(v * 0.0, 1)  # NaN where a value is not finite: nothing is hidden
    scaled = v / tl.where(unit > 0, unit, 1.0)[:, None]
    q = (scaled + tl.where(scaled >= 0, 0.5, -0.5)).to(tl.int32)
    bit = block % 8
    value = tl.where(bit == 7, -128.0, (1 << bit).to(tl.float32))  # of a byte with that bit alone, as int8
    at_unit = units_ptr + (pid * PANEL + r).to(tl.int64) * 2
    tl.store(at_unit, 2 * unit / value)
    # The sum of four slices' q could overflow; those of its halves are exact.
    total = tl.sum(q >> 14, 1).to(tl.float32) * 16384.0 + tl.sum(q & 16383, 1).to(tl.float32)
    tl.store(at_unit + 1, total * unit)

    if panel * PANEL >= n:
        return

    # ---- slices ---------------------------------------------------------------------------------------------------
    # Column j = row * SLICES + slice of the operand; with 16 columns, j and j + 8 share a lane's vector of 16 bytes.
    COLUMNS: tl.constexpr = PANEL * SLICES
    PAIR: tl.constexpr = COLUMNS // 8
    lane = (c // 4) % 4
    base = slices_ptr + pid.to(tl.int64) * (BLOCK * COLUMNS) + (c // STEP) * (STEP * COLUMNS)
    base = base + ((c // 16) % 2) * 4 + c % 4
    for s in tl.static_range(SLICES):
        digit = ((q + 64) & 127) - 64 if s + 1 < SLICES else q
        q = (q - digit) >> 7
        column = r * SLICES + s
        place = (column % 8) * (STEP * PAIR) + (column // 8) * 8
        tl.store(base[None, :] + place[:, None] + (lane * (8 * PAIR))[None, :], digit.to(tl.int8))
