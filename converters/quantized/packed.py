"""A weight that a release has packed: its codes and parameters are taken over as they are, and nothing is fitted again.

Each kind of release has a file beside this one: which tensors make a weight, how their bits are ordered, and, apart
from that, the release's own formula. A weight is taken over only if both give the same bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from ...bits import U8, row_bytes
from ...dtypes import from_float32, round_to, stored, to_float32
from ...errors import QuantizedSourceError
from ...matrix import F32, Params, StoredMatrix
from ...quantize.group_lanes import pack
from ...reference import decode
from ...schema import Scheme
from ..source import SourceTensor

Read = Callable[[str, int, int | None], NDArray[np.uint8]]  # as Source.read
_T = TypeVar("_T", bound=np.generic)
_AT_ONCE = 1 << 20  # weights that are unpacked and compared at a time


@dataclass(frozen=True)
class Raw:
    """The tensors of one packed weight, read.

    Attributes:
        parts: as the header describes them, by role.
        data: their bytes as arrays of the file's dtypes (16-bit floats of the brain kind and 8-bit floats as integers).
        made: what was computed from them once, by name.
    """

    parts: Mapping[str, SourceTensor]
    data: Mapping[str, NDArray[np.generic]]
    made: dict[str, NDArray[np.generic]] = field(default_factory=dict)

    def __contains__(self, role: str) -> bool:
        return role in self.data

    def __getitem__(self, role: str) -> NDArray[np.generic]:
        return self.data[role]

    def floats(self, role: str, dtype: str | None = None) -> F32:
        """A tensor of finite floats as float32, of `dtype` if its bytes say no other.

        Raises QuantizedSourceError if one is NaN or infinite.
        """
        return self.once(f"floats of {role}", lambda: self._floats(role, dtype))

    def once(self, name: str, make: Callable[[], NDArray[_T]]) -> NDArray[_T]:
        """What `make` gives, which is called for the first rows of a weight only."""
        if name not in self.made:
            self.made[name] = make()
        return cast("NDArray[_T]", self.made[name])

    def _floats(self, role: str, dtype: str | None) -> F32:
        dtype = dtype or self.parts[role].dtype
        table = FLOAT8.get(dtype)
        values = to_float32(self.data[role], dtype) if table is None else table[self.data[role].astype(np.uint8)]
        if not np.isfinite(values).all():
            bad = int(np.count_nonzero(~np.isfinite(values)))
            raise QuantizedSourceError(
                f"{self.parts[role].name}: holds {bad} NaN or infinite values of {values.size}, expected finite ones; "
                "get the checkpoint again, or keep the module in full precision if the release means it so"
            )
        return values


@dataclass(frozen=True)
class Packed(ABC):
    """One weight of a release, as headers and config describe it.

    Attributes:
        name: that it has unpacked, such as ``model.layers.0.mlp.up_proj.weight``.
        shape: ``(rows, cols)`` of its matrix, or of that of each expert.
        dtype: that the release's own library decodes it to.
        scheme: that it is stored with.
        parts: its tensors, by role.
        experts: number of the matrices that its tensors hold, in their first dimension; None for a single one.
        transposed: unpacked, the model has it as ``[cols, rows]``.
        refusal: why it cannot be stored without loss; empty if it can.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    scheme: Scheme
    parts: Mapping[str, SourceTensor]
    experts: int | None = None
    transposed: bool = False
    refusal: str = ""

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """The shape that it has unpacked, in the model."""
        shape = self.shape[::-1] if self.transposed else self.shape
        return shape if self.experts is None else (self.experts, *shape)

    @property
    def nbytes(self) -> int:
        """Of its tensors."""
        return sum(part.nbytes for part in self.parts.values())

    @abstractmethod
    def codes(self, raw: Raw, rows: slice) -> U8:
        """The codes of some rows, uint8 ``[rows, cols]``."""

    @abstractmethod
    def params(self, raw: Raw) -> Params:
        """The parameters of all rows, exact in the scheme's dtype."""

    def table(self, raw: Raw) -> F32 | None:
        """The codebook float32 ``[2**bits]``, of a scheme that has one."""
        return None

    @abstractmethod
    def formula(self, raw: Raw, rows: slice) -> F32:
        """Some rows by the release's own formula, float32 ``[rows, cols]`` before it is rounded to :attr:`dtype`."""

    # --- what all kinds have in common ---

    def decode(self, raw: Raw, rows: slice) -> F32:
        """Some rows as the release's library has them: float32 with values of :attr:`dtype`."""
        return round_to(self._computed(raw, rows), self.dtype)

    def _computed(self, raw: Raw, rows: slice) -> F32:
        """As :meth:`formula`, which may overflow: that is looked at where a weight is taken over."""
        with np.errstate(over="ignore", invalid="ignore"):
            return self.formula(raw, rows)

    def load(self, read: Read, expert: int | None = None) -> Raw:
        """Read its tensors, or their part of one expert."""
        data = {}
        for role, part in self.parts.items():
            if expert is None or self.experts is None:
                data[role] = stored(read(part.name, 0, None), part.dtype, part.shape)
            else:
                nbytes = part.nbytes // self.experts
                data[role] = stored(read(part.name, expert * nbytes, nbytes), part.dtype, part.shape[1:])
        return Raw(self.parts, data)

    def matrix(self, raw: Raw) -> StoredMatrix:
        """The matrix as it is stored; raises QuantizedSourceError if it does not decode to what the release gives."""
        rows, cols = self.shape
        params, table = self.params(raw), self.table(raw)
        planes = np.empty((self.scheme.bits, rows, row_bytes(cols)), np.uint8)
        for part in self._chunks():
            codes = np.zeros((part.stop - part.start, 8 * row_bytes(cols)), np.uint8)
            codes[:, :cols] = self.codes(raw, part)
            planes[:, part] = pack(codes, self.scheme.bits)
        matrix = StoredMatrix(self.scheme, rows, cols, planes, params, codebook=table)
        for part in self._chunks():
            expected = self._computed(raw, part)
            found = decode(matrix.row_slice(part.start, part.stop))
            largest = np.abs(expected).max(keepdims=True)  # NaN, if there is one
            if not np.isfinite(round_to(largest, self.dtype)).all():
                raise QuantizedSourceError(
                    f"{self.name}: decodes to NaN or infinite weights, which no lowbit model holds; get the checkpoint "
                    "again"
                )
            if np.array_equal(found.view(np.uint32), expected.view(np.uint32)):
                continue
            own, theirs = (round_to(weights, self.dtype).view(np.uint32) for weights in (found, expected))
            if differ := int(np.count_nonzero(own != theirs)):
                raise QuantizedSourceError(
                    f"{self.name}: {differ} weights of {expected.size} in rows {part.start} to {part.stop} would "
                    f"decode to other values than the release gives in {self.dtype}; nothing inexact is stored: "
                    f"{how_to_keep(self.name)}"
                )
        return matrix

    def of_columns(self, values: NDArray[_T], raw: Raw, order: str) -> NDArray[_T]:
        """Parameters ``[n, groups]`` for each column, ``[n, cols]``; out of order, `order` names each one's group."""
        if self.refusal:  # the columns are in another order
            return values[:, raw[order].astype(np.int64)]
        return spread(values, self.scheme.group_size, self.shape[1])

    def floats(self, raw: Raw) -> NDArray[np.uint8]:
        """The bytes of the unpacked weight in :attr:`dtype`, in the model's order."""
        rows, cols = self.shape
        out = np.empty((rows, cols), from_float32(np.empty(0, np.float32), self.dtype).dtype)
        for part in self._chunks():
            out[part] = from_float32(self.decode(raw, part), self.dtype)
        whole = np.ascontiguousarray(out.T) if self.transposed else out
        return whole.reshape(-1).view(np.uint8)

    def _chunks(self) -> Iterator[slice]:
        rows, cols = self.shape
        step = max(1, _AT_ONCE // cols)
        for begin in range(0, rows, step):
            yield slice(begin, min(rows, begin + step))


def how_to_keep(name: str) -> str:
    """Advice: the module stays in full precision."""
    return f"keep it as floats (--keep {name.removesuffix('.weight')!r}), or convert the original checkpoint"


# --- orders of bits, and small floats, that several releases share ----------------------------------


def unpack_words(words: NDArray[np.generic], bits: int, count: int) -> U8:
    """Codes that stand one behind the other in 32-bit words, the lowest bits first, across the ends of words.

    Args:
        words: int32 ``[n, words]``.
        bits: of a code, 1 to 8.
        count: codes of a row; what is behind them is padding.

    Returns:
        uint8 ``[n, count]``.
    """
    return unpack_bytes(np.ascontiguousarray(words).view(np.uint8), bits, count)


def unpack_padded_words(words: NDArray[np.generic], bits: int, count: int) -> U8:
    """As :func:`unpack_words`, of words with ``32 // bits`` whole codes each and nothing in the bits that are left."""
    per = 32 // bits
    words = np.ascontiguousarray(words).view(np.uint32)
    out = np.empty((*words.shape, per), np.uint8)
    for j in range(per):
        out[:, :, j] = (words >> np.uint32(bits * j)) & np.uint32(2**bits - 1)
    return out.reshape(len(words), -1)[:, :count]


def unpack_bytes(packed: U8, bits: int, count: int) -> U8:
    """As :func:`unpack_words`, of uint8 ``[n, bytes]``."""
    n = len(packed)
    if 8 % bits:
        flat = np.unpackbits(packed, axis=1, count=count * bits, bitorder="little").reshape(n, count, bits)
        return np.packbits(flat, axis=2, bitorder="little")[:, :, 0]
    per = 8 // bits
    out = np.empty((n, packed.shape[1], per), np.uint8)
    for j in range(per):
        out[:, :, j] = (packed >> np.uint8(bits * j)) & np.uint8(2**bits - 1)
    return out.reshape(n, -1)[:, :count]


def spread(values: NDArray[_T], group_size: int, cols: int) -> NDArray[_T]:
    """Parameters ``[n, groups]`` for each column, ``[n, cols]``; `group_size` 0 is the whole row."""
    return np.repeat(values, group_size or cols, axis=1)[:, :cols]


def _e4m3() -> F32:
    """The values of OCP E4M3 ("FN": no infinities, two NaNs), by code."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, (code & 7).astype(np.float64)
    value = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    value[(code & 127) == 127] = np.nan
    return (np.where(code & 128, -1.0, 1.0) * value).astype(np.float32)


def _e8m0() -> F32:
    """The values of OCP E8M0: powers of two, and one NaN."""
    value = 2.0 ** (np.arange(256) - 127.0)
    value[255] = np.nan
    return value.astype(np.float32)


FLOAT8: dict[str, F32] = {"F8_E4M3": _e4m3(), "F8_E8M0": _e8m0()}
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)  # OCP MX, section 5.3.3
