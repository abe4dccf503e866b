"""Bit-planes: codes to planes and back (sections 5 and 7), against bytes worked out by hand and against loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit_format.bits import pack_codes, padding_is_zero, plane_rows, row_bytes, to_ragged, unpack_codes
from lowbit_format.quantize.group_lanes import pack
from lowbit_format.testing.strategies import BITS, COLS, ROWS, SEEDS


@pytest.mark.parametrize(("cols", "nbytes"), [(1, 8), (8, 8), (63, 8), (64, 8), (65, 16), (128, 16), (129, 24)])
def test_row_bytes(cols: int, nbytes: int) -> None:
    assert row_bytes(cols) == nbytes


def test_worked_example() -> None:
    """Section 15.2: codes 5, 0, 7 in three planes, most significant first (BIT-1, BIT-2)."""
    planes = pack_codes(np.array([[5, 0, 7]], np.uint8), 3)
    assert [plane.tobytes().hex() for plane in planes] == ["0500000000000000", "0400000000000000", "0500000000000000"]


def test_column_eight_is_the_lowest_bit_of_the_second_byte() -> None:
    codes = np.zeros((1, 66), np.uint8)
    codes[0, [8, 65]] = 1
    assert pack_codes(codes, 1).tobytes().hex() == "0001000000000000" + "0200000000000000"


@settings(max_examples=60, deadline=None)
@given(BITS, ROWS, COLS, SEEDS)
def test_round_trip(bits: int, rows: int, cols: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, cols)).astype(np.uint8)
    planes = pack_codes(codes, bits)
    assert planes.shape == (bits, rows, row_bytes(cols))
    assert padding_is_zero(planes, cols)
    np.testing.assert_array_equal(unpack_codes(planes, cols), codes)
    for k in range(1, bits + 1):  # BIT-4: the first k planes are the k leading bits
        np.testing.assert_array_equal(unpack_codes(planes[:k], cols), codes >> (bits - k))


@settings(max_examples=40, deadline=None)
@given(BITS, ROWS, COLS, SEEDS)
def test_compiled_packing_is_the_same(bits: int, rows: int, cols: int, seed: int) -> None:
    codes = np.zeros((rows, 8 * row_bytes(cols)), np.uint8)
    codes[:, :cols] = np.random.default_rng(seed).integers(0, 2**bits, (rows, cols))
    np.testing.assert_array_equal(pack(codes, bits), pack_codes(codes[:, :cols], bits))


@pytest.mark.parametrize("cols", [1, 7, 8, 9, 63, 64, 65])
def test_padding_is_seen_bit_by_bit(cols: int) -> None:
    """Each single bit behind the last column is found, and none before it (BIT-3)."""
    width = row_bytes(cols)
    for bit in range(8 * width):
        planes = np.zeros((2, 3, width), np.uint8)
        planes[1, 2, bit // 8] = 1 << (bit % 8)
        assert padding_is_zero(planes, cols) == (bit < cols)


@settings(max_examples=60, deadline=None)
@given(st.lists(BITS, min_size=1, max_size=7), SEEDS)
def test_ragged_planes(row_bits: list[int], seed: int) -> None:
    """MIX-2: plane by plane, the rows that have it; the index says where each one lies."""
    bits, rows = max(row_bits), np.array(row_bits, np.uint8)
    codes = np.random.default_rng(seed).integers(0, 2**bits, (len(rows), 11)).astype(np.uint8)
    planes = pack_codes(codes, bits)
    expected = [planes[p, r] for p in range(bits) for r in range(len(rows)) if row_bits[r] > p]
    ragged, index = to_ragged(planes, rows), plane_rows(rows, bits)
    np.testing.assert_array_equal(ragged, np.stack(expected))
    assert ragged.shape[0] == sum(row_bits)
    for p in range(bits):
        for r, n in enumerate(row_bits):
            assert (index[p, r] >= 0) == (n > p)
            if n > p:
                np.testing.assert_array_equal(ragged[index[p, r]], planes[p, r])
