"""A matrix whose scales and offsets are trained by gradients, and perhaps its codes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..kernels import operators
from ..kernels.matrix import PlaneMatrix
from ..matrix import Params, StoredMatrix
from ..quantize.solve import rounded
from .code_choice import CodeChoice, can_choose
from .decoded import plane_matrix


class TrainedMatrix:
    """A matrix whose scales and offsets (of uniform: zeros) are trained.

    Scales and offsets are trained as multiples of the mean scale, so that one learning rate suits all matrices.

    Args:
        matrix: to begin with.
        device: to compute on.
        codes: may change too, if they can.

    Attributes:
        tensors: scales and offsets in training, float32.
        choice: of codes; None where they stay.
    """

    def __init__(self, matrix: StoredMatrix, device: torch.device, *, codes: bool = False) -> None:
        self.choice = CodeChoice(matrix, device) if codes and can_choose(matrix) else None
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
        """The decoded weight ``[rows, cols]``, float32; through it gradients reach :attr:`tensors` and the choice."""
        w = self._present()
        if self.choice is None:
            return operators.dequantize(w)
        return self.choice.through(operators.dequantize(w._replace(planes=self.choice.planes())))

    def change_codes(self) -> None:
        """Change the codes that the gradients speak against, if they are trained."""
        if self.choice is not None:
            self.choice.step(self._present())

    def stored(self) -> StoredMatrix:
        """The matrix so far, with parameters rounded to its dtype; as it was, if these are not finite."""
        scales, shift = self._parameters()
        exact = Params(scales.detach().cpu().numpy(), None if shift is None else shift.detach().cpu().numpy())
        params = rounded(exact, self._matrix.scheme.scale_dtype)
        finite = np.isfinite(params.scales).all() and (params.shift is None or np.isfinite(params.shift).all())
        if not finite:
            return self._matrix
        planes = self._matrix.planes if self.choice is None else self.choice.planes().cpu().numpy()
        return replace(self._matrix, planes=planes, params=params)

    def round(self) -> None:
        """Go on from the parameters as they are stored."""
        params = self.stored().params
        with torch.no_grad():
            self.tensors[0].copy_(torch.from_numpy(params.scales) / self._unit)
            if params.shift is not None:
                unit = self._unit if self._w.has_offsets else 1.0
                self.tensors[1].copy_(torch.from_numpy(params.shift) / unit)

    def _present(self) -> PlaneMatrix:
        """The matrix with the parameters so far and the codes that it began with."""
        scales, shift = self._parameters()
        w = self._w._replace(scales=scales)
        return w if shift is None else w.with_shift(shift)

    def _parameters(self) -> tuple[Tensor, Tensor | None]:
        shift = self._w.shift
        if shift is not None and self._w.has_offsets:
            shift = shift * self._unit
        return self._w.scales * self._unit, shift
