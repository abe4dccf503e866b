"""The codecs and the tensors that each one stores (spec/FORMAT.md sections 4, 7, 8, 9).

A codec is one row of :data:`CODECS`. What a code means numerically is in :mod:`lowbit_format.reference`;
how codes are chosen is in :mod:`lowbit_format.quantize`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .bits import row_bytes
from .schema import ModuleEntry, Scheme


@dataclass(frozen=True)
class Codec:
    """Which parameters a codec has.

    Attributes:
        id: permanent name in the file.
        scale_per_plane: scales are ``[bits, rows, groups]``; otherwise ``[1, rows, groups]``.
        shift: role of the additive ``[rows, groups]`` parameter, or None.
        codebook: a table of ``2**bits`` values exists.
    """

    id: str
    scale_per_plane: bool
    shift: str | None
    codebook: bool

    def has_shift(self, scheme: Scheme) -> bool:
        """Whether the module has the tensor named by ``shift``: always zeros, offsets on request."""
        return self.shift == "zeros" or (self.shift == "offsets" and scheme.offset)


CODECS = {
    "bcq": Codec("bcq", scale_per_plane=True, shift="offsets", codebook=False),
    "uniform": Codec("uniform", scale_per_plane=False, shift="zeros", codebook=False),
    "codebook": Codec("codebook", scale_per_plane=False, shift=None, codebook=True),
}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor that a module must have (TEN-1). A shape with -1 depends on ``row_bits`` (MIX-2)."""

    name: str
    role: str
    dtype: str
    shape: tuple[int, ...]


def tensor_specs(module: ModuleEntry) -> tuple[TensorSpec, ...]:
    """All tensors of `module`, planes first."""
    scheme, codec = module.scheme, CODECS[module.scheme.codec]
    stack = () if module.experts is None else (module.experts,)
    rows, groups, width = module.rows, scheme.groups(module.cols), row_bytes(module.cols)
    planes = (-1, width) if scheme.row_bits else (*stack, scheme.bits, rows, width)
    found: list[tuple[str, str, tuple[int, ...]]] = [("planes", "U8", planes)]
    for suffix, bits in [("", scheme.bits), *((f"_k{k}", k) for k in scheme.nested)]:
        scale_planes = bits if codec.scale_per_plane else 1
        found.append((f"scales{suffix}", scheme.scale_dtype, (*stack, scale_planes, rows, groups)))
        if codec.shift and codec.has_shift(scheme):
            found.append((f"{codec.shift}{suffix}", scheme.scale_dtype, (*stack, rows, groups)))
    if codec.codebook:
        found.append(("codebook", "F32", (2**scheme.bits,)))
    if scheme.row_bits:
        found.append(("row_bits", "U8", (rows,)))
    return tuple(TensorSpec(module.tensor(role), role, dtype, shape) for role, dtype, shape in found)


def all_roles() -> frozenset[str]:
    """Every role that a tensor of section 4 can have."""
    shifts = {c.shift for c in CODECS.values() if c.shift}
    numbered = {f"{r}_k{k}" for r in ("scales", *shifts) for k in range(1, 10)}  # TEN-1
    return frozenset({"planes", "scales", "codebook", "row_bits"} | shifts | numbered)


def stored_bits(module: ModuleEntry, row_bits_sum: int | None = None) -> int:
    """Bits that the module's tensors take on disk; `row_bits_sum` is needed for ragged planes."""
    sizes = {"U8": 8, "F16": 16, "BF16": 16, "F32": 32}
    total = 0
    for spec in tensor_specs(module):
        shape = spec.shape
        if -1 in shape:
            shape = (module.rows * module.scheme.bits if row_bits_sum is None else row_bits_sum, shape[1])
        total += math.prod(shape) * sizes[spec.dtype]
    return total
