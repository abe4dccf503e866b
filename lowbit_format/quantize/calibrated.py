"""Quantizes a weight for the outputs that it gives, rather than for the weight itself.

For inputs X of a layer, the squared error of its outputs is a quadratic form: with a row w, its decoded row q and the
*Hessian* ``H = X^T X / n``, it is ``(q - w) H (q - w)^T``. Two steps lower it:

1. *Error feedback* (GPTQ, Frantar et al. 2023, arXiv:2210.17323): codes are chosen column by column, and the error of
   each is made up for by the columns that follow. A group's parameters are fitted when its turn comes, with the
   Hessian's diagonal as the importance of columns.
2. *Descent*, group by group: first the code of each column in turn becomes the best one while all others stay
   (cyclic coordinate descent, as in LNQ, Kim et al. 2025, arXiv:2505.07004), then the group's parameters become the
   solution of their normal equations. A row keeps a change only if its error falls, so no sweep makes a row worse.

With nested precisions, a code is chosen for the sum of the errors at all of them, each divided by what it was before
the sweep: it is the product of the errors that falls.

All of it is torch, on the device of the weight. The result is a :class:`StoredMatrix` on the host.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..bits import row_bytes
from ..errors import NonFiniteWeightError, QuantizationError
from ..matrix import Params, StoredMatrix
from . import codebook, columns
from .group_lanes import pack
from .solve import SOLVERS, is_close, rounded
from .target import Target

DAMPING = 0.01  # of the Hessian's mean diagonal, added to its diagonal: few inputs leave directions unseen
BLOCK = 128  # columns after which the errors of earlier ones are passed on to all later columns, as one product
SWEEPS = 4  # of descent
_RIDGE = 1e-6  # of the normal equations, relative to their mean diagonal: planes of a group may coincide
_TORCH = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@dataclass(frozen=True)
class Calibrated:
    """A matrix that was quantized for its outputs.

    Attributes:
        matrix: the result.
        errors: squared error of the outputs relative to the squared outputs, after each step: ``"feedback"``,
            ``"descent"``; of the nested precision k, ``"descent at k bits"``.
    """

    matrix: StoredMatrix
    errors: dict[str, float]


class _TooNarrow(Exception):
    """A dtype cannot hold the parameters."""


def quantize_for_outputs(
    weight: Tensor, target: Target, hessian: Tensor, *, sweeps: int = SWEEPS, name: str = "weight"
) -> Calibrated:
    """Quantize one matrix for the outputs that it gives.

    Args:
        weight: float ``[rows, cols]`` on any device.
        target: codec, bits and other options; ``recognise`` is ignored.
        hessian: float32 ``[cols, cols]`` on the same device: mean of ``x^T x`` over the inputs x.
        sweeps: of descent.
        name: tensor name for messages.

    Raises:
        NonFiniteWeightError: the weight holds NaN or an infinity.
        QuantizationError: the Hessian does, or has a wrong shape; or parameters overflow.
    """
    weight = weight.detach().float()
    if not bool(torch.isfinite(weight).all()):
        raise NonFiniteWeightError(f"{name}: holds NaN or infinite values")
    cols = weight.shape[1]
    if hessian.shape != (cols, cols) or not bool(torch.isfinite(hessian).all()):
        raise QuantizationError(f"{name}: the Hessian must be {cols} x {cols} finite numbers")
    hessian = damped(hessian.float())
    for dtype in (target.scale_dtype, "F32"):
        try:
            return _quantize(weight, replace(target, scale_dtype=dtype), hessian, sweeps)
        except _TooNarrow:
            continue
    raise QuantizationError(f"{name}: its parameters overflow float32; keep this module in full precision")


def damped(hessian: Tensor) -> Tensor:
    """The Hessian with :data:`DAMPING`. Inputs that are always 0 count as little as that, never nothing."""
    mean = hessian.diagonal().mean()
    if not mean > 0:  # no input was ever anything but 0
        return torch.eye(len(hessian), device=hessian.device)
    return hessian + DAMPING * mean * torch.eye(len(hessian), device=hessian.device)


def without_drift(weight: Tensor, cross: Tensor, total: Tensor) -> Tensor:
    """The weight that gives, for the inputs x that a layer gets after quantized ones, most nearly what `weight` gives
    for the inputs y that it had in the float model (GPTAQ, Li et al. 2025, arXiv:2504.02692).

    Args:
        weight: float32 ``[rows, cols]``.
        cross, total: sums of ``y^T x`` and of ``x^T x``, float32 ``[cols, cols]``.
    """
    shift = DAMPING * total.diagonal().mean() * torch.eye(len(total), device=total.device)
    found: Tensor = torch.linalg.solve(total + shift, (weight @ (cross + shift)).T)
    return found.T.contiguous()


def output_error(weight: Tensor, decoded: Tensor, hessian: Tensor) -> float:
    """Squared error of the outputs relative to the squared outputs; 0 for a weight of zeros."""
    error, size = (float(((d @ hessian) * d).sum()) for d in (decoded - weight, weight))
    return error / size if size > 0 else 0.0


def _quantize(weight: Tensor, target: Target, hessian: Tensor, sweeps: int) -> Calibrated:
    state = _State(weight, target, hessian)
    state.feed_back()
    errors = {"feedback": state.error(target.bits)}
    state.start_nested()
    for _ in range(sweeps):
        state.descend()
    errors["descent"] = state.error(target.bits)
    errors.update({f"descent at {k} bits": state.error(k) for k in target.nested})
    return Calibrated(state.stored(), errors)


class _Grid:
    """The levels of a codec, at one precision: a weight is linear in its parameters, given its code.

    Args:
        target: codec and bits.
        bits: planes to read.
    """

    def __init__(self, target: Target, bits: int, device: torch.device) -> None:
        self.target, self.bits = target, bits
        code = torch.arange(2**target.bits, device=device)
        self.index = code >> (target.bits - bits)  # of the level of each code
        if target.codec == "bcq":
            shifts = torch.arange(target.bits - 1, target.bits - 1 - bits, -1, device=device)
            signs = ((code[:, None] >> shifts) & 1).float() * 2 - 1
            self.features = torch.cat([signs, torch.ones_like(signs[:, :1])], 1) if target.offset else signs
        elif target.codec == "uniform":
            self.features = torch.stack(
                [self.index.float(), torch.ones(len(code), dtype=torch.float32, device=device)], 1
            )
        else:
            self.features = torch.from_numpy(codebook.padded(target.values())).to(device)[:, None]

    def levels(self, scales: Tensor, shift: Tensor | None) -> Tensor:
        """float32 ``[rows, codes]`` of parameters ``[planes, rows]`` and ``[rows]``, as a decoder computes them."""
        if self.target.codec == "bcq":
            level = torch.zeros_like(scales[0]) if shift is None else shift
            level = level[:, None].expand(-1, len(self.index))
            for p in range(self.bits):
                level = level + scales[p, :, None] * self.features[:, p]
            return level
        if self.target.codec == "uniform":
            assert shift is not None  # noqa: S101 - uniform always has zeros; tells the type checker
            return (self.index - shift[:, None]) * scales[0, :, None]
        return scales[0, :, None] * self.features[:, 0]

    def coefficients(self, scales: Tensor, shift: Tensor | None) -> Tensor:
        """``[rows, n]`` of which the levels are ``features @ coefficients``."""
        if shift is None:
            return scales.T
        last = shift if self.target.codec == "bcq" else -shift * scales[0]
        return torch.cat([scales.T, last[:, None]], 1)

    def parameters(self, coefficients: Tensor) -> tuple[Tensor, Tensor | None]:
        """The parameters of coefficients, as they are stored: rounded to the target's dtype."""
        dtype = _TORCH[self.target.scale_dtype]
        if self.features.shape[1] == (self.bits if self.target.codec == "bcq" else 1):
            return coefficients.T.to(dtype).float(), None
        scales, last = coefficients[:, :-1].T.to(dtype).float(), coefficients[:, -1]
        if self.target.codec == "uniform":
            last = -last / scales[0]
        return scales, last.to(dtype).float()


class _State:
    """A weight, its codes and its parameters so far.

    Attributes:
        codes: int64 ``[rows, cols]``.
        scales: by precision, float32 ``[planes, rows, groups]``; exact in the target's dtype.
        shift: by precision, float32 ``[rows, groups]``, or None.
        decoded: by precision, float32 ``[rows, cols]``.
    """

    def __init__(self, weight: Tensor, target: Target, hessian: Tensor) -> None:
        self.weight, self.target, self.hessian = weight, target, hessian
        scheme = target.scheme()
        rows, cols = weight.shape
        self.size = scheme.group_columns(cols)
        self.grids = {k: _Grid(target, k, weight.device) for k in (*target.nested, target.bits)}
        self.codes = torch.zeros(rows, cols, dtype=torch.int64, device=weight.device)
        self.scales: dict[int, Tensor] = {}
        self.shift: dict[int, Tensor | None] = {}
        self.decoded = {target.bits: torch.empty_like(weight)}
        self._start(target.bits)
        self._errors: dict[int, float] = {}

    def _start(self, bits: int) -> None:
        rows, groups = len(self.weight), -(-self.weight.shape[1] // self.size)
        planes = bits if self.target.codec == "bcq" else 1
        shifted = self.target.codec == "uniform" or (self.target.codec == "bcq" and self.target.offset)
        self.scales[bits] = self.weight.new_zeros(planes, rows, groups)
        self.shift[bits] = self.weight.new_zeros(rows, groups) if shifted else None

    def _set(self, bits: int, group: int, scales: Tensor, shift: Tensor | None) -> None:
        self.scales[bits][:, :, group] = scales
        if shift is not None:
            self.shift[bits][:, group] = shift  # type: ignore[index]

    def _get(self, bits: int, group: int) -> tuple[Tensor, Tensor | None]:
        shift = self.shift[bits]
        return self.scales[bits][:, :, group], None if shift is None else shift[:, group]

    def error(self, bits: int) -> float:
        """See :func:`output_error`."""
        return output_error(self.weight, self.decoded[bits], self.hessian)

    def _groups(self) -> list[tuple[int, int, int]]:
        cols = self.weight.shape[1]
        return [(g, s, min(cols, s + self.size)) for g, s in enumerate(range(0, cols, self.size))]

    # --- the first step ---

    def feed_back(self) -> None:
        """Choose all codes at full precision; each error is made up for by the columns that follow."""
        bits, target = self.target.bits, self.target
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.hessian))
        upper = torch.linalg.cholesky(inverse, upper=True)
        diagonal, left = self.hessian.diagonal(), self.weight.clone()
        decoded = self.decoded[bits]
        for group, start, stop in self._groups():
            scales, shift = _fit(left[:, start:stop], diagonal[start:stop], target)
            self._set(bits, group, scales, shift)
            level, order = self.grids[bits].levels(scales, shift).sort(dim=1, stable=True)
            for begin in range(start, stop, BLOCK):
                here = slice(begin, min(stop, begin + BLOCK))
                errors = columns.feed_back(
                    left[:, here], upper[here, here], level, order, decoded[:, here], self.codes[:, here]
                )
                left[:, here.stop :].addmm_(errors, upper[here, here.stop :], alpha=-1)

    # --- descent ---

    def start_nested(self) -> None:
        """Give every nested precision parameters for the codes that full precision has chosen."""
        for bits in self.target.nested:
            self._start(bits)
            self.decoded[bits] = torch.zeros_like(self.weight)
            gradient = -self.weight @ self.hessian
            for group, start, stop in self._groups():
                gradient += self._refit(bits, group, start, stop, gradient)

    def descend(self) -> None:
        """One sweep over all groups: their codes, then their parameters."""
        self._errors = {k: max(self.error(k), 1e-12) for k in self.grids}
        gradients = {k: (self.decoded[k] - self.weight) @ self.hessian for k in self.grids}
        for group, start, stop in self._groups():
            for begin in range(start, stop, BLOCK):
                self._choose_codes(group, begin, min(stop, begin + BLOCK), gradients)
            for k in self.grids:
                gradients[k] += self._refit(k, group, start, stop, gradients[k])

    def _choose_codes(self, group: int, begin: int, end: int, gradients: dict[int, Tensor]) -> None:
        """The best code of each column from `begin` to `end`, while all others stay."""
        here, bits = slice(begin, end), list(self.grids)
        levels = torch.stack([grid.levels(*self._get(k, group)) for k, grid in self.grids.items()])
        shares = torch.tensor([1 / self._errors[k] for k in bits], dtype=torch.float32, device=levels.device)
        gradient = torch.stack([gradients[k][:, here] for k in bits])
        before = torch.stack([self.decoded[k][:, here] for k in bits])
        decoded = before.clone()
        columns.descend(self.hessian[here, here], levels, shares, gradient, decoded, self.codes[:, here])
        for k, old, new in zip(bits, before, decoded, strict=True):
            self.decoded[k][:, here] = new
            gradients[k].addmm_(new - old, self.hessian[here])

    def _refit(self, bits: int, group: int, start: int, stop: int, gradient: Tensor) -> Tensor:
        """Solve for the group's parameters, rows of which the error falls; returns the change of the gradient."""
        grid, block = self.grids[bits], self.hessian[start:stop, start:stop]
        codes, old = self.codes[:, start:stop], self.decoded[bits][:, start:stop]
        design = grid.features[codes]  # [rows, columns, n]
        weighed = torch.matmul(block, design)
        gram = design.transpose(1, 2) @ weighed
        wanted = old @ block - gradient[:, start:stop]
        right = (design * wanted[..., None]).sum(1)
        ridge = _RIDGE * gram.diagonal(dim1=1, dim2=2).mean(1) + torch.finfo(torch.float32).tiny
        gram = gram + ridge[:, None, None] * torch.eye(gram.shape[1], device=gram.device)
        present = grid.coefficients(*self._get(bits, group))
        right = right + ridge[:, None] * present
        solution, failed = torch.linalg.solve_ex(gram.double(), right.double())
        scales, shift = grid.parameters(solution.float())
        level = grid.levels(scales, shift)
        new = level.gather(1, codes)
        change = new - old
        gain = (change * (2 * gradient[:, start:stop] + change @ block)).sum(1)
        good = (gain < 0) & (failed == 0) & torch.isfinite(level).all(1)
        if self.target.codec != "bcq":
            good &= scales[0] > 0
        change = torch.where(good[:, None], change, 0.0)
        self.decoded[bits][:, start:stop] = torch.where(good[:, None], new, old)
        old_scales, old_shift = self._get(bits, group)
        kept = None if shift is None or old_shift is None else torch.where(good, shift, old_shift)
        self._set(bits, group, torch.where(good, scales, old_scales), kept)
        return change @ self.hessian[start:stop]

    # --- the result ---

    def stored(self) -> StoredMatrix:
        """The matrix, on the host."""
        if self.target.codec == "bcq":
            self._order_planes()
        rows, cols = self.weight.shape
        codes = np.zeros((rows, 8 * row_bytes(cols)), np.uint8)
        codes[:, :cols] = self.codes.cpu().numpy()
        found = {}
        for k, scales in self.scales.items():
            shift = self.shift[k]
            found[k] = Params(
                np.ascontiguousarray(scales.cpu().numpy()),
                None if shift is None else np.ascontiguousarray(shift.cpu().numpy()),
            )
        target = self.target
        table = codebook.padded(target.values()) if target.codec == "codebook" else None
        return StoredMatrix(target.scheme(), rows, cols, pack(codes, target.bits), found.pop(target.bits), found, table)

    def _order_planes(self) -> None:
        """Scales that are >= 0 and, without nested precisions, descending (ENC-2): other planes, the same weights."""
        bits = self.target.bits
        shifts = torch.arange(bits - 1, -1, -1, device=self.codes.device)
        for group, start, stop in self._groups():
            planes = (self.codes[:, start:stop, None] >> shifts) & 1  # [rows, columns, bits]
            flip = self.scales[bits][:, :, group].T < 0  # [rows, bits]
            if self.target.nested:  # a plane has one sign at all precisions
                flip = torch.zeros_like(flip)
            scales = torch.where(flip.T, -self.scales[bits][:, :, group], self.scales[bits][:, :, group])
            planes = planes ^ flip[:, None].long()
            if not self.target.nested:
                scales, order = scales.sort(dim=0, descending=True, stable=True)
                planes = planes.gather(2, order.T[:, None].expand_as(planes))
            self.scales[bits][:, :, group] = scales
            self.codes[:, start:stop] = (planes << shifts).sum(2)


def _fit(weight: Tensor, importance: Tensor, target: Target) -> tuple[Tensor, Tensor | None]:
    """Rounded parameters of one group ``[rows, columns]``, fitted to its weights by columns' importance."""
    alone = replace(target, group_size=0, nested=())
    exact = _fitter(alone, weight.device.type)(weight, importance, alone)
    params = rounded(exact, target.scale_dtype)
    if not is_close(exact, params, target):
        raise _TooNarrow
    shift = None if params.shift is None else torch.from_numpy(params.shift[:, 0]).to(weight.device)
    return torch.from_numpy(params.scales[:, :, 0]).to(weight.device), shift


@functools.cache
def _fitter(target: Target, device: str) -> Callable[[Tensor, Tensor, Target], Params]:
    """The data-free fit of a codec: compiled on a CPU, and for codebooks; else on torch tensors."""
    if device == "cpu" or target.codec == "codebook":
        fit = SOLVERS[target.codec].fit
        return lambda w, i, t: fit(np.ascontiguousarray(w.cpu().numpy()), t, np.ascontiguousarray(i.cpu().numpy()))
    from .on_torch import fit_groups

    return fit_groups
