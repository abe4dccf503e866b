"""One quantized matrix as the file stores it: planes, and the parameters that give their codes a meaning."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from .bits import U8, plane_rows
from .schema import Scheme

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Params:
    """Float parameters of one precision.

    They are float32 here; their values are exact in the scheme's ``scale_dtype``.

    Attributes:
        scales: float32 ``[bits, rows, groups]`` (bcq) or ``[1, rows, groups]``.
        shift: float32 ``[rows, groups]``: offsets (bcq, affine) or zeros (uniform); None where the scheme has none.
    """

    scales: F32
    shift: F32 | None = None


@dataclass(frozen=True)
class StoredMatrix:
    """One matrix ``[rows, cols]`` (spec/FORMAT.md section 4).

    Attributes:
        scheme: how it is stored.
        rows, cols: logical shape.
        planes: uint8 ``[bits, rows, bytes]``, or ragged ``[sum of row_bits, bytes]``.
        params: parameters at full precision.
        nested: parameters at each nested precision k.
        codebook: float32 ``[2**bits]`` (codebook).
        row_bits: uint8 ``[rows]`` (schemes with row_bits).
    """

    scheme: Scheme
    rows: int
    cols: int
    planes: U8
    params: Params
    nested: dict[int, Params] = field(default_factory=dict)
    codebook: F32 | None = None
    row_bits: U8 | None = None

    def row_slice(self, begin: int, end: int) -> StoredMatrix:
        """Rows `begin` to `end` as a matrix of views; of ragged planes, their rows are copied."""

        def rows(p: Params) -> Params:
            return Params(p.scales[:, begin:end], None if p.shift is None else p.shift[begin:end])

        nested = {k: rows(p) for k, p in self.nested.items()}
        if self.row_bits is None:
            planes, row_bits = self.planes[:, begin:end], None
        else:
            index = plane_rows(self.row_bits, self.scheme.bits)[:, begin:end]
            planes, row_bits = self.planes[index[index >= 0]], self.row_bits[begin:end]
        return replace(
            self, rows=end - begin, planes=planes, params=rows(self.params), nested=nested, row_bits=row_bits
        )

    def at(self, bits: int | None) -> tuple[Params, int]:
        """Parameters and number of planes to read at precision `bits` (NST-1 to NST-4).

        None, or a number not below the matrix's own bits, is full precision.
        Raises PrecisionError for a precision that is not stored.
        """
        self.scheme.check_precision(bits)
        planes = self.scheme.planes_at(bits)
        return (self.params if planes == self.scheme.bits else self.nested[planes]), planes
