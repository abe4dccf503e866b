"""Activations as int8 slices: what the tensor cores multiply by the bits of a plane.

A block (see tiles.py) of a row of x is rounded to integers q, ``x = unit * q``, with the unit that its largest value
asks for. q is written in base 128 with digits from -64 to 63, the highest from -127 to 127: a *slice* is one digit, one
column of the int8 operand. Two slices are 15 bits of the block's largest value, more than float16 and bfloat16 have;
float32 takes four. Sums of slices are exact, so the only error is that of the rounding here. A block without a value of
at least 2**-92 counts as zero.
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
    """Activations as the product kernel wants them.

    Attributes:
        slices: int8 ``[chunks, macro blocks, 8, steps * 32 * columns]``, columns = rows of a chunk times slices; in the
            order in which a warp's lanes hold the right operand of ``mma.m16n8k32``.
        units: float32 ``[chunks * macro blocks + 1, 8, rows of a chunk, 2]``: twice what an integer of the block is
            worth, over the value of the block's bit in a byte; and the sum of the block. The last is of nothing.
    """

    slices: Tensor
    units: Tensor


def to_slices(x: Tensor, steps: int, rows: int) -> Operand:
    """Activations as integers.

    Args:
        x: float16, bfloat16 or float32 ``[n, cols]``, any strides.
        steps: of a block.
        rows: of x in a chunk; times slices it is 8 or 16.
    """
    n, cols = x.shape
    count = SLICES[x.dtype]
    chunks, macros, columns = -(-n // rows), macro_blocks(cols, steps), rows * count
    slices = torch.empty((chunks, macros, 8, steps * STEP * columns), dtype=torch.int8, device=x.device)
    units = torch.empty((chunks * macros + 1, 8, rows, 2), dtype=torch.float32, device=x.device)
    _to_slices[(chunks * macros * 8 + 8,)](
        x, slices, units, n, cols, *x.stride(), macros, rows, steps, count, num_warps=1, enable_fp_fusion=True
    )  # fmt: skip
    return Operand(slices, units)


@triton.jit(do_not_specialize=("n", "cols", "macros"))
def _to_slices(
    x, slices, units, n, cols, x_row, x_col, macros,
    ROWS: tl.constexpr, STEPS: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """One block of the rows of one chunk."""
    pid = tl.program_id(0)
    chunk, block = pid // (macros * 8), pid % (macros * 8)  # the last eight programs are of rows that x has not
    BLOCK: tl.constexpr = STEPS * 32
    r, c = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    row, col = chunk * ROWS + r, block * BLOCK + c
    at = row.to(tl.int64)[:, None] * x_row + col.to(tl.int64)[None, :] * x_col
    v = tl.load(x + at, mask=(row < n)[:, None] & (col < cols)[None, :], other=0.0).to(tl.float32)

    most: tl.constexpr = 16319.0 if COUNT == 2 else 266338304.0  # digits 127, 63; and 127, 0, 0, 0
    largest = tl.max(tl.abs(v), 1)
    unit = tl.where(largest < 2.0**-92, 0.0, largest / most)  # smaller ones would be no normal numbers any more
    unit += tl.sum(v * 0.0, 1)  # NaN where a value is not finite: nothing is hidden
    scaled = v / tl.where(unit > 0, unit, 1.0)[:, None]
    q = (scaled + tl.where(scaled >= 0, 0.5, -0.5)).to(tl.int32)
    bit = block % 8
    worth = tl.where(bit == 7, -128.0, (1 << bit).to(tl.float32))  # of a byte with that bit alone, as int8
    at_unit = units + (pid * ROWS + r).to(tl.int64) * 2
    tl.store(at_unit, 2 * unit / worth)
    # The sum of four slices' q could overflow; those of its halves are exact.
    total = tl.sum(q >> 14, 1).to(tl.float32) * 16384.0 + tl.sum(q & 16383, 1).to(tl.float32)
    tl.store(at_unit + 1, total * unit)

    if chunk * ROWS >= n:
        return
    # Column n = row * COUNT + slice of the operand; with 16 columns, n and n + 8 share a lane's vector of 16 bytes.
    COLUMNS: tl.constexpr = ROWS * COUNT
    PAIR: tl.constexpr = COLUMNS // 8
    lane = (c // 4) % 4
    base = slices + pid.to(tl.int64) * (BLOCK * COLUMNS) + (c // 32) * (32 * COLUMNS) + ((c // 16) % 2) * 4 + c % 4
    for s in tl.static_range(COUNT):
        digit = ((q + 64) & 127) - 64 if s + 1 < COUNT else q
        q = (q - digit) >> 7
        column = r * COUNT + s
        place = (column % 8) * (32 * PAIR) + (column // 8) * 8
        tl.store(base[None, :] + place[:, None] + (lane * (8 * PAIR))[None, :], digit.to(tl.int8))
