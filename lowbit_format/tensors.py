"""The tensors of a module entry: names, dtypes, shapes and sizes (spec/FORMAT.md sections 4 and 9)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .bits import row_bytes
from .codecs import CODECS
from .dtypes import DTYPES
from .schema import ModuleEntry


@dataclass(frozen=True)
class TensorSpec:
    """One tensor that a module entry must have (TEN-1). A shape with -1 depends on ``row_bits`` (MIX-2)."""

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
        found.append((f"scales{suffix}", scheme.scale_dtype, (*stack, scheme.scale_planes(bits), rows, groups)))
        if scheme.shift:
            found.append((f"{scheme.shift}{suffix}", scheme.scale_dtype, (*stack, rows, groups)))
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
    """Bits that the tensors of `module` take on disk; `row_bits_sum` is needed for ragged planes."""
    total = 0
    for spec in tensor_specs(module):
        shape = spec.shape
        if -1 in shape:
            shape = (module.rows * module.scheme.bits if row_bits_sum is None else row_bits_sum, shape[1])
        total += math.prod(shape) * 8 * DTYPES[spec.dtype].nbytes
    return total
