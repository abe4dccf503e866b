"""Rows with different bits: each is what it would be among rows of its own bits, and the rules of section 7 hold."""

from __future__ import annotations

import numpy as np
import pytest

from lowbit_format.errors import QuantizationError, SchemeError
from lowbit_format.quantize import Target, quantize
from lowbit_format.reference import decode, decode_numpy

ROW_BITS = (4, 1, 3, 3, 1, 2, 4)


def weight(rows: int = len(ROW_BITS), cols: int = 70) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, cols)).astype(np.float32)


@pytest.mark.parametrize("codec", ["bcq", "uniform"])
@pytest.mark.parametrize("nested", [(), (1, 2)])
def test_each_row_is_as_among_its_equals(codec: str, nested: tuple[int, ...]) -> None:
    target = Target(codec, bits=4, group_size=32, nested=nested, row_bits=ROW_BITS)
    found = quantize(w := weight(), target)
    assert found.matrix.scheme.row_bits
    assert found.matrix.planes.shape == (sum(ROW_BITS), 16)
    decoded = {k: decode(found.matrix, k) for k in (None, *nested)}
    assert np.array_equal(decoded[None], decode_numpy(found.matrix))
    for bits in set(ROW_BITS):
        at = [r for r, n in enumerate(ROW_BITS) if n == bits]
        lower = tuple(k for k in nested if k < bits)
        alone = quantize(w[at], Target(codec, bits=bits, group_size=32, nested=lower, recognise=False)).matrix
        assert np.array_equal(decoded[None][at], decode(alone))
        for k in nested:
            assert np.array_equal(decoded[k][at], decode(alone, k if k < bits else None))
        if codec == "bcq":
            assert not found.matrix.params.scales[bits:, at].any()
    for k, whole in decoded.items():
        assert np.array_equal(decode(found.matrix.row_slice(2, 6), k), whole[2:6])
    assert found.squared_error == pytest.approx(float(((decoded[None].astype(np.float64) - w) ** 2).sum()))


def test_parameters_that_one_row_needs_wider_are_wider_for_all() -> None:
    w = weight()
    w[1] *= 1e6
    found = quantize(w, Target("uniform", bits=4, group_size=32, row_bits=ROW_BITS))
    assert (found.matrix.scheme.scale_dtype, found.widened) == ("F32", "F16 cannot hold its parameters, F32 can")
    error = ((decode(found.matrix).astype(np.float64) - w) ** 2).sum()
    assert found.squared_error == pytest.approx(float(error))


def test_bits_for_other_rows_are_refused() -> None:
    with pytest.raises(QuantizationError, match="x: has 9 rows, and row_bits says the bits of 7"):
        quantize(weight(9), Target(bits=4, row_bits=ROW_BITS), name="x")
    with pytest.raises(SchemeError, match="row_bits has other numbers than integers from 1 to bits = 3"):
        Target(bits=3, row_bits=ROW_BITS)
    with pytest.raises(SchemeError, match="a codebook has no row_bits"):
        Target("codebook", row_bits=ROW_BITS)
