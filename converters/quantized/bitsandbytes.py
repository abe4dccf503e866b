"""bitsandbytes in 4 bits: NF4 or FP4, with a scale for each block of the flattened weight.

| tensor | dtype, shape | meaning |
|---|---|---|
| weight | uint8 [rows * cols / 2, 1] | codes row by row, the first in the upper half of a byte; the bytes may also be |
|        |                            | called floats (bnb_4bit_quant_storage, for FSDP) |
| weight.absmax | float32 [blocks]; uint8, if the scales are quantized too | the scales |
| weight.quant_map | float32 [16] | the table |
| weight.nested_absmax, weight.nested_quant_map | float32 [blocks of blocks], [256] | of quantized scales |
| weight.quant_state.bitsandbytes__nf4 (or fp4) | uint8, a JSON object | shape, sizes of blocks, dtype |

scale = absmax, or nested_quant_map[absmax] * nested_absmax + nested_offset;
weight = table[code] * scale, in float32, rounded to the dtype of the state.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...bits import U8
from ...dtypes import BY_NAME, FLOATS
from ...matrix import F32, Params
from ...quantize.codebook import TABLES, padded
from ...schema import MAX_DIMENSION, Scheme, is_int
from ..source import SourceTensor
from .packed import Packed, Raw, unpack_bytes
from .release import WRONG, Release

_STATE = "weight.quant_state.bitsandbytes__"
_LARGEST_STATE = 1 << 16  # bytes
_FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32) / np.float32(12)
_TABLES = {"nf4": padded(TABLES["nf4"]), "fp4": _FP4}


@dataclass(frozen=True)
class BlockWeight(Packed):
    """A weight in blocks of the flattened matrix.

    Attributes:
        block: weights of a block.
        nested_block, nested_offset: of scales that are quantized too; `nested_block` is 0 where they are not.
    """

    block: int = 64
    nested_block: int = 0
    nested_offset: float = 0.0

    def codes(self, raw: Raw, rows: slice) -> U8:
        cols = self.shape[1]
        first, last = rows.start * cols, rows.stop * cols
        packed = raw["weight"].reshape(-1).view(np.uint8)[first // 2 : -(-last // 2)]
        swapped = (packed >> np.uint8(4)) | (packed << np.uint8(4))
        flat: U8 = unpack_bytes(swapped[None], 4, 2 * len(packed))[0]
        return flat[first % 2 : first % 2 + last - first].reshape(-1, cols)

    def params(self, raw: Raw) -> Params:
        rows, cols = self.shape
        groups = self.scheme.groups(cols)
        if groups > 1 or self.block == cols:
            return Params(self._scales(raw).reshape(1, rows, groups))
        return Params(self._scales(raw)[np.arange(rows) * cols // self.block].reshape(1, rows, 1))

    def table(self, raw: Raw) -> F32:
        return raw.floats("quant_map")

    def formula(self, raw: Raw, rows: slice) -> F32:
        cols = self.shape[1]
        place = np.arange(rows.start * cols, rows.stop * cols).reshape(-1, cols)
        weight: F32 = raw.floats("quant_map")[self.codes(raw, rows)] * self._scales(raw)[place // self.block]
        return weight

    def _scales(self, raw: Raw) -> F32:
        """float32 ``[blocks]``."""
        return raw.once("scales", lambda: self._whole_scales(raw))

    def _whole_scales(self, raw: Raw) -> F32:
        if not self.nested_block:
            return raw.floats("absmax")
        block = np.arange(len(raw["absmax"])) // self.nested_block
        scales = raw.floats("nested_quant_map")[raw["absmax"].astype(np.uint8)] * raw.floats("nested_absmax")[block]
        found: F32 = scales + np.float32(self.nested_offset)
        return found


def find(release: Release) -> Iterator[Packed]:
    """The weights of a release in 4 bits; raises QuantizedSourceError for another, or one whose tensors lie."""
    if any(name.endswith(".SCB") for name in release.source.tensors) or release.section.get("load_in_8bit"):
        raise release.error(
            "is in bitsandbytes' 8 bits, whose library rounds every weight twice: no lowbit model decodes to just the "
            "same; convert the original checkpoint"
        )
    for name, state in release.source.tensors.items():
        path, found, kind = name.rpartition(_STATE)
        if found:
            yield _weight(release, path.removesuffix("."), kind, state)


def _weight(release: Release, path: str, kind: str, state: SourceTensor) -> BlockWeight:
    if kind not in _TABLES:
        raise release.error(
            f"{state.name}: is of the kind {kind!r}, expected nf4 or fp4; convert the original checkpoint"
        )
    facts = _facts(release, state)
    (rows, cols), block, dtype = facts["shape"], facts["blocksize"], BY_NAME[facts["dtype"]]
    weight = release.tensor(f"{path}.weight", ("U8", *FLOATS))
    if weight.nbytes != -(-rows * cols // 2):
        raise release.error(f"{weight.name}: has {weight.nbytes} bytes, which {[rows, cols]} do not fill; {WRONG}")
    blocks, nested = -(-rows * cols // block), release.has(f"{path}.weight.nested_absmax")
    parts = {
        "weight": weight,
        "state": state,
        "absmax": release.tensor(f"{path}.weight.absmax", ("U8",) if nested else ("F32",), (blocks,)),
        "quant_map": release.tensor(f"{path}.weight.quant_map", ("F32",), (16,)),
    }
    _check_table(release, parts["quant_map"], kind)
    inner = facts["nested_blocksize"] if nested else 0
    if nested:
        parts["nested_absmax"] = release.tensor(f"{path}.weight.nested_absmax", ("F32",), (-(-blocks // inner),))
        parts["nested_quant_map"] = release.tensor(f"{path}.weight.nested_quant_map", ("F32",), (256,))
    refusal = ""
    if cols % block and block % cols:
        refusal = f"blocks of {block} weights run over the ends of rows of {cols}, which no lowbit model has"
    size = block if cols % block == 0 and block < cols else 0
    scheme = Scheme("codebook", 4, size, "F32", label=kind if kind == "nf4" else "bnb-fp4")
    return BlockWeight(
        f"{path}.weight", (rows, cols), dtype, scheme, parts, refusal=refusal, block=block, nested_block=inner,
        nested_offset=facts["nested_offset"],
    )  # fmt: skip


def _facts(release: Release, state: SourceTensor) -> dict[str, Any]:
    """The numbers of a state, checked."""
    if state.dtype != "U8" or state.nbytes > _LARGEST_STATE:
        raise release.error(f"{state.name}: is {state.dtype} of {state.nbytes} bytes, expected a short text; {WRONG}")
    try:
        found = json.loads(release.source.read(state.name).tobytes())
    except (ValueError, RecursionError) as e:
        raise release.error(f"{state.name}: is not JSON ({str(e)[:100]}); {WRONG}") from e
    found = found if isinstance(found, dict) else {}
    shape = found.get("shape")
    sizes = [found.get("blocksize"), found.get("nested_blocksize", 1), *(shape if isinstance(shape, list) else ())]
    good = len(sizes) == 4 and all(is_int(n) and 0 < n <= MAX_DIMENSION for n in sizes)
    offset = found.get("nested_offset", 0.0)
    if not good or str(found.get("dtype")) not in BY_NAME or not isinstance(offset, (int, float)) or abs(offset) > 1e30:
        raise release.error(
            f"{state.name}: says shape {str(shape)[:80]}, blocksize {str(found.get('blocksize'))[:80]} and dtype "
            f"{str(found.get('dtype'))[:80]}, expected two numbers, one, and a float dtype; {WRONG}"
        )
    return {"nested_blocksize": 1, "nested_offset": 0.0, **found}


def _check_table(release: Release, part: SourceTensor, kind: str) -> None:
    """Raise QuantizedSourceError unless the table is that of the kind: the library takes its own, whatever it says."""
    found: NDArray[np.float32] = release.source.read(part.name).view("<f4")
    if not np.array_equal(found, _TABLES[kind]):
        raise release.error(f"{part.name}: is not the table of {kind}, which the library decodes with; {WRONG}")
