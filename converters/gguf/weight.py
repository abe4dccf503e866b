"""A weight that a GGUF file has packed, as :class:`..quantized.packed.Packed` has those of other releases."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...bits import U8
from ...errors import QuantizedSourceError
from ...matrix import F32, Params
from ..quantized.packed import Packed, Raw
from .blocks import TYPES


@dataclass(frozen=True)
class GgufWeight(Packed):
    """A weight of blocks. Its parts hold its rows, one part behind the other.

    Attributes:
        kind: name of its type, such as ``"Q4_K"``.
        block_bytes: of a block.
        order: of rows, int64 ``[rows]``, or None.
    """

    kind: str = ""
    block_bytes: int = 0
    order: NDArray[np.int64] | None = None

    def codes(self, raw: Raw, rows: slice) -> U8:
        packed = self._rows(raw, rows)
        return TYPES[self.kind].codes(packed.reshape(-1, self.block_bytes)).reshape(len(packed), self.shape[1])

    def params(self, raw: Raw) -> Params:
        rows, groups = self.shape[0], self.scheme.groups(self.shape[1])
        form = TYPES[self.kind]
        scales = np.empty((1, rows, groups), np.float32)
        shift = None if form.shift is None else np.empty((rows, groups), np.float32)
        for part in self._chunks():
            blocks = self._rows(raw, part).reshape(-1, self.block_bytes)
            with np.errstate(over="ignore", invalid="ignore"):
                scales[0, part] = form.scales(blocks).reshape(-1, groups)
                if shift is not None:
                    shift[part] = form.shift(blocks).reshape(-1, groups) if callable(form.shift) else form.shift
        for values in (scales, shift):
            if values is not None and not np.isfinite(values).all():
                bad = int(np.count_nonzero(~np.isfinite(values)))
                raise QuantizedSourceError(
                    f"{next(iter(self.parts.values())).name}: holds {bad} NaN or infinite scales or offsets, expected "
                    "finite ones; download the file again"
                )
        return Params(scales, shift)

    def table(self, raw: Raw) -> F32 | None:
        return TYPES[self.kind].table

    def formula(self, raw: Raw, rows: slice) -> F32:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        found: F32 = dequantize(self._rows(raw, rows), GGMLQuantizationType[self.kind])
        return found

    def _rows(self, raw: Raw, rows: slice) -> U8:
        """The bytes of some rows, uint8 ``[n, bytes of a row]``, in the model's order."""
        wanted = np.arange(rows.start, rows.stop) if self.order is None else self.order[rows]
        parts = [raw[role].astype(np.uint8, copy=False) for role in self.parts]
        if len(parts) == 1:
            return parts[0][rows] if self.order is None else parts[0][wanted]
        first, found = 0, np.empty((len(wanted), parts[0].shape[1]), np.uint8)
        for part in parts:
            here = (wanted >= first) & (wanted < first + len(part))
            found[here] = part[wanted[here] - first]
            first += len(part)
        return found
