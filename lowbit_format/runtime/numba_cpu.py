"""CPU kernels: the compiled reference dequantizer, then torch's own product. The same functions as :mod:`.naive`.

Decoding gives the same bits as the naive way in a small part of the time. The gradient of the weight, from which those
of scales and shift are sums, is made a tile of rows at a time and never whole.
"""

from __future__ import annotations

from functools import partial

import numba
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .. import reference
from ..bits import to_ragged
from ..packed import PackedMatrix, Params
from ..schema import Scheme
from ..threads import parallel_rows
from . import naive
from .naive import Packed, RowGrads

TILE = 1 << 20  # weights whose gradient is in memory at a time: 4 MiB, a cache's size
SIGNS = np.where((np.arange(256)[:, None] >> np.arange(8)) & 1, 1, -1).astype(np.float32)  # of a byte's columns

__all__ = [
    "dequantize",
    "dequantize_param_grads",
    "embedding",
    "embedding_param_grads",
    "linear",
    "linear_input_grad",
    "linear_param_grads",
]


def decode(w: Packed) -> Tensor:
    """Weights ``[rows, cols]`` in float32; float64 parameters, which only tests have, go the naive way."""
    if w.scales.dtype == torch.float64:
        return naive.decode(w)
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


def linear(x: Tensor, w: Packed, bias: Tensor | None, deltas: Tensor | None, task_ids: Tensor | None) -> Tensor:
    """As :func:`.naive.linear`. A batch of several tasks shares its products: a row's delta is an epilogue to them.

    With planes' parts ``z[p] = x @ (scale[p] * sign[p]).T`` of the result, a factor ``1 + delta[p]`` on a scale adds
    ``delta[p] * z[p]``; with one scale for all of the weight, ``z`` is the result itself.
    """
    shared = 1 if w.codec != "bcq" else 1 + (0 if deltas is None else deltas.shape[1])
    mixed = deltas is not None and task_ids is not None and deltas.dim() == 3 and len(deltas) > shared
    if deltas is None or task_ids is None or not mixed or x.dtype != torch.float32 or w.row_bits is not None:
        return naive.linear(x, w, bias, deltas, task_ids, decode=decode)
    flat = x.reshape(-1, w.cols)
    base = F.linear(flat, decode(w))
    out = base.clone() if bias is None else base + bias
    with_base = F.pad(deltas, (0, 0, 0, 0, 0, 1))  # zeros last, where the base's -1 points
    for p in range(deltas.shape[1]):
        part = base if w.codec != "bcq" else F.linear(flat, decode(_plane(w, p)))
        out.addcmul_(with_base[task_ids, p], part)
    return out.reshape(*x.shape[:-1], out.shape[1])


def _plane(w: Packed, p: int) -> Packed:
    """Plane `p` alone, without the offset."""
    return w._replace(planes=w.planes[p : p + 1], scales=w.scales[p : p + 1], offsets=None, bits=1)


def decode_grads(w: Packed, weight_grad: RowGrads) -> tuple[Tensor, Tensor | None]:
    """As :func:`.naive.decode_grads`; ragged planes, codebooks and odd groups go that way."""
    rows, groups = w.scales.shape[1:]
    size = w.cols if w.group_size == 0 else min(w.group_size, w.cols)
    odd = groups > 1 and size % 8 != 0
    if w.scales.dtype == torch.float64 or w.row_bits is not None or w.codebook is not None or odd:
        return naive.decode_grads(w, weight_grad)
    planes = w.planes.detach()[: w.bits].contiguous().numpy()
    sums, totals = np.empty((w.bits, rows, groups), np.float32), np.empty((rows, groups), np.float32)
    step = max(1, TILE // w.cols)
    for start in range(0, rows, step):
        grad = weight_grad(start, min(start + step, rows)).contiguous().numpy()
        parallel_rows(_signed_sums, len(grad), sums, totals, grad, planes, SIGNS, start, size)
    signed, total = torch.from_numpy(sums), torch.from_numpy(totals)
    if w.codec == "bcq":
        return signed, None if w.offsets is None else total
    zero = 0 if w.zeros is None else w.zeros.float()
    weights = 2.0 ** torch.arange(w.bits - 1, -1, -1)  # BIT-1
    code = (signed.add_(total).div_(2) * weights[:, None, None]).sum(0)  # a bit is (its sign + 1) / 2
    return (code - zero * total)[None], None if w.zeros is None else -total * w.scales[0].float()


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
                    sign = signs[planes[p, row, c >> 3]]
                    grad = grads[r, c : c + 8]
                    for j in range(8):
                        lanes[j] += grad[j] * sign[j]
                acc = np.float32(0.0)
                for j in range(8):
                    acc += lanes[j]
                for c in range(whole, end):
                    acc += grads[r, c] * signs[planes[p, row, c >> 3], c & 7]
                sums[p, row, g] = acc


def _floats(values: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = values.detach().float().contiguous().numpy()
    return array


dequantize = partial(naive.dequantize, decode=decode)
linear_input_grad = partial(naive.linear_input_grad, decode=decode)
embedding = partial(naive.embedding, decode=decode)
dequantize_param_grads = partial(naive.dequantize_param_grads, decode_grads=decode_grads)
linear_param_grads = partial(naive.linear_param_grads, decode_grads=decode_grads)
embedding_param_grads = partial(naive.embedding_param_grads, decode_grads=decode_grads)
