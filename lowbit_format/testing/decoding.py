"""What every decoder must do: inherit :class:`DecoderConformance`, write ``decode``, and its tests run for yours.

The expected values come from :func:`scalar_decode`, a loop over single weights in numpy.float32 that follows sections
5 to 8 of spec/FORMAT.md sentence by sentence and shares no code with the library.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from ..bits import pack_codes
from ..codecs import CODECS
from ..errors import PrecisionError
from ..matrix import Params, StoredMatrix
from ..schema import Scheme
from .matrices import F32, extreme_matrix
from .strategies import splits, stored_matrices
from .vectors import assert_same_bits


def scalar_bit(matrix: StoredMatrix, p: int, r: int, c: int) -> int:
    """Bit of column `c` in plane `p` of row `r` (BIT-2; MIX-2 for ragged planes)."""
    planes = matrix.planes
    if matrix.row_bits is None:
        row = planes[p][r]
    else:
        have = [int(n) for n in matrix.row_bits]
        before = sum(1 for q in range(p) for n in have if n > q)
        row = planes[before + sum(1 for n in have[:r] if n > p)]
    return (int(row[c // 8]) >> (c % 8)) & 1


def scalar_decode(matrix: StoredMatrix, bits: int | None = None) -> F32:
    """The weights, one by one (DEC-1 to DEC-4, DEC-7, MIX-4, NST-1, NST-2)."""
    scheme = matrix.scheme
    params = matrix.params if bits is None or bits >= scheme.bits else matrix.nested[bits]
    at_most = scheme.bits if bits is None else min(bits, scheme.bits)
    out = np.empty((matrix.rows, matrix.cols), np.float32)
    with np.errstate(all="ignore"):
        for r in range(matrix.rows):
            n = at_most if matrix.row_bits is None else min(int(matrix.row_bits[r]), at_most)
            for c in range(matrix.cols):
                g = c // scheme.group_size if scheme.group_size else 0
                bit = [scalar_bit(matrix, p, r, c) for p in range(n)]
                code = sum(b * 2 ** (n - 1 - p) for p, b in enumerate(bit))  # BIT-1
                scale = [params.scales[p][r][g] for p in range(len(params.scales))]
                if scheme.codec == "bcq":
                    weight = np.float32(0.0) if params.shift is None else params.shift[r][g]
                    for p in range(n):
                        weight = weight + scale[p] if bit[p] else weight - scale[p]
                elif scheme.codec == "uniform":
                    assert params.shift is not None
                    weight = (np.float32(code) - params.shift[r][g]) * scale[0]
                elif scheme.codec == "affine":
                    assert params.shift is not None
                    weight = np.float32(code) * scale[0]
                    weight = weight + params.shift[r][g]
                elif scheme.codec == "codebook":
                    assert matrix.codebook is not None
                    weight = matrix.codebook[code] * scale[0]
                else:
                    raise AssertionError(f"the scalar loop does not know {scheme.codec}")
                assert isinstance(weight, np.float32)
                out[r, c] = weight
    return out


def scheme_for(codec: str, bits: int, group_size: int = 0, **more: object) -> Scheme:
    """A scheme with F32 parameters, and with an offset where the codec can have one."""
    return replace(Scheme(codec, bits, group_size, "F32", CODECS[codec].optional_shift), **more)  # type: ignore[arg-type]


CODEC_BITS = [pytest.param(codec, bits, id=f"{codec}-{bits}") for codec in CODECS for bits in range(1, 9)]
SPLIT_CODECS = [codec.id for codec in CODECS.values() if splits(codec)]


class DecoderConformance:
    """Tests of a decoder; a subclass gives :meth:`decode`."""

    def decode(self, matrix: StoredMatrix, bits: int | None) -> F32:
        """Float32 ``[rows, cols]`` of `matrix` at precision `bits`, in host memory."""
        raise NotImplementedError

    def check(self, matrix: StoredMatrix, bits: int | None = None) -> None:
        assert_same_bits(self.decode(matrix, bits), scalar_decode(matrix, bits))

    @pytest.mark.parametrize(("codec", "bits"), CODEC_BITS)
    def test_every_code(self, codec: str, bits: int) -> None:
        """Every code of every codec, in two rows of groups that do not divide the row (DEC-2 to DEC-4)."""
        codes = np.arange(2**bits, dtype=np.uint8)
        both = np.stack([codes, codes[::-1]])
        matrix = replace(extreme_matrix(scheme_for(codec, bits, 3), 2, 2**bits), planes=pack_codes(both, bits))
        self.check(matrix)

    @pytest.mark.parametrize("codec", CODECS)
    @pytest.mark.parametrize("cols", [1, 2, 7, 8, 9, 63, 64, 65, 129])
    @pytest.mark.parametrize("group_size", [0, 1, 5, 64, 1000])
    def test_every_width_and_group(self, codec: str, cols: int, group_size: int) -> None:
        """Odd columns, short last groups, groups larger than the row, one row (section 4)."""
        self.check(extreme_matrix(scheme_for(codec, 3, group_size), 1, cols, seed=cols))

    @pytest.mark.parametrize("codec", SPLIT_CODECS)
    @pytest.mark.parametrize("ragged", [False, True])
    def test_every_precision(self, codec: str, ragged: bool) -> None:
        """Each nested precision alone, with and without row_bits (NST-1, NST-2, MIX-4)."""
        scheme = scheme_for(codec, 8, 7, row_bits=ragged, nested=tuple(range(1, 8)))
        matrix = extreme_matrix(scheme, 6, 19)
        for bits in (*range(1, 10), None):
            self.check(matrix, bits)

    @pytest.mark.parametrize("codec", SPLIT_CODECS)
    def test_every_mixture_of_row_bits(self, codec: str) -> None:
        """All 27 ways to give three rows 1 to 3 bits (MIX-2, MIX-4)."""
        scheme = scheme_for(codec, 3, row_bits=True)
        for ways in np.ndindex(3, 3, 3):
            row_bits = np.array(ways, np.uint8) + np.uint8(1)
            matrix = extreme_matrix(scheme, 3, 5)
            planes = np.random.default_rng(1).integers(0, 32, (int(row_bits.sum()), 8)).astype(np.uint8)
            planes[:, 1:] = 0
            self.check(replace(matrix, planes=planes, row_bits=row_bits))

    @settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
    @given(stored_matrices())
    def test_any_matrix(self, matrix: StoredMatrix) -> None:
        for bits in (None, *matrix.scheme.nested):
            self.check(matrix, bits)

    @pytest.mark.parametrize("codec", CODECS)
    def test_padding_is_not_read(self, codec: str) -> None:
        """Bits behind the last column make no difference (BIT-3)."""
        matrix = extreme_matrix(scheme_for(codec, 4, 4), 3, 13)
        dirty = matrix.planes.copy()
        dirty[..., 1] |= 0b11100000
        dirty[..., 2:] = 255
        assert_same_bits(self.decode(replace(matrix, planes=dirty), None), scalar_decode(matrix))

    def test_unused_scales_are_not_read(self) -> None:
        """Scales of planes that a row does not have make no difference (MIX-3)."""
        matrix = extreme_matrix(scheme_for("bcq", 3, row_bits=True), 4, 6)
        assert matrix.row_bits is not None
        scales = matrix.params.scales.copy()
        scales[matrix.row_bits[None, :] <= np.arange(3)[:, None]] = np.nan
        assert np.isnan(scales).any()
        dirty = replace(matrix, params=replace(matrix.params, scales=scales))
        assert_same_bits(self.decode(dirty, None), scalar_decode(matrix))

    def test_operations_are_rounded_one_by_one(self) -> None:
        """No fused multiply-add and no other order (DEC-1, DEC-2), on values where these give other bits."""
        one, tiny = np.float32(1.0), np.float32(2.0**-24)
        scales = np.array([one, tiny, tiny, tiny], np.float32).reshape(4, 1, 1)
        offset = np.array([[tiny]], np.float32)
        scheme = scheme_for("bcq", 4)
        ones = pack_codes(np.full((1, 3), 15, np.uint8), 4)
        found = self.decode(StoredMatrix(scheme, 1, 3, ones, Params(scales, offset)), None)
        assert_same_bits(found, np.full((1, 3), 1.0, np.float32))  # each tiny part is a tie to even; their sum is not
        zero = np.array([[2.0**-24]], np.float32)  # 3 - 2^-24 rounds to 3: with one rounding 3s - 2^-24 s is not 3s
        scale = np.array([[[1.0 + 2.0**-23]]], np.float32)
        uniform = StoredMatrix(
            scheme_for("uniform", 2), 1, 1, pack_codes(np.full((1, 1), 3, np.uint8), 2), Params(scale, zero)
        )
        assert_same_bits(self.decode(uniform, None), np.float32(3) * scale[0])
        scale = np.array([[[1.0 + 2.0**-23]]], np.float32)  # 3 times it is a tie to even; the offset shows which way
        offset = np.array([[-np.float32(3) * scale[0, 0, 0]]], np.float32)
        codes = pack_codes(np.full((1, 1), 3, np.uint8), 2)
        affine = StoredMatrix(scheme_for("affine", 2), 1, 1, codes, Params(scale, offset))
        assert_same_bits(self.decode(affine, None), np.zeros((1, 1), np.float32))  # fused, what was rounded off is left

    @pytest.mark.parametrize("codec", CODECS)
    def test_subnormals_are_kept(self, codec: str) -> None:
        """No flush to zero (DEC-1)."""
        matrix = extreme_matrix(scheme_for(codec, 2), 2, 9)
        tiny = np.full_like(matrix.params.scales, 2.0**-149)
        shift = None if matrix.params.shift is None else np.full_like(matrix.params.shift, 3 * 2.0**-149)
        table = None if matrix.codebook is None else np.ones(4, np.float32)
        matrix = replace(matrix, params=Params(tiny, shift), codebook=table)
        assert np.any(scalar_decode(matrix))
        self.check(matrix)

    def test_signs_of_zero(self) -> None:
        """+0.0 and -0.0 as the rules give them: scales and offsets of all signs of zero (DEC-2)."""
        zeros = np.array([0.0, -0.0], np.float32)
        scheme = scheme_for("bcq", 2)
        for s0, s1, o in np.ndindex(2, 2, 2):
            params = Params(zeros[[s0, s1]].reshape(2, 1, 1), zeros[o].reshape(1, 1))
            self.check(StoredMatrix(scheme, 1, 4, pack_codes(np.arange(4, dtype=np.uint8)[None], 2), params))

    def test_a_precision_that_is_not_stored_is_refused(self) -> None:
        """NST-3; a precision not below the matrix's own is its own."""
        matrix = extreme_matrix(scheme_for("bcq", 4, nested=(2,)), 2, 5)
        for bits in (1, 3):
            with pytest.raises(PrecisionError, match=r"NST-3"):
                self.decode(matrix, bits)
        assert_same_bits(self.decode(matrix, 8), scalar_decode(matrix))

    def test_planes_may_be_read_only_and_unaligned(self) -> None:
        """A memory-mapped file gives views at any address (HDR-8)."""
        matrix = extreme_matrix(scheme_for("bcq", 3, 4), 3, 70)
        buffer = np.frombuffer(b"\0" + matrix.planes.tobytes(), np.uint8)[1:]
        assert not buffer.flags.writeable
        self.check(replace(matrix, planes=buffer.reshape(matrix.planes.shape)))

    @pytest.mark.parametrize("codec", CODECS)
    def test_a_slice_of_rows(self, codec: str) -> None:
        """Views that are not contiguous decode as the rows that they are."""
        matrix = extreme_matrix(scheme_for(codec, 4, 8), 7, 21)
        assert_same_bits(self.decode(matrix.row_slice(2, 5), None), scalar_decode(matrix)[2:5])
