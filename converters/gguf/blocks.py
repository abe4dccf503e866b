"""The types of blocks of GGUF that a lowbit model holds without loss, one a row of :data:`TYPES`.

A block is some columns of one row: its bytes hold codes, and parameters of the whole block or of its groups. With d, m
float16, and s, n integers of 4 to 8 bits that the block has for each of its groups:

| type | weight | columns of a block, of a group | stored as |
|---|---|---|---|
| Q4_0, Q5_0, Q8_0 | d * (q - 2^(bits-1)) | 32, 32 | uniform, F16 |
| Q4_1, Q5_1 | d * q + m | 32, 32 | affine, F16 |
| Q2_K | (d * s) * q - (m * n) | 256, 16 | affine, F32 |
| Q4_K, Q5_K | (d * s) * q - (m * n) | 256, 32 | affine, F32 |
| Q3_K, Q6_K | (d * s) * (q - 4), (d * s) * (q - 32) | 256, 16 | codebook, F32 |
| IQ4_NL | d * table[q] | 32, 32 | codebook, F16 |
| IQ4_XS | (d * s) * table[q] | 256, 32 | codebook, F32 |
| MXFP4 | 2^e * table[q] | 32, 32 | codebook, BF16 |
| TQ1_0, TQ2_0 | d * (q - 1) | 256, 256 | uniform, F16 |

A product of a float16 and an integer of 8 bits is exact in float32, and so is one of it with q; the sum with m is
rounded. Q3_K and Q6_K could be uniform too, but their zeros, all the same, would take 2 bits for each weight.

The formula against which each weight is checked is that of the package gguf (``gguf.quants.dequantize``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...bits import U8
from ...matrix import F32
from ...schema import Scheme

_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice the numbers of OCP MX
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # ggml's kvalues_iq4nl


@dataclass(frozen=True)
class BlockType:
    """How the bytes of blocks ``[n, bytes]`` are read.

    Attributes:
        scheme: that weights are stored with.
        codes: uint8 ``[n, columns]``.
        scales: float32 ``[n, groups]``.
        shift: offsets float32 ``[n, groups]`` (affine), the zero (uniform), or None (codebook).
        table: the codebook, or None.
    """

    scheme: Scheme
    codes: Callable[[U8], U8]
    scales: Callable[[U8], F32]
    shift: Callable[[U8], F32] | float | None = None
    table: F32 | None = None


def _fields(packed: U8, bits: int, run: int) -> U8:
    """Numbers of so many bits, uint8 ``[n, columns]``: of each `run` bytes first all lowest ones, then all next."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    found: U8 = (packed.reshape(len(packed), -1, 1, run) >> shifts) & np.uint8(2**bits - 1)
    return found.reshape(len(packed), -1)


def _halves(blocks: U8, begin: int, count: int = 1) -> F32:
    """`count` float16 of each block from byte `begin` on, float32 ``[n, count]``."""
    raw = np.ascontiguousarray(blocks[:, begin : begin + 2 * count])
    return raw.view("<f2").astype(np.float32)


def _with_fifth(low: U8, high: U8) -> U8:
    found: U8 = low | (high << np.uint8(4))
    return found


def _fifth_bits(packed: U8) -> U8:
    """One bit for each of 32 columns, of 4 bytes."""
    return np.unpackbits(np.ascontiguousarray(packed), axis=1, bitorder="little")


def _product(d: F32, numbers: NDArray[np.generic]) -> F32:
    """``d [n, 1]`` times integers ``[n, groups]``, exact in float32."""
    found: F32 = d * numbers.astype(np.float32)
    return found


# --- Q2_K to Q6_K: parameters of groups ------------------------------------------------------------


def _six_bits(packed: U8) -> tuple[U8, U8]:
    """The eight scales and the eight minima of Q4_K and Q5_K, of 12 bytes, uint8 ``[n, 8]`` each.

    The first four of each are the low six bits of bytes 0 to 3 and 4 to 7. The last four have their low half in bytes
    8 to 11 and their two high bits in those that the first four leave free.
    """
    a, b, c = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([a & 63, (c & 15) | ((a >> 6) << 4)], axis=1)
    minima = np.concatenate([b & 63, (c >> 4) | ((b >> 6) << 4)], axis=1)
    return scales, minima


def _q3_scales(blocks: U8) -> F32:
    """Sixteen signed numbers of six bits: the low four in 8 bytes, the high two in 4 more."""
    packed = blocks[:, 96:108]
    numbers = _fields(packed[:, :8], 4, 8) | (_fields(packed[:, 8:], 2, 4) << np.uint8(4))
    return _product(_halves(blocks, 108), numbers.astype(np.int16) - 32)


def _iq4_xs_scales(blocks: U8) -> F32:
    """Eight signed numbers of six bits: the low four in 4 bytes, the high two in 2 before them."""
    high = _fields(blocks[:, 2:4], 2, 1)
    numbers = _fields(blocks[:, 4:8], 4, 1) | (high << np.uint8(4))
    return _product(_halves(blocks, 0), numbers.astype(np.int16) - 32)


def _tq1_codes(blocks: U8) -> U8:
    """Base three: a byte holds five numbers as a fraction of 256; three times it has the first as integer part."""
    parts = []
    for begin, end, width, count in ((0, 32, 32, 5), (32, 48, 16, 5), (48, 52, 4, 4)):
        powers = (3 ** np.arange(count)).astype(np.uint8)[:, None]
        moved = blocks[:, begin:end].reshape(len(blocks), -1, 1, width) * powers  # modulo 256
        parts.append(moved.reshape(len(blocks), -1))
    return ((np.concatenate(parts, axis=1).astype(np.uint16) * 3) >> 8).astype(np.uint8)


def _levels(bits: int, zero: int) -> F32:
    found: F32 = np.arange(2**bits, dtype=np.float32) - np.float32(zero)
    return found


def _uniform(bits: int, codes: Callable[[U8], U8], zero: float, size: int = 32, d: int = 0) -> BlockType:
    return BlockType(Scheme("uniform", bits, size, "F16"), codes, lambda b: _halves(b, d), zero)


def _affine_16(bits: int, codes: Callable[[U8], U8]) -> BlockType:
    return BlockType(Scheme("affine", bits, 32, "F16"), codes, lambda b: _halves(b, 0), lambda b: _halves(b, 2))


def _affine_k(bits: int, codes: Callable[[U8], U8]) -> BlockType:
    return BlockType(
        Scheme("affine", bits, 32, "F32"),
        codes,
        lambda b: _product(_halves(b, 0), _six_bits(b[:, 4:16])[0]),
        lambda b: -_product(_halves(b, 2), _six_bits(b[:, 4:16])[1]),
    )


def _codebook(
    bits: int, size: int, dtype: str, label: str, codes: Callable[[U8], U8], scales: Callable[[U8], F32], table: F32
) -> BlockType:
    return BlockType(Scheme("codebook", bits, size, dtype, label=label), codes, scales, None, table)


TYPES: dict[str, BlockType] = {
    "Q4_0": _uniform(4, lambda b: _fields(b[:, 2:], 4, 16), 8),
    "Q5_0": _uniform(5, lambda b: _with_fifth(_fields(b[:, 6:], 4, 16), _fifth_bits(b[:, 2:6])), 16),
    "Q8_0": _uniform(8, lambda b: b[:, 2:] ^ np.uint8(128), 128),
    "Q4_1": _affine_16(4, lambda b: _fields(b[:, 4:], 4, 16)),
    "Q5_1": _affine_16(5, lambda b: _with_fifth(_fields(b[:, 8:], 4, 16), _fifth_bits(b[:, 4:8]))),
    "Q2_K": BlockType(
        Scheme("affine", 2, 16, "F32"),
        lambda b: _fields(b[:, 16:80], 2, 32),
        lambda b: _product(_halves(b, 80), b[:, :16] & 15),
        lambda b: -_product(_halves(b, 82), b[:, :16] >> 4),
    ),
    "Q4_K": _affine_k(4, lambda b: _fields(b[:, 16:], 4, 32)),
    "Q5_K": _affine_k(5, lambda b: _with_fifth(_fields(b[:, 48:], 4, 32), _fields(b[:, 16:48], 1, 32))),
    "Q3_K": _codebook(
        3, 16, "F32", "q3_k",
        lambda b: _fields(b[:, 32:96], 2, 32) | (_fields(b[:, :32], 1, 32) << np.uint8(2)),
        _q3_scales, _levels(3, 4),
    ),
    "Q6_K": _codebook(
        6, 16, "F32", "q6_k",
        lambda b: _with_fifth(_fields(b[:, :128], 4, 64), _fields(b[:, 128:192], 2, 32)),
        lambda b: _product(_halves(b, 208), b[:, 192:208].view(np.int8)), _levels(6, 32),
    ),
    "IQ4_NL": _codebook(
        4, 32, "F16", "iq4_nl", lambda b: _fields(b[:, 2:], 4, 16), lambda b: _halves(b, 0), np.array(_IQ4, np.float32)
    ),
    "IQ4_XS": _codebook(
        4, 32, "F32", "iq4_xs", lambda b: _fields(b[:, 8:], 4, 16), _iq4_xs_scales, np.array(_IQ4, np.float32)
    ),
    "MXFP4": _codebook(
        4, 32, "BF16", "fp4-e2m1", lambda b: _fields(b[:, 1:], 4, 16),
        lambda b: np.ldexp(np.float32(1), b[:, :1].astype(np.int32) - 128), np.array(_E2M1, np.float32),
    ),
    "TQ1_0": _uniform(2, _tq1_codes, 1, 256, 52),
    "TQ2_0": _uniform(2, lambda b: _fields(b[:, :64], 2, 32), 1, 256, 64),
}  # fmt: skip
FLOATS = {"F32": "F32", "F16": "F16", "BF16": "BF16"}  # types that hold values; dtype of a tensor
