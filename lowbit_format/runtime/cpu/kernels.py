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
from ...packed import PackedMatrix, Params
from ...schema import Scheme
from ...threads import parallel_rows
from .. import by_library, naive
from ..lanes import in_lanes, map_parameters
from ..naive import Packed, RowGrads
from . import decoding, products, team, tiles

ROWS = 64  # of x that are multiplied at a time straight from planes
TILE = 1 << 20  # weights decoded at a time for the library's product: 4 MiB
GRAD_TILE = 1 << 20  # weights whose gradient is in memory at a time: 4 MiB, a cache's size
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIGNS = np.where((np.arange(256)[:, None] >> np.arange(8)) & 1, 1, -1).astype(np.float32)  # of a byte's columns

__all__ = [
    "can_pack",
    "dequantize",
    "dequantize_param_grads",
    "embedding",
    "embedding_param_grads",
    "linear",
    "linear_input_grad",
    "linear_param_grads",
    "pack",
    "unpack",
]


def can_pack(w: Packed) -> bool:
    """Whether `w` has a packed form."""
    return type(w.planes) in (Tensor, torch.nn.Parameter) and tiles.can_pack(w)


def pack(w: Packed) -> Packed:
    """`w` in its packed form: planes in tiles, parameters in lanes. What is so already is left as it is."""
    planes = w.planes if tiles.is_packed(w.planes) else tiles.pack(w)
    return map_parameters(w, in_lanes)._replace(planes=planes)


def unpack(w: Packed) -> Packed:
    """`w` as the file has it."""
    if not tiles.is_packed(w.planes):
        return w
    products.forget_plan(w.planes)
    return map_parameters(tiles.unpack(w), lambda t: t.clone(memory_format=torch.contiguous_format))


def decode(w: Packed) -> Tensor:
    """Weights ``[rows, cols]`` in float32; float64 parameters, which only tests have, go the naive way."""
    if w.scales.dtype == torch.float64:
        return naive.decode(unpack(w))
    if tiles.is_packed(w.planes) and w.row_bits is None:
        return decoding.decode_rows(w, 0, w.scales.shape[1], team.threads())
    return _decode_plain(unpack(w))


def _decode_plain(w: Packed) -> Tensor:
    shift = w.offsets if w.codec == "bcq" else w.zeros
    planes = w.planes.detach().contiguous().numpy()
    row_bits = None if w.row_bits is None else w.row_bits.detach().contiguous().numpy()
    if row_bits is not None and planes.ndim == 3:  # rows picked out of ragged planes come with all planes
        planes = to_ragged(planes[: w.bits], row_bits)
    scheme = Scheme(w.codec, w.bits, w.group_size, "F32", row_bits=w.row_bits is not None)
    matrix = PackedMatrix(
        scheme,
        w.scales.shape[1],
        w.cols,
        planes,
        Params(_floats(w.scales), None if shift is None else _floats(shift)),
        {},
        None if w.codebook is None else _floats(w.codebook),
        row_bits,
    )
    return torch.from_numpy(reference.decode(matrix))


# --- products --------------------------------------------------------------------------------------


def linear(x: Tensor, w: Packed, bias: Tensor | None, deltas: Tensor | None, task_ids: Tensor | None) -> Tensor:
    """As :func:`..naive.linear`; a few rows are multiplied in float32 whatever the dtype of `x`, and rounded once."""
    plan, rows = products.plan(w) if x.dtype in _DTYPES else None, x.numel() // w.cols
    if plan is not None and 0 < rows <= plan.most_rows:
        return _few(x, plan, bias, deltas, task_ids)
    with torch.no_grad(), naive.no_autocast(x):
        if not can_pack(w) or w.row_bits is not None or x.dtype not in _DTYPES:
            return naive.linear(x, unpack(w), bias, deltas, task_ids, decode=decode)
        if deltas is not None and task_ids is not None:
            naive.check_task_ids(deltas, task_ids)
        out = by_library.linear(x.reshape(-1, w.cols), pack(w), deltas, task_ids, _weight_tiles)
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


def _weight_tiles(w: Packed, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """Rows from, to, and the weight ``[rows of the tile, cols]`` in `dtype`, in memory that the next tile reuses.

    The memory is kept, since the system clears what it gives anew, in more time than decoding takes.
    """
    rows, threads = w.scales.shape[1], team.threads()
    w = w._replace(scales=in_lanes(w.scales))
    step = max(16, TILE // w.cols // 16 * 16)
    if _kept.room.numel() < min(step, rows) * w.cols:
        _kept.room = torch.empty(max(TILE, step * w.cols))
    room = _kept.room[: min(step, rows) * w.cols].view(-1, w.cols)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        yield start, stop, decoding.decode_rows(w, start, stop, threads, room[: stop - start]).to(dtype)


def linear_input_grad(grad: Tensor, w: Packed, deltas: Tensor | None, task_ids: Tensor | None) -> Tensor:
    """As :func:`..naive.linear_input_grad`, summed in float32."""
    packed = pack(w) if can_pack(w) and grad.dtype != torch.float64 else None
    if packed is None or packed.row_bits is not None:
        return naive.linear_input_grad(grad, unpack(w), deltas, task_ids, decode=decode)
    with torch.no_grad(), naive.no_autocast(grad):
        out = by_library.input_grad(grad.reshape(-1, grad.shape[-1]), packed, deltas, task_ids, _weight_tiles)
    return out.reshape(*grad.shape[:-1], w.cols)


# --- rows ------------------------------------------------------------------------------------------


def embedding(ids: Tensor, w: Packed, deltas: Tensor | None, task_ids: Tensor | None, dtype: torch.dtype) -> Tensor:
    """As :func:`..naive.embedding`."""
    return naive.embedding(ids, w, deltas, task_ids, dtype, decode=decode, select=_select)


def _select(w: Packed, rows: Tensor) -> Packed:
    return tiles.unpack(w, rows) if tiles.is_packed(w.planes) else naive.select_rows(w, rows)


# --- gradients of parameters -----------------------------------------------------------------------


def decode_grads(w: Packed, weight_grad: RowGrads) -> tuple[Tensor, Tensor | None]:
    """As :func:`..naive.decode_grads`; ragged planes, codebooks and odd groups go that way."""
    rows, groups = w.scales.shape[1:]
    size = w.cols if w.group_size == 0 else min(w.group_size, w.cols)
    odd = groups > 1 and size % 8 != 0
    if w.scales.dtype == torch.float64 or w.row_bits is not None or w.codebook is not None or odd:
        return naive.decode_grads(unpack(w), weight_grad)
    sums, totals = np.empty((w.bits, rows, groups), np.float32), np.empty((rows, groups), np.float32)
    step = max(1, GRAD_TILE // w.cols)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        grad = weight_grad(start, stop).contiguous().numpy()
        planes = _select(w, torch.arange(start, stop)).planes if tiles.is_packed(w.planes) else w.planes[:, start:stop]
        signs = planes[: w.bits].detach().contiguous().numpy()
        parallel_rows(_signed_sums, len(grad), sums, totals, grad, signs, SIGNS, start, size)
    return naive.grads_of_sums(w, torch.from_numpy(sums), torch.from_numpy(totals))


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


dequantize = partial(naive.dequantize, decode=decode)
dequantize_param_grads = partial(naive.dequantize_param_grads, decode_grads=decode_grads)
linear_param_grads = partial(naive.linear_param_grads, decode_grads=decode_grads)
embedding_param_grads = partial(naive.embedding_param_grads, decode_grads=decode_grads)
