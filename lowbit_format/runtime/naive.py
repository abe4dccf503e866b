"""The slow truth: decoding and products in plain torch, and their gradients, on any device.

Weights come out bit for bit as :func:`lowbit_format.reference.decode_numpy` gives them: every operation is an eager
torch operation of its own, so that no compiler contracts two of them (DEC-1). Faster kernels offer the same
functions under the same names (see :data:`lowbit_format.runtime.ops.KERNELS`) and are tested against these.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor


class Packed(NamedTuple):
    """The tensors of one matrix ``[rows, cols]`` (spec section 4), read at precision `bits`.

    Attributes:
        planes: uint8 ``[>= bits, rows, bytes]``, or ragged ``[>= sum of row_bits, bytes]`` (MIX-2).
        scales: float ``[bits, rows, groups]`` (bcq) or ``[1, rows, groups]``.
        offsets: float ``[rows, groups]``, or None.
        zeros: float ``[rows, groups]``, or None.
        codebook: float32 ``[2**bits]``, or None.
        row_bits: uint8 ``[rows]``, or None.
        codec, bits, group_size, cols: the scheme, as the config has it.
    """

    planes: Tensor
    scales: Tensor
    offsets: Tensor | None
    zeros: Tensor | None
    codebook: Tensor | None
    row_bits: Tensor | None
    codec: str
    bits: int
    group_size: int
    cols: int


Given = TypeVar("Given")
ParamGrads = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]  # of scales, offsets, zeros, deltas
Rows = Tensor | slice  # rows of a flattened input: bool mask, or all


def decode(w: Packed) -> Tensor:
    """Weights ``[rows, cols]`` in float32 (float64 if the scales are), operation by operation as DEC-2 to DEC-4 say."""
    scales, shift = w.scales.to(_work_dtype(w))[..., None], _shift(w)
    if w.codec != "bcq":
        return _columns(_levels(w) * scales[0], w)
    rows, groups = w.scales.shape[1:]
    acc = torch.zeros((), dtype=scales.dtype, device=scales.device) if shift is None else shift
    acc = acc.expand(rows, groups, _group_columns(w))
    present = _present(w)
    for p, bit in enumerate(_bits(w)):
        step = torch.where(bit, acc + scales[p], acc - scales[p])
        acc = step if present is None else torch.where(present[p][:, None, None], step, acc)
    return _columns(acc, w)


Decoder = Callable[[Packed], Tensor]  # a faster one gives the same bits
RowSelector = Callable[[Packed, Tensor], Packed]  # the matrix of some rows, int64 [n]
RowGrads = Callable[[int, int], Tensor]  # gradient of the weight's rows start to stop, [stop - start, cols]


def decode_grads(w: Packed, weight_grad: RowGrads) -> tuple[Tensor, Tensor | None]:
    """Gradients of ``scales`` and of the shift (offsets or zeros) from that of :func:`decode`'s result."""
    rows, groups = w.scales.shape[1:]
    size = _group_columns(w)
    grad = F.pad(weight_grad(0, rows), (0, groups * size - w.cols)).reshape(rows, groups, size)
    shift = _shift(w)
    scales_grad = torch.zeros_like(w.scales, dtype=grad.dtype)
    if w.codec != "bcq":
        scales_grad[0] = (grad * _levels(w)).sum(-1)
        return scales_grad, None if shift is None else -grad.sum(-1) * w.scales[0].to(grad.dtype)
    present = _present(w)
    for p, bit in enumerate(_bits(w)):
        signed = torch.where(bit, grad, -grad).sum(-1)
        scales_grad[p] = signed if present is None else torch.where(present[p][:, None], signed, 0)
    return scales_grad, None if shift is None else grad.sum(-1)


DecoderGrads = Callable[[Packed, RowGrads], tuple[Tensor, Tensor | None]]


def grads_of_sums(w: Packed, signed: Tensor, total: Tensor) -> tuple[Tensor, Tensor | None]:
    """What :func:`decode_grads` gives, from sums of the weight's gradient over each group.

    Args:
        w: without ragged rows.
        signed: float32 ``[bits, rows, groups]``, with +1 where a plane has a 1 and -1 where it has a 0; of a codebook
            ``[1, rows, groups]``, with its levels. Changed.
        total: float32 ``[rows, groups]``, without.
    """
    if w.codec == "bcq":
        return signed, None if w.offsets is None else total
    if w.codebook is not None:
        return signed, None
    zero = 0 if w.zeros is None else w.zeros.float()
    weights = 2.0 ** torch.arange(w.bits - 1, -1, -1, device=signed.device)  # BIT-1
    code = (signed.add_(total).div_(2) * weights[:, None, None]).sum(0)  # a bit is (its sign + 1) / 2
    return (code - zero * total)[None], None if w.zeros is None else -total * w.scales[0].float()


# --- the operators ---------------------------------------------------------------------------------


def dequantize(w: Packed, deltas: Tensor | None, dtype: torch.dtype, *, decode: Decoder = decode) -> Tensor:
    """The weight ``[rows, cols]``, rounded once to `dtype` (DEC-5); of task 0 where there are `deltas`."""
    return decode(w if deltas is None else with_delta(w, deltas[0])).to(dtype).contiguous()


def dequantize_param_grads(
    grad: Tensor, w: Packed, deltas: Tensor | None, *, decode_grads: DecoderGrads = decode_grads
) -> ParamGrads:
    """Gradients of the parameters from that of the weight, ``[rows, cols]``."""
    grad = grad.to(_work_dtype(w))
    return sum_over_tasks(lambda _: lambda start, stop: grad[start:stop], w, deltas, None, decode_grads)


def linear(
    x: Tensor,
    w: Packed,
    bias: Tensor | None,
    deltas: Tensor | None,
    task_ids: Tensor | None,
    *,
    decode: Decoder = decode,
) -> Tensor:
    """``x @ weight.T + bias`` with the weight in the dtype of `x`.

    Args:
        x: float ``[..., cols]``.
        bias: float ``[rows]``, or None.
        deltas: float32 ``[tasks, p, rows]`` (multiply) or ``[tasks, p, rows, groups]`` (add), or None; see TSK-6.
        task_ids: int64 ``[rows of x]``, the task of each row of the flattened `x`, -1 for the base; None: task 0.
        decode: what gives the float weight.

    Returns:
        ``[..., rows]`` in the dtype of `x`.
    """
    flat, bias = x.reshape(-1, w.cols), None if bias is None else bias.to(x.dtype)
    out = x.new_empty(flat.shape[0], w.scales.shape[1])
    with no_autocast(x):
        for rows, mine in each_task(w, deltas, task_ids):
            out[rows] = F.linear(flat[rows], decode(mine).to(x.dtype), bias)
    return out.reshape(*x.shape[:-1], out.shape[1])


def linear_input_grad(
    grad: Tensor, w: Packed, deltas: Tensor | None, task_ids: Tensor | None, *, decode: Decoder = decode
) -> Tensor:
    """Gradient of `x` in :func:`linear`, from that of its result ``[..., rows]``."""
    flat = grad.reshape(-1, grad.shape[-1])
    out = grad.new_empty(flat.shape[0], w.cols)
    with no_autocast(grad):
        for rows, mine in each_task(w, deltas, task_ids):
            out[rows] = flat[rows] @ decode(mine).to(grad.dtype)
    return out.reshape(*grad.shape[:-1], w.cols)


def linear_param_grads(
    grad: Tensor,
    x: Tensor,
    w: Packed,
    deltas: Tensor | None,
    task_ids: Tensor | None,
    *,
    decode_grads: DecoderGrads = decode_grads,
) -> ParamGrads:
    """Gradients of the parameters in :func:`linear`; accumulated in float32 whatever the dtype of `x`."""
    work = _work_dtype(w)
    flat_grad, flat_x = grad.reshape(-1, grad.shape[-1]).to(work), x.reshape(-1, w.cols).to(work)

    def weight_grad(rows: Rows) -> RowGrads:
        left, right = flat_grad[rows].T, flat_x[rows]
        return lambda start, stop: left[start:stop] @ right

    with no_autocast(x):
        return sum_over_tasks(weight_grad, w, deltas, task_ids, decode_grads)


def embedding(
    ids: Tensor,
    w: Packed,
    deltas: Tensor | None,
    task_ids: Tensor | None,
    dtype: torch.dtype,
    *,
    decode: Decoder = decode,
    select: RowSelector | None = None,
) -> Tensor:
    """Rows `ids` (int ``[...]``) of the weight in `dtype`, ``[..., cols]``; only these rows are decoded.

    `task_ids` is int64 ``[number of ids]``.
    """
    flat = ids.reshape(-1).long()
    out = torch.empty(flat.shape[0], w.cols, dtype=dtype, device=ids.device)
    for rows, mine in each_task(w, deltas, task_ids):
        out[rows] = decode((select or select_rows)(mine, flat[rows])).to(dtype)
    return out.reshape(*ids.shape, w.cols)


def embedding_param_grads(
    grad: Tensor,
    ids: Tensor,
    w: Packed,
    deltas: Tensor | None,
    task_ids: Tensor | None,
    *,
    decode_grads: DecoderGrads = decode_grads,
) -> ParamGrads:
    """Gradients of the parameters in :func:`embedding`, from that of its result ``[..., cols]``."""
    flat_grad, flat = grad.reshape(-1, w.cols).to(_work_dtype(w)), ids.reshape(-1).long()

    def weight_grad(rows: Rows) -> RowGrads:
        out = flat_grad.new_zeros(w.scales.shape[1], w.cols)
        out.index_add_(0, flat[rows], flat_grad[rows])
        return lambda start, stop: out[start:stop]

    return sum_over_tasks(weight_grad, w, deltas, task_ids, decode_grads)


# --- decoding --------------------------------------------------------------------------------------


def with_delta(w: Packed, delta: Tensor) -> Packed:
    """`w` with a task's scales (TSK-6, TSK-8).

    Args:
        delta: ``[p, rows]``: multiply by ``1 + delta``; ``[p, rows, groups]``: add.
    """
    scales = w.scales.to(_work_dtype(w))
    delta = delta.to(scales.dtype)
    first = scales[: delta.shape[0]]
    tuned = first * (1 + delta)[..., None] if delta.dim() == 2 else first + delta
    return w._replace(scales=torch.cat([tuned, scales[delta.shape[0] :]]))


def each_task(w: Packed, deltas: Tensor | None, task_ids: Tensor | None) -> Iterator[tuple[Rows, Packed]]:
    """The rows of each task, and the matrix with that task's scales."""
    for rows, task in _tasks(deltas, task_ids):
        yield rows, w if deltas is None or task < 0 else with_delta(w, deltas[task])


def _tasks(deltas: Tensor | None, task_ids: Tensor | None) -> Iterator[tuple[Rows, int]]:
    """Which rows belong to which task, -1 being the base."""
    if deltas is None or task_ids is None:
        yield slice(None), -1 if deltas is None else 0
        return
    for task in torch.unique(task_ids).tolist():
        yield task_ids == task, task


def sum_over_tasks(
    weight_grad: Callable[[Rows], Given],
    w: Packed,
    deltas: Tensor | None,
    task_ids: Tensor | None,
    decode_grads: Callable[[Packed, Given], tuple[Tensor, Tensor | None]],
) -> ParamGrads:
    """Gradients of all parameters.

    `weight_grad` gives the weight's gradient that some rows of the input make, in whatever form `decode_grads` takes.
    """
    # Contiguous, whatever strides the parameters have: so the operators' fakes say.
    zeros = functools.partial(torch.zeros_like, dtype=_work_dtype(w), memory_format=torch.contiguous_format)
    shift = w.offsets if w.codec == "bcq" else w.zeros
    scales_grad, shift_grad = zeros(w.scales), None if shift is None else zeros(shift)
    deltas_grad = None if deltas is None else zeros(deltas)
    for rows, task in _tasks(deltas, task_ids):
        tuned = w if deltas is None or task < 0 else with_delta(w, deltas[task])
        grad, task_shift_grad = decode_grads(tuned, weight_grad(rows))
        if shift_grad is not None and task_shift_grad is not None:
            shift_grad += task_shift_grad
        if deltas is None or deltas_grad is None or task < 0:
            scales_grad += grad
            continue
        delta, p = deltas[task].to(grad.dtype), deltas.shape[1]
        if delta.dim() == 2:
            deltas_grad[task] = (grad[:p] * w.scales[:p].to(grad.dtype)).sum(-1)
            grad[:p] *= (1 + delta)[..., None]
        else:
            deltas_grad[task] = grad[:p]
        scales_grad += grad
    offsets_grad, zeros_grad = (shift_grad, None) if w.codec == "bcq" else (None, shift_grad)
    return scales_grad, offsets_grad, zeros_grad, deltas_grad


def check_tasks(scales: tuple[int, int, int], deltas: Tensor, task_ids: Tensor | None, batch: int) -> None:
    """For kernels, which look at no bounds: raises ValueError if deltas do not fit such scales, or ids the batch."""
    planes, rows, groups = scales
    shape = (len(deltas), min(deltas.shape[1], planes), rows, groups)[: deltas.dim()]
    if tuple(deltas.shape) != shape:
        raise ValueError(f"expected deltas {list(shape)} for this matrix, found {list(deltas.shape)}")
    if task_ids is not None and task_ids.numel() != batch:
        raise ValueError(f"expected a task for each of {batch} rows, found {task_ids.numel()}")


def check_task_ids(deltas: Tensor, task_ids: Tensor) -> None:
    """Raises IndexError for a task that has no deltas. On a GPU this would wait for the device."""
    if task_ids.numel() and int(task_ids.max()) >= len(deltas):
        raise IndexError(f"task {int(task_ids.max())} of {len(deltas)}")


def check_bias(rows: int, bias: Tensor | None) -> None:
    """For kernels likewise."""
    if bias is not None and bias.numel() != rows:
        raise ValueError(f"expected a bias of {rows} numbers, found {list(bias.shape)}")


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured: what runs now happens later, and nobody can ask the device anything."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def no_autocast(x: Tensor) -> torch.autocast:
    """The dtypes here are chosen; autocast must not change them inside of an operator."""
    return torch.autocast(x.device.type, enabled=False)


def _shift(w: Packed) -> Tensor | None:
    """Offsets or zeros as ``[rows, groups, 1]``."""
    shift = w.offsets if w.codec == "bcq" else w.zeros
    return None if shift is None else shift.to(_work_dtype(w))[..., None]


def _levels(w: Packed) -> Tensor:
    """``float(code) - zero`` or ``codebook[code]``, ``[rows, groups, columns of a group]``."""
    present, work = _present(w), _work_dtype(w)
    code = torch.zeros((), dtype=torch.uint8, device=w.planes.device)
    for p, bit in enumerate(_bits(w)):
        longer = code * 2 + bit
        code = longer if present is None else torch.where(present[p][:, None, None], longer, code)
    level = code.to(work) if w.codebook is None else w.codebook.to(work)[code.long()]
    shift = _shift(w)
    return level if shift is None else level - shift


def _bits(w: Packed) -> Iterator[Tensor]:
    """Bits of each plane, the most significant first: bool ``[rows, groups, columns of a group]`` (BIT-1, BIT-2)."""
    rows, groups = w.scales.shape[1:]
    columns = groups * _group_columns(w)
    powers = torch.arange(8, dtype=torch.uint8, device=w.planes.device)
    for plane in _full_planes(w):
        bit = ((plane[..., None] >> powers) & 1).reshape(rows, plane.shape[-1] * 8)[:, :columns]
        yield F.pad(bit, (0, columns - bit.shape[1])).reshape(rows, groups, _group_columns(w)).bool()


def _full_planes(w: Packed) -> Tensor:
    """Planes as ``[bits, rows, bytes]``; rows that a ragged plane lacks hold anything (see :func:`_present`)."""
    present = _present(w)
    if present is None or w.planes.dim() == 3:
        return w.planes[: w.bits]
    return w.planes[_plane_rows(present)]


def _present(w: Packed) -> Tensor | None:
    """Which rows each plane has: bool ``[bits, rows]``, or None if all have all (MIX-1)."""
    if w.row_bits is None:
        return None
    return w.row_bits[None, :] > torch.arange(w.bits, dtype=torch.uint8, device=w.row_bits.device)[:, None]


def _plane_rows(present: Tensor) -> Tensor:
    """Where each row of each plane lies in ragged planes (MIX-2): int64 ``[bits, rows]``; anywhere if it is absent."""
    return (present.reshape(-1).cumsum(0) - 1).clamp(min=0).reshape(present.shape)


def select_rows(w: Packed, rows: Tensor) -> Packed:
    """The matrix of the given rows (int64 ``[n]``, repetition allowed)."""
    present = _present(w)
    if present is None or w.planes.dim() == 3:
        planes = w.planes[: w.bits, rows]
    else:
        planes = w.planes[_plane_rows(present)[:, rows]]
    return w._replace(
        planes=planes,
        scales=w.scales[:, rows],
        offsets=None if w.offsets is None else w.offsets[rows],
        zeros=None if w.zeros is None else w.zeros[rows],
        row_bits=None if w.row_bits is None else w.row_bits[rows],
    )


def _group_columns(w: Packed) -> int:
    return w.cols if w.group_size == 0 else min(w.group_size, w.cols)


def _columns(grouped: Tensor, w: Packed) -> Tensor:
    """``[rows, groups, columns of a group]`` to ``[rows, cols]``: the last group may be short."""
    return grouped.reshape(grouped.shape[0], grouped.shape[1] * grouped.shape[2])[:, : w.cols]


def _work_dtype(w: Packed) -> torch.dtype:
    """float32 (DEC-1), or float64 for double-precision scales, which only tests of gradients have."""
    return torch.promote_types(w.scales.dtype, torch.float32)
