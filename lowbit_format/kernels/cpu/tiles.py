"""The tiled layout of the CPU kernels: the words of the file, sixteen rows side by side.

A *word* is 32 columns of one row of one plane: four bytes of the file, unchanged. A *tile* is 16 rows. It holds, group
by group, plane by plane, word by word, one vector of the words of its 16 rows::

    tiles[t, (g * W * bits) + (p * words of group g) + j, lane] = word (g * W + j) of plane p of row 16 * t + lane

with W words in a whole group; the last group may have fewer. Where groups are half a word (16 columns), the two groups
of a word stand together, as one of W = 1. Rows are padded with zeros to whole tiles. The planes are a uint8 tensor
``[tiles, words * bits, 16, 4]``. Those of ragged matrices are in :mod:`..ragged`.

Scales and shift are group-major (:mod:`..parameter_order`). Both changes lose nothing: :func:`untile` gives the bytes
of the file back.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...bits import plane_rows
from ...machine.llvm import LANES
from ...machine.threads import parallel_rows
from .. import ragged
from ..matrix import FILE, TILED, PlaneMatrix
from ..parameter_order import is_group_major
from ..rounded_sums import COLUMNS

WORD = 32  # columns
BLOCK = COLUMNS // WORD  # words whose tables are made at a time: 4 KiB of floats for a row of x, in the nearest cache
MOST_PLANES = 8  # of a matrix
MARGIN = 64  # bytes of memory behind the planes: see has_margin
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


def shape(w: PlaneMatrix, rows: int, bits: int) -> tuple[int, int, int, int]:
    """Shape of the tiled planes of so many rows with so many bits, of a matrix like `w`."""
    return -(-rows // LANES), words(w) * bits, LANES, 4


def array_of(values: Tensor) -> NDArray[Any]:
    """The tensor's memory. ``values.numpy()`` would forbid its owner to give that back, as ``fully_shard`` does."""
    return np.from_dlpack(values.detach().contiguous())


def tile(w: PlaneMatrix) -> PlaneMatrix:
    """`w` in the tiled layout, its planes in new memory. Parameters stay as they are."""
    if w.row_bits is not None:
        return ragged.tile(w, tile, MARGIN)
    planes, size = array_of(w.planes[: w.bits]), shape(w, w.rows, w.bits)
    source = planes.view("<u4")
    room = np.empty(math.prod(size) + MARGIN, np.uint8)
    out = room[:-MARGIN].view(np.uint32).reshape(size[0], size[1], LANES)
    parallel_rows(_set_tiles, size[0], out, source, group_words(w), grain=STRIP)
    return w._replace(planes=torch.from_numpy(room)[:-MARGIN].view(size), layout=TILED)


def untile(w: PlaneMatrix, rows: Tensor | None = None, planes: int | None = None) -> PlaneMatrix:
    """`w` in the file's layout.

    Args:
        w: in the tiled layout.
        rows: int64 ``[n]``: give a matrix of these rows alone.
        planes: with `rows` of a matrix that is not ragged: the first so many planes alone.

    Raises:
        IndexError: `rows` has one that does not exist.
    """
    picked = w if rows is None else _of_rows(w, rows)
    wanted = np.arange(w.rows) if rows is None else rows.numpy() % w.rows
    if w.row_bits is None:
        out = np.empty((planes or w.bits, len(wanted), words(w)), np.uint32)
        index = np.arange(len(out) * len(wanted)).reshape(len(out), -1)
        own, first = np.full(len(wanted), w.bits, np.uint8), np.zeros(w.bits + 1, np.int64)
    else:
        own, first = ragged.own_bits(picked).numpy(), np.zeros(w.bits + 1, np.int64)
        index = plane_rows(own, w.bits)
        out = np.empty((int(own.sum(dtype=np.int64)), words(w)), np.uint32)
        kept, begin = ragged.arrangement(w), 0
        for bits, some in kept.rows:
            first[bits] = begin
            begin += math.prod(shape(w, len(some), bits)[:2])
        wanted = kept.places.numpy()[wanted]
    source = w.planes.detach().numpy().reshape(-1, LANES, 4).view("<u4")[..., 0]
    parallel_rows(_set_rows, len(wanted), out.reshape(-1, words(w)), source, index, own, wanted, first, group_words(w))
    return picked._replace(planes=torch.from_numpy(out.view(np.uint8)), layout=FILE)


def _of_rows(w: PlaneMatrix, rows: Tensor) -> PlaneMatrix:
    """`w` with the parameters of `rows`."""
    return w._replace(
        scales=w.scales[:, rows],
        offsets=None if w.offsets is None else w.offsets[rows],
        zeros=None if w.zeros is None else w.zeros[rows],
        row_bits=None if w.row_bits is None else w.row_bits[rows],
    )


def parts(w: PlaneMatrix) -> list[ragged.Part]:
    """The parts of tiled ragged `w`."""
    return ragged.parts(w, shape)


@numba.njit(nogil=True, cache=True)
def _set_tiles(start, stop, out, source, whole):
    """Tiles start to stop of `out` uint32 ``[tiles, vectors, LANES]`` from `source` uint32 ``[bits, rows, words]``."""
    bits, rows, words = source.shape
    for t in range(start, stop):
        first = LANES * t
        lanes = min(LANES, rows - first)
        for g in range((words + whole - 1) // whole):
            here = min(whole, words - g * whole)
            for p in range(bits):
                at = g * whole * bits + p * here
                block = out[t, at : at + here]
                for lane in range(lanes):
                    line = source[p, first + lane]
                    for j in range(here):
                        block[j, lane] = line[g * whole + j]
                for lane in range(lanes, LANES):
                    for j in range(here):
                        block[j, lane] = 0


@numba.njit(nogil=True, cache=True)
def _set_rows(start, stop, out, source, index, bits, places, first, whole):
    """Rows start to stop into `out` uint32 ``[plane rows, words]`` from `source` uint32 ``[vectors, LANES]``.

    Args:
        index: int64 ``[planes, n]``: where in `out` each plane of each row is.
        bits: uint8 ``[n]``, of each row.
        places: int64 ``[n]``: of each row among all that have as many bits.
        first: int64 ``[bits]``: the first vector of rows of so many bits.
        whole: words of a whole group.
    """
    words = out.shape[1]
    for i in range(start, stop):
        n, lane = np.int64(bits[i]), places[i] % LANES
        begin = first[n] + places[i] // LANES * n * words
        for g in range((words + whole - 1) // whole):
            here = min(whole, words - g * whole)
            for p in range(min(n, len(index))):
                at, line = begin + g * whole * n + p * here, out[index[p, i]]
                for j in range(here):
                    line[g * whole + j] = source[at + j, lane]
