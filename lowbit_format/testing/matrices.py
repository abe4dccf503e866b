"""Random quantized matrices of any scheme, as numpy arrays: with ordinary parameters, or with any finite ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bits import pack_codes, to_ragged
from ..codecs import CODECS
from ..dtypes import round_to, to_float32
from ..matrix import Params, StoredMatrix
from ..schema import Scheme

F32 = NDArray[np.float32]
Draw = Callable[[tuple[int, ...]], F32]  # random values of a shape

_WORDS: dict[str, tuple[Any, int, int]] = {  # dtype -> word, exponent bits, mantissa bits
    "F16": (np.uint16, 5, 10),
    "BF16": (np.uint16, 8, 7),
    "F32": (np.uint32, 8, 23),
}


def random_matrix(scheme: Scheme, rows: int, cols: int, seed: int = 0) -> StoredMatrix:
    """A matrix of random codes, with parameters of about the size that real ones have."""
    rng, dtype = np.random.default_rng(seed), scheme.scale_dtype
    return _random_matrix(
        scheme,
        (rows, cols),
        rng,
        scales=lambda shape: round_to(rng.uniform(0.01, 0.1, shape).astype(np.float32), dtype),
        shift=lambda shape: round_to(rng.normal(0, 0.1, shape).astype(np.float32), dtype),
        codebook=lambda shape: rng.normal(0, 1, shape).astype(np.float32),
    )


def extreme_matrix(scheme: Scheme, rows: int, cols: int, seed: int = 0) -> StoredMatrix:
    """A matrix of random codes; parameters are any finite values of the scheme's dtype (TEN-3), subnormal ones too."""
    rng, dtype = np.random.default_rng(seed), scheme.scale_dtype
    return _random_matrix(
        scheme,
        (rows, cols),
        rng,
        scales=lambda shape: random_floats(rng, dtype, shape),
        shift=lambda shape: random_floats(rng, dtype, shape),
        codebook=lambda shape: random_floats(rng, "F32", shape),
    )


def _random_matrix(
    scheme: Scheme, shape: tuple[int, int], rng: np.random.Generator, scales: Draw, shift: Draw, codebook: Draw
) -> StoredMatrix:
    (rows, cols), codec, groups = shape, CODECS[scheme.codec], scheme.groups(shape[1])
    planes = pack_codes(rng.integers(0, 2**scheme.bits, shape).astype(np.uint8), scheme.bits)
    row_bits = rng.integers(1, scheme.bits + 1, rows).astype(np.uint8) if scheme.row_bits else None  # MIX-1

    def params(bits: int) -> Params:
        found = scales((bits if codec.scale_per_plane else 1, rows, groups))
        if row_bits is not None and codec.scale_per_plane:
            found[row_bits[None, :] <= np.arange(bits)[:, None]] = 0  # MIX-3
        return Params(found, shift((rows, groups)) if scheme.shift else None)

    return StoredMatrix(
        scheme,
        rows,
        cols,
        planes if row_bits is None else to_ragged(planes, row_bits),
        params(scheme.bits),
        {k: params(k) for k in scheme.nested},
        codebook((2**scheme.bits,)) if codec.codebook else None,
        row_bits,
    )


def random_floats(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> F32:
    """Finite values of `dtype` in float32: one in eight of any exponent, subnormal ones too, the rest near 1."""
    word, exponent_bits, mantissa_bits = _WORDS[dtype]
    bias = 2 ** (exponent_bits - 1) - 1
    anywhere = rng.integers(0, 2 * bias + 1, shape)
    exponent = np.where(rng.integers(0, 8, shape) == 0, anywhere, rng.integers(bias - 4, bias + 3, shape))
    sign, mantissa = rng.integers(0, 2, shape), rng.integers(0, 2**mantissa_bits, shape)
    raw = (sign << (exponent_bits + mantissa_bits)) | (exponent << mantissa_bits) | mantissa
    values = raw.astype(word)
    return to_float32(values.view({"F16": "<f2", "BF16": "<u2", "F32": "<f4"}[dtype]), dtype)
