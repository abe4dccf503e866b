"""The innermost loops in LLVM: sums looked up by the bits of planes, and weights decoded from them.

Every intrinsic works on *tiles*: 16 rows of the matrix in the 16 lanes of a vector, with a *word* of 32 columns in each
lane (see :mod:`.tiles`). One source serves all machines. AVX-512 and AVX2 permute a table that is in registers. Other
machines add or subtract activations by the sign that a bit gives.

Addresses are int64, strides are bytes. Arguments in capitals are literal ints: each value has code of its own.
"""

from __future__ import annotations

from typing import Any

import numba
import torch
from llvmlite import ir
from numba import literally, types  # type: ignore[attr-defined]
from numba.extending import intrinsic

from ...codecs import CODECS
from ...machine.llvm import (
    F32,
    I1,
    I16,
    I32,
    I64,
    LANES,
    VECTOR_F16,
    VECTOR_F32,
    VECTOR_I16,
    VECTOR_I32,
    ZERO,
    at,
    call,
    features,
    float_to_bfloat,
    fma,
    half_to_float,
    ints,
    load,
    loop,
    prefetch,
    splat,
    store,
)
from .tiles import WORD

# Sizes in bytes.
VECTOR = 4 * LANES  # a vector of words, or of floats
TABLE = 4 * 16  # the signed sums of four columns
TRIPLE, TRIPLE_TABLE = 3, 4 * 8  # columns of a table with AVX2, and its bytes
WORD_TABLES = WORD // 4 * TABLE  # the tables of a word's columns
WORD_X = 4 * WORD  # the activations of a word's columns
CACHE_LINE = 64

# Kernels know codecs and dtypes of parameters by number.
CODEC_NUMBERS = {name: number for number, name in enumerate(CODECS)}
BCQ, UNIFORM, CODEBOOK, AFFINE = (CODEC_NUMBERS[name] for name in ("bcq", "uniform", "codebook", "affine"))
FLOAT32, FLOAT16, BFLOAT16 = range(3)
DTYPE_NUMBERS = {torch.float32: FLOAT32, torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}

_HALF = LANES // 2
_HALF_F32, _HALF_I32 = ir.VectorType(F32, _HALF), ir.VectorType(I32, _HALF)


def has_codebook_lookup(instruction_sets: frozenset[str]) -> bool:
    """Whether a machine with these instruction sets can run :func:`add_levels`."""
    return "avx512f" in instruction_sets


def _isa(context: Any) -> str:
    return next((name for name in ("avx512f", "avx2") if name in features(context)), "")


@intrinsic(prefer_literal=True)
def add_planes(
    typingctx,
    # addresses
    words,
    tables,
    x,
    scales,
    y,
    # sizes
    count,
    planes,
    # strides
    tile_stride,
    plane_stride,
    table_stride,
    x_stride,
    y_stride,
    ahead,
    # constants
    TILES,
    ROWS,
    BYTES,
):
    """``y += scale * (sum of +x where the plane has a 1 and -x where it has a 0)`` over some planes of one group.

    Args:
        words: int32 ``[TILES (tile_stride), planes (plane_stride), count, LANES]``; the first byte to read of a word.
        tables: float32 ``[ROWS (table_stride), 2 * BYTES * count, 16]``, see :func:`set_tables`.
        x: float32 ``[ROWS (x_stride), 8 * BYTES * count]``.
        scales: float32 ``[planes, TILES, LANES]``.
        y: float32 ``[ROWS (y_stride), TILES, LANES]``.
        count: words of a row, at least 1.
        planes: number of planes, at least 1.
        ahead: distance in bytes from a word to the one that is needed next, and is prefetched.
        TILES, ROWS: numbers of tiles and of rows of x.
        BYTES: of each word, 4; or 2 of one word, where the group is half of it.
    """
    tiles, rows, size = TILES.literal_value, ROWS.literal_value, BYTES.literal_value
    signature = types.void(*[types.int64] * 13, TILES, ROWS, BYTES)

    def codegen(context, builder, signature, args):
        words, tables, x, scales, y = args[:5]
        count, planes = args[5:7]
        tile_stride, plane_stride, table_stride, x_stride, y_stride, ahead = args[7:13]
        isa = _isa(context)
        # Tiles and rows whose sums stay in registers: there are 32 (AVX-512) or 16 (AVX2), else 16 or 32 of 4 lanes.
        t_step, r_step = {"avx512f": (tiles, rows), "avx2": (min(2, tiles), 1), "": (1, 1)}[isa]
        emit = {"avx512f": _lookup_512, "avx2": _lookup_256, "": _add_signed}[isa]

        def plane(p, _):
            of_plane = at(builder, words, (plane_stride, p))
            for r0 in range(0, rows, r_step):
                for t0 in range(0, tiles, t_step):
                    places = [(r, t) for r in range(r0, r0 + r_step) for t in range(t0, t0 + t_step)]
                    at_words = {t: at(builder, of_plane, (tile_stride, t)) for _, t in places}
                    at_tables = {r: at(builder, tables, (table_stride, r)) for r, _ in places}
                    at_x = {r: at(builder, x, (x_stride, r)) for r, _ in places}

                    def word(i, sums, places=places, at_words=at_words, at_tables=at_tables, at_x=at_x):
                        w = {t: at(builder, a, (i, VECTOR)) for t, a in at_words.items()}
                        for address in w.values():
                            prefetch(builder, builder.add(address, ahead))
                        tb = {r: at(builder, a, (i, WORD_TABLES)) for r, a in at_tables.items()}
                        xs = {r: at(builder, a, (i, WORD_X)) for r, a in at_x.items()}
                        new = emit(builder, w, tb, xs, dict(zip(places, sums, strict=True)), size)
                        return [new[place] for place in places]

                    sums = loop(builder, count, word, [ZERO] * len(places))
                    for (r, t), total in zip(places, sums, strict=True):
                        scale = load(builder, at(builder, scales, (p, tiles * VECTOR), (t, VECTOR)), VECTOR_F32)
                        to = at(builder, y, (y_stride, r), (t, VECTOR))
                        store(builder, fma(builder, total, scale, load(builder, to, VECTOR_F32)), to)
            return []

        loop(builder, planes, plane, [])
        return context.get_dummy_value()

    return signature, codegen


def _lookup_512(builder, words, tables, x, sums, size):
    """``vpermps`` looks up 16 nibbles at once in a table of 16 and ignores the higher bits: shift, permute, add.

    Every second shift is saved: in a word loaded from one byte further on, the next byte is the lowest.
    """
    for byte in range(size):
        align = 1 if byte else size
        w = {t: load(builder, at(builder, a, (byte, 1)), VECTOR_I32, align) for t, a in words.items()}
        for nibble in range(2):
            places = {r: at(builder, a, (2 * byte + nibble, TABLE)) for r, a in tables.items()}
            table = {r: load(builder, a, VECTOR_F32) for r, a in places.items()}
            index = {t: builder.lshr(v, ints(4 * nibble)) for t, v in w.items()}
            sums = {(r, t): builder.fadd(s, _permute(builder, table[r], index[t])) for (r, t), s in sums.items()}
    return sums


def _permute(builder, table, index):
    return call(builder, "llvm.x86.avx512.permvar.sf.512", VECTOR_F32, table, index)


def _lookup_256(builder, words, tables, x, sums, size):
    """``vpermps`` looks up eight indices of three bits in a table of 8: shift, permute, add for three columns.

    Tables of four columns would be two vectors, of which a blend has to choose: six instructions for four columns, and
    on Zen 3 permutations are the slowest of them.
    """
    halves = {(p, h): builder.shuffle_vector(s, s, _half(h)) for p, s in sums.items() for h in range(2)}

    def loaded(byte):
        return {
            (t, h): load(builder, at(builder, a, (h, VECTOR // 2), (byte, 1)), _HALF_I32, 1 if byte % size else size)
            for t, a in words.items()
            for h in range(2)
        }

    w = loaded(0)
    for number, column in enumerate(range(0, 8 * size, TRIPLE)):
        here, shift = (loaded(column // 8), 0) if column % 8 == 0 else (w, column)
        for r, a in tables.items():
            table = load(builder, at(builder, a, (number, TRIPLE_TABLE)), _HALF_F32)
            for (t, h), v in here.items():
                index = builder.lshr(v, ir.Constant(_HALF_I32, [shift] * _HALF)) if shift else v
                found = call(builder, "llvm.x86.avx2.permps", _HALF_F32, table, index)
                halves[(r, t), h] = builder.fadd(halves[(r, t), h], found)
    both = ir.Constant(VECTOR_I32, list(range(LANES)))
    return {p: builder.shuffle_vector(halves[p, 0], halves[p, 1], both) for p in sums}


def _half(h: int) -> Any:
    """Mask that picks the lanes of half `h` of a vector."""
    return ir.Constant(_HALF_I32, list(range(h * _HALF, (h + 1) * _HALF)))


def _add_signed(builder, words, tables, x, sums, size):
    """For machines that cannot permute floats: a bit becomes the sign of the activation, column by column."""
    flipped = {t: builder.not_(load(builder, a, VECTOR_I32, size)) for t, a in words.items()}
    for column in range(8 * size):
        value = {r: builder.bitcast(splat(builder, load(builder, at(builder, a, (column, 4)), F32)), VECTOR_I32)
                 for r, a in x.items()}  # fmt: skip
        sign = {t: _sign_of(builder, v, column) for t, v in flipped.items()}
        sums = {
            (r, t): builder.fadd(s, builder.bitcast(builder.xor(value[r], sign[t]), VECTOR_F32))
            for (r, t), s in sums.items()
        }
    return sums


def _sign_of(builder, word, column):
    """Bit `column` of each word, as the sign bit of a float."""
    return builder.and_(builder.shl(word, ints(31 - column)), ints(1 << 31))


@intrinsic(prefer_literal=True)
def add_levels(
    typingctx,
    # addresses
    words,
    x,
    codebook,
    scales,
    y,
    # sizes
    count,
    planes,
    # strides
    tile_stride,
    plane_stride,
    x_stride,
    y_stride,
    ahead,
    # constants
    TILES,
    ROWS,
    BYTES,
):
    """``y += scale * sum of codebook[code] * x``; only for machines with :func:`has_codebook_lookup`.

    A step gathers the codes of every fourth column in nibbles. They index the codebook, which is in a register.

    Args:
        words, x, y, count, tile_stride, plane_stride, x_stride, y_stride, ahead: as in :func:`add_planes`.
        codebook: float32 ``[16]``, padded with zeros.
        scales: float32 ``[TILES, LANES]``.
        planes: number of planes, 1 to 4.
        TILES, ROWS, BYTES: as in :func:`add_planes`.
    """
    tiles, rows, size = TILES.literal_value, ROWS.literal_value, BYTES.literal_value
    signature = types.void(*[types.int64] * 12, TILES, ROWS, BYTES)

    def codegen(context, builder, signature, args):
        words, x, codebook, scales, y = args[:5]
        count, planes = args[5:7]
        tile_stride, plane_stride, x_stride, y_stride, ahead = args[7:12]
        if not has_codebook_lookup(features(context)):
            return context.get_dummy_value()
        places = [(r, t) for r in range(rows) for t in range(tiles)]
        levels = load(builder, codebook, VECTOR_F32)

        def word(i, sums):
            total = dict(zip(places, sums, strict=True))
            for quarter in range(4):

                def plane(p, codes, i=i, quarter=quarter):
                    following = []
                    for t in range(tiles):
                        address = at(builder, words, (tile_stride, t), (plane_stride, p), (i, VECTOR))
                        if quarter == 0:
                            prefetch(builder, builder.add(address, ahead))
                        bit = builder.lshr(load(builder, address, VECTOR_I32, size), ints(quarter))
                        field = builder.and_(bit, ints(0x11111111))
                        following.append(builder.or_(builder.shl(codes[t], ints(1)), field))
                    return following

                codes = loop(builder, planes, plane, [ints(0)] * tiles)
                for nibble in range(2 * size):
                    column = 4 * nibble + quarter
                    values = [
                        splat(builder, load(builder, at(builder, x, (x_stride, r), (i, WORD_X), (column, 4)), F32))
                        for r in range(rows)
                    ]
                    for t in range(tiles):
                        level = _permute(builder, levels, builder.lshr(codes[t], ints(4 * nibble)))
                        for r in range(rows):
                            total[r, t] = fma(builder, level, values[r], total[r, t])
            return [total[p] for p in places]

        sums = loop(builder, count, word, [ZERO] * len(places))
        for (r, t), total in zip(places, sums, strict=True):
            scale = load(builder, at(builder, scales, (t, VECTOR)), VECTOR_F32)
            to = at(builder, y, (y_stride, r), (t, VECTOR))
            store(builder, fma(builder, total, scale, load(builder, to, VECTOR_F32)), to)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def add_shift(typingctx, sums, shift, y, sum_stride, y_stride, TILES, ROWS):
    """``y += sum * shift``.

    Args:
        sums: float32 ``[ROWS (sum_stride)]``, sums of x over the columns.
        shift: float32 ``[TILES, LANES]``.
        y: float32 ``[ROWS (y_stride), TILES, LANES]``.
        TILES, ROWS: numbers of tiles and of rows of x.
    """
    tiles, rows = TILES.literal_value, ROWS.literal_value
    signature = types.void(*[types.int64] * 5, TILES, ROWS)

    def codegen(context, builder, signature, args):
        sums, shift, y, sum_stride, y_stride = args[:5]
        for r in range(rows):
            number = splat(builder, load(builder, at(builder, sums, (sum_stride, r)), F32))
            for t in range(tiles):
                to = at(builder, y, (y_stride, r), (t, VECTOR))
                value = load(builder, at(builder, shift, (t, VECTOR)), VECTOR_F32)
                store(builder, fma(builder, number, value, load(builder, to, VECTOR_F32)), to)
        return context.get_dummy_value()

    return signature, codegen


@numba.njit(forceinline=True)
def read_parameters(
    # addresses
    source,
    target,
    # sizes
    count,
    # positions and strides, in parameters
    index,
    stride,
    ahead,
    # constants
    dtype,
    TILES,
):
    """Copy parameters of TILES tiles for `count` planes, as float32.

    Args:
        source: of the parameters, stored as `dtype` (:data:`DTYPE_NUMBERS`).
        target: float32 ``[count, TILES * LANES]``.
        index: of the first parameter in `source`.
        stride: from the parameters of one plane to those of the next.
        ahead: from a parameter to the one that is needed next, and is prefetched.
    """
    literally(TILES)
    if dtype == FLOAT32:
        _widen(source + 4 * index, target, count, 4 * stride, 4 * ahead, TILES, FLOAT32)
    elif dtype == FLOAT16:
        _widen(source + 2 * index, target, count, 2 * stride, 2 * ahead, TILES, FLOAT16)
    else:
        _widen(source + 2 * index, target, count, 2 * stride, 2 * ahead, TILES, BFLOAT16)


@intrinsic(prefer_literal=True)
def _widen(typingctx, source, target, count, stride, ahead, TILES, DTYPE):
    """See :func:`read_parameters`; `source` is where the first parameter is, `stride` and `ahead` are bytes."""
    tiles, dtype = TILES.literal_value, DTYPE.literal_value
    signature = types.void(*[types.int64] * 5, TILES, DTYPE)

    def codegen(context, builder, signature, args):
        source, target, count, stride, ahead = args[:5]

        def row(i, _):
            first = builder.add(at(builder, source, (i, stride)), ahead)
            for line in range(0, tiles * LANES * (4 if dtype == FLOAT32 else 2), CACHE_LINE):
                prefetch(builder, at(builder, first, (line, 1)))
            for t in range(tiles):
                value = _as_float(context, builder, at(builder, source, (i, stride)), t, dtype)
                store(builder, value, at(builder, target, (i, tiles * VECTOR), (t, VECTOR)))
            return []

        loop(builder, count, row, [])
        return context.get_dummy_value()

    return signature, codegen


def _as_float(context, builder, source, tile, dtype):
    """The parameters of tile `tile` of those at `source`."""
    if dtype == FLOAT32:
        return load(builder, at(builder, source, (tile, 4 * LANES)), VECTOR_F32)
    address = at(builder, source, (tile, 2 * LANES))
    if dtype == FLOAT16 and features(context) & {"f16c", "fullfp16"}:
        return builder.fpext(load(builder, address, VECTOR_F16, 2), VECTOR_F32)
    raw = load(builder, address, VECTOR_I16, 2)
    if dtype == FLOAT16:
        return half_to_float(builder, raw)
    return builder.bitcast(builder.shl(builder.zext(raw, VECTOR_I32), ints(16)), VECTOR_F32)


@intrinsic(prefer_literal=True)
def set_tables(typingctx, x, tables, count, BYTES):
    """Fill `tables` with the signed sums of every few activations; returns the sum of x.

    Entry i adds the activation of column j where bit j of i is 1 and subtracts it where the bit is 0.

    Args:
        x: float32 ``[count, 8 * BYTES]``.
        tables: float32 ``[count, 2 * BYTES, 16]``: of four columns each. With AVX2 the room of a word has tables of
            three columns, ``[8]``, the last of which are fewer and count as 0.
        count: words, at least 1.
        BYTES: as in :func:`add_planes`.
    """
    size = BYTES.literal_value
    signature = types.float32(types.int64, types.int64, types.int64, BYTES)

    def codegen(context, builder, signature, args):
        x, tables, count = args[:3]
        by_three = _isa(context) == "avx2"
        columns, lanes, kind = (TRIPLE, _HALF, _HALF_F32) if by_three else (4, LANES, VECTOR_F32)
        signs = [ir.Constant(kind, [1.0 if i >> j & 1 else -1.0 for i in range(lanes)]) for j in range(columns)]

        def word(i, total):
            total = total[0]
            for number, first in enumerate(range(0, 8 * size, columns)):
                table = None
                for j in range(min(columns, 8 * size - first)):
                    value = load(builder, at(builder, x, (i, WORD_X * size // 4), (first + j, 4)), F32)
                    value = splat(builder, value, lanes)
                    table = builder.fmul(value, signs[j]) if table is None else fma(builder, value, signs[j], table)
                to = at(builder, tables, (i, WORD_TABLES * size // 4), (number, TRIPLE_TABLE if by_three else TABLE))
                store(builder, table, to)
                total = builder.fadd(total, table)
            return [total]

        (total,) = loop(builder, count, word, [ir.Constant(kind, [0.0] * lanes)])
        return builder.extract_element(total, I32(lanes - 1))  # the last entry adds all columns

    return signature, codegen


@intrinsic(prefer_literal=True)
def decode_half(
    typingctx,
    # addresses
    words,
    signed,
    start,
    scale,
    shift,
    codebook,
    out,
    # sizes
    planes,
    # strides
    plane_stride,
    out_stride,
    # constants
    HALF,
    CODEC,
):
    """Weights of 16 columns of a tile, half a word, with the operations of DEC-2 to DEC-4 and DEC-7 in their order.

    A weight is computed from ``sum = start + (-signed where the bit is 1, +signed where it is 0, for each plane)``:
    BCQ: ``sum``. UNIFORM: ``(sum - shift) * scale``. AFFINE: ``sum * scale + shift``.
    CODEBOOK: ``codebook[sum] * scale``.

    Args:
        words: int32 ``[planes (plane_stride), LANES]``.
        signed: float32 ``[planes, LANES]``.
        start, scale, shift: float32 ``[LANES]``.
        codebook: float32 ``[2**planes]``.
        out: float32 ``[LANES (out_stride), 16]``.
        planes: number of planes, at least 1.
        HALF: of the words, 0 or 1.
        CODEC: BCQ, UNIFORM, AFFINE or CODEBOOK.
    """
    half, codec = HALF.literal_value, CODEC.literal_value
    signature = types.void(*[types.int64] * 10, HALF, CODEC)

    def codegen(context, builder, signature, args):
        words, signed, start, scale, shift, codebook, out = args[:7]
        planes, plane_stride, out_stride = args[7:10]

        def plane(p, sums):
            word = load(builder, at(builder, words, (plane_stride, p)), VECTOR_I32)
            value = load(builder, at(builder, signed, (p, VECTOR)), VECTOR_I32)
            steps = [builder.xor(value, _sign_of(builder, word, LANES * half + c)) for c in range(LANES)]
            return [builder.fadd(s, builder.bitcast(v, VECTOR_F32)) for s, v in zip(sums, steps, strict=True)]

        first = load(builder, start, VECTOR_F32)
        columns = loop(builder, planes, plane, [first] * LANES)
        if codec == UNIFORM:
            down, by = load(builder, shift, VECTOR_F32), load(builder, scale, VECTOR_F32)
            columns = [builder.fmul(builder.fsub(v, down), by) for v in columns]
        if codec == AFFINE:
            up, by = load(builder, shift, VECTOR_F32), load(builder, scale, VECTOR_F32)
            columns = [builder.fadd(builder.fmul(v, by), up) for v in columns]
        if codec == CODEBOOK:
            by = load(builder, scale, VECTOR_F32)
            columns = [builder.fmul(_level(builder, codebook, v), by) for v in columns]
        for row, value in enumerate(_transposed(builder, columns)):
            store(builder, value, at(builder, out, (out_stride, row)))
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def add_signed_and_round(
    typingctx,
    # addresses
    words,
    steps,
    block,
    out,
    # sizes
    rows,
    planes,
    # strides
    plane_stride,
    out_stride,
    # constants
    DTYPE,
):
    """``out = block + (sum of +step where the plane has a 1 and -step where it has a 0)`` for 16 columns of a tile.

    Args:
        words: int32 ``[planes (plane_stride), LANES]``; the first byte to read of a word.
        steps: float32 ``[planes, LANES]``.
        block: float32 ``[LANES, 16]``.
        out: float32 or bfloat16 ``[rows (out_stride), 16]``.
        rows: of the tile, at least 1.
        planes: number of planes, at least 1.
        DTYPE: FLOAT32 or BFLOAT16, of `out`.
    """
    dtype = DTYPE.literal_value
    signature = types.void(*[types.int64] * 8, DTYPE)

    def codegen(context, builder, signature, args):
        words, steps, block, out, rows, planes, plane_stride, out_stride = args[:8]
        size, native = 4 if dtype == FLOAT32 else 2, "avx512bf16" in features(context)

        def row(r, _):
            def plane(p, sums):
                up = splat(builder, load(builder, at(builder, steps, (p, VECTOR), (r, 4)), F32))
                word = at(builder, words, (plane_stride, p), (r, 4))
                bits = builder.bitcast(load(builder, word, I16, align=2), ir.VectorType(I1, LANES))
                return [builder.fadd(sums[0], builder.select(bits, up, builder.fneg(up)))]

            base = load(builder, at(builder, block, (r, VECTOR)), VECTOR_F32)
            (value,) = loop(builder, planes, plane, [base])
            rounded = value if dtype == FLOAT32 else float_to_bfloat(builder, value, native)
            store(builder, rounded, at(builder, out, (out_stride, r)), align=size)
            return []

        loop(builder, rows, row, [])
        return context.get_dummy_value()

    return signature, codegen


def _level(builder, codebook, codes):
    """The level of each code; codes are floats."""
    index = builder.zext(builder.fptoui(codes, VECTOR_I32), ir.VectorType(I64, LANES))
    base = splat(builder, codebook)
    addresses = builder.add(base, builder.shl(index, ir.Constant(ir.VectorType(I64, LANES), [2] * LANES)))
    found = ir.Constant(VECTOR_F32, ir.Undefined)
    for lane in range(LANES):
        number = I32(lane)
        entry = load(builder, builder.extract_element(addresses, number), F32)
        found = builder.insert_element(found, entry, number)
    return found


def _transposed(builder, vectors):
    """LANES vectors, rows for columns, in four rounds of exchanges."""
    vectors = list(vectors)
    for d in (8, 4, 2, 1):
        keep = [lane if lane & d == 0 else LANES + lane - d for lane in range(LANES)]
        move = [lane + d if lane & d == 0 else LANES + lane for lane in range(LANES)]
        low, high = (ir.Constant(VECTOR_I32, mask) for mask in (keep, move))
        for i in range(LANES):
            if i & d == 0:
                a, b = vectors[i], vectors[i + d]
                vectors[i], vectors[i + d] = builder.shuffle_vector(a, b, low), builder.shuffle_vector(a, b, high)
    return vectors


def _pointer_intrinsic(kind: Any) -> Any:
    @intrinsic
    def pointer(typingctx, address):
        """A pointer to the numbers at an int64 address, to be indexed."""

        def codegen(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), codegen

    return pointer


floats_at, longs_at, bytes_at = (_pointer_intrinsic(kind) for kind in (types.float32, types.int64, types.uint8))
