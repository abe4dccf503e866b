"""The operators over quantized matrices: :func:`dequantize`, :func:`linear` and :func:`embedding`.

Each is a ``torch.library`` operator (``lowbit::linear`` etc.), which autograd, ``torch.compile`` and dispatch modes
need. A custom operator costs 30 microseconds a call before its kernel starts, so :func:`linear` has a second door: it
calls the backend directly where none of them is active. A test holds the results of both equal.

The operators' arguments are the tensors of the matrix, deltas, the task of each row, and the scheme as plain values.
Gradients flow to x, scales, offsets, zeros, bias and deltas, never to planes; the backward pass decodes the weight
again instead of keeping it.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from . import naive
from .batch import Factor, ParamGrads, Share, factor_by_factor, one_by_one
from .matrix import SCHEME, TENSORS, PlaneMatrix

BACKENDS = {"cpu": "cpu.backend", "cuda": "gpu.backend"}  # device type -> module of this package; else naive


class Backend(Protocol):
    """The functions of a module of kernels for one device: three for its tiled layout, nine for the operators.

    Every function takes matrices ``w`` ``[rows, cols]`` in the file's layout and in its own tiled layout. The other
    arguments:

    - ``deltas``: float32 ``[tasks, p, rows]``, factors ``1 + delta`` of the first p planes' scales, or
      ``[tasks, p, rows, groups]``, added to them (TSK-6, TSK-8); None is the base.
    - ``task_ids``: int64 ``[n]``, the task of each row of the flattened input, -1 for the base; None is task 0 for all
      rows.

    Gradients of parameters are those of scales, offsets, zeros and deltas: float32, contiguous, None where the matrix
    or the call has no such tensor.

    For an unknown token id or task a CPU raises IndexError. A GPU gives NaN in that row, since a check would stall the
    device.
    """

    def can_tile(self, w: PlaneMatrix) -> bool:
        """Whether this backend has a tiled layout for `w`."""
        ...

    def tile(self, w: PlaneMatrix) -> PlaneMatrix:
        """`w` in the tiled layout, with group-major parameters; `w` itself if it is tiled already."""
        ...

    def untile(self, w: PlaneMatrix) -> PlaneMatrix:
        """The exact inverse of :meth:`tile`; `w` itself if it has the file's layout already."""
        ...

    def dequantize(self, w: PlaneMatrix, deltas: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The weight ``[rows, cols]``, rounded once to `dtype` (DEC-5); with `deltas`, that of task 0."""
        ...

    def dequantize_param_grads(self, grad: Tensor, w: PlaneMatrix, deltas: Tensor | None) -> ParamGrads:
        """Gradients of the parameters from that of the weight, ``[rows, cols]``."""
        ...

    def linear(
        self, x: Tensor, w: PlaneMatrix, bias: Tensor | None, deltas: Tensor | None, task_ids: Tensor | None
    ) -> Tensor:
        """``x @ weight.T + bias`` in the dtype of `x`, float ``[..., cols]`` to ``[..., rows]``; `bias`: ``[rows]``.

        Where ``w.activations`` is ``"int8"``, sums may be rounded as :mod:`.rounded_sums` says; they need not.
        """
        ...

    def linear_each(self, x: Tensor, shares: Sequence[Share], task_ids: Tensor | None) -> Tensor:
        """:meth:`linear` for several matrices of one shape, each with its own rows of `x`.

        ``[n, cols]`` to ``[n, rows]``. The shares cover the rows of `x` in their order; there is at least one.
        """
        ...

    def linear_together(self, x: Tensor, factors: Sequence[Factor]) -> list[Tensor]:
        """:meth:`linear` for the same `x` and several matrices, of any numbers of rows; there is at least one."""
        ...

    def linear_input_grad(self, grad: Tensor, w: PlaneMatrix, deltas: Tensor | None, task_ids: Tensor | None) -> Tensor:
        """Gradient of `x` in :meth:`linear` from that of its result: ``[..., rows]`` to ``[..., cols]``."""
        ...

    def linear_param_grads(
        self,
        grad: Tensor,
        x: Tensor,
        w: PlaneMatrix,
        deltas: Tensor | None,
        task_ids: Tensor | None,
        deltas_only: bool = False,
    ) -> ParamGrads:
        """Gradients of the parameters in :meth:`linear`, summed in float32 whatever the dtype of `x`.

        With `deltas_only` those of the deltas alone, and the others are None.
        """
        ...

    def embedding(
        self, ids: Tensor, w: PlaneMatrix, deltas: Tensor | None, task_ids: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Rows `ids` (integers ``[...]``) of the weight in `dtype`: ``[..., cols]``."""
        ...

    def embedding_param_grads(
        self, grad: Tensor, ids: Tensor, w: PlaneMatrix, deltas: Tensor | None, task_ids: Tensor | None
    ) -> ParamGrads:
        """Gradients of the parameters in :meth:`embedding` from that of its result, ``[..., cols]``."""
        ...


def backend_of(w: PlaneMatrix) -> Backend:
    """The kernels for the device of `w`."""
    return _backend(BACKENDS.get(w.planes.device.type, "naive"))


@functools.cache
def _backend(name: str) -> Backend:
    """The backend in module `name`, imported at first use: compilers load slowly. A GPU without Triton uses naive."""
    try:
        return cast(Backend, importlib.import_module(f".{name}", __package__))
    except ModuleNotFoundError as e:
        if e.name != "triton":
            raise
        warnings.warn("without the package triton, products on this GPU are slow: pip install triton", stacklevel=3)
        return cast(Backend, naive)


def dequantize(w: PlaneMatrix, deltas: Tensor | None = None, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight ``[rows, cols]`` in `dtype`; with `deltas` (see :func:`linear`), that of task 0."""
    out: Tensor = torch.ops.lowbit.dequantize(*w[:TENSORS], deltas, dtype, *w[TENSORS:])
    return out


def linear(
    x: Tensor, w: PlaneMatrix, bias: Tensor | None = None, deltas: Tensor | None = None, task_ids: Tensor | None = None
) -> Tensor:
    """``x @ weight.T + bias``, the weight rounded to the dtype of `x` (under autocast: to that of autocast).

    Args:
        x: float ``[..., cols]``.
        w: the weight, ``[rows, cols]``.
        bias: float ``[rows]``.
        deltas: float32 ``[tasks, p, rows]``, factors ``1 + delta`` of the first p planes' scales, or
            ``[tasks, p, rows, groups]``, added to them (TSK-6, TSK-8).
        task_ids: int64 ``[n]``, the task of each of the n rows of the flattened `x`, -1 for the base; None is task 0
            for all rows.

    Returns:
        ``[..., rows]`` in the dtype of `x` (or of autocast).
    """
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if _is_plain_call(x, w, bias, deltas):
        product: Tensor = backend_of(w).linear(x, w, bias, deltas, task_ids)
        return product
    out: Tensor = torch.ops.lowbit.linear(x, *w[:TENSORS], bias, deltas, task_ids, *w[TENSORS:])
    return out


def linear_each(x: Tensor, shares: Sequence[Share], task_ids: Tensor | None = None) -> Tensor:
    """:func:`linear` for several matrices of one shape, each with its own rows of x; without gradients in one launch.

    Args:
        x: float ``[n, cols]``.
        shares: the matrices, and which rows are for each: they cover the rows in their order.
        task_ids: int64 ``[n]``, for all shares that have deltas.

    Returns:
        ``[n, rows]`` in the dtype of `x` (or of autocast).
    """
    if not torch.is_grad_enabled() and _is_plain_call(x) and not torch.is_autocast_enabled(x.device.type):
        product: Tensor = backend_of(shares[0].w).linear_each(x, shares, task_ids)
        return product
    return one_by_one(x, shares, task_ids, linear=linear)


def linear_together(x: Tensor, factors: Sequence[Factor]) -> list[Tensor]:
    """:func:`linear` for the same `x` and several matrices; without gradients in one launch.

    Args:
        x: float ``[..., cols]``.
        factors: the matrices, with bias, deltas and task ids as in :func:`linear`.

    Returns:
        For each matrix ``[..., rows]`` in the dtype of `x` (or of autocast).
    """
    if not torch.is_grad_enabled() and _is_plain_call(x) and not torch.is_autocast_enabled(x.device.type):
        return backend_of(factors[0].w).linear_together(x, factors)
    return factor_by_factor(x, factors, linear=linear)


def embedding(
    ids: Tensor,
    w: PlaneMatrix,
    deltas: Tensor | None = None,
    task_ids: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Rows `ids` (integers ``[...]``) of the weight in `dtype`: ``[..., cols]``; tasks as in :func:`linear`."""
    out: Tensor = torch.ops.lowbit.embedding(ids, *w[:TENSORS], deltas, task_ids, dtype, *w[TENSORS:])
    return out


def _is_plain_call(x: Tensor, *inputs: Any) -> bool:
    """Whether the kernel can be called directly: no autograd, tracing or dispatch mode is active.

    With some hundred layers, 30 microseconds each are several milliseconds for a token.
    """
    if type(x) is not Tensor or x.is_meta or is_watched():
        return False
    if not torch.is_grad_enabled():
        return True
    w, *others = inputs
    return not any(t is not None and t.requires_grad for t in (x, *w[1:4], *others))


def is_watched() -> bool:
    """Whether this call is compiled, traced, transformed or under a dispatch mode; it may have no side effects then."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None  # torch.jit.trace
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def can_tile(w: PlaneMatrix) -> bool:
    """Whether `w` has the file's layout and the backend of its device has a tiled layout for it."""
    return not w.is_tiled and backend_of(w).can_tile(w)


def tile(w: PlaneMatrix) -> PlaneMatrix:
    """`w` in the tiled layout of its device's backend; the operators take both layouts."""
    return backend_of(w).tile(w)


def untile(w: PlaneMatrix) -> PlaneMatrix:
    """`w` in the file's layout, exactly."""
    return backend_of(w).untile(w)


# --- definitions -----------------------------------------------------------------------------------
# In every schema the tensors of the matrix are consecutive and the scheme comes last: split relies on it.

MATRIX_SCHEMA = "Tensor planes, Tensor scales, Tensor? offsets, Tensor? zeros, Tensor? codebook, Tensor? row_bits"
_TASKS = "Tensor? deltas, Tensor? task_ids"
SCHEME_SCHEMA = "str codec, int bits, int group_size, int cols, str layout, str activations"
_GRADS = "(Tensor, Tensor, Tensor, Tensor)"  # of scales, offsets, zeros, deltas; an empty tensor means None


def _define(name: str, schema: str) -> Callable[[Callable[..., Any]], CustomOpDef]:
    define: Callable[[Callable[..., Any]], CustomOpDef] = torch.library.custom_op(
        f"lowbit::{name}", mutates_args=(), schema=schema
    )
    return define


def split(args: tuple[Any, ...]) -> tuple[PlaneMatrix, tuple[Any, ...]]:
    """The matrix, and the arguments between its tensors and the scheme."""
    return PlaneMatrix(*args[:TENSORS], *args[-SCHEME:]), args[TENSORS:-SCHEME]


def no_view(out: Tensor) -> Tensor:
    """`out` itself: autograd forbids changing the result of a custom operator in place if it is a view."""
    return out.detach() if out._is_view() else out


def _tensors(grads: ParamGrads) -> tuple[Tensor, ...]:
    some = next(g for g in grads if g is not None)
    return tuple(some.new_empty(0) if g is None else g for g in grads)


@_define("dequantize", f"({MATRIX_SCHEMA}, Tensor? deltas, ScalarType dtype, {SCHEME_SCHEMA}) -> Tensor")
def _dequantize(*args: Any) -> Tensor:
    w, (deltas, dtype) = split(args)
    out: Tensor = backend_of(w).dequantize(w, deltas, dtype)
    return out


@_define("dequantize_param_grads", f"(Tensor grad, {MATRIX_SCHEMA}, Tensor? deltas, {SCHEME_SCHEMA}) -> {_GRADS}")
def _dequantize_param_grads(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    w, (deltas,) = split(args)
    return _tensors(backend_of(w).dequantize_param_grads(grad, w, deltas))


@_define("linear", f"(Tensor x, {MATRIX_SCHEMA}, Tensor? bias, {_TASKS}, {SCHEME_SCHEMA}) -> Tensor")
def _linear(x: Tensor, *args: Any) -> Tensor:
    w, (bias, deltas, task_ids) = split(args)
    return no_view(backend_of(w).linear(x, w, bias, deltas, task_ids))


@_define("linear_input_grad", f"(Tensor grad, {MATRIX_SCHEMA}, {_TASKS}, {SCHEME_SCHEMA}) -> Tensor")
def _linear_input_grad(grad: Tensor, *args: Any) -> Tensor:
    w, (deltas, task_ids) = split(args)
    out: Tensor = backend_of(w).linear_input_grad(grad, w, deltas, task_ids)
    return out


@_define(
    "linear_param_grads",
    f"(Tensor grad, Tensor x, {MATRIX_SCHEMA}, {_TASKS}, bool deltas_only, {SCHEME_SCHEMA}) -> {_GRADS}",
)
def _linear_param_grads(grad: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    w, (deltas, task_ids, deltas_only) = split(args)
    return _tensors(backend_of(w).linear_param_grads(grad, x, w, deltas, task_ids, deltas_only))


@_define("embedding", f"(Tensor ids, {MATRIX_SCHEMA}, {_TASKS}, ScalarType dtype, {SCHEME_SCHEMA}) -> Tensor")
def _embedding(ids: Tensor, *args: Any) -> Tensor:
    w, (deltas, task_ids, dtype) = split(args)
    return no_view(backend_of(w).embedding(ids, w, deltas, task_ids, dtype))


@_define("embedding_param_grads", f"(Tensor grad, Tensor ids, {MATRIX_SCHEMA}, {_TASKS}, {SCHEME_SCHEMA}) -> {_GRADS}")
def _embedding_param_grads(grad: Tensor, ids: Tensor, *args: Any) -> tuple[Tensor, ...]:
    w, (deltas, task_ids) = split(args)
    return _tensors(backend_of(w).embedding_param_grads(grad, ids, w, deltas, task_ids))


# --- shapes without data ---------------------------------------------------------------------------


@_dequantize.register_fake
def _(*args: Any) -> Tensor:
    w, (_, dtype) = split(args)
    return w.scales.new_empty(w.rows, w.cols, dtype=dtype)


@_linear.register_fake
def _(x: Tensor, *args: Any) -> Tensor:
    w, _ = split(args)
    return x.new_empty(*x.shape[:-1], w.rows)


@_linear_input_grad.register_fake
def _(grad: Tensor, *args: Any) -> Tensor:
    w, _ = split(args)
    return grad.new_empty(*grad.shape[:-1], w.cols)


@_embedding.register_fake
def _(ids: Tensor, *args: Any) -> Tensor:
    w, (_, _, dtype) = split(args)
    return w.scales.new_empty(*ids.shape, w.cols, dtype=dtype)


def _fake_param_grads(w: PlaneMatrix, deltas: Tensor | None, deltas_only: bool = False) -> tuple[Tensor, ...]:
    work = torch.promote_types(w.scales.dtype, torch.float32)
    inputs = (None, None, None, deltas) if deltas_only else (w.scales, w.offsets, w.zeros, deltas)
    return tuple(w.scales.new_empty((0,) if t is None else t.shape, dtype=work) for t in inputs)


@_dequantize_param_grads.register_fake
def _(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    w, (deltas,) = split(args)
    return _fake_param_grads(w, deltas)


@_linear_param_grads.register_fake
def _(grad: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    w, (deltas, _, deltas_only) = split(args)
    return _fake_param_grads(w, deltas, deltas_only)


@_embedding_param_grads.register_fake
def _(grad: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    w, (deltas, _) = split(args)
    return _fake_param_grads(w, deltas)


# --- gradients -------------------------------------------------------------------------------------
# Inputs by position, counted from the first tensor of the matrix: scales 1, offsets 2, zeros 3.


def _param_grads(ctx: Any, first: int, deltas_at: int, compute: Any) -> dict[int, Tensor]:
    """Gradients by input position; `compute` runs only if scales, offsets, zeros or deltas need one."""
    places = (first + 1, first + 2, first + 3, deltas_at)
    if not any(ctx.needs_input_grad[i] for i in places):
        return {}
    return {i: g for i, g in zip(places, compute(), strict=True) if ctx.needs_input_grad[i]}


def _dequantize_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.scheme = inputs[-SCHEME:]


def _dequantize_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    found = _param_grads(
        ctx, 0, 6, lambda: torch.ops.lowbit.dequantize_param_grads(grad, *ctx.saved_tensors, *ctx.scheme)
    )
    return tuple(found.get(i) for i in range(len(ctx.needs_input_grad)))


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, matrix, deltas, task_ids = inputs[0], inputs[1:7], *inputs[8:10]  # 7 is the bias
    wanted = any(ctx.needs_input_grad[i] for i in (2, 3, 4, 8))  # with frozen scales x is not kept
    ctx.save_for_backward(x if wanted else None, *matrix, deltas, task_ids)
    ctx.deltas_only = not any(ctx.needs_input_grad[i] for i in (2, 3, 4))
    ctx.scheme = inputs[-SCHEME:]


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, *rest = ctx.saved_tensors
    found = _param_grads(
        ctx, 1, 8, lambda: torch.ops.lowbit.linear_param_grads(grad, x, *rest, ctx.deltas_only, *ctx.scheme)
    )
    if ctx.needs_input_grad[0]:
        found[0] = torch.ops.lowbit.linear_input_grad(grad, *rest, *ctx.scheme)
    if ctx.needs_input_grad[7]:
        found[7] = grad.reshape(-1, grad.shape[-1]).sum(0)
    return tuple(found.get(i) for i in range(len(ctx.needs_input_grad)))


def _embedding_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:9])
    ctx.scheme = inputs[-SCHEME:]


def _embedding_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    found = _param_grads(
        ctx, 1, 7, lambda: torch.ops.lowbit.embedding_param_grads(grad, *ctx.saved_tensors, *ctx.scheme)
    )
    return tuple(found.get(i) for i in range(len(ctx.needs_input_grad)))


_dequantize.register_autograd(_dequantize_backward, setup_context=_dequantize_setup)
_linear.register_autograd(_linear_backward, setup_context=_linear_setup)
_embedding.register_autograd(_embedding_backward, setup_context=_embedding_setup)
