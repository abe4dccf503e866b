"""The reference decoders: the compiled one and its numpy twin, each against the scalar loop and against each other."""

from __future__ import annotations

import numpy as np
import pytest

from lowbit_format.codecs import CODECS
from lowbit_format.matrix import StoredMatrix
from lowbit_format.reference import decode, decode_numpy
from lowbit_format.schema import SCALE_DTYPES, Scheme
from lowbit_format.testing.decoding import F32, DecoderConformance
from lowbit_format.testing.matrices import extreme_matrix
from lowbit_format.testing.strategies import splits
from lowbit_format.testing.vectors import assert_same_bits

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")


class TestCompiled(DecoderConformance):
    def decode(self, matrix: StoredMatrix, bits: int | None) -> F32:
        return decode(matrix, bits)


class TestNumpy(DecoderConformance):
    def decode(self, matrix: StoredMatrix, bits: int | None) -> F32:
        return decode_numpy(matrix, bits)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_twins_agree_on_larger_matrices(codec: str, bits: int) -> None:
    """Several chunks of rows, many groups, every dtype of parameters, ragged and nested where the codec has it."""
    for i, dtype in enumerate(SCALE_DTYPES):
        for ragged in {False, splits(CODECS[codec])}:
            nested = tuple(range(1, bits)) if splits(CODECS[codec]) else ()
            scheme = Scheme(codec, bits, 32, dtype, codec == "bcq" and i > 0, ragged, nested)
            matrix = extreme_matrix(scheme, 67, 333, seed=bits)
            for k in (None, *nested):
                assert_same_bits(decode(matrix, k), decode_numpy(matrix, k))


def test_out_is_written_in_place() -> None:
    matrix = extreme_matrix(Scheme("bcq", 2, 8, "F32"), 5, 17)
    out = np.full((5, 17), np.nan, np.float32)
    assert decode(matrix, out=out) is out
    assert_same_bits(out, decode_numpy(matrix))
