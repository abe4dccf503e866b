"""The packed form that CPU kernels read: the same words as in the file, sixteen rows side by side.

A *word* is 32 columns of one row of one plane, the file's own four bytes. A *tile* is 16 rows; it holds, group by
group, plane by plane, word by word, one vector of the 16 rows' words::

    tiles[t, (g * W * bits) + (p * words of group g) + j, lane] = word (g * W + j) of plane p of row 16 * t + lane

with W words in a whole group; the last group may have fewer. Rows are padded with zeros to whole tiles. Ragged planes
(MIX-2) have tiles of as many planes as their longest row, one after the other. As a tensor it is uint8
``[tiles, words * bits, 16, 4]`` (ragged: ``[1, all of them, 16, 4]``): four dimensions tell it from plain planes.

Scales and shift are in lanes (:mod:`..lanes`). Both are exact: :func:`unpack` gives the file's bytes back.
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
_GRAIN = 4  # tiles of a strip (see products.py)


def has_product_kernel(w: PlaneMatrix) -> bool:
    """Whether planes and parameters are as kernels want them, so that nothing need be copied."""
    return w.is_tiled and has_margin(w.planes) and all(t is None or is_group_major(t) for t in w[1:4])


def has_margin(planes: Tensor) -> bool:
    """Whether three bytes behind the last word may be read: the way to a word's higher bytes without a shift."""
    return planes.storage_offset() + planes.numel() + 3 <= planes.untyped_storage().nbytes()


def can_tile(w: PlaneMatrix) -> bool:
    """Whether groups consist of whole words; other matrices are decoded by the reference."""
    size = w.group_size
    return w.is_in_memory and w.scales.dtype != torch.float64 and (size == 0 or size >= w.cols or size % WORD == 0)


def group_words(w: PlaneMatrix) -> int:
    """Words of a whole group."""
    return w.group_size // WORD if 0 < w.group_size < w.cols else words(w)


def words(w: PlaneMatrix) -> int:
    """Words of a row: rows are padded to 64 columns in the file (BIT-2)."""
    return 2 * -(-w.cols // 64)


def tile_bits(w: PlaneMatrix) -> NDArray[np.int64]:
    """Planes in each tile: the most that one of its rows has."""
    tiles = -(-w.rows // LANES)
    if w.row_bits is None:
        return np.full(tiles, w.bits, np.int64)
    of_rows = np.minimum(w.row_bits.detach().numpy(), w.bits)  # read at a lower precision, a row has fewer (NST-2)
    most: NDArray[np.int64] = np.maximum.reduceat(of_rows, np.arange(0, len(of_rows), LANES)).astype(np.int64)
    return most


def tile_starts(w: PlaneMatrix, bits: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each tile begins, in vectors; last, where all end. `bits` are those of :func:`tile_bits`."""
    starts: NDArray[np.int64] = np.concatenate([[0], np.cumsum(bits * words(w))])
    return starts


def tile(w: PlaneMatrix) -> PlaneMatrix:
    """`w` with its planes in tiles, in memory of their own."""
    planes, ragged = w.planes.detach().contiguous().numpy(), w.row_bits is not None
    source = planes.reshape(-1, planes.shape[-1]).view("<u4")
    bits, rows = tile_bits(w), w.rows
    starts = tile_starts(w, bits)
    index = _plane_rows(w)
    room = np.empty((int(starts[-1]) + 1, LANES), np.uint32)  # kernels read a few bytes more: see has_margin
    out = room[:-1]
    parallel_rows(_pack, len(bits), out, source, index, bits, starts, group_words(w), rows, grain=_GRAIN)
    shape = (1, -1, LANES, 4) if ragged else (len(bits), w.bits * source.shape[1], LANES, 4)
    planes = torch.from_numpy(room.view(np.uint8)).flatten()[: out.nbytes].view(shape)
    return w._replace(planes=planes, layout=TILED)


def untile(w: PlaneMatrix, rows: Tensor | None = None) -> PlaneMatrix:
    """`w` with plain planes, as in the file.

    With `rows` (int64 ``[n]``), a matrix of these rows alone: planes ``[bits, n, bytes]``, also of a ragged one, whose
    missing planes are then zero.
    """
    count, bits = w.rows, tile_bits(w)
    picked = (
        None
        if rows is None
        else w._replace(  # out of range is an IndexError here
            scales=w.scales[:, rows],
            offsets=None if w.offsets is None else w.offsets[rows],
            zeros=None if w.zeros is None else w.zeros[rows],
            row_bits=None if w.row_bits is None else w.row_bits[rows],
        )
    )
    source = w.planes.detach().numpy().reshape(-1, LANES, 4).view("<u4")[..., 0]
    starts = tile_starts(w, bits)
    wanted = np.arange(count) if rows is None else rows.numpy() % count
    out = np.zeros((w.bits, len(wanted), words(w)), np.uint32)
    parallel_rows(_unpack, len(wanted), out, source, wanted, bits, starts, group_words(w))
    planes = torch.from_numpy(out.view(np.uint8))
    if picked is not None:
        return picked._replace(planes=planes, layout=FILE)
    if w.row_bits is not None:
        planes = planes[torch.from_numpy(w.row_bits.numpy()[None, :] > np.arange(w.bits)[:, None])]
    return w._replace(planes=planes, layout=FILE)


def _plane_rows(w: PlaneMatrix) -> NDArray[np.int64]:
    """Where each row of each plane lies in the flat plain planes, ``[bits, rows]``; -1 where ragged ones lack it."""
    rows = w.rows
    if w.row_bits is None or w.planes.dim() == 3:
        flat = np.arange(w.bits)[:, None] * w.planes.shape[1] + np.arange(rows)
        if w.row_bits is None:
            return flat
        return np.where(w.row_bits.numpy() > np.arange(w.bits)[:, None], flat, -1)
    return plane_rows(w.row_bits.detach().numpy(), w.bits)


@numba.njit(nogil=True, cache=True)
def _pack(start, stop, out, source, index, bits, starts, whole, rows):
    """Tiles start to stop of `out` uint32 ``[all vectors, LANES]`` from `source` uint32 ``[plane rows, words]``."""
    words = source.shape[1]
    for t in range(start, stop):
        first, n = 16 * t, bits[t]
        lanes = min(16, rows - first)
        for g in range((words + whole - 1) // whole):
            here = min(whole, words - g * whole)
            for p in range(n):
                at = starts[t] + g * whole * n + p * here
                block = out[at : at + here]
                for lane in range(16):
                    row = index[p, first + lane] if lane < lanes else -1
                    if row < 0:
                        for j in range(here):
                            block[j, lane] = 0
                        continue
                    line = source[row]
                    for j in range(here):
                        block[j, lane] = line[g * whole + j]


@numba.njit(nogil=True, cache=True)
def _unpack(start, stop, out, source, wanted, bits, starts, whole):
    """Rows wanted[start:stop] into `out` uint32 ``[bits, n, words]``, which is zero where a tile has fewer planes."""
    words = out.shape[2]
    for i in range(start, stop):
        t, lane = wanted[i] // 16, wanted[i] % 16
        n = bits[t]
        for g in range((words + whole - 1) // whole):
            here = min(whole, words - g * whole)
            for p in range(n):
                at = starts[t] + g * whole * n + p * here
                for j in range(here):
                    out[p, i, g * whole + j] = source[at + j, lane]
