"""Stored matrices in torch, where a block computes with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..codecs import CODECS
from ..kernels import operators
from ..kernels.matrix import PlaneMatrix
from ..matrix import StoredMatrix


def decoded(matrix: StoredMatrix, device: torch.device) -> Tensor:
    """The weight ``[rows, cols]`` that a matrix stands for, float32."""
    return operators.dequantize(plane_matrix(matrix, device))


def plane_matrix(matrix: StoredMatrix, device: torch.device) -> PlaneMatrix:
    """A matrix as kernels take it, at full precision."""
    scheme, shift, role = matrix.scheme, matrix.params.shift, CODECS[matrix.scheme.codec].shift

    def tensor(array: np.ndarray[Any, Any] | None) -> Tensor | None:
        return None if array is None else torch.from_numpy(np.array(array, order="C")).to(device)

    planes, scales = tensor(matrix.planes), tensor(matrix.params.scales)
    assert planes is not None and scales is not None  # noqa: S101, PT018 - tells the type checker
    return PlaneMatrix(
        planes,
        scales,
        tensor(shift) if role == "offsets" else None,
        tensor(shift) if role == "zeros" else None,
        tensor(matrix.codebook),
        tensor(matrix.row_bits),
        scheme.codec,
        scheme.bits,
        scheme.group_size,
        matrix.cols,
    )
