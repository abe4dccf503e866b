"""The operators on a CPU: the same functions as :mod:`..naive`, over plain planes and over the packed form alike.

Few rows of x are multiplied straight from the packed form (:mod:`.products`), many by decoding a tile of the weight at
a time, which stays in cache, for the library's own product. The weight is never whole in memory but where it is the
result. What the packed form does not hold (groups that are no multiple of 32 columns, float64) is decoded by the
reference.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ... import reference
from ...bits import to_ragged
from ...machine.threads import parallel_rows
from ...matrix import Params, StoredMatrix
from ...schema import Scheme
from .. import by_decoding, decode_then_matmul, naive
from ..batch import check_task_ids, grads_of_sums, no_autocast
from ..by_decoding import RowGrads
from ..matrix import PlaneMatrix, select_rows
from ..parameter_order import group_major, map_parameters
from . import decoding, parallel, products, tiles

ROWS = 64  # of x that are multiplied at a time straight from planes
TILE = 1 << 20  # weights decoded at a time for the library's product: 4 MiB
GRAD_TILE = 1 << 20  # weights whose gradient is in memory at a time: 4 MiB, a cache's size
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIGNS = np.where((np.arange(256)[:, None] >> np.arange(8)) & 1, 1, -1).astype(np.float32)  # of a byte's columns

can_tile = tiles.can_tile


def tile(w: PlaneMatrix) -> PlaneMatrix:
    """`w` in tiles, with group-major parameters. What is so already is left as it is."""
    return map_parameters(w if w.is_tiled else tiles.tile(w), group_major)


def untile(w: PlaneMatrix) -> PlaneMatrix:
    """`w` as the file has it."""
    if not w.is_tiled:
        return w
    products.forget_plan(w.planes)
    return map_parameters(tiles.untile(w), lambda t: t.clone(memory_format=torch.contiguous_format))


def decode(w: PlaneMatrix) -> Tensor:
    """Weights ``[rows, cols]`` in float32; float64 parameters, which only tests have, go the naive way."""
    if w.scales.dtype == torch.float64:
        return naive.decode(untile(w))
    if w.is_tiled and w.row_bits is None:
        return decoding.decode_rows(w, 0, w.rows, parallel.threads())
    return _decode_plain(untile(w))


def _decode_plain(w: PlaneMatrix) -> Tensor:
    shift = w.shift
    planes = w.planes.detach().contiguous().numpy()
    row_bits = None if w.row_bits is None else w.row_bits.detach().contiguous().numpy()
    if row_bits is not None and planes.ndim == 3:  # rows picked out of ragged planes come with all planes
        planes = to_ragged(planes[: w.bits], row_bits)
    scheme = Scheme(w.codec, w.bits, w.group_size, "F32", row_bits=w.row_bits is not None)
    matrix = StoredMatrix(
        scheme,
        w.rows,
        w.cols,
        planes,
        Params(_floats(w.scales), None if shift is None else _floats(shift)),
        {},
        None if w.codebook is None else _floats(w.codebook),
        row_bits,
    )
    return torch.from_numpy(reference.decode(matrix))


# --- products --------------------------------------------------------------------------------------


def linear(x: Tensor, w: PlaneMatrix, bias: Tensor | None, deltas: Tensor | None, task_ids: Tensor | None) -> Tensor:
    """As :func:`..naive.linear`; a few rows are multiplied in float32 whatever the dtype of `x`, and rounded once."""
    plan, rows = products.plan(w) if x.dtype in _DTYPES else None, x.numel() // w.cols
    if plan is not None and 0 < rows <= plan.most_rows:
        return _few(x, plan, bias, deltas, task_ids)
    with torch.no_grad(), no_autocast(x):
        if not can_tile(w) or w.row_bits is not None or x.dtype not in _DTYPES:
            return by_decoding.linear(x, untile(w), bias, deltas, task_ids, decode=decode)
        if deltas is not None and task_ids is not None:
            check_task_ids(deltas, task_ids)
        out = decode_then_matmul.linear(x.reshape(-1, w.cols), tile(w), deltas, task_ids, _weight_tiles)
        out = out if bias is None else out.add_(bias)
    return out.reshape(*x.shape[:-1], out.shape[1])


def _few(x: Tensor, plan: products.Plan, bias: Tensor | None, deltas: Tensor | None, task_ids: Tensor | None) -> Tensor:
    if bias is not None and (bias.dtype != torch.float32 or not bias.is_contiguous()):
        bias = bias.detach().float().contiguous()
    flat = x.reshape(-1, plan.cols)
    if len(flat) <= ROWS:
        out = plan.multiply(flat, bias, deltas, task_ids)
    else:
        out = torch.empty(len(flat), plan.rows)
        for at in range(0, len(flat), ROWS):
            ids = None if task_ids is None else task_ids[at : at + ROWS]
            out[at : at + ROWS] = plan.multiply(flat[at : at + ROWS], bias, deltas, ids)
    out = out.view(*x.shape[:-1], plan.rows)
    return out if x.dtype == torch.float32 else out.to(x.dtype)


class _Kept(threading.local):
    """Memory of each thread for a tile of weights."""

    room: Tensor = torch.empty(0)


_kept = _Kept()


def _weight_tiles(w: PlaneMatrix, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """Rows from, to, and the weight ``[rows of the tile, cols]`` in `dtype`, in memory that the next tile reuses.

    The memory is kept, since the system clears what it gives anew, in more time than decoding takes.
    """
    rows, threads = w.rows, parallel.threads()
    w = w._replace(scales=group_major(w.scales))
    step = max(16, TILE // w.cols // 16 * 16)
    if _kept.room.numel() < min(step, rows) * w.cols:
        _kept.room = torch.empty(max(TILE, step * w.cols))
    room = _kept.room[: min(step, rows) * w.cols].view(-1, w.cols)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        yield start, stop, decoding.decode_rows(w, start, stop, threads, room[: stop - start]).to(dtype)


def linear_input_grad(grad: Tensor, w: PlaneMatrix, deltas: Tensor | None, task_ids: Tensor | None) -> Tensor:
    """As :func:`..naive.linear_input_grad`, summed in float32."""
    packed = tile(w) if can_tile(w) and grad.dtype != torch.float64 else None
    if packed is None or packed.row_bits is not None:
        return by_decoding.linear_input_grad(grad, untile(w), deltas, task_ids, decode=decode)
    with torch.no_grad(), no_autocast(grad):
        out = decode_then_matmul.input_grad(grad.reshape(-1, grad.shape[-1]), packed, deltas, task_ids, _weight_tiles)
    return out.reshape(*grad.shape[:-1], w.cols)


# --- rows ------------------------------------------------------------------------------------------


def embedding(
    ids: Tensor, w: PlaneMatrix, deltas: Tensor | None, task_ids: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """As :func:`..naive.embedding`."""
    return by_decoding.embedding(ids, w, deltas, task_ids, dtype, decode=decode, select=_select)


def _select(w: PlaneMatrix, rows: Tensor) -> PlaneMatrix:
    return tiles.untile(w, rows) if w.is_tiled else select_rows(w, rows)


# --- gradients of parameters -----------------------------------------------------------------------


def decode_grads(w: PlaneMatrix, weight_grad: RowGrads) -> tuple[Tensor, Tensor | None]:
    """As :func:`..naive.decode_grads`; ragged planes, codebooks and odd groups go that way."""
    rows, groups = w.rows, w.groups
    size = w.group_columns
    odd = groups > 1 and size % 8 != 0
    if w.scales.dtype == torch.float64 or w.row_bits is not None or w.codebook is not None or odd:
        return naive.decode_grads(untile(w), weight_grad)
    sums, totals = np.empty((w.bits, rows, groups), np.float32), np.empty((rows, groups), np.float32)
    step = max(1, GRAD_TILE // w.cols)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        grad = weight_grad(start, stop).contiguous().numpy()
        planes = _select(w, torch.arange(start, stop)).planes if w.is_tiled else w.planes[:, start:stop]
        signs = planes[: w.bits].detach().contiguous().numpy()
        parallel_rows(_signed_sums, len(grad), sums, totals, grad, signs, SIGNS, start, size)
    return grads_of_sums(w, torch.from_numpy(sums), torch.from_numpy(totals))


@numba.njit(nogil=True, cache=True, fastmath={"contract", "reassoc"})
def _signed_sums(start, stop, sums, totals, grads, planes, signs, first, group):
    """Of rows start to stop of `grads` (rows from `first` on of the matrix), the sums over each group of +grad where
    the plane has a 1 and -grad where it has a 0, and the plain sums. Gradients may be summed in any order.
    """
    bits, cols = planes.shape[0], grads.shape[1]
    lanes = np.empty(8, np.float32)
    for r in range(start, stop):
        row = first + r
        for g in range(sums.shape[2]):
            begin, end = g * group, min(cols, (g + 1) * group)
            whole = begin + (end - begin) // 8 * 8
            total = np.float32(0.0)
            for c in range(begin, end):
                total += grads[r, c]
            totals[row, g] = total
            for p in range(bits):
                lanes[:] = 0
                for c in range(begin, whole, 8):
                    sign = signs[planes[p, r, c >> 3]]
                    grad = grads[r, c : c + 8]
                    for j in range(8):
                        lanes[j] += grad[j] * sign[j]
                acc = np.float32(0.0)
                for j in range(8):
                    acc += lanes[j]
                for c in range(whole, end):
                    acc += grads[r, c] * signs[planes[p, r, c >> 3], c & 7]
                sums[p, row, g] = acc


def _floats(values: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = values.detach().float().contiguous().numpy()
    return array


dequantize = partial(by_decoding.dequantize, decode=decode)
dequantize_param_grads = partial(by_decoding.dequantize_param_grads, decode_grads=decode_grads)
linear_param_grads = partial(by_decoding.linear_param_grads, decode_grads=decode_grads)
embedding_param_grads = partial(by_decoding.embedding_param_grads, decode_grads=decode_grads)
