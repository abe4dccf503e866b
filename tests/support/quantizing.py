"""What tests of all quantizers share: a typical weight, all levels of a matrix, and the nearest-code rule by brute
force.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lowbit_format.bits import pack_codes, unpack_codes
from lowbit_format.matrix import StoredMatrix
from lowbit_format.reference import decode


def spread_matrix(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    """Gaussian weights whose rows differ in size, as those of real models do: float32 ``[rows, cols]``."""
    rng = np.random.default_rng(seed)
    size = 0.02 * np.exp(0.3 * rng.standard_normal((rows, 1)))
    return (rng.standard_normal((rows, cols)) * size).astype(np.float32)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a.astype(np.float64) - b))


def sized_error(weight: np.ndarray, matrix: StoredMatrix) -> float:
    """What BCQ without importance makes small: squared errors, from 4 bits on times 1 + w^2 / mean w^2 of the group."""
    size = matrix.scheme.group_size or weight.shape[1]
    error, squares = (decode(matrix).astype(np.float64) - weight) ** 2, weight.astype(np.float64) ** 2
    if matrix.scheme.bits < 4:
        return float(error.sum())
    total = 0.0
    for begin in range(0, weight.shape[1], size):
        part = squares[:, begin : begin + size]
        mean = part.mean(axis=1, keepdims=True)
        total += float((error[:, begin : begin + size] * (1 + part / np.where(mean > 0, mean, np.inf))).sum())
    return total


def assert_padding_is_zero(matrix: StoredMatrix) -> None:
    unpacked = unpack_codes(matrix.planes, 8 * matrix.planes.shape[-1])
    assert not unpacked[:, matrix.cols :].any()


def all_levels(matrix: StoredMatrix) -> np.ndarray:
    """What every code would decode to in every place: float32 ``[2**bits, rows, cols]``."""
    shape = (matrix.rows, matrix.cols)
    planes = (pack_codes(np.full(shape, code, np.uint8), matrix.scheme.bits) for code in range(2**matrix.scheme.bits))
    return np.stack([decode(replace(matrix, planes=p)) for p in planes])


def assert_nearest(weight: np.ndarray, matrix: StoredMatrix) -> None:
    """ENC-1: no level is nearer than the chosen one, up to the rounding of the levels themselves."""
    levels = all_levels(matrix).astype(np.float64)
    distances = np.abs(levels - weight)
    chosen = np.abs(decode(matrix).astype(np.float64) - weight)
    rounding = 4 * np.finfo(np.float32).eps * np.abs(levels).max(axis=0)
    assert (chosen <= distances.min(axis=0) + rounding).all()
