"""The inner loops of the solvers, sixteen groups side by side, against numpy."""

from __future__ import annotations

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit_format.bits import pack_codes, row_bytes
from lowbit_format.machine.llvm import LANES
from lowbit_format.quantize import group_lanes
from lowbit_format.quantize.group_lanes import pack


@numba.njit
def _row_operations(added, product, signs, a, b, code):  # type: ignore[no-untyped-def]
    group_lanes.add_product(added, a, b)
    group_lanes.set_product(product, a, b)
    group_lanes.set_signs(signs, code, np.uint8(0x80))


@numba.njit
def _order_rows(level, code):  # type: ignore[no-untyped-def]
    group_lanes.order(level[0], level[1], code[0], code[1])


@pytest.mark.parametrize("cols", [1, 3, 128])
@pytest.mark.parametrize("thresholds", [4, 8, 256])
def test_sums_above(cols: int, thresholds: int) -> None:
    rng = np.random.default_rng(cols)
    x, w = rng.integers(-8, 8, (2, cols, LANES)).astype(np.float32)  # small integers: sums are exact
    mids = np.sort(rng.integers(-8, 8, (thresholds, LANES)), axis=0).astype(np.float32)
    mids[-1] = np.inf
    weights, sums = np.full((2, thresholds, LANES), np.nan, np.float32)
    group_lanes.sums_above(x, w, w * x, mids, weights, sums)
    above = x[None] >= mids[:, None]
    assert np.array_equal(weights, (above * w).sum(axis=1))
    assert np.array_equal(sums, (above * (w * x)).sum(axis=1))


@pytest.mark.parametrize("steps", [1, 3, 255])
def test_codes_of(steps: int) -> None:
    rng = np.random.default_rng(steps)
    x = rng.integers(-9, 9, (50, LANES)).astype(np.float32)  # whole numbers: many lie on a threshold
    mids = np.sort(rng.integers(-8, 8, (steps, LANES)), axis=0).astype(np.float32)
    codes = rng.integers(0, 256, (steps + 1, LANES)).astype(np.uint8)
    out = np.empty((50, LANES), np.uint8)
    group_lanes.codes_of(x, mids, codes, steps, out)
    above = (x[:, None] >= mids[None]).sum(axis=1)
    assert np.array_equal(out, np.take_along_axis(codes, above, axis=0))


def test_row_operations() -> None:
    rng = np.random.default_rng(0)
    out, a, b = rng.integers(-9, 9, (3, LANES)).astype(np.float32)
    code = rng.integers(0, 256, LANES).astype(np.uint8)
    added, product, signs = out.copy(), out.copy(), out.copy()
    _row_operations(added, product, signs, a, b, code)
    assert np.array_equal(added, out + a * b)
    assert np.array_equal(product, a * b)
    assert np.array_equal(signs, np.where(code & 0x80, 1, -1))


def test_order_sorts_two_rows_and_breaks_ties_by_code() -> None:
    rng = np.random.default_rng(0)
    level, code = rng.integers(0, 3, (2, LANES)).astype(np.float32), rng.integers(0, 9, (2, LANES))
    expected = [sorted(zip(level[:, i], code[:, i], strict=True)) for i in range(LANES)]
    code = code.astype(np.uint8)
    _order_rows(level, code)
    assert [list(zip(level[:, i], code[:, i], strict=True)) for i in range(LANES)] == expected


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 5), cols=st.integers(1, 200), bits=st.integers(1, 8), seed=st.integers(0, 99))
def test_compiled_packing_equals_the_plain_one(rows: int, cols: int, bits: int, seed: int) -> None:
    """BIT-1 to BIT-3."""
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, cols)).astype(np.uint8)
    padded = np.zeros((rows, 8 * row_bytes(cols)), np.uint8)
    padded[:, :cols] = codes
    assert np.array_equal(pack(padded, bits), pack_codes(codes, bits))


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 20), cols=st.integers(1, 60), group=st.integers(1, 70), weighted=st.booleans())
def test_blocks_hold_every_group_once(rows: int, cols: int, group: int, weighted: bool) -> None:
    weight = np.arange(rows * cols, dtype=np.float32).reshape(rows, cols)
    importance = np.arange(1, cols + 1, dtype=np.float32) if weighted else np.empty(0, np.float32)
    size, groups = min(group, cols), -(-cols // group)
    x, w, wx = np.full((3, size, LANES), np.nan, np.float32)
    codes = np.full((rows, cols), 255, np.uint8)
    for first in range(0, rows * groups, LANES):
        last = min(first + LANES, rows * groups)
        group_lanes.load_block(weight, importance, first, last, groups, size, x, w, wx)
        assert np.array_equal(wx, w * x)
        for lane in range(LANES):
            i = min(first + lane, last - 1)
            row, begin = divmod(i, groups)[0], size * (i % groups)
            source = weight[row, begin : begin + size]
            assert np.array_equal(x[: len(source), lane], source)
            assert not w[len(source) :, lane].any()
            np.testing.assert_allclose(w[:, lane].sum(), len(source), rtol=1e-5)
        group_lanes.store_codes(x.astype(np.uint32).astype(np.uint8), first, last, groups, size, cols, codes)
    assert np.array_equal(codes, weight.astype(np.uint32).astype(np.uint8))
