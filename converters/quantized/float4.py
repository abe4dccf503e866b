"""FP4: E2M1 numbers, two in a byte (the lower half first), with a scale for each group of columns.

MXFP4 has groups of 32 and scales that are powers of two, E8M0. The experts of gpt-oss (quant_method "mxfp4"):

| tensor | dtype, shape | meaning |
|---|---|---|
| experts.gate_up_proj_blocks | uint8 [experts, rows, groups, 16] | |
| experts.gate_up_proj_scales | uint8 [experts, rows, groups] | exponents, E8M0 |

The model has the parameter as [experts, cols, rows]. Compressed-tensors has MXFP4 as "mxfp4-pack-quantized", and NVFP4,
groups of 16 with scales in E4M3 and one for the whole matrix, as "nvfp4-pack-quantized":

| tensor | dtype, shape | meaning |
|---|---|---|
| weight_packed | uint8 [rows, cols / 2] | |
| weight_scale | E4M3 (or uint8 that holds E8M0) [rows, groups] | |
| weight_global_scale | float32 [1], of NVFP4 | scales are divided by it, in float32 |

TensorRT Model Optimizer has NVFP4 under other names, see :mod:`.modelopt`.

weight = number * scale, in float32, rounded to the model's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from ...bits import U8
from ...errors import QuantizedSourceError
from ...matrix import F32, Params
from ...schema import Scheme
from ..source import SourceTensor
from .packed import E2M1, Packed, Raw, spread, unpack_bytes
from .release import WRONG, Release

_MX_GROUP, _NV_GROUP = 32, 16


@dataclass(frozen=True)
class Float4Weight(Packed):
    """A weight of E2M1 numbers.

    Attributes:
        scale_kind: what the bytes of its scales are.
        multiplied: scales are multiplied by the matrix's own, not divided.
        numbers: by code, float32 ``[16]``; libraries differ in the sign of the second zero.
    """

    scale_kind: str = "F8_E8M0"
    multiplied: bool = False
    numbers: F32 = field(default_factory=lambda: E2M1)

    def codes(self, raw: Raw, rows: slice) -> U8:
        packed = raw["packed"][rows].astype(np.uint8)
        return unpack_bytes(packed.reshape(len(packed), -1), 4, self.shape[1])

    def params(self, raw: Raw) -> Params:
        return Params(np.ascontiguousarray(self._scales(raw))[None])

    def table(self, raw: Raw) -> F32:
        return self.numbers

    def formula(self, raw: Raw, rows: slice) -> F32:
        scales = spread(self._scales(raw)[rows], self.scheme.group_size, self.shape[1])
        weight: F32 = self.numbers[self.codes(raw, rows)] * scales
        return weight

    def _scales(self, raw: Raw) -> F32:
        """float32 ``[rows, groups]``."""
        return raw.once("scales", lambda: self._whole_scales(raw))

    def _whole_scales(self, raw: Raw) -> F32:
        scales = raw.floats("scales", self.scale_kind).reshape(self.shape[0], -1)
        if "global" not in raw:
            return scales
        whole = raw.floats("global").reshape(-1)[0]
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            found: F32 = scales * whole if self.multiplied else scales / whole
        if not np.isfinite(found).all():
            raise QuantizedSourceError(
                f"{self.parts['global'].name}: is {whole}, and scales {'multiplied' if self.multiplied else 'divided'} "
                "by it are not finite; get the checkpoint again"
            )
        return found


def find(release: Release) -> Iterator[Packed]:
    """The experts of an MXFP4 release; raises QuantizedSourceError for one whose tensors lie."""
    for name in release.source.tensors:
        if name.endswith("_blocks"):
            yield _experts(release, name.removesuffix("_blocks"))


def _experts(release: Release, path: str) -> Float4Weight:
    blocks = release.tensor(f"{path}_blocks", ("U8",))
    half = _MX_GROUP // 2
    if len(blocks.shape) != 4 or 0 in blocks.shape or blocks.shape[3] != half:
        raise release.error(
            f"{blocks.name}: has shape {list(blocks.shape)}, expected [experts, rows, groups, {half}], none of them 0; "
            f"{WRONG}"
        )
    experts, rows, groups, _ = blocks.shape
    scales = release.tensor(f"{path}_scales", ("U8", "F8_E8M0"), (experts, rows, groups))
    scheme = Scheme("codebook", 4, 0 if groups == 1 else _MX_GROUP, "BF16", label="fp4-e2m1")
    return Float4Weight(
        path, (rows, groups * _MX_GROUP), release.dtype, scheme, {"packed": blocks, "scales": scales},
        experts=experts, transposed=True,
    )  # fmt: skip


def float4_weight(release: Release, path: str) -> Float4Weight:
    """The weight of one module of compressed-tensors: NVFP4 where it has a global scale, else MXFP4."""
    if release.has(f"{path}.weight_global_scale"):
        return nvfp4_weight(release, path, f"{path}.weight_packed", f"{path}.weight_global_scale")
    packed, scales, groups = _packed(release, path, f"{path}.weight_packed", _MX_GROUP, ("U8", "F8_E8M0"))
    scheme = Scheme("codebook", 4, 0 if groups == 1 else _MX_GROUP, "BF16", label="fp4-e2m1")
    shape = (packed.shape[0], 2 * packed.shape[1])
    return Float4Weight(f"{path}.weight", shape, release.dtype, scheme, {"packed": packed, "scales": scales})


def nvfp4_weight(
    release: Release, path: str, packed_name: str, global_name: str, *, multiplied: bool = False, numbers: F32 = E2M1
) -> Float4Weight:
    """The weight of one module in NVFP4.

    Args:
        packed_name, global_name: of the tensors of its codes and of the matrix's own scale.
        multiplied, numbers: as of :class:`Float4Weight`.
    """
    packed, scales, groups = _packed(release, path, packed_name, _NV_GROUP, ("F8_E4M3",))
    whole = release.tensor(global_name, ("F32",))
    if whole.shape not in ((), (1,)):
        raise release.error(f"{global_name}: has shape {list(whole.shape)}, expected one number; {WRONG}")
    scheme = Scheme("codebook", 4, 0 if groups == 1 else _NV_GROUP, "F32", label="fp4-e2m1")
    return Float4Weight(
        f"{path}.weight", (packed.shape[0], 2 * packed.shape[1]), release.dtype, scheme,
        {"packed": packed, "scales": scales, "global": whole},
        scale_kind="F8_E4M3", multiplied=multiplied, numbers=numbers,
    )  # fmt: skip


def _packed(
    release: Release, path: str, name: str, size: int, kinds: tuple[str, ...]
) -> tuple[SourceTensor, SourceTensor, int]:
    """The tensors of a module's codes and scales, and the groups of a row."""
    packed = release.matrix_tensor(name, ("U8",))
    groups = -(-2 * packed.shape[1] // size)
    return packed, release.tensor(f"{path}.weight_scale", kinds, (packed.shape[0], groups)), groups
