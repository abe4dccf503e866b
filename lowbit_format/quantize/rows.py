"""A matrix whose rows have different numbers of bits (MIX-1 to MIX-4): rows of equal bits are fitted together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ..bits import row_bytes, to_ragged
from ..errors import QuantizationError
from ..matrix import F32, Params, StoredMatrix
from .target import Target

Fit = Callable[[F32, Target], StoredMatrix]


def quantize_rows(weight: F32, target: Target, fit: Fit, name: str) -> StoredMatrix:
    """Quantize a matrix to the ``row_bits`` of its target (MIX-1 to MIX-4).

    Args:
        weight: float32 ``[rows, cols]``.
        target: with ``row_bits``, one number for each row.
        fit: quantizes rows to a target without them; it may widen parameters, which all rows then get.
        name: tensor name for messages.

    Raises:
        QuantizationError: `target` has bits for another number of rows.
    """
    rows, cols = weight.shape
    row_bits = np.array(target.row_bits, np.uint8)
    if row_bits.shape != (rows,):
        raise QuantizationError(f"{name}: has {rows} rows, and row_bits says the bits of {row_bits.size}")
    members = {int(bits): np.flatnonzero(row_bits == bits) for bits in np.unique(row_bits)}

    def fitted(scale_dtype: str) -> dict[int, StoredMatrix]:
        found = {}
        for bits, at in members.items():
            nested = tuple(k for k in target.nested if k < bits)
            own = replace(target, bits=bits, nested=nested, row_bits=None, scale_dtype=scale_dtype)
            found[bits] = fit(np.ascontiguousarray(weight[at]), own)
        return found

    parts = fitted(target.scale_dtype)
    dtypes = {part.scheme.scale_dtype for part in parts.values()}
    if len(dtypes) > 1:
        parts, dtypes = fitted("F32"), {"F32"}
    planes = np.zeros((target.bits, rows, row_bytes(cols)), np.uint8)
    for bits, part in parts.items():
        planes[:bits, members[bits]] = part.planes

    def together(k: int | None) -> Params:
        """The parameters at precision `k`; rows that have no more bits are read with their own (NST-2)."""
        of = {bits: part.nested[k] if k is not None and k < bits else part.params for bits, part in parts.items()}
        scheme, first = target.scheme(), next(iter(of.values()))
        groups = first.scales.shape[2]
        scales = np.zeros((scheme.scale_planes(k or target.bits), rows, groups), np.float32)  # beyond a row's bits: 0
        shift = None if first.shift is None else np.zeros((rows, groups), np.float32)
        for bits, params in of.items():
            scales[: len(params.scales), members[bits]] = params.scales
            if shift is not None:
                shift[members[bits]] = params.shift
        return Params(scales, shift)

    return StoredMatrix(
        target.scheme(dtypes.pop()),
        rows,
        cols,
        to_ragged(planes, row_bits),
        together(None),
        {k: together(k) for k in target.nested},
        row_bits=row_bits,
    )
