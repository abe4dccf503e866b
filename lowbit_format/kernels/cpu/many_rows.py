"""Products of many rows of x: weights are decoded chunk by chunk, each small enough for the cache, for ``torch.mm``.

Where tasks multiply scales of bcq by one factor for each row of the matrix, all of them share the decoding
(:func:`.decoding.decode_for_tasks`). What follows goes by what a product costs. Where the machine has instructions for
products of bfloat16 matrices, all tasks share one more product for each tuned plane, of what that plane adds, and take
``delta`` times it. Elsewhere a task of many rows of x has a weight of its own. To make one for a task of few rows takes
longer than to multiply these by the base's weight, and to add what the task changes: ``delta * part`` of each tuned
plane, by lookups (:mod:`.products`), which need no weight. Other codecs and deltas: :mod:`..decode_then_matmul`.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ...machine.llvm import LANES, features
from .. import decode_then_matmul
from ..batch import check_task_ids
from ..matrix import PlaneMatrix
from ..parameter_order import group_major
from ..ragged import Part
from . import decoding, levels, parallel, products, tiles
from .decoding import BASE, PLANE
from .tiles import WORD

CHUNK = 1 << 21  # weights that are decoded at a time
FEW_ROWS = 40  # of x, for which no weight of their own is made


def linear(x: Tensor, w: PlaneMatrix, deltas: Tensor | None, task_ids: Tensor | None) -> Tensor:
    """As :meth:`..operators.Backend.linear`, for `x` ``[n, cols]``, without the bias.

    Args:
        w: in the tiled layout.

    Raises:
        IndexError: a task does not exist.
    """
    if w.row_bits is not None:
        out = x.new_empty(len(x), w.rows)
        for part in tiles.parts(w):
            out[:, part.rows] = linear(x, part.matrix, _of_part(deltas, part), task_ids)
        return out
    if deltas is None:
        return _by_weights(x, w, None, [(slice(None), BASE)])
    if task_ids is not None:
        check_task_ids(deltas, task_ids)
    plan = products.plan(w)
    if plan is None or w.codec != "bcq" or deltas.dim() == 4:
        return decode_then_matmul.linear(x, w, deltas, task_ids, weight_chunks)
    if task_ids is None:
        return _by_weights(x, w, deltas, [(slice(None), 0)])
    places = task_ids.long().clamp(min=BASE) + 1  # 0 is the base
    counts = torch.bincount(places, minlength=len(deltas) + 1).tolist()
    if shares_products(x.dtype) and sum(count > 0 for count in counts) > 1:
        return _by_planes(x, w, deltas, places)
    many = [place for place, count in enumerate(counts) if place > 0 and count > FEW_ROWS]
    if not many:
        out = _by_weights(x, w, None, [(slice(None), BASE)])
        return out.add_(plan.changes(x, deltas, task_ids))
    shares: list[tuple[Tensor | slice, int]] = [((places == one).nonzero().flatten(), one - 1) for one in many]
    if sum(counts[one] for one in many) == len(x):
        return _by_weights(x, w, deltas, shares)
    is_rest = torch.ones(len(counts), dtype=torch.bool, device="cpu")
    is_rest[many] = False
    rest = is_rest[places].nonzero().flatten()
    out = _by_weights(x, w, deltas, [*shares, (rest, BASE)])
    few = rest if counts[0] == 0 else rest[places[rest] > 0]
    if len(few):
        out.index_add_(0, few, plan.changes(x[few], deltas, task_ids[few]).to(x.dtype))
    return out


@functools.cache
def shares_products(dtype: torch.dtype) -> bool:
    """Whether a product costs little beside making its weight, so that tasks had better share one more of them."""
    return dtype == torch.bfloat16 and "amx-bf16" in features()


def _by_planes(x: Tensor, w: PlaneMatrix, deltas: Tensor, places: Tensor) -> Tensor:
    """The products of all rows of `x` with the base's weight, and ``delta`` times those with each tuned plane.

    `places` has 0 for a row of the base, and 1 + task for others.
    """
    wanted = torch.tensor([BASE, *(PLANE - p for p in range(deltas.shape[1]))], device="cpu")
    with_base = F.pad(deltas.detach().to(x.dtype), (0, 0, 0, 0, 1, 0))  # zeros first: those of the base
    factors = [with_base[:, p].index_select(0, places) for p in range(deltas.shape[1])]
    out = x.new_empty(len(x), w.rows)
    for start, stop, (base, *added) in _chunks(w, x.dtype, deltas, wanted):
        mine = torch.mm(x, base.t(), out=out[:, start:stop])
        for factor, plane in zip(factors, added, strict=True):
            mine.addcmul_(factor[:, start:stop], x @ plane.t())
    return out


def input_grad(grad: Tensor, w: PlaneMatrix, deltas: Tensor | None, task_ids: Tensor | None) -> Tensor:
    """As :meth:`..operators.Backend.linear_input_grad`, for `grad` ``[n, rows]``; `w` as in :func:`linear`."""
    if w.row_bits is None:
        return decode_then_matmul.input_grad(grad, w, deltas, task_ids, weight_chunks)
    out = torch.zeros(len(grad), w.cols, dtype=torch.float32, device="cpu")
    for part in tiles.parts(w):
        own = _of_part(deltas, part)
        out += decode_then_matmul.input_grad(grad[:, part.rows], part.matrix, own, task_ids, weight_chunks)
    return out.to(grad.dtype)


def _of_part(deltas: Tensor | None, part: Part) -> Tensor | None:
    """Of the rows of a part and the planes that they have."""
    return None if deltas is None else deltas[:, : part.bits, part.rows]


def _by_weights(x: Tensor, w: PlaneMatrix, deltas: Tensor | None, shares: list[tuple[Tensor | slice, int]]) -> Tensor:
    """The products of rows of `x` with the weights of tasks; `shares` has the rows of each."""
    tasks = torch.tensor([task for _, task in shares], device="cpu")
    given = [x[rows] for rows, _ in shares]
    parts = [x.new_empty(len(one), w.rows) for one in given]
    for start, stop, weights in _chunks(w, x.dtype, deltas, tasks):
        for one, part, weight in zip(given, parts, weights, strict=True):
            torch.mm(one, weight.t(), out=part[:, start:stop])
    if len(parts) == 1:
        return parts[0]
    out = x.new_empty(len(x), w.rows)
    for (rows, _), part in zip(shares, parts, strict=True):
        out[rows] = part
    return out


def weight_chunks(w: PlaneMatrix, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """First row, end, and weights ``[rows of the chunk, cols]`` in `dtype`, in memory that the next chunk reuses."""
    for start, stop, weights in _chunks(w, dtype, None, torch.tensor([BASE], device="cpu")):
        yield start, stop, weights[0]


class _Kept(threading.local):
    """Memory of each thread for a chunk of weights."""

    memory: Tensor = torch.empty(0, dtype=torch.uint8, device="cpu")


_kept = _Kept()


def _chunks(
    w: PlaneMatrix, dtype: torch.dtype, deltas: Tensor | None, tasks: Tensor
) -> Iterator[tuple[int, int, Tensor]]:
    """The same for several tasks: weights ``[tasks, rows of the chunk, cols]``.

    The memory is kept between calls: the system would clear new memory, which takes longer than decoding.
    """
    rows, threads, count = w.rows, parallel.num_threads(), len(tasks)
    kind = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    looks_up = kind == torch.bfloat16 and deltas is None and count == 1 and levels.can_look_up(w)
    w, padded = w._replace(scales=group_major(w.scales)), -(-w.cols // WORD) * WORD
    most = 2 * CHUNK if looks_up else CHUNK  # where decoding takes little, calls of the library count
    step = min(rows, max(LANES, most // (padded * count) // LANES * LANES))
    size = count * step * padded * kind.itemsize
    if _kept.memory.numel() < size:
        _kept.memory = torch.empty(size, dtype=torch.uint8, device="cpu")
    room = _kept.memory[:size].view(kind)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        out = room[: count * (stop - start) * padded].view(count, stop - start, padded)
        if looks_up:
            levels.decode(w, start, stop, threads, out[0])
        else:
            decoding.decode_for_tasks(w, start, stop, threads, deltas, tasks, out)
        yield start, stop, out[..., : w.cols].to(dtype)
