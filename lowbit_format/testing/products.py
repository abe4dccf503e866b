"""Plane matrices and calls of the operators for tests of kernels: what is true of them, and how near a result must be.

The truth is written a second time here, in plain torch and without the library's kernels: :func:`decode` follows DEC-2
to DEC-4 operation by operation, so that in float32 it gives the weights bit for bit; with parameters in float64
(:func:`exact`) autograd differentiates it, and products and gradients come out as good as exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..codecs import CODECS
from ..kernels.matrix import PlaneMatrix
from ..matrix import StoredMatrix
from ..runtime.stored_tensors import TORCH_DTYPES
from ..schema import Scheme
from .matrices import random_matrix

KINDS = [  # schemes without bits and group size
    Scheme("bcq"),
    Scheme("bcq", offset=True),
    Scheme("bcq", offset=True, row_bits=True),
    Scheme("uniform"),
    Scheme("uniform", row_bits=True),
    Scheme("codebook"),
    Scheme("affine"),
]
NAMES = ["bcq", "bcq-offset", "bcq-ragged", "uniform", "uniform-ragged", "codebook", "affine"]
ROUNDINGS = 1e-6  # error of a float32 product, of the sum of its terms' absolute values: eight roundings' worth
PARAMETERS = "scales", "offsets", "zeros"

Given = TypeVar("Given")
Grads = tuple[Tensor | None, ...]  # of scales, offsets, zeros, deltas


class Call(NamedTuple):
    """The arguments of ``linear``."""

    x: Tensor
    w: PlaneMatrix
    bias: Tensor | None = None
    deltas: Tensor | None = None
    task_ids: Tensor | None = None


# --- matrices and calls ----------------------------------------------------------------------------


def plane_matrix(matrix: StoredMatrix, bits: int | None = None, dtype: torch.dtype | None = None) -> PlaneMatrix:
    """The tensors of `matrix` at precision `bits`; parameters in `dtype`, or in the one that the scheme declares."""
    params, n = matrix.at(bits)
    scheme = matrix.scheme
    declared = TORCH_DTYPES[scheme.scale_dtype] if dtype is None else dtype

    def tensor(array: np.ndarray | None, dtype: torch.dtype | None) -> Tensor | None:
        return None if array is None else torch.from_numpy(np.array(array)).to(dtype)

    offsets, zeros = (None, params.shift) if CODECS[scheme.codec].shift == "zeros" else (params.shift, None)
    scales = tensor(params.scales, declared)
    planes = torch.from_numpy(np.array(matrix.planes))
    assert scales is not None
    return PlaneMatrix(
        planes,
        scales,
        tensor(offsets, declared),
        tensor(zeros, declared),
        tensor(matrix.codebook, dtype),
        tensor(matrix.row_bits, None),
        scheme.codec,
        n,
        scheme.group_size,
        matrix.cols,
    )


def drawn(
    kind: Scheme, bits: int, group_size: int, rows: int, cols: int, seed: int = 0, dtype: str = "F32"
) -> PlaneMatrix:
    """A random matrix of a kind with other bits, groups and dtype of parameters."""
    scheme = replace(kind, bits=bits, group_size=group_size, scale_dtype=dtype)
    return plane_matrix(random_matrix(scheme, rows, cols, seed))


def random_call(
    w: PlaneMatrix,
    batch: int,
    *,
    dtype: torch.dtype = torch.float32,
    layout: str = "rows",
    bias: torch.dtype | None = torch.float32,
    tasks: str | None = None,
    count: int = 3,
    ids: bool = True,
    seed: int = 0,
) -> Call:
    """A product with `w`; deltas of `count` tasks, for some of the scale planes."""
    rng, (p, rows, groups) = torch.Generator().manual_seed(seed), w.scales.shape
    layouts: dict[str, Callable[[], Tensor]] = {
        "rows": lambda: torch.randn(batch, w.cols, generator=rng),
        "columns": lambda: torch.randn(w.cols, batch, generator=rng).t(),
        "every second": lambda: torch.randn(batch, 2 * w.cols, generator=rng)[:, ::2],
        "leading": lambda: torch.randn(1, batch, 1, w.cols, generator=rng),
    }
    x = layouts[layout]()
    x = x.to(dtype, memory_format=torch.preserve_format)
    deltas = None
    if tasks is not None:
        p = 1 + seed % p
        shape = (count, p, rows) if tasks == "mul" else (count, p, rows, groups)
        deltas = torch.randn(shape, generator=rng) * 0.1
    return Call(
        x,
        w,
        None if bias is None else torch.randn(rows, generator=rng).to(bias),
        deltas,
        torch.randint(-1, count, (batch,), generator=rng) if deltas is not None and ids else None,
    )


LAYOUTS = ["rows", "columns", "every second", "leading"]  # of x, see random_call


def on_device(given: Given, device: str) -> Given:
    """`given`, a tensor or a tuple with tensors in it (also a named one), on `device`, strides and all."""
    if isinstance(given, Tensor):
        if given.device.type == device:
            return given
        memory = given.detach().new_empty(0).set_(given.detach().untyped_storage())
        return memory.to(device).as_strided(given.shape, given.stride(), given.storage_offset())  # type: ignore[return-value]
    if isinstance(given, tuple):
        parts = [on_device(part, device) for part in given]
        return type(given)(*parts) if hasattr(given, "_fields") else tuple(parts)  # type: ignore[return-value]
    return given


# --- the truth -------------------------------------------------------------------------------------


def decode(w: PlaneMatrix) -> Tensor:
    """Weights ``[rows, cols]``, operation by operation (section 6, MIX-2, MIX-4); float64 if the scales are."""
    work = torch.promote_types(w.scales.dtype, torch.float32)
    bits, present = _bits(w)
    group = torch.arange(w.cols) // (w.group_size or w.cols)
    scales = w.scales.to(work)[..., group]
    if w.codec == "bcq":
        weight = torch.zeros((), dtype=work) if w.offsets is None else w.offsets.to(work)[:, group]
        for bit, scale, there in zip(bits, scales, present, strict=False):
            weight = torch.where(there[:, None], torch.where(bit, weight + scale, weight - scale), weight)
        return weight.expand(w.rows, w.cols)
    code = torch.zeros(w.rows, w.cols, dtype=torch.int64)
    for bit, there in zip(bits, present, strict=True):  # BIT-1: the first plane is the most significant
        code = torch.where(there[:, None], 2 * code + bit, code)
    level = code.to(work) if w.codebook is None else w.codebook.to(work)[code]
    if w.codec == "affine":
        scaled = level * scales[0]
        return scaled if w.offsets is None else scaled + w.offsets.to(work)[:, group]
    return (level if w.zeros is None else level - w.zeros.to(work)[:, group]) * scales[0]


def _bits(w: PlaneMatrix) -> tuple[Tensor, Tensor]:
    """Bits of the planes, bool ``[bits, rows, cols]`` (BIT-2), and which rows each plane has, bool ``[bits, rows]``."""
    planes, present = w.planes[: w.bits], torch.ones(w.bits, w.rows, dtype=torch.bool)
    if w.row_bits is not None:
        present = w.row_bits[None] > torch.arange(w.bits)[:, None]
        planes = torch.zeros(w.bits, w.rows, w.planes.shape[-1], dtype=torch.uint8)
        planes[present] = w.planes[: int(present.sum())]  # MIX-2: plane after plane, each with the rows that it has
    return ((planes[..., None] >> torch.arange(8)) & 1).flatten(-2)[..., : w.cols].bool(), present


def with_task(w: PlaneMatrix, delta: Tensor) -> PlaneMatrix:
    """`w` with a task's scales (TSK-6, TSK-8): `delta` is ``[p, rows]``, factors, or ``[p, rows, groups]``, added."""
    scales = w.scales.to(torch.promote_types(w.scales.dtype, torch.float32))
    delta, first = delta.to(scales.dtype), scales[: len(delta)]
    first = first + delta if delta.dim() == 3 else first * (1 + delta)[..., None]
    return w._replace(scales=torch.cat([first, scales[len(delta) :]]))


def dequantize(w: PlaneMatrix, deltas: Tensor | None = None) -> Tensor:
    """The weight of task 0, or of the base without deltas: ``[rows, cols]``."""
    return decode(w if deltas is None else with_task(w, deltas[0]))


def each_task(w: PlaneMatrix, deltas: Tensor | None, task_ids: Tensor | None, n: int) -> list[tuple[Tensor, Tensor]]:
    """Rows of the flattened input, bool ``[n]``, and the weight that they are multiplied by."""
    if deltas is None or task_ids is None:
        return [(torch.ones(n, dtype=torch.bool), dequantize(w, deltas))]
    ids = task_ids.clamp(min=-1)
    return [(ids == i, decode(w if i < 0 else with_task(w, deltas[i]))) for i in sorted(set(ids.tolist()))]


def linear(
    x: Tensor,
    w: PlaneMatrix,
    bias: Tensor | None = None,
    deltas: Tensor | None = None,
    task_ids: Tensor | None = None,
) -> Tensor:
    """``x @ weight.T + bias`` in the dtype of the weight, each row with the weight of its task."""
    flat, out = x.reshape(-1, w.cols), None
    for rows, weight in each_task(w, deltas, task_ids, len(flat)):
        product = torch.where(rows[:, None], flat, torch.zeros(())).to(weight.dtype) @ weight.T
        out = product if out is None else torch.where(rows[:, None], product, out)
    assert out is not None
    out = out if bias is None else out + bias.to(out.dtype)
    return out.reshape(*x.shape[:-1], w.rows)


def linear_input_grad(
    grad: Tensor, w: PlaneMatrix, deltas: Tensor | None = None, task_ids: Tensor | None = None
) -> Tensor:
    """Gradient of `x` in :func:`linear`."""
    flat = grad.reshape(-1, w.rows)
    out = flat.new_zeros(len(flat), w.cols, dtype=torch.float64)
    for rows, weight in each_task(w, deltas, task_ids, len(flat)):
        out[rows] = flat[rows].double() @ weight.double()
    return out.reshape(*grad.shape[:-1], w.cols)


def embedding(ids: Tensor, w: PlaneMatrix, deltas: Tensor | None = None, task_ids: Tensor | None = None) -> Tensor:
    """Rows `ids` of the weight, each of its task."""
    flat, out = ids.reshape(-1).long(), None
    for rows, weight in each_task(w, deltas, task_ids, len(flat)):
        mine = weight[torch.where(rows, flat, 0)]
        out = mine if out is None else torch.where(rows[:, None], mine, out)
    assert out is not None
    return out.reshape(*ids.shape, w.cols)


def param_grads(
    result: Callable[[PlaneMatrix, Tensor | None], Tensor], w: PlaneMatrix, deltas: Tensor | None, grad: Tensor
) -> Grads:
    """Gradients of scales, offsets, zeros and deltas of ``result(w, deltas)`` by autograd in float64."""
    w = exact(w)
    leaves = {name: t.requires_grad_() for name in PARAMETERS if (t := getattr(w, name)) is not None}
    delta = None if deltas is None else deltas.detach().double().requires_grad_()
    torch.autograd.backward(result(w._replace(**leaves), delta), grad.double())
    of = [*(leaves.get(name) for name in PARAMETERS), delta]
    return tuple(None if t is None else torch.zeros_like(t) if t.grad is None else t.grad for t in of)


def exact(w: PlaneMatrix) -> PlaneMatrix:
    """`w` with parameters in float64: the functions of this module then compute in it."""
    names = [n for n in (*PARAMETERS, "codebook") if getattr(w, n) is not None]
    return w._replace(**{n: getattr(w, n).detach().double() for n in names})


def absolute(w: PlaneMatrix) -> PlaneMatrix:
    """A matrix in float64 whose weights are the sums of the absolute values of what the weights of `w` consist of."""
    w = exact(w)
    return w._replace(
        planes=w.planes if w.codebook is not None else torch.full_like(w.planes, 255),
        scales=w.scales.abs(),
        offsets=None if w.offsets is None else w.offsets.abs(),
        zeros=None if w.zeros is None else -w.zeros.abs(),
        codebook=None if w.codebook is None else w.codebook.abs(),
    )


def magnitude(t: Tensor | None) -> Tensor | None:
    """Absolute values in float64."""
    return None if t is None else t.double().abs()


# --- how near --------------------------------------------------------------------------------------


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype are equal bit for bit: the sign of zero counts."""
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def rounding_error(
    want: Tensor, terms: Tensor, dtype: torch.dtype, *, one_rounding: bool, tolerance: float = ROUNDINGS
) -> Tensor:
    """How far a result may be off: by float32 rounding of sums of `terms`, and one rounding to `dtype`.

    In half precision ``torch.mm`` rounds weights and what several tasks share, too: then `one_rounding` is
    false.
    """
    at_most = tolerance * terms
    if dtype in (torch.float16, torch.bfloat16):
        eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
        at_most = at_most + eps * ((want.abs() if one_rounding else 4 * terms) + tiny)
    return at_most


def assert_within(found: Tensor, want: Tensor, at_most: Tensor) -> None:
    """`found` is `want`, but for an error of `at_most`."""
    assert found.shape == want.shape
    worst = ((found.double() - want).abs() - at_most).max() if found.numel() else torch.tensor(0.0)
    assert worst <= 0, f"off by {worst} more than rounding explains"


def assert_near(found: Tensor, want: Tensor, terms: Tensor, one_rounding: bool = True) -> None:
    """As :func:`assert_within`, with :func:`rounding_error` of the dtype that `found` has."""
    assert_within(found, want, rounding_error(want, terms, found.dtype, one_rounding=one_rounding))


def assert_grads(found: Any, want: Grads, terms: Grads, tolerance: float = ROUNDINGS) -> None:
    """Gradients of scales, offsets, zeros and deltas: float32, contiguous, each within the rounding of its sum."""
    assert len(found) == len(want) == 4
    for a, b, t in zip(found, want, terms, strict=True):
        assert (a is None) == (b is None)
        if a is None or b is None or t is None:
            continue
        assert a.dtype == torch.float32
        assert a.is_contiguous()
        assert_within(a.cpu(), b, tolerance * t.abs())
