"""GPTQ (AutoGPTQ, GPTQModel): integers with a scale and an integer zero for each group of columns.

| tensor | dtype, shape | meaning |
|---|---|---|
| qweight | int32 [cols * bits / 32, rows] | a column of words holds the codes of one row |
| qzeros | int32 [groups, rows * bits / 32] | the zeros; with checkpoint_format "gptq" minus one |
| scales | float [groups, rows] | |
| g_idx | int32 [cols], or absent | the group of each column |

weight = (code - zero) * scale, in the dtype of the scales.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...bits import U8
from ...dtypes import stored
from ...errors import QuantizedSourceError
from ...matrix import F32, Params
from ...schema import Scheme
from .packed import Packed, Raw, unpack_words
from .release import WRONG, Release

BITS = (2, 3, 4, 8)
FORMATS = ("gptq", "gptq_v2")


@dataclass(frozen=True)
class GptqWeight(Packed):
    """A weight of a GPTQ release. `minus_one`: its zeros are stored minus one."""

    minus_one: bool = True

    def codes(self, raw: Raw, rows: slice) -> U8:
        return unpack_words(raw["qweight"][:, rows].T, self.scheme.bits, self.shape[1])

    def params(self, raw: Raw) -> Params:
        zeros = self._zeros(raw)
        if self.minus_one and (zeros == 2**self.scheme.bits).any():
            raise QuantizedSourceError(
                f"{self.parts['qzeros'].name}: holds {2**self.scheme.bits - 1}, which stands for a zero of "
                f"{2**self.scheme.bits} or of 0: the libraries that read checkpoint_format 'gptq' do not agree; get "
                "the release in the format 'gptq_v2', or convert the original checkpoint"
            )
        return Params(np.ascontiguousarray(raw.floats("scales").T)[None], np.ascontiguousarray(zeros.T, np.float32))

    def formula(self, raw: Raw, rows: slice) -> F32:
        zeros = self.of_columns(self._zeros(raw)[:, rows].T, raw, "g_idx")
        scales = self.of_columns(raw.floats("scales")[:, rows].T, raw, "g_idx")
        weight: F32 = (self.codes(raw, rows) - zeros).astype(np.float32) * scales
        return weight

    def _zeros(self, raw: Raw) -> NDArray[np.int16]:
        """int16 ``[groups, rows]``."""
        return raw.once("zeros", lambda: self._unpack_zeros(raw))

    def _unpack_zeros(self, raw: Raw) -> NDArray[np.int16]:
        return unpack_words(raw["qzeros"], self.scheme.bits, self.shape[0]).astype(np.int16) + int(self.minus_one)


def find(release: Release) -> Iterator[Packed]:
    """The weights of a GPTQ release; raises QuantizedSourceError for one that is not known, or whose tensors lie."""
    if (form := release.section.get("checkpoint_format", "gptq")) not in FORMATS:
        raise release.error(
            f"config.json: quantization_config has checkpoint_format {form!r}, expected one of {', '.join(FORMATS)}; "
            "save the model in one of these with its own library, or convert the original checkpoint"
        )
    yield from weights(release, varied=bool(release.section.get("dynamic")), minus_one=form == "gptq")


def weights(release: Release, *, varied: bool, minus_one: bool) -> Iterator[GptqWeight]:
    """The weights of a release in this layout; `varied`: the bits of some modules are not those of the section."""
    bits = release.number("bits", BITS)
    for path in release.modules("qweight"):
        yield _weight(release, path, bits, varied, minus_one)


def _weight(release: Release, path: str, bits: int, varied: bool, minus_one: bool) -> GptqWeight:
    qweight = release.matrix_tensor(f"{path}.qweight", ("I32",))
    rows = qweight.shape[1]
    qzeros = release.matrix_tensor(f"{path}.qzeros", ("I32",))
    groups = qzeros.shape[0]
    if varied:  # by module: the headers say it
        bits = next((b for b in BITS if qzeros.shape[1] * 32 == rows * b), bits)
    if rows * bits % 32 or qweight.shape[0] * 32 % bits:
        raise release.error(f"{qweight.name}: has shape {list(qweight.shape)}, which {bits} bits do not fill; {WRONG}")
    cols = qweight.shape[0] * 32 // bits
    release.tensor(qzeros.name, ("I32",), (groups, rows * bits // 32))
    scales = release.floats(f"{path}.scales", (groups, rows))
    parts = {"qweight": qweight, "qzeros": qzeros, "scales": scales}
    size = release.group_size(cols, "group_size", -1)
    if varied and -(-cols // size) != groups:
        size = -(-cols // groups)
    if -(-cols // size) != groups:
        raise release.error(
            f"{scales.name}: has {groups} groups, expected {-(-cols // size)} of {size} columns for {cols}; {WRONG}"
        )
    refusal = ""
    if release.has(f"{path}.g_idx"):
        parts["g_idx"] = release.tensor(f"{path}.g_idx", ("I32", "I64"), (cols,))
        refusal = check_order(release, parts["g_idx"].name, groups, size)
    scheme = Scheme("uniform", bits, 0 if groups == 1 else size, scales.dtype)
    weight = f"{path}.weight"
    return GptqWeight(weight, (rows, cols), scales.dtype, scheme, parts, refusal=refusal, minus_one=minus_one)


def check_order(release: Release, name: str, groups: int, size: int) -> str:
    """Why columns with the groups that the tensor `name` gives cannot be stored; empty if they stand group by group.

    Raises QuantizedSourceError if it names groups that do not exist.
    """
    part = release.source.tensors[name]
    found = stored(release.source.read(name), part.dtype, part.shape).astype(np.int64)
    if found.min() < 0 or found.max() >= groups:
        raise release.error(f"{name}: has groups {found.min()} to {found.max()}, expected 0 to {groups - 1}; {WRONG}")
    if np.array_equal(found, np.arange(len(found)) // size):
        return ""
    return "its columns are not in the order of their groups (desc_act, or actorder), which a lowbit model cannot say"
