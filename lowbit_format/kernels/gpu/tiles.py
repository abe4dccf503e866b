"""The tiled layout that GPU kernels read: bytes in the order in which a warp's matrix instruction takes them.

A *block* is 32, 64 or 128 columns of one group: ``steps`` times 32. Eight blocks are a *macro block*; bit s of a byte
belongs to block s of it. A *tile* is 16 rows. For each macro block and plane a tile has ``steps`` *pieces* of 512
bytes. A piece is 16 rows of 32 bytes, and 16 bytes of it are the operand of one lane of a warp (``mma.m16n8k32``)::

    tiles[t, m, p * steps + k, (row % 8, byte // 4 % 4, byte // 16, row // 8, byte % 4)]
        bit s  =  plane p, row 16 * t + row, column 8 * block * m + block * s + 32 * k + byte

So a lane loads its operands of a piece with one instruction of 16 bytes, and one mask takes a block's bits out of the
bytes. Rows and columns are padded with zeros. As a tensor it is uint8 ``[tiles, macro blocks, bits * steps, 512]``.
Scales and shift are group-major (:mod:`..parameter_order`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..matrix import FILE, TILED, PlaneMatrix
from ..parameter_order import TILE_ROWS, group_major, map_parameters

STEP = 32  # columns of a block that one matrix instruction takes
PIECE = TILE_ROWS * STEP  # bytes of a piece
_WASTE = 1.1  # padded columns over columns, up to which longer blocks are worth it
_AT_ONCE = 1 << 26  # bytes that are rearranged at a time


def can_tile(w: PlaneMatrix) -> bool:
    """Whether there is a tiled layout for `w`: its groups are whole steps, and every row has all planes.

    Other matrices take the naive code path.
    """
    size = w.group_size
    whole = size == 0 or size >= w.cols or size % STEP == 0
    return (
        w.is_in_memory
        and whole
        and w.row_bits is None
        and w.scales.dtype != torch.float64
        and w.planes.shape[0] == w.bits
    )


def steps(w: PlaneMatrix) -> int:
    """Steps of a block: the largest of 4, 2, 1 that divides the groups and pads few columns."""
    if w.is_tiled:
        return w.planes.shape[2] // w.bits
    size = w.group_size if 0 < w.group_size < w.cols else 4 * STEP
    for n in (4, 2):
        if size % (n * STEP) == 0 and _padded(w.cols, n) <= _WASTE * w.cols:
            return n
    return 1


def blocks_of_group(w: PlaneMatrix, steps: int) -> int:
    """Blocks in a group; 0: a row has one group."""
    return w.group_size // (steps * STEP) if 0 < w.group_size < w.cols else 0


def macro_blocks(cols: int, steps: int) -> int:
    """Macro blocks of a row."""
    return -(-cols // (8 * steps * STEP))


def tile(w: PlaneMatrix) -> PlaneMatrix:
    """`w` in the tiled layout, in memory of its own."""
    n, rows = steps(w), w.rows
    shape = (-(-rows // TILE_ROWS), macro_blocks(w.cols, n), w.bits * n, PIECE)
    out = torch.empty(shape, dtype=torch.uint8, device=w.planes.device)
    width = _padded(w.cols, n) // 8
    for start, stop in _parts(shape):
        part = w.planes.detach()[:, TILE_ROWS * start : TILE_ROWS * stop]
        room = part.new_zeros(w.bits, TILE_ROWS * (stop - start), width)
        have = min(width, part.shape[2])
        room[:, : part.shape[1], :have] = part[:, :, :have]
        # plane, tile, row // 8, row % 8, macro block, bit, step, byte // 16, byte // 4 % 4, (byte % 4) // 2 ...
        bits = room.view(w.bits, -1, TILE_ROWS, shape[1], 8, n * STEP // 8).transpose(-1, -2)
        lanes = _transpose_bits(bits).view(w.bits, -1, 2, 8, shape[1], n, 2, 4, 4)  # p, t, r, g, m, k, h, c, b
        out[start:stop] = lanes.permute(1, 4, 0, 5, 3, 7, 6, 2, 8).reshape(-1, *shape[1:])
    return map_parameters(w, group_major)._replace(planes=out, layout=TILED)


def untile(w: PlaneMatrix) -> PlaneMatrix:
    """`w` in the file's layout: the exact inverse of :func:`tile`."""
    if not w.is_tiled:
        return w
    n, rows, shape = steps(w), w.rows, w.planes.shape
    width = 8 * -(-w.cols // 64)
    out = w.planes.new_zeros(w.bits, rows, width)
    for start, stop in _parts(tuple(shape)):
        lanes = w.planes.detach()[start:stop].view(-1, shape[1], w.bits, n, 8, 4, 2, 2, 4)  # t, m, p, k, g, c, h, r, b
        bits = lanes.permute(2, 0, 7, 4, 1, 3, 6, 5, 8).reshape(w.bits, TILE_ROWS * (stop - start), shape[1], -1, 8)
        plain = _transpose_bits(bits).transpose(-1, -2).reshape(w.bits, TILE_ROWS * (stop - start), -1)
        part = out[:, TILE_ROWS * start : TILE_ROWS * stop]
        have = min(width, plain.shape[2])
        part[:, :, :have] = plain[:, : part.shape[1], :have]
    return map_parameters(w, lambda t: t.detach().contiguous())._replace(planes=out, layout=FILE)


def _padded(cols: int, steps: int) -> int:
    return macro_blocks(cols, steps) * 8 * steps * STEP


def _parts(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Ranges of tiles, from and to, each of at most about ``_AT_ONCE`` bytes."""
    step = max(1, _AT_ONCE // max(1, shape[1] * shape[2] * shape[3]))
    return [(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


def _transpose_bits(rows: Tensor) -> Tensor:
    """The transpose of each matrix of 8 times 8 bits: uint8 ``[..., 8]``, a byte a row, to the same shape.

    Three exchanges of bits that are 7, 14 and 28 places apart (Hacker's Delight, second edition, section 7-3).
    """
    x = rows.contiguous().view(torch.int64)
    for shift, mask in ((7, 0x00AA00AA00AA00AA), (14, 0x0000CCCC0000CCCC), (28, 0x00000000F0F0F0F0)):
        moved = (x ^ (x >> shift)) & mask
        x = x ^ moved ^ (moved << shift)
    return x.view(torch.uint8)


# ---- inside kernels ----------------------------------------------------------------------------------------------


@triton.jit
def place_of_row(r):
    """Where in a piece the bytes of rows `r` begin."""
    return (r % 8) * 64 + ((r // 8) % 2) * 4


@triton.jit
def place_of_column(c, STEP: tl.constexpr = STEP, PIECE: tl.constexpr = PIECE):
    """Where the bytes of columns `c` of a block are from there on, counted over the pieces of its steps."""
    return (c // STEP) * PIECE + ((c // 4) % 4) * 16 + ((c // 16) % 2) * 8 + c % 4


@triton.jit
def group_of(m, s: tl.constexpr, groups, BLOCKS: tl.constexpr):
    """The group of block `s` of the macro blocks `m`; a block of padding belongs to any group.

    ``BLOCKS`` is what :func:`blocks_of_group` gives.
    """
    if BLOCKS == 0:
        group = m * 0
    elif BLOCKS == 1:
        group = tl.minimum(m * 8 + s, groups - 1)
    else:
        group = tl.minimum((m * 8 + s) // BLOCKS, groups - 1)
    return group
