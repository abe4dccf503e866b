"""The ``torch.library`` operators over packed matrices: ``lowbit::dequantize``, ``::linear`` and ``::embedding``.

Their schema is complete, so that faster kernels and per-task scales need no other one: packed tensors, deltas, the
task of each row, and the scheme as plain values. Gradients flow to x, scales, offsets, zeros, bias and deltas, never
to planes; the backward pass decodes the weight again instead of keeping it. Call the functions at the top.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from . import naive
from .naive import Packed

KERNELS = {
    "cpu": "cpu.kernels",
    "cuda": "gpu.kernels",
}  # device type -> module beside this one; naive serves all others


def dequantize(w: Packed, deltas: Tensor | None = None, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight ``[rows, cols]`` in `dtype`; of task 0 where there are `deltas` (see :func:`linear`)."""
    out: Tensor = torch.ops.lowbit.dequantize(*w[:6], deltas, dtype, *w[6:])
    return out


def linear(
    x: Tensor, w: Packed, bias: Tensor | None = None, deltas: Tensor | None = None, task_ids: Tensor | None = None
) -> Tensor:
    """``x @ weight.T + bias``, the weight rounded to the dtype of `x` (under autocast: to that of autocast).

    Args:
        x: float ``[..., cols]``.
        w: the packed weight, ``[rows, cols]``.
        bias: float ``[rows]``.
        deltas: float32 ``[tasks, p, rows]``, factors ``1 + delta`` of the first p planes' scales, or
            ``[tasks, p, rows, groups]``, added to them (TSK-6, TSK-8).
        task_ids: int64 ``[rows of x, flattened]``, -1 for the base; None: task 0 for all rows.

    Returns:
        ``[..., rows]``.
    """
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if _is_plain_call(x, w, bias, deltas):
        product: Tensor = _kernels(w).linear(x, w, bias, deltas, task_ids)
        return product
    out: Tensor = torch.ops.lowbit.linear(x, *w[:6], bias, deltas, task_ids, *w[6:])
    return out


def embedding(
    ids: Tensor,
    w: Packed,
    deltas: Tensor | None = None,
    task_ids: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Rows `ids` (integers ``[...]``) of the weight in `dtype`: ``[..., cols]``. Tasks as in :func:`linear`."""
    out: Tensor = torch.ops.lowbit.embedding(ids, *w[:6], deltas, task_ids, dtype, *w[6:])
    return out


def _is_plain_call(x: Tensor, *inputs: Any) -> bool:
    """Whether nobody looks on: no gradient, no tracing, no mode that has to see operators.

    A custom operator costs 30 microseconds before its kernel starts, several milliseconds for a token.
    """
    if type(x) is not Tensor or x.is_meta or is_watched():
        return False
    if not torch.is_grad_enabled():
        return True
    w, *others = inputs
    return not any(t is not None and t.requires_grad for t in (x, *w[1:4], *others))


def is_watched() -> bool:
    """Whether what runs now is being compiled, traced, transformed, or seen by a mode: side effects are to be left."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None  # torch.jit.trace
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def can_pack(w: Packed) -> bool:
    """Whether the kernels of its device compute with another form of `w` than it has."""
    kernels = _kernels(w)
    return hasattr(kernels, "pack") and not is_packed(w.planes) and bool(kernels.can_pack(w))


def is_packed(planes: Any) -> bool:
    """Whether planes have a form that only kernels know: one dimension more than in the file."""
    return planes is not None and planes.dim() == 4


def pack(w: Packed) -> Packed:
    """`w` in the form that kernels compute with; the operators take both."""
    packed: Packed = _kernels(w).pack(w)
    return packed


def unpack(w: Packed) -> Packed:
    """`w` as the file has it."""
    unpacked: Packed = _kernels(w).unpack(w)
    return unpacked


# --- definitions -----------------------------------------------------------------------------------
# In every schema the packed tensors stand together and the scheme comes last, so that one split serves all.

_PACKED = "Tensor planes, Tensor scales, Tensor? offsets, Tensor? zeros, Tensor? codebook, Tensor? row_bits"
_TASKS = "Tensor? deltas, Tensor? task_ids"
_SCHEME = "str codec, int bits, int group_size, int cols"
_GRADS = "(Tensor, Tensor, Tensor, Tensor)"  # of scales, offsets, zeros, deltas; an empty one stands for None


def _define(name: str, schema: str) -> Callable[[Callable[..., Any]], CustomOpDef]:
    define: Callable[[Callable[..., Any]], CustomOpDef] = torch.library.custom_op(
        f"lowbit::{name}", mutates_args=(), schema=schema
    )
    return define


def _split(args: tuple[Any, ...]) -> tuple[Packed, tuple[Any, ...]]:
    """The packed weight, and what stands between its tensors and the scheme."""
    return Packed(*args[:6], *args[-4:]), args[6:-4]


def _kernels(w: Packed) -> Any:
    return _module(KERNELS.get(w.planes.device.type, "naive"))


@functools.cache
def _module(name: str) -> ModuleType:
    """A module of kernels, imported when first used: compilers take their time.

    Where torch comes without Triton, there is the naive way.
    """
    try:
        return importlib.import_module(f".{name}", __package__)
    except ModuleNotFoundError as e:
        if e.name != "triton":
            raise
        warnings.warn("without the package triton, products on this GPU are slow: pip install triton", stacklevel=3)
        return naive


def _tensors(grads: naive.ParamGrads) -> tuple[Tensor, ...]:
    return tuple(grads[0].new_empty(0) if g is None else g for g in grads)


@_define("dequantize", f"({_PACKED}, Tensor? deltas, ScalarType dtype, {_SCHEME}) -> Tensor")
def _dequantize(*args: Any) -> Tensor:
    w, (deltas, dtype) = _split(args)
    out: Tensor = _kernels(w).dequantize(w, deltas, dtype)
    return out


@_define("dequantize_param_grads", f"(Tensor grad, {_PACKED}, Tensor? deltas, {_SCHEME}) -> {_GRADS}")
def _dequantize_param_grads(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    w, (deltas,) = _split(args)
    return _tensors(_kernels(w).dequantize_param_grads(grad, w, deltas))


@_define("linear", f"(Tensor x, {_PACKED}, Tensor? bias, {_TASKS}, {_SCHEME}) -> Tensor")
def _linear(x: Tensor, *args: Any) -> Tensor:
    w, (bias, deltas, task_ids) = _split(args)
    out: Tensor = _kernels(w).linear(x, w, bias, deltas, task_ids)
    return out


@_define("linear_input_grad", f"(Tensor grad, {_PACKED}, {_TASKS}, {_SCHEME}) -> Tensor")
def _linear_input_grad(grad: Tensor, *args: Any) -> Tensor:
    w, (deltas, task_ids) = _split(args)
    out: Tensor = _kernels(w).linear_input_grad(grad, w, deltas, task_ids)
    return out


@_define("linear_param_grads", f"(Tensor grad, Tensor x, {_PACKED}, {_TASKS}, {_SCHEME}) -> {_GRADS}")
def _linear_param_grads(grad: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    w, (deltas, task_ids) = _split(args)
    return _tensors(_kernels(w).linear_param_grads(grad, x, w, deltas, task_ids))


@_define("embedding", f"(Tensor ids, {_PACKED}, {_TASKS}, ScalarType dtype, {_SCHEME}) -> Tensor")
def _embedding(ids: Tensor, *args: Any) -> Tensor:
    w, (deltas, task_ids, dtype) = _split(args)
    out: Tensor = _kernels(w).embedding(ids, w, deltas, task_ids, dtype)
    return out


@_define("embedding_param_grads", f"(Tensor grad, Tensor ids, {_PACKED}, {_TASKS}, {_SCHEME}) -> {_GRADS}")
def _embedding_param_grads(grad: Tensor, ids: Tensor, *args: Any) -> tuple[Tensor, ...]:
    w, (deltas, task_ids) = _split(args)
    return _tensors(_kernels(w).embedding_param_grads(grad, ids, w, deltas, task_ids))


# --- shapes without data ---------------------------------------------------------------------------


@_dequantize.register_fake
def _(*args: Any) -> Tensor:
    w, (_, dtype) = _split(args)
    return w.scales.new_empty(w.scales.shape[1], w.cols, dtype=dtype)


@_linear.register_fake
def _(x: Tensor, *args: Any) -> Tensor:
    w, _ = _split(args)
    return x.new_empty(*x.shape[:-1], w.scales.shape[1])


@_linear_input_grad.register_fake
def _(grad: Tensor, *args: Any) -> Tensor:
    w, _ = _split(args)
    return grad.new_empty(*grad.shape[:-1], w.cols)


@_embedding.register_fake
def _(ids: Tensor, *args: Any) -> Tensor:
    w, (_, _, dtype) = _split(args)
    return w.scales.new_empty(*ids.shape, w.cols, dtype=dtype)


def _fake_param_grads(w: Packed, deltas: Tensor | None) -> tuple[Tensor, ...]:
    work = torch.promote_types(w.scales.dtype, torch.float32)
    inputs = (w.scales, w.offsets, w.zeros, deltas)
    return tuple(w.scales.new_empty((0,) if t is None else t.shape, dtype=work) for t in inputs)


@_dequantize_param_grads.register_fake
def _(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    w, (deltas,) = _split(args)
    return _fake_param_grads(w, deltas)


@_linear_param_grads.register_fake
@_embedding_param_grads.register_fake
def _(grad: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    w, (deltas, _) = _split(args)
    return _fake_param_grads(w, deltas)


# --- gradients -------------------------------------------------------------------------------------
# Inputs by position, counted from the first packed tensor: scales 1, offsets 2, zeros 3.


def _param_grads(ctx: Any, first: int, deltas_at: int, compute: Any) -> dict[int, Tensor]:
    """Gradients by input position; `compute` runs only if one of scales, offsets, zeros, deltas wants one."""
    places = (first + 1, first + 2, first + 3, deltas_at)
    if not any(ctx.needs_input_grad[i] for i in places):
        return {}
    return {i: g for i, g in zip(places, compute(), strict=True) if ctx.needs_input_grad[i]}


def _dequantize_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.scheme = inputs[-4:]


def _dequantize_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    found = _param_grads(
        ctx, 0, 6, lambda: torch.ops.lowbit.dequantize_param_grads(grad, *ctx.saved_tensors, *ctx.scheme)
    )
    return tuple(found.get(i) for i in range(12))


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, _, deltas, task_ids = inputs[0], inputs[1:7], inputs[7], *inputs[8:10]
    wanted = any(ctx.needs_input_grad[i] for i in (2, 3, 4, 8))  # with frozen scales x need not be kept
    ctx.save_for_backward(x if wanted else None, *packed, deltas, task_ids)
    ctx.scheme = inputs[-4:]


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, *rest = ctx.saved_tensors
    found = _param_grads(ctx, 1, 8, lambda: torch.ops.lowbit.linear_param_grads(grad, x, *rest, *ctx.scheme))
    if ctx.needs_input_grad[0]:
        found[0] = torch.ops.lowbit.linear_input_grad(grad, *rest, *ctx.scheme)
    if ctx.needs_input_grad[7]:
        found[7] = grad.reshape(-1, grad.shape[-1]).sum(0)
    return tuple(found.get(i) for i in range(14))


def _embedding_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:9])
    ctx.scheme = inputs[-4:]


def _embedding_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    found = _param_grads(
        ctx, 1, 7, lambda: torch.ops.lowbit.embedding_param_grads(grad, *ctx.saved_tensors, *ctx.scheme)
    )
    return tuple(found.get(i) for i in range(14))


_dequantize.register_autograd(_dequantize_backward, setup_context=_dequantize_setup)
_linear.register_autograd(_linear_backward, setup_context=_linear_setup)
_embedding.register_autograd(_embedding_backward, setup_context=_embedding_setup)
