"""FP8: E4M3 numbers with a scale for the whole matrix, for each row, each group of columns, or each block of both.

The releases of DeepSeek, Qwen, Mistral and others (quant_method "fp8", "fbgemm_fp8"):

| tensor | dtype, shape | meaning |
|---|---|---|
| weight | E4M3 [rows, cols] | |
| weight_scale_inv, weight_scale | float or E8M0: one number, [rows, 1], or [blocks of rows, blocks of columns] | |

weight = number * scale, in float32, rounded to the model's dtype. A lowbit model repeats the scale of a block for its
rows. Compressed-tensors has the same numbers under its own names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np

from ...bits import U8
from ...dtypes import FLOATS, round_to
from ...matrix import F32, Params
from ...schema import Scheme, is_int
from ..source import SourceTensor
from .packed import FLOAT8, Packed, Raw, spread
from .release import WRONG, Release

_SCALES = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")
_TABLE = np.nan_to_num(FLOAT8["F8_E4M3"], nan=0.0)  # a codebook is finite; weights that are NaN are refused


@dataclass(frozen=True)
class Float8Weight(Packed):
    """A weight of E4M3 numbers.

    Attributes:
        block_rows: rows that share their scales.
        groups: of columns.
        exponents: the scales are bytes that hold exponents (E8M0).
        rounded: the library rounds the scales to :attr:`dtype` before it multiplies.
    """

    block_rows: int = 1
    groups: int = 1
    exponents: bool = False
    rounded: bool = False

    def codes(self, raw: Raw, rows: slice) -> U8:
        return raw["weight"][rows].astype(np.uint8)

    def params(self, raw: Raw) -> Params:
        return Params(np.ascontiguousarray(self._scales(raw)[np.arange(self.shape[0]) // self.block_rows])[None])

    def table(self, raw: Raw) -> F32:
        return _TABLE

    def formula(self, raw: Raw, rows: slice) -> F32:
        numbers = FLOAT8["F8_E4M3"][self.codes(raw, rows)]
        block = np.arange(rows.start, rows.stop) // self.block_rows
        weight: F32 = numbers * spread(self._scales(raw)[block], self.scheme.group_size, self.shape[1])
        return weight

    def _scales(self, raw: Raw) -> F32:
        """float32 ``[blocks of rows, groups]``."""
        dtype = "F8_E8M0" if self.exponents else None
        scales = raw.floats("scales", dtype).reshape(-1, self.groups)
        return round_to(scales, self.dtype) if self.rounded else scales


def find(release: Release) -> Iterator[Packed]:
    """The weights of an FP8 release; raises QuantizedSourceError for one that is not known, or whose tensors lie."""
    form = release.section.get("fmt", "e4m3")
    if form != "e4m3":
        raise release.error(
            f"config.json: quantization_config has fmt {form!r}, expected 'e4m3', the one that is known; convert the "
            "original checkpoint"
        )
    block = release.section.get("weight_block_size")
    if block is not None and not is_block(block):
        raise release.error(
            f"config.json: quantization_config has weight_block_size {block!r}, expected two numbers, or null; {WRONG}"
        )
    for name, tensor in release.source.tensors.items():
        path, _, role = name.rpartition(".")
        if role == "weight" and tensor.dtype == "F8_E4M3":
            scale = next((f"{path}.{r}" for r in _SCALES if release.has(f"{path}.{r}")), f"{path}.{_SCALES[0]}")
            yield float8_weight(release, path, scale, None if block is None else (block[0], block[1]))


def is_block(block: object) -> TypeGuard[Sequence[int]]:
    """Whether it is a number of rows and one of columns."""
    return isinstance(block, (list, tuple)) and len(block) == 2 and all(is_int(n) and n > 0 for n in block)


def float8_weight(
    release: Release, path: str, scale_name: str, block: tuple[int, int] | None = None, group_size: int = 0
) -> Float8Weight:
    """The weight of one module.

    Args:
        scale_name: of the tensor of its scales.
        block: rows and columns of a block, if scales are by blocks.
        group_size: of columns, if scales are by groups; else 0.
    """
    weight = release.matrix_tensor(f"{path}.weight", ("F8_E4M3",))
    rows, cols = weight.shape
    scale = release.tensor(scale_name, (*FLOATS, "F8_E8M0", "U8"))
    many = scale.shape if len(scale.shape) == 2 else (*scale.shape, 1)
    if many in ((1,), (1, 1)):
        height, width = rows, cols
    elif many == (rows, 1):
        height, width = 1, cols
    else:
        height, width = block or (1, group_size or cols)
    expected = (-(-rows // height), -(-cols // width))
    if many not in ((1,), (1, 1)) and many != expected:
        raise release.error(
            f"{scale_name}: has shape {list(scale.shape)}, expected {list(expected)} for a weight {list(weight.shape)} "
            f"in blocks of {height} by {width}; {WRONG}"
        )
    scheme = Scheme("codebook", 8, 0 if expected[1] == 1 else width, parameters_in(scale), label="fp8-e4m3")
    return Float8Weight(
        f"{path}.weight", (rows, cols), decoded_in(scale, release), scheme, {"weight": weight, "scales": scale},
        block_rows=height, groups=expected[1], exponents=scale.dtype == "U8",
    )  # fmt: skip


def parameters_in(scale: SourceTensor) -> str:
    """The dtype that holds the scales of a release: BF16 those that are exponents alone."""
    return scale.dtype if scale.dtype in FLOATS else "BF16"


def decoded_in(scale: SourceTensor, release: Release) -> str:
    """The dtype of a model whose scales have 16 bits is theirs; else it is the config's."""
    return scale.dtype if scale.dtype in ("F16", "BF16") else release.dtype
