"""Scales and offsets of matrices as something to train by gradients, while the codes stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels import operators
from ..kernels.matrix import PlaneMatrix
from ..matrix import Params, StoredMatrix
from ..quantize.solve import rounded


class TrainedScales:
    """Scales and offsets (of uniform: zeros) of some matrices.

    They are trained as multiples of a matrix's mean scale, so that one learning rate suits all.

    Args:
        matrices: by name.
        device: to compute on.

    Attributes:
        parameters: for an optimizer, float32.
    """

    def __init__(self, matrices: Mapping[str, StoredMatrix], device: torch.device) -> None:
        self._stored = dict(matrices)
        self._units: dict[str, float] = {}
        self._trained: dict[str, PlaneMatrix] = {}
        self.parameters: list[Tensor] = []
        for name, matrix in matrices.items():
            w = plane_matrix(matrix, device)
            self._units[name] = unit = float(w.scales.abs().mean()) or 1.0
            w = w._replace(scales=(w.scales / unit).requires_grad_())
            self.parameters.append(w.scales)
            if w.shift is not None:
                shift = w.shift / unit if w.codec == "bcq" else w.shift.clone()
                w = w.with_shift(shift.requires_grad_())
                self.parameters.append(shift)
            self._trained[name] = w

    def _current(self, name: str) -> PlaneMatrix:
        w, unit = self._trained[name], self._units[name]
        shift = w.shift
        w = w._replace(scales=w.scales * unit)
        return w if shift is None else w.with_shift(shift * unit if w.codec == "bcq" else shift)

    def weight(self, name: str) -> Tensor:
        """The weight ``[rows, cols]`` with the present parameters, float32; gradients reach them through it."""
        return operators.dequantize(self._current(name))

    def matrix(self, name: str) -> StoredMatrix:
        """The matrix with the present parameters, rounded as they are stored; as it was, if these are not finite."""
        with torch.no_grad():
            w, matrix = self._current(name), self._stored[name]
            exact = Params(w.scales.cpu().numpy(), None if w.shift is None else w.shift.cpu().numpy())
            params = rounded(exact, matrix.scheme.scale_dtype)
        finite = np.isfinite(params.scales).all() and (params.shift is None or np.isfinite(params.shift).all())
        return replace(matrix, params=params) if finite else matrix

    def round(self) -> None:
        """From now on the present parameters are those that are stored."""
        for name, w in self._trained.items():
            params, unit = self.matrix(name).params, self._units[name]
            with torch.no_grad():
                w.scales.copy_(torch.from_numpy(params.scales) / unit)
                if w.shift is not None and params.shift is not None:
                    w.shift.copy_(torch.from_numpy(params.shift) / (unit if w.codec == "bcq" else 1.0))


def plane_matrix(matrix: StoredMatrix, device: torch.device) -> PlaneMatrix:
    """A matrix as the kernels take it, at full precision."""
    scheme, shift = matrix.scheme, matrix.params.shift

    def tensor(array: np.ndarray[Any, Any] | None) -> Tensor | None:
        return None if array is None else torch.from_numpy(np.array(array, order="C")).to(device)  # of a mapped file

    planes, scales = tensor(matrix.planes), tensor(matrix.params.scales)
    assert planes is not None and scales is not None  # noqa: S101, PT018 - tells the type checker
    return PlaneMatrix(
        planes,
        scales,
        tensor(shift) if scheme.codec == "bcq" else None,
        tensor(shift) if scheme.codec == "uniform" else None,
        tensor(matrix.codebook),
        tensor(matrix.row_bits),
        scheme.codec,
        scheme.bits,
        scheme.group_size,
        matrix.cols,
    )
