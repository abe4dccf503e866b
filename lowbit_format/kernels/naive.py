"""The slow truth: decoding in plain torch on any device, its gradients, and the operators by decoding.

The weights equal those of :func:`lowbit_format.reference.decode_numpy` bit for bit: every step is a separate eager
torch operation, which no compiler can contract with the next (DEC-1). The other backends are tested against this one.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from . import by_decoding, rounded_sums
from .batch import check_linear, each_task, factor_by_factor, one_by_one
from .by_decoding import RowGrads
from .matrix import EXACT, PlaneMatrix, full_planes, present_rows


def decode(w: PlaneMatrix) -> Tensor:
    """The weights ``[rows, cols]``, float32 (float64 if the scales are), by the operations of section 6."""
    scales, shift = w.scales.to(w.work_dtype)[..., None], _shift(w)
    if not w.scale_per_plane:
        scaled = _levels(w) * scales[0]
        return _columns(scaled if shift is None or not w.has_offsets else scaled + shift, w)
    rows, groups = w.rows, w.groups
    acc = torch.zeros((), dtype=scales.dtype, device=scales.device) if shift is None else shift
    acc = acc.expand(rows, groups, w.group_columns)
    present = present_rows(w)
    for p, bit in enumerate(_bits(w)):
        step = torch.where(bit, acc + scales[p], acc - scales[p])
        acc = step if present is None else torch.where(present[p][:, None, None], step, acc)
    return _columns(acc, w)


def decode_grads(w: PlaneMatrix, weight_grad: RowGrads, planes: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Gradients of the scales and of the shift from that of the weights, which `weight_grad` gives by rows.

    Args:
        planes: only those of the first so many planes' scales are wanted: others, and the shift's, are arbitrary.

    Returns:
        In the dtype of the weights' gradient: ``[planes of scales, rows, groups]``; ``[rows, groups]`` or None.
    """
    rows, groups = w.rows, w.groups
    size = w.group_columns
    grad = F.pad(weight_grad(0, rows), (0, groups * size - w.cols)).reshape(rows, groups, size)
    shift = _shift(w)
    scales_grad = torch.zeros_like(w.scales, dtype=grad.dtype)
    if not w.scale_per_plane:
        scales_grad[0] = (grad * _levels(w)).sum(-1)
        if shift is None or w.has_offsets:
            return scales_grad, None if shift is None else grad.sum(-1)
        return scales_grad, -grad.sum(-1) * w.scales[0].to(grad.dtype)
    present = present_rows(w)
    for p, bit in zip(range(w.bits if planes is None else planes), _bits(w), strict=False):
        signed = torch.where(bit, grad, -grad).sum(-1)
        scales_grad[p] = signed if present is None else torch.where(present[p][:, None], signed, 0)
    return scales_grad, None if shift is None else grad.sum(-1)


# --- the backend -----------------------------------------------------------------------------------


def linear(x: Tensor, w: PlaneMatrix, bias: Tensor | None, deltas: Tensor | None, task_ids: Tensor | None) -> Tensor:
    """As :meth:`..operators.Backend.linear`; with 8-bit activations as :mod:`.rounded_sums` says, summed in float64."""
    if w.activations == EXACT or w.codebook is not None:
        return by_decoding.linear(x, w, bias, deltas, task_ids, decode=decode)
    check_linear(x, w, bias, deltas, task_ids)
    flat = x.reshape(-1, w.cols)
    out = torch.empty(len(flat), w.rows, dtype=torch.float64, device=x.device)
    for rows, mine in each_task(w, deltas, task_ids):  # row by row: each takes as much memory as the weight
        for i in torch.arange(len(flat), device=x.device)[rows].tolist():
            out[i] = rounded_sums.product(flat[i : i + 1], mine, _bits(mine))[0]
    out = out if bias is None else out + bias.double()
    return out.to(x.dtype).reshape(*x.shape[:-1], w.rows)


dequantize = partial(by_decoding.dequantize, decode=decode)
dequantize_param_grads = partial(by_decoding.dequantize_param_grads, decode_grads=decode_grads)
linear_each = partial(one_by_one, linear=linear)
linear_together = partial(factor_by_factor, linear=linear)
linear_input_grad = partial(by_decoding.linear_input_grad, decode=decode)
linear_param_grads = partial(by_decoding.linear_param_grads, decode_grads=decode_grads)
embedding = partial(by_decoding.embedding, decode=decode)
embedding_param_grads = partial(by_decoding.embedding_param_grads, decode_grads=decode_grads)


def can_tile(w: PlaneMatrix) -> bool:
    """False: this backend decodes the file's layout."""
    return False


def tile(w: PlaneMatrix) -> PlaneMatrix:
    """`w` itself."""
    return w


def untile(w: PlaneMatrix) -> PlaneMatrix:
    """`w` itself."""
    return w


# --- decoding --------------------------------------------------------------------------------------


def _shift(w: PlaneMatrix) -> Tensor | None:
    """Offsets or zeros as ``[rows, groups, 1]``."""
    return None if w.shift is None else w.shift.to(w.work_dtype)[..., None]


def _levels(w: PlaneMatrix) -> Tensor:
    """Levels before scaling: ``float(code)``, ``float(code) - zero`` or ``codebook[code]``.

    ``[rows, groups, columns of a group]``.
    """
    present, work = present_rows(w), w.work_dtype
    code = torch.zeros((), dtype=torch.uint8, device=w.planes.device)
    for p, bit in enumerate(_bits(w)):
        longer = code * 2 + bit
        code = longer if present is None else torch.where(present[p][:, None, None], longer, code)
    level = code.to(work) if w.codebook is None else w.codebook.to(work)[code.long()]
    shift = _shift(w)
    return level if shift is None or w.has_offsets else level - shift


def _bits(w: PlaneMatrix) -> Iterator[Tensor]:
    """The bits of each plane, most significant first: bool ``[rows, groups, columns of a group]`` (BIT-1, BIT-2)."""
    rows, groups = w.rows, w.groups
    columns = groups * w.group_columns
    powers = torch.arange(8, dtype=torch.uint8, device=w.planes.device)
    for plane in full_planes(w):
        bit = ((plane[..., None] >> powers) & 1).reshape(rows, plane.shape[-1] * 8)[:, :columns]
        yield F.pad(bit, (0, columns - bit.shape[1])).reshape(rows, groups, w.group_columns).bool()


def _columns(grouped: Tensor, w: PlaneMatrix) -> Tensor:
    """``[rows, groups, columns of a group]`` to ``[rows, cols]``, without the padding of a short last group."""
    return grouped.reshape(grouped.shape[0], grouped.shape[1] * grouped.shape[2])[:, : w.cols]
