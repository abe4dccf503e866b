"""The operators on a CPU: the same functions as in :mod:`..naive`, for the file's layout and the tiled layout.

Few rows of x are multiplied straight from the tiled layout (:mod:`.products`). For many rows the weight is decoded
chunk by chunk (:mod:`.many_rows`); the whole weight is in memory only where it is the result. Matrices that cannot be
tiled (float64, or groups that are neither 16 columns nor a multiple of 32) are decoded by
:mod:`lowbit_format.reference`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ... import reference
from ...bits import to_ragged
from ...machine.llvm import features
from ...machine.threads import parallel_rows
from .. import by_decoding, naive
from ..batch import (
    Factor,
    Share,
    check_linear,
    check_shares,
    factor_by_factor,
    grads_of_sums,
    ids_of,
    no_autocast,
    one_by_one,
)
from ..by_decoding import RowGrads
from ..matrix import INT8, PlaneMatrix, select_rows
from ..parameter_order import group_major, map_parameters
from . import decoding, many_rows, parallel, products, tiles

GRAD_CHUNK = 1 << 20  # weights whose gradient is in memory at a time: 4 MiB, the size of a cache
SIGNS = np.where((np.arange(256)[:, None] >> np.arange(8)) & 1, 1, -1).astype(np.float32)  # [byte, column]
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

can_tile = tiles.can_tile


def tile(w: PlaneMatrix) -> PlaneMatrix:
    """`w` in the tiled layout, with group-major parameters. Tensors that are so already are kept."""
    return map_parameters(w if w.is_tiled else tiles.tile(w), group_major)


def untile(w: PlaneMatrix) -> PlaneMatrix:
    """`w` in the file's layout."""
    if not w.is_tiled:
        return w
    products.forget_plan(w.planes)
    return map_parameters(tiles.untile(w), lambda t: t.clone(memory_format=torch.contiguous_format))


def decode(w: PlaneMatrix) -> Tensor:
    """Weights, float32 ``[rows, cols]``. With float64 parameters, which only tests have, as :func:`..naive.decode`."""
    if w.scales.dtype == torch.float64:
        return naive.decode(untile(w))
    if not w.is_tiled:
        return _decode_from_file_layout(w)
    if w.row_bits is None:
        return decoding.decode_rows(w, 0, w.rows, parallel.num_threads())
    out = torch.empty(w.rows, w.cols, dtype=torch.float32, device="cpu")
    for part in tiles.parts(w):
        out[part.rows] = decode(part.matrix)
    return out


def _decode_from_file_layout(w: PlaneMatrix) -> Tensor:
    planes = tiles.array_of(w.planes)
    row_bits = None if w.row_bits is None else tiles.array_of(w.row_bits)
    if row_bits is not None and planes.ndim == 3:  # selected rows of ragged planes come with all planes
        planes = to_ragged(planes[: w.bits], row_bits)
    weight = np.empty((w.rows, w.cols), np.float32)
    reference.decode_arrays(
        weight,
        planes,
        _floats(w.scales),
        None if w.shift is None else _floats(w.shift),
        None if w.codebook is None else _floats(w.codebook),
        row_bits,
        codec=w.codec,
        bits=w.bits,
        group_columns=w.group_columns,
    )
    return torch.from_numpy(weight)


# --- products --------------------------------------------------------------------------------------


def linear(x: Tensor, w: PlaneMatrix, bias: Tensor | None, deltas: Tensor | None, task_ids: Tensor | None) -> Tensor:
    """As :func:`..naive.linear`. Few rows are multiplied in float32, whatever the dtype of `x`, and rounded once."""
    check_linear(x, w, bias, deltas, task_ids)
    plan, rows = products.plan(w) if x.dtype in _DTYPES else None, x.numel() // w.cols
    if plan is not None and 0 < rows <= most_rows(plan, w, x.dtype, task_ids):
        return _few(x, plan, bias, deltas, task_ids, w.activations)
    with torch.no_grad(), no_autocast(x):
        if not can_tile(w) or x.dtype not in _DTYPES:
            return by_decoding.linear(x, untile(w), bias, deltas, task_ids, decode=decode)
        out = many_rows.linear(x.reshape(-1, w.cols).to(product_dtype(x.dtype)), tile(w), deltas, task_ids)
        out = out if bias is None else out.add_(bias)
    return out.to(x.dtype).reshape(*x.shape[:-1], out.shape[1])


@functools.cache
def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which the library multiplies matrices of this dtype with the least time on this machine.

    Without instructions for a half precision it takes several times as long with it as with float32: 101 ms in bfloat16
    and 80 in float16 where float32 takes 17 (128 rows, 2048 x 2048, one thread of a Zen 3).
    """
    known = features()
    native = {torch.bfloat16: {"avx512bf16", "amx-bf16"}, torch.float16: {"avx512fp16", "amx-fp16"}}
    if dtype in native and "sse2" in known and not known & native[dtype]:
        return torch.float32
    return dtype


def most_rows(plan: products.Plan, w: PlaneMatrix, dtype: torch.dtype, task_ids: Tensor | None) -> float:
    """Rows of an x of this dtype up to which they are multiplied straight from planes."""
    rounds = w.activations == INT8 and plan.can_round
    return products.most_rows(plan.bits, dtype, task_ids is not None, rounds)


def _few(
    x: Tensor,
    plan: products.Plan,
    bias: Tensor | None,
    deltas: Tensor | None,
    task_ids: Tensor | None,
    activations: str,
) -> Tensor:
    bias = readable(bias)
    flat = x.reshape(-1, plan.cols)
    if len(flat) <= products.ROWS_AT_ONCE:
        out = plan.multiply(flat, bias, deltas, task_ids, activations)
    else:
        out = torch.empty(len(flat), plan.rows, dtype=torch.float32, device="cpu")
        for start in range(0, len(flat), products.ROWS_AT_ONCE):
            rows = slice(start, start + products.ROWS_AT_ONCE)
            ids = None if task_ids is None else task_ids[rows]
            out[rows] = plan.multiply(flat[rows], bias, deltas, ids, activations)
    out = out.view(*x.shape[:-1], plan.rows)
    return out if x.dtype == torch.float32 else out.to(x.dtype)


def readable(bias: Tensor | None) -> Tensor | None:
    """`bias` as kernels read it: float32, contiguous."""
    if bias is None or (bias.dtype == torch.float32 and bias.is_contiguous()):
        return bias
    return bias.detach().float().contiguous()


def linear_together(x: Tensor, factors: Sequence[Factor]) -> list[Tensor]:
    """As :meth:`..operators.Backend.linear_together`; products with few rows are one piece of work for the threads."""
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    few = []
    for w, bias, deltas, task_ids in factors:
        check_linear(x, w, bias, deltas, task_ids)
        plan = products.plan(w) if x.dtype in _DTYPES else None
        if plan is None or not 0 < rows <= min(most_rows(plan, w, x.dtype, task_ids), products.ROWS_AT_ONCE):
            return factor_by_factor(x, factors, linear=linear)
        few.append(products.Product(plan, readable(bias), deltas, task_ids, w.activations))
    found = products.multiply_together(x if x.dim() == 2 else x.reshape(rows, -1), few)
    if x.dim() == 2 and x.dtype == torch.float32:
        return found
    return [out.view(*x.shape[:-1], out.shape[1]).to(x.dtype) for out in found]


def linear_each(x: Tensor, shares: Sequence[Share], task_ids: Tensor | None) -> Tensor:
    """As :func:`..batch.one_by_one`; all products with few rows are one piece of work for the threads."""
    if x.dtype not in _DTYPES:
        return one_by_one(x, shares, task_ids, linear=linear)
    check_shares(x, shares)
    few, out = [], torch.empty(len(x), shares[0].w.rows, dtype=torch.float32, device="cpu")
    for share in shares:
        w, begin, end, deltas = share
        check_linear(x, w, None, deltas, task_ids)
        plan = products.plan(w)
        ids = ids_of(share, task_ids)
        if plan is None or end - begin > min(most_rows(plan, w, x.dtype, ids), products.ROWS_AT_ONCE):
            out[begin:end] = linear(x[begin:end], w, None, deltas, ids)
        elif begin < end:
            few.append((plan, share))
    if few:
        products.multiply_each(x, few, task_ids, out)
    return out if x.dtype == torch.float32 else out.to(x.dtype)


def linear_input_grad(grad: Tensor, w: PlaneMatrix, deltas: Tensor | None, task_ids: Tensor | None) -> Tensor:
    """As :func:`..naive.linear_input_grad`, summed in float32."""
    if not can_tile(w) or grad.dtype == torch.float64:
        return by_decoding.linear_input_grad(grad, untile(w), deltas, task_ids, decode=decode)
    with torch.no_grad(), no_autocast(grad):
        rows = grad.reshape(-1, grad.shape[-1]).to(product_dtype(grad.dtype))
        out = many_rows.input_grad(rows, tile(w), deltas, task_ids)
    return out.to(grad.dtype).reshape(*grad.shape[:-1], w.cols)


# --- rows ------------------------------------------------------------------------------------------


def embedding(
    ids: Tensor, w: PlaneMatrix, deltas: Tensor | None, task_ids: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """As :func:`..naive.embedding`."""
    return by_decoding.embedding(ids, w, deltas, task_ids, dtype, decode=decode, select=_select)


def _select(w: PlaneMatrix, rows: Tensor) -> PlaneMatrix:
    return tiles.untile(w, rows) if w.is_tiled else select_rows(w, rows)


# --- gradients of parameters -----------------------------------------------------------------------


def decode_grads(w: PlaneMatrix, weight_grad: RowGrads, planes: int | None = None) -> tuple[Tensor, Tensor | None]:
    """As :func:`..naive.decode_grads`, which computes those of plain ragged planes, codebooks and odd groups."""
    rows, groups = w.rows, w.groups
    size = w.group_columns
    odd = groups > 1 and size % 8 != 0
    is_plain_ragged = w.row_bits is not None and not w.is_tiled
    if w.scales.dtype == torch.float64 or is_plain_ragged or w.codebook is not None or odd:
        return naive.decode_grads(untile(w), weight_grad, planes)
    if w.row_bits is not None:
        return _decode_grads_by_parts(w, weight_grad, planes)
    wanted = w.bits if planes is None or not w.scale_per_plane else planes
    sums, totals = np.empty((wanted, rows, groups), np.float32), np.empty((rows, groups), np.float32)
    step = max(1, GRAD_CHUNK // w.cols)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        grad = weight_grad(start, stop).contiguous().numpy()
        if w.is_tiled:
            mine = tiles.untile(w, torch.arange(start, stop, device="cpu"), wanted).planes
        else:
            mine = w.planes[:wanted, start:stop]
        signs = tiles.array_of(mine)
        parallel_rows(_signed_sums, len(grad), sums, totals, grad, signs, SIGNS, start, size)
    return grads_of_sums(w, torch.from_numpy(sums), torch.from_numpy(totals))


def _decode_grads_by_parts(w: PlaneMatrix, weight_grad: RowGrads, planes: int | None) -> tuple[Tensor, Tensor | None]:
    """The same for tiled ragged rows. Planes that a row lacks have no gradient (MIX-4)."""
    grad = weight_grad(0, w.rows)
    wanted = len(w.scales) if planes is None or not w.scale_per_plane else planes
    scales_grad = torch.zeros(wanted, w.rows, w.groups, dtype=torch.float32, device="cpu")
    shift_grad = None if w.shift is None else torch.empty(w.shift.shape, dtype=torch.float32, device="cpu")
    for part in tiles.parts(w):
        own, first = grad[part.rows], None if planes is None else min(planes, part.bits)
        found, found_shift = decode_grads(part.matrix, lambda start, stop, own=own: own[start:stop], first)  # type: ignore[misc]
        scales_grad[: len(found), part.rows] = found
        if shift_grad is not None and found_shift is not None:
            shift_grad[part.rows] = found_shift
    return scales_grad, shift_grad


@numba.njit(nogil=True, cache=True, fastmath={"contract", "reassoc"})
def _signed_sums(start, stop, sums, totals, grads, planes, signs, first, group):
    """Sums over each group, for rows start to stop of `grads`: of +grad where a plane has a 1 and -grad where it has
    a 0, and of grad. The order of sums is free.

    Args:
        sums, totals: float32 ``[bits, all rows, groups]`` and ``[all rows, groups]``, to fill.
        grads: float32 ``[rows, cols]``, for rows `first` and on of the matrix.
        planes: uint8 ``[bits, rows, bytes]``, of the same rows.
        signs: :data:`SIGNS`.
        group: columns of a group.
    """
    bits, cols = planes.shape[0], grads.shape[1]
    partial = np.empty(8, np.float32)  # sums of every eighth column
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
                partial[:] = 0
                for c in range(begin, whole, 8):
                    sign = signs[planes[p, r, c >> 3]]
                    grad = grads[r, c : c + 8]
                    for j in range(8):
                        partial[j] += grad[j] * sign[j]
                acc = np.float32(0.0)
                for j in range(8):
                    acc += partial[j]
                for c in range(whole, end):
                    acc += grads[r, c] * signs[planes[p, r, c >> 3], c & 7]
                sums[p, row, g] = acc


def _floats(values: Tensor) -> NDArray[np.float32]:
    return tiles.array_of(values.float())


dequantize = functools.partial(by_decoding.dequantize, decode=decode)
dequantize_param_grads = functools.partial(by_decoding.dequantize_param_grads, decode_grads=decode_grads)
linear_param_grads = functools.partial(by_decoding.linear_param_grads, decode_grads=decode_grads)
embedding_param_grads = functools.partial(by_decoding.embedding_param_grads, decode_grads=decode_grads)
