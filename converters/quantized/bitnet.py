"""BitNet as transformers packs it: ternary numbers, four in a byte, with one scale for the matrix.

| tensor | dtype, shape | meaning |
|---|---|---|
| weight | uint8 [rows / 4, cols] | bits 2i and 2i + 1 of row r hold the number of row r + i * rows / 4, plus one |
| weight_scale | float [1] | |

weight = number * weight_scale with linear_class "autobitlinear", else number / weight_scale, rounded to the model's
dtype. The layers of transformers round their inputs to 8 bits too, which a lowbit model does not do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ...bits import U8
from ...errors import QuantizedSourceError
from ...matrix import F32, Params
from ...quantize.codebook import TABLES, padded
from ...schema import Scheme
from .packed import Packed, Raw
from .release import WRONG, Release

_TABLE = padded(TABLES["ternary"])


@dataclass(frozen=True)
class TernaryWeight(Packed):
    """A weight of a BitNet release. `divided`: numbers are divided by the scale."""

    divided: bool = False

    def codes(self, raw: Raw, rows: slice) -> U8:
        quarter = self.shape[0] // 4
        row = np.arange(rows.start, rows.stop)
        shift = (2 * (row // quarter)).astype(np.uint8)[:, None]
        found: U8 = (raw["weight"][row % quarter].astype(np.uint8) >> shift) & np.uint8(3)
        if (found == 3).any():
            raise QuantizedSourceError(
                f"{self.name}: holds codes that stand for no ternary number (3); get the checkpoint again"
            )
        return found

    def params(self, raw: Raw) -> Params:
        scale = raw.floats("weight_scale").reshape(-1)[0]
        if self.divided:
            with np.errstate(divide="ignore", over="ignore"):
                scale = np.float32(1) / scale
        if not np.isfinite(scale):
            raise QuantizedSourceError(
                f"{self.parts['weight_scale'].name}: is so small that numbers divided by it are infinite; get the "
                "checkpoint again"
            )
        return Params(np.full((1, self.shape[0], 1), scale, np.float32))

    def table(self, raw: Raw) -> F32:
        return _TABLE

    def formula(self, raw: Raw, rows: slice) -> F32:
        numbers = self.codes(raw, rows).astype(np.float32) - 1
        scale = raw.floats("weight_scale").reshape(-1)[0]
        weight: F32 = numbers / scale if self.divided else numbers * scale
        return weight


def find(release: Release) -> Iterator[Packed]:
    """The weights of a BitNet release; raises QuantizedSourceError for one that is not known, or whose tensors lie."""
    section = release.section
    if section.get("use_rms_norm"):
        raise release.error(
            "config.json: quantization_config has use_rms_norm: its layers normalize their inputs, which the layers of "
            "the model do not; convert the original checkpoint"
        )
    divided = section.get("linear_class", "bitlinear") != "autobitlinear"
    for path in release.modules("weight_scale"):
        weight = release.matrix_tensor(f"{path}.weight", ("U8",))
        scale = release.floats(f"{path}.weight_scale")
        if scale.shape not in ((), (1,)):
            raise release.error(f"{scale.name}: has shape {list(scale.shape)}, expected one number; {WRONG}")
        scheme = Scheme("codebook", 2, 0, "F32" if divided else scale.dtype, label="ternary")
        shape = (4 * weight.shape[0], weight.shape[1])
        parts = {"weight": weight, "weight_scale": scale}
        yield TernaryWeight(f"{path}.weight", shape, release.dtype, scheme, parts, divided=divided)
