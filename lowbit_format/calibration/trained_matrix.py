"""A matrix whose scales and offsets are trained by gradients, while its codes stay."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..kernels import operators
from ..matrix import Params, StoredMatrix
from ..quantize.solve import rounded
from .decoded import plane_matrix


class TrainedMatrix:
    """A matrix whose scales and offsets (of uniform: zeros) are trained.

    Scales and offsets are trained as multiples of the mean scale, so that one learning rate suits all matrices.

    Args:
        matrix: to begin with.
        device: to compute on.

    Attributes:
        tensors: what is trained, float32.
    """

    def __init__(self, matrix: StoredMatrix, device: torch.device) -> None:
        w = plane_matrix(matrix, device)
        self._matrix, self._unit = matrix, float(w.scales.abs().mean()) or 1.0
        w = w._replace(scales=(w.scales / self._unit).requires_grad_())
        self.tensors = [w.scales]
        if w.shift is not None:
            shift = w.shift / self._unit if w.has_offsets else w.shift.clone()
            w = w.with_shift(shift.requires_grad_())
            self.tensors.append(shift)
        self._w = w

    def weight(self) -> Tensor:
        """The decoded weight ``[rows, cols]``, float32; through it gradients reach :attr:`tensors`."""
        scales, shift = self._parameters()
        w = self._w._replace(scales=scales)
        return operators.dequantize(w if shift is None else w.with_shift(shift))

    def stored(self) -> StoredMatrix:
        """The matrix with the parameters so far, rounded to its dtype; as it was, if that is not finite."""
        scales, shift = self._parameters()
        exact = Params(scales.detach().cpu().numpy(), None if shift is None else shift.detach().cpu().numpy())
        params = rounded(exact, self._matrix.scheme.scale_dtype)
        finite = np.isfinite(params.scales).all() and (params.shift is None or np.isfinite(params.shift).all())
        return replace(self._matrix, params=params) if finite else self._matrix

    def round(self) -> None:
        """Go on from the parameters as they are stored."""
        params = self.stored().params
        with torch.no_grad():
            self.tensors[0].copy_(torch.from_numpy(params.scales) / self._unit)
            if params.shift is not None:
                unit = self._unit if self._w.has_offsets else 1.0
                self.tensors[1].copy_(torch.from_numpy(params.shift) / unit)

    def _parameters(self) -> tuple[Tensor, Tensor | None]:
        shift = self._w.shift
        if shift is not None and self._w.has_offsets:
            shift = shift * self._unit
        return self._w.scales * self._unit, shift
