"""Matrices and products for tests of kernels, and how near a result has to be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from support.building import random_matrix
from torch import Tensor

from lowbit_format.kernels.matrix import PlaneMatrix
from lowbit_format.matrix import StoredMatrix
from lowbit_format.runtime.stored_tensors import TORCH_DTYPES
from lowbit_format.schema import Scheme
from tests.kernels.test_operators import packed

ROUNDINGS = 1e-6  # error of a float32 product, of the sum of its terms' absolute values: eight roundings' worth


class Call(NamedTuple):
    """The arguments of ``linear``."""

    x: Tensor
    w: PlaneMatrix
    bias: Tensor | None = None
    deltas: Tensor | None = None
    task_ids: Tensor | None = None


def stored(matrix: StoredMatrix, bits: int | None = None) -> PlaneMatrix:
    """The tensors of `matrix`, parameters in the dtype that its scheme declares."""
    w, dtype = packed(matrix, bits), TORCH_DTYPES[matrix.scheme.scale_dtype]
    return w._replace(**{n: t.to(dtype) for n in ("scales", "offsets", "zeros") if (t := getattr(w, n)) is not None})


def drawn(
    kind: Scheme, bits: int, group_size: int, rows: int, cols: int, seed: int = 0, dtype: str = "F32"
) -> PlaneMatrix:
    return stored(random_matrix(replace(kind, bits=bits, group_size=group_size, scale_dtype=dtype), rows, cols, seed))


def exact(w: PlaneMatrix) -> PlaneMatrix:
    """`w` with parameters in float64: the naive functions then compute in it."""
    names = [n for n in ("scales", "offsets", "zeros", "codebook") if getattr(w, n) is not None]
    return w._replace(**{n: getattr(w, n).double() for n in names})


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
    return None if t is None else t.double().abs()


def same_bits(a: Tensor, b: Tensor) -> bool:
    kind = torch.int32 if a.dtype == torch.float32 else torch.int16
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def assert_near(found: Tensor, want: Tensor, terms: Tensor, one_rounding: bool = True) -> None:
    """`found` is `want` but for float32 rounding of sums of `terms`, and one rounding to its own dtype.

    In half precision a library's product rounds weights and what several tasks share, too.
    """
    assert found.shape == want.shape
    at_most = ROUNDINGS * terms
    if found.dtype != torch.float32:
        eps, tiny = torch.finfo(found.dtype).eps, torch.finfo(found.dtype).smallest_normal
        at_most += eps * ((want.abs() if one_rounding else 4 * terms) + tiny)
    worst = ((found.double() - want).abs() - at_most).max() if found.numel() else torch.tensor(0.0)
    assert worst <= 0, f"off by {worst} more than rounding explains"


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
