"""AWQ in the order of its "gemm" kernel: 4-bit integers with a scale and an integer zero for each group of columns.

| tensor | dtype, shape | meaning |
|---|---|---|
| qweight | int32 [cols, rows / 8] | a word holds the codes of 8 rows, in the order of :data:`ORDER` |
| qzeros | int32 [groups, rows / 8] | the zeros, likewise |
| scales | float [groups, rows] | |

weight = (code - zero) * scale, in the dtype of the scales.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...bits import U8
from ...matrix import F32, Params
from ...schema import Scheme
from .packed import Packed, Raw, spread
from .release import Release

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the row, of 8, whose code is in the lowest bits of a word, the next, ...


@dataclass(frozen=True)
class AwqWeight(Packed):
    """A weight of an AWQ release."""

    def codes(self, raw: Raw, rows: slice) -> U8:
        first, last = rows.start // 8, -(-rows.stop // 8)
        whole = _unpack(raw["qweight"][:, first:last])[:, rows.start - 8 * first : rows.stop - 8 * first]
        return np.ascontiguousarray(whole.T)

    def params(self, raw: Raw) -> Params:
        zeros = _unpack(raw["qzeros"])
        return Params(np.ascontiguousarray(raw.floats("scales").T)[None], np.ascontiguousarray(zeros.T, np.float32))

    def formula(self, raw: Raw, rows: slice) -> F32:
        size, cols = self.scheme.group_size, self.shape[1]
        zeros = raw.once("zeros", lambda: _unpack(raw["qzeros"]).astype(np.int16))
        steps = self.codes(raw, rows) - spread(zeros[:, rows].T, size, cols)
        weight: F32 = steps.astype(np.float32) * spread(raw.floats("scales")[:, rows].T, size, cols)
        return weight


def _unpack(words: NDArray[np.generic]) -> U8:
    """uint8 ``[n, rows]`` of int32 ``[n, rows / 8]``."""
    words = np.ascontiguousarray(words).view(np.uint32)
    out = np.empty((*words.shape, 8), np.uint8)
    for i, row in enumerate(ORDER):
        out[:, :, row] = (words >> np.uint32(4 * i)) & np.uint32(15)
    return out.reshape(len(words), -1)


def find(release: Release) -> Iterator[Packed]:
    """The weights of an AWQ release; raises QuantizedSourceError for one that is not known, or whose tensors lie."""
    section = release.section
    order = section.get("version", section.get("format", "gemm"))
    if str(order).lower() != "gemm":
        raise release.error(
            f"config.json: quantization_config has version {order!r}, expected 'gemm', the one order of bits that is "
            "known; save the model in it with its own library, or convert the original checkpoint"
        )
    release.number("bits", (4,), section.get("w_bit"))
    for path in release.modules("qweight"):
        yield _weight(release, path)


def _weight(release: Release, path: str) -> AwqWeight:
    qweight = release.matrix_tensor(f"{path}.qweight", ("I32",))
    cols, rows = qweight.shape[0], 8 * qweight.shape[1]
    key = "q_group_size" if "q_group_size" in release.section else "group_size"
    size = release.group_size(cols, key, 128)
    groups = -(-cols // size)
    qzeros = release.tensor(f"{path}.qzeros", ("I32",), (groups, rows // 8))
    scales = release.floats(f"{path}.scales", (groups, rows))
    parts = {"qweight": qweight, "qzeros": qzeros, "scales": scales}
    scheme = Scheme("uniform", 4, 0 if groups == 1 else size, scales.dtype)
    return AwqWeight(f"{path}.weight", (rows, cols), scales.dtype, scheme, parts)
