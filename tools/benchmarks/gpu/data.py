"""A part of the GPU benchmark: random matrices, made on the device, in more copies than its caches hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowbit_format.bits import row_bytes
from lowbit_format.codecs import CODECS
from lowbit_format.kernels.gpu import backend
from lowbit_format.kernels.matrix import PlaneMatrix
from lowbit_format.runtime.stored_tensors import TORCH_DTYPES
from lowbit_format.schema import Scheme

from .bench import Bench
from .predict import nbytes


@dataclass(frozen=True)
class Matrix:
    """A random matrix, and as many others of its shape as exceed the caches, in the layout that kernels read.

    Attributes:
        plain: copy 0 in the file's layout.
        tiled: all copies in the tiled layout.
        nbytes: bytes that a product must read.
    """

    scheme: Scheme
    plain: PlaneMatrix
    tiled: list[PlaneMatrix]
    nbytes: int


def random_matrix(bench: Bench, scheme: Scheme, rows: int, cols: int) -> Matrix:
    """A random matrix in more copies, all different, than the caches hold."""
    size = nbytes(scheme, rows, cols)
    first = random_plane_matrix(scheme, rows, cols, bench.device)
    others = (random_plane_matrix(scheme, rows, cols, bench.device) for _ in range(bench.copies(size) - 1))
    return Matrix(scheme, first, [backend.tile(w) for w in (first, *others)], size)


def random_plane_matrix(scheme: Scheme, rows: int, cols: int, device: torch.device) -> PlaneMatrix:
    """Random planes, and parameters of about the size of real ones, in the file's layout."""
    codec, groups, dtype = CODECS[scheme.codec], scheme.groups(cols), TORCH_DTYPES[scheme.scale_dtype]
    planes = torch.randint(0, 256, (scheme.bits, rows, row_bytes(cols)), dtype=torch.uint8, device=device)
    scales = torch.rand(scheme.bits if codec.scale_per_plane else 1, rows, groups, device=device) * 0.09 + 0.01
    shift = torch.randn(rows, groups, device=device) * 0.1 if scheme.shift else None
    if shift is not None and scheme.codec == "uniform":
        shift += (2**scheme.bits - 1) / 2
    shift = None if shift is None else shift.to(dtype)
    offsets, zeros = (shift, None) if scheme.codec == "bcq" else (None, shift)
    codebook = torch.randn(2**scheme.bits, device=device) if codec.codebook else None
    return PlaneMatrix(
        planes, scales.to(dtype), offsets, zeros, codebook, None, scheme.codec, scheme.bits, scheme.group_size, cols
    )
