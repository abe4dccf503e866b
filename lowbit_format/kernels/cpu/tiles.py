"""The tiled layout of the CPU kernels: the words of the file, sixteen rows side by side.

A *word* is 32 columns of one row of one plane: four bytes of the file, unchanged. A *tile* is 16 rows. It holds, group
by group, plane by plane, word by word, one vector of the words of its 16 rows::

    tiles[t, (g * W * bits) + (p * words of group g) + j, lane] = word (g * W + j) of plane p of row 16 * t + lane

with W words in a whole group; the last group may have fewer. Where groups are half a word (16 columns), the two groups
of a word stand together, as one of W = 1. Rows are padded with zeros to whole tiles. The planes are a uint8 tensor
``[tiles, words * bits, 16, 4]``. Ragged planes (MIX-2) have tiles of as many planes as their longest row, one tile
after the other: ``[1, vectors of all tiles, 16, 4]``.

Scales and shift are group-major (:mod:`..parameter_order`). Both changes lose nothing: :func:`untile` gives the bytes
of the file back.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...bits import plane_rows
from ...machine.llvm import LANES
from ...machine.threads import parallel_rows
from ..matrix import FILE, TILED, PlaneMatrix
from ..parameter_order import is_group_major

WORD = 32  # columns
MOST_PLANES = 8  # of a matrix
STRIP = 4  # tiles that are multiplied together, so that a table in a register serves four vectors of words


def is_ready(w: PlaneMatrix) -> bool:
    """Whether the kernels can read all tensors of `w` where they are, without a copy."""
    return w.is_tiled and has_margin(w.planes) and all(t is None or is_group_major(t) for t in w[1:4])


def has_margin(planes: Tensor) -> bool:
    """Whether three bytes after the last word may be read, as the kernels do to save shifts (see README.md)."""
    return planes.storage_offset() + planes.numel() + 3 <= planes.untyped_storage().nbytes()


def can_tile(w: PlaneMatrix) -> bool:
    """Whether groups are whole words, or half a word. Others are decoded by :mod:`lowbit_format.reference`."""
    size = w.group_size
    fits = size == 0 or size >= w.cols or size % WORD == 0 or size == WORD // 2
    return w.is_in_memory and w.scales.dtype != torch.float64 and fits


def groups_in_word(w: PlaneMatrix) -> int:
    """2 where two groups share each word, else 1."""
    return 2 if w.group_size == WORD // 2 < w.cols else 1


def group_words(w: PlaneMatrix) -> int:
    """Words of a whole group, or of the two that share one."""
    return max(1, w.group_size // WORD) if 0 < w.group_size < w.cols else words(w)


def words(w: PlaneMatrix) -> int:
    """Words of a row of a plane; the file pads rows to 64 columns (BIT-2)."""
    return 2 * -(-w.cols // 64)


def tile_bits(w: PlaneMatrix) -> NDArray[np.int64]:
    """Planes in each tile, int64 ``[tiles]``: as many as its longest row has."""
    tiles = -(-w.rows // LANES)
    if w.row_bits is None:
        return np.full(tiles, w.bits, np.int64)
    of_rows = np.minimum(w.row_bits.detach().numpy(), w.bits)  # read at a lower precision, a row has fewer (NST-2)
    most: NDArray[np.int64] = np.maximum.reduceat(of_rows, np.arange(0, len(of_rows), LANES)).astype(np.int64)
    return most


def tile_starts(w: PlaneMatrix, bits: NDArray[np.int64]) -> NDArray[np.int64]:
    """First vector of each tile, int64 ``[tiles + 1]``; the last entry is their number. `bits` is :func:`tile_bits`."""
    starts: NDArray[np.int64] = np.concatenate([[0], np.cumsum(bits * words(w))])
    return starts


def tile(w: PlaneMatrix) -> PlaneMatrix:
    """`w` in the tiled layout, its planes in new memory. Parameters stay as they are."""
    planes, ragged = w.planes.detach().contiguous().numpy(), w.row_bits is not None
    source = planes.reshape(-1, planes.shape[-1]).view("<u4")
    bits, rows = tile_bits(w), w.rows
    starts = tile_starts(w, bits)
    index = _plane_rows(w)
    room = np.empty((int(starts[-1]) + 1, LANES), np.uint32)  # one vector more: see has_margin
    out = room[:-1]
    parallel_rows(_set_tiles, len(bits), out, source, index, bits, starts, group_words(w), rows, grain=STRIP)
    shape = (1, -1, LANES, 4) if ragged else (len(bits), w.bits * source.shape[1], LANES, 4)
    tiled = torch.from_numpy(room.view(np.uint8)).flatten()[: out.nbytes].view(shape)
    return w._replace(planes=tiled, layout=TILED)


def untile(w: PlaneMatrix, rows: Tensor | None = None, planes: int | None = None) -> PlaneMatrix:
    """`w` in the file's layout.

    Args:
        w: in the tiled layout.
        rows: int64 ``[n]``: give a matrix of these rows alone, with planes ``[bits, n, bytes]``. Planes that a row of
            a ragged matrix lacks are then zero.
        planes: with `rows`: only the first so many planes.

    Raises:
        IndexError: `rows` has one that does not exist.
    """
    count, bits = w.rows, tile_bits(w)
    picked = (
        None
        if rows is None
        else w._replace(  # raises the IndexError
            scales=w.scales[:, rows],
            offsets=None if w.offsets is None else w.offsets[rows],
            zeros=None if w.zeros is None else w.zeros[rows],
            row_bits=None if w.row_bits is None else w.row_bits[rows],
        )
    )
    source = w.planes.detach().numpy().reshape(-1, LANES, 4).view("<u4")[..., 0]
    starts = tile_starts(w, bits)
    wanted = np.arange(count) if rows is None else rows.numpy() % count
    out = np.zeros((planes or w.bits, len(wanted), words(w)), np.uint32)
    parallel_rows(_set_rows, len(wanted), out, source, wanted, bits, starts, group_words(w))
    found = torch.from_numpy(out.view(np.uint8))
    if picked is not None:
        return picked._replace(planes=found, layout=FILE)
    if w.row_bits is not None:
        found = found[torch.from_numpy(w.row_bits.numpy()[None, :] > np.arange(w.bits)[:, None])]
    return w._replace(planes=found, layout=FILE)


def _plane_rows(w: PlaneMatrix) -> NDArray[np.int64]:
    """Index of each row of each plane among all rows of the file's layout, int64 ``[bits, rows]``; -1: none."""
    rows = w.rows
    if w.row_bits is None or w.planes.dim() == 3:
        flat = np.arange(w.bits)[:, None] * w.planes.shape[1] + np.arange(rows)
        if w.row_bits is None:
            return flat
        return np.where(w.row_bits.numpy() > np.arange(w.bits)[:, None], flat, -1)
    return plane_rows(w.row_bits.detach().numpy(), w.bits)


@numba.njit(nogil=True, cache=True)
def _set_tiles(start, stop, out, source, index, bits, starts, whole, rows):
    """Tiles start to stop of `out` uint32 ``[all vectors, LANES]`` from `source` uint32 ``[plane rows, words]``."""
    words = source.shape[1]
    for t in range(start, stop):
        first, n = LANES * t, bits[t]
        lanes = min(LANES, rows - first)
        for g in range((words + whole - 1) // whole):
            here = min(whole, words - g * whole)
            for p in range(n):
                at = starts[t] + g * whole * n + p * here
                block = out[at : at + here]
                for lane in range(LANES):
                    row = index[p, first + lane] if lane < lanes else -1
                    if row < 0:
                        for j in range(here):
                            block[j, lane] = 0
                        continue
                    line = source[row]
                    for j in range(here):
                        block[j, lane] = line[g * whole + j]


@numba.njit(nogil=True, cache=True)
def _set_rows(start, stop, out, source, wanted, bits, starts, whole):
    """Rows wanted[start:stop] into `out` uint32 ``[planes, n, words]``, which is zero where a tile has fewer planes."""
    planes, words = out.shape[0], out.shape[2]
    for i in range(start, stop):
        t, lane = wanted[i] // LANES, wanted[i] % LANES
        n = bits[t]
        for g in range((words + whole - 1) // whole):
            here = min(whole, words - g * whole)
            for p in range(min(n, planes)):
                at = starts[t] + g * whole * n + p * here
                for j in range(here):
                    out[p, i, g * whole + j] = source[at + j, lane]
