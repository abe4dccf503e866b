"""compressed-tensors (LLM Compressor): integers, packed or not, FP8 and FP4.

Integers, of 2 to 8 bits, in the formats "pack-quantized" and "int-quantized":

| tensor | dtype, shape | meaning |
|---|---|---|
| weight_packed | int32 [rows, words] | codes of a row: number + 2^(bits - 1) |
| weight | int8 [rows, cols] | or this: the numbers themselves |
| weight_shape | int64 [2] | rows and cols, beside weight_packed |
| weight_scale | float: one number, [rows, 1] or [rows, groups] | |
| weight_zero_point | int32 [words, groups] packed by rows, or int8 as it is; or absent | |

Of 3, 5, 6 and 7 bits, which do not divide 32, a word has as many whole codes as fit, and the other bits are unused;
newer versions (0.20) put the codes one behind the other, across the ends of words.

weight = (number - zero point) * scale, in the dtype of the scales. FP8 is in :mod:`.float8`, FP4 in :mod:`.float4`.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ...bits import U8
from ...dtypes import stored
from ...matrix import F32, Params
from ...schema import Scheme, is_int
from .float4 import float4_weight
from .float8 import decoded_in, float8_weight, is_block
from .gptq import check_order
from .packed import Packed, Raw, unpack_padded_words, unpack_words
from .release import WRONG, Release

_ROLES = ("weight_packed", "weight_scale")
_T = TypeVar("_T", bound=np.generic)


@dataclass(frozen=True)
class Arguments:
    """How the config says that the weights of some modules are quantized.

    Attributes:
        targets: the modules: classes, paths, ends of paths, or patterns that begin with ``re:``.
        bits, kind: of a number; the kind is ``int`` or ``float``.
        symmetric: there are no zero points.
        group_size: columns of a group; 0 if there are none.
        block: rows and columns that share a scale, or None.
    """

    targets: tuple[str, ...]
    bits: int
    kind: str
    symmetric: bool
    group_size: int
    block: tuple[int, int] | None

    def names(self, path: str) -> bool:
        """Whether a target is this module's path."""
        return any(_names(target, path) for target in self.targets)


@dataclass(frozen=True)
class IntegerWeight(Packed):
    """A weight of integers.

    Attributes:
        groups: of columns; 0 if all of the matrix has one scale.
        padded: a word has whole codes alone.
    """

    groups: int = 0
    padded: bool = False

    def codes(self, raw: Raw, rows: slice) -> U8:
        if "weight_packed" in raw:
            return self._unpack(raw["weight_packed"][rows], self.shape[1])
        return (raw["weight"][rows].astype(np.int16) + 128).astype(np.uint8)

    def params(self, raw: Raw) -> Params:
        middle = 2 ** (self.scheme.bits - 1)
        return Params(self._scales(raw)[None], (self._zero_points(raw) + middle).astype(np.float32))

    def formula(self, raw: Raw, rows: slice) -> F32:
        zeros = self.of_columns(self._zero_points(raw)[rows], raw, "weight_g_idx")
        scales = self.of_columns(self._scales(raw)[rows], raw, "weight_g_idx")
        numbers = self.codes(raw, rows).astype(np.int16) - np.int16(2 ** (self.scheme.bits - 1))
        weight: F32 = (numbers - zeros).astype(np.float32) * scales
        return weight

    def _scales(self, raw: Raw) -> F32:
        """float32 ``[rows, groups]``."""
        return self._spread(raw.floats("weight_scale"))

    def _zero_points(self, raw: Raw) -> NDArray[np.int16]:
        """int16 ``[rows, groups]``."""
        return raw.once("zero points", lambda: self._unpack_zero_points(raw))

    def _unpack_zero_points(self, raw: Raw) -> NDArray[np.int16]:
        if "weight_zero_point" not in raw:
            return np.zeros((self.shape[0], max(self.groups, 1)), np.int16)
        if self.parts["weight_zero_point"].dtype == "I8":
            return self._spread(raw["weight_zero_point"].astype(np.int16))
        codes = self._unpack(raw["weight_zero_point"].T, self.shape[0])
        points: NDArray[np.int16] = np.ascontiguousarray(codes.T).astype(np.int16) - 2 ** (self.scheme.bits - 1)
        return points

    def _unpack(self, words: NDArray[np.generic], count: int) -> U8:
        return (unpack_padded_words if self.padded else unpack_words)(words, self.scheme.bits, count)

    def _spread(self, values: NDArray[_T]) -> NDArray[_T]:
        """Parameters of the rows: of one for all, every row gets it."""
        rows = self.shape[0]
        return values.reshape(rows, self.groups) if self.groups else np.repeat(values.reshape(1, 1), rows, axis=0)


def find(release: Release) -> Iterator[Packed]:
    """The weights of a release; raises QuantizedSourceError for one that is not known, or whose tensors lie."""
    section = release.section
    sparse = section.get("sparsity_config") or {}
    if not isinstance(sparse, Mapping) or sparse.get("format", "dense") != "dense":
        raise release.error("config.json: has a sparsity_config, whose weights cannot be read; convert the original")
    if section.get("transform_config"):
        raise release.error(
            "config.json: has a transform_config: the release multiplies activations by matrices on the way, which no "
            "lowbit model does; convert the original checkpoint"
        )
    schemes = _schemes(release)
    for path in dict.fromkeys(path for role in _ROLES for path in release.modules(role)):
        weight = release.source.tensors.get(f"{path}.weight_packed") or release.source.tensors.get(f"{path}.weight")
        kind = None if weight is None else (weight.name.rpartition(".")[2], weight.dtype)
        arguments = _arguments(release, schemes, path)
        if kind == ("weight", "F8_E4M3"):
            yield float8_weight(release, path, f"{path}.weight_scale", arguments.block, arguments.group_size)
        elif kind == ("weight_packed", "U8"):
            yield float4_weight(release, path)
        elif kind in (("weight_packed", "I32"), ("weight", "I8")):
            yield _integers(release, path, arguments)
        else:
            found = "nothing" if weight is None else f"{weight.name} of {weight.dtype}"
            raise release.error(
                f"{path}: has scales and {found}, which none of the formats that are known has (pack-quantized, "
                "int-quantized, float-quantized, nvfp4-pack-quantized, mxfp4-pack-quantized); convert the original "
                "checkpoint"
            )


def _schemes(release: Release) -> list[Arguments]:
    """The arguments of all groups of the config."""
    groups = release.section.get("config_groups")
    found = [_parse(release, group) for group in (groups.values() if isinstance(groups, Mapping) else ())]
    if not found:
        raise release.error(f"config.json: quantization_config has no config_groups with weights; {WRONG}")
    return found


def _parse(release: Release, group: object) -> Arguments:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    targets = group.get("targets") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping) or not isinstance(targets, list):
        raise release.error(f"config.json: one of the config_groups has no weights or no targets; {WRONG}")
    bits, size, block = weights.get("num_bits"), weights.get("group_size") or 0, weights.get("block_structure")
    if not is_int(bits) or not 2 <= bits <= 8:
        raise release.error(f"config.json: has num_bits {bits!r}, expected 2 to 8; convert the original checkpoint")
    if not is_int(size) or size < -1:
        raise release.error(f"config.json: has group_size {size!r}, expected a number of columns, or null; {WRONG}")
    if block is not None and not is_block(block):
        raise release.error(f"config.json: has block_structure {block!r}, expected two numbers, or null; {WRONG}")
    kind, symmetric = str(weights.get("type", "int")), bool(weights.get("symmetric", True))
    whole = None if block is None else (block[0], block[1])
    return Arguments(tuple(map(str, targets)), bits, kind, symmetric, max(size, 0), whole)


def _arguments(release: Release, schemes: list[Arguments], path: str) -> Arguments:
    """The arguments of a module: of the group that names it, or else of one for its class."""
    named = next((one for one in schemes if one.names(path)), None)
    of_class = (one for one in schemes if any(target.isidentifier() for target in one.targets))
    found = named or next(of_class, None)
    if found is None:
        raise release.error(f"{path}: none of the config_groups of config.json has it; {WRONG}")
    return found


def _names(target: str, path: str) -> bool:
    if not target.startswith("re:"):
        return target == path or fnmatch.fnmatchcase(path, f"*.{target}")
    try:
        return re.match(target[3:], path) is not None
    except re.error:
        return False


def _integers(release: Release, path: str, arguments: Arguments) -> IntegerWeight:
    bits, padded = arguments.bits, False
    if arguments.kind != "int":
        raise release.error(f"{path}: holds integers, but config.json says {arguments.kind}; {WRONG}")
    packed = f"{path}.weight_packed"
    if release.has(packed):
        tensor = release.matrix_tensor(packed, ("I32",))
        shape = release.tensor(f"{path}.weight_shape", ("I64", "I32"), (2,))
        rows, cols = (int(n) for n in stored(release.source.read(shape.name), shape.dtype, shape.shape).tolist())
        padded = 32 % bits > 0 and tensor.shape[1] == -(-cols // (32 // bits))
        if cols < 1 or tensor.shape != (rows, _words(cols, bits, padded)):
            raise release.error(
                f"{packed}: has shape {list(tensor.shape)}, which is not that of {[rows, cols]} (weight_shape) in "
                f"{bits} bits; {WRONG}"
            )
        if padded and tensor.shape[1] == _words(cols, bits, False) > 1:
            raise release.error(
                f"{packed}: {cols} codes of {bits} bits take as many words in both ways to pack them, and the file "
                "does not tell which; convert the original checkpoint"
            )
        parts = {"weight_packed": tensor, "weight_shape": shape}
    elif bits == 8:
        tensor = release.matrix_tensor(f"{path}.weight", ("I8",))
        rows, cols = tensor.shape
        parts = {"weight": tensor}
    else:
        raise release.error(f"{path}.weight: has 8 bits, config.json says {bits}; {WRONG}")
    scale = parts["weight_scale"] = release.floats(f"{path}.weight_scale")
    groups, size = _groups(release, scale.name, scale.shape, (rows, cols), arguments)
    zero = f"{path}.weight_zero_point"
    if release.has(zero):
        part = parts["weight_zero_point"] = release.tensor(zero, ("I32", "I8"))
        expected = (_words(rows, bits, padded), groups) if part.dtype == "I32" else scale.shape
        release.tensor(zero, ("I32", "I8"), expected)
    elif not arguments.symmetric:
        release.tensor(zero, ("I32", "I8"))
    refusal = ""
    if release.has(f"{path}.weight_g_idx"):
        part = parts["weight_g_idx"] = release.tensor(f"{path}.weight_g_idx", ("I32", "I64"), (cols,))
        refusal = check_order(release, part.name, max(groups, 1), size or cols)
    scheme = Scheme("uniform", bits, size, scale.dtype)
    dtype = decoded_in(scale, release)
    return IntegerWeight(
        f"{path}.weight", (rows, cols), dtype, scheme, parts, refusal=refusal, groups=groups, padded=padded
    )


def _words(codes: int, bits: int, padded: bool) -> int:
    """Words of a number of codes."""
    return -(-codes // (32 // bits)) if padded else -(-codes * bits // 32)


def _groups(
    release: Release, name: str, found: tuple[int, ...], shape: tuple[int, int], arguments: Arguments
) -> tuple[int, int]:
    """Groups of a row (0: all rows have one scale together), and the columns of one (0: all)."""
    rows, cols = shape
    if found in ((), (1,)) or (found == (1, 1) and rows > 1):
        return 0, 0
    if found in ((rows,), (rows, 1)):
        return 1, 0
    size = arguments.group_size
    if size and found == (rows, -(-cols // size)):
        return found[1], size
    raise release.error(
        f"{name}: has shape {list(found)}, expected one scale, {rows} of rows, or of groups of {size} columns for a "
        f"weight {[rows, cols]}; {WRONG}"
    )
