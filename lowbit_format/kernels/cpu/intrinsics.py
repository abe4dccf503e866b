"""The innermost loops, as LLVM vector code: sums looked up by plane bits, and weights decoded from them.

Every intrinsic works on *tiles*: 16 rows of the matrix in the 16 lanes of a vector, a *word* of 32 columns in each lane
(see :mod:`.tiles`). One source serves all machines. Where AVX-512 or AVX2 permute a table held in registers, other
machines add and subtract activations by the sign that a bit gives. Addresses are int64, strides are bytes.

Arguments in capitals are literal ints, by which code is made.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ...machine.llvm import (
    F32,
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
    fma,
    half_to_float,
    ints,
    load,
    loop,
    prefetch,
    splat,
    store,
)

VECTOR = 64  # bytes: 16 words, or 16 floats
TABLE = 64  # bytes of the table of 4 columns
F32_KIND, F16_KIND, BF16_KIND = 0, 1, 2  # how parameters are stored

_HALF_F32, _HALF_I32 = ir.VectorType(F32, 8), ir.VectorType(ir.IntType(32), 8)


def has_codebook_lookup(instruction_sets: frozenset[str]) -> bool:
    """Whether :func:`add_levels` has code for a machine with these instruction sets."""
    return "avx512f" in instruction_sets


def _isa(context: Any) -> str:
    return next((name for name in ("avx512f", "avx2") if name in features(context)), "")


@intrinsic(prefer_literal=True)
def add_planes(typingctx, words, tile_stride, plane_stride, count, planes, ahead, tables, table_stride, x, x_stride,
               scales, y, y_stride, TILES, ROWS):  # fmt: skip
    """``y += scale * (sum of +x where the plane has a 1 and -x where it has a 0)`` over some planes of one group.

    Args:
        words: of the first tile and plane, int32 ``[count, LANES]``; those of the next tile and plane lie
            `tile_stride` and `plane_stride` further on.
        ahead: how much further on lies what is wanted next, and is fetched from memory meanwhile.
        tables: of the first row of x, float32 ``[8 * count, 16]`` (see :func:`set_tables`).
        x: float32 ``[32 * count]`` of the first row.
        scales: float32 ``[planes, TILES, LANES]``.
        y: float32 ``[ROWS (y_stride apart), TILES, LANES]``.
    """
    tiles, rows = TILES.literal_value, ROWS.literal_value
    signature = types.void(*[types.int64] * 13, TILES, ROWS)

    def codegen(context, builder, signature, args):
        words, tile_stride, plane_stride, count, planes, ahead, tables, table_stride, x, x_stride = args[:10]
        scales, y, y_stride = args[10:13]
        isa = _isa(context)
        # What stays in registers at a time: 32 of them, 16, and 16 or 32 of a quarter of the size.
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
                        tb = {r: at(builder, a, (i, 8 * TABLE)) for r, a in at_tables.items()}
                        xs = {r: at(builder, a, (i, 32 * 4)) for r, a in at_x.items()}
                        new = emit(builder, w, tb, xs, dict(zip(places, sums, strict=True)))
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


def _lookup_512(builder, words, tables, x, sums):
    """``vpermps`` looks 16 nibbles up in a table of 16 at once, and ignores the higher bits: shift, permute, add.

    Every second shift is saved: loaded from one byte further on, a word's next byte is its lowest.
    """
    for byte in range(4):
        w = {t: load(builder, at(builder, a, (byte, 1)), VECTOR_I32, 1 if byte else 4) for t, a in words.items()}
        for nibble in range(2):
            places = {r: at(builder, a, (2 * byte + nibble, TABLE)) for r, a in tables.items()}
            table = {r: load(builder, a, VECTOR_F32) for r, a in places.items()}
            index = {t: builder.lshr(v, ints(4 * nibble)) for t, v in w.items()}
            sums = {(r, t): builder.fadd(s, _permute(builder, table[r], index[t])) for (r, t), s in sums.items()}
    return sums


def _permute(builder, table, index):
    return call(builder, "llvm.x86.avx512.permvar.sf.512", VECTOR_F32, table, index)


def _lookup_256(builder, words, tables, x, sums):
    """As with AVX-512, with the table in two halves: the nibble's highest bit, moved to the sign, chooses."""
    halves = {(p, h): builder.shuffle_vector(s, s, _first(8 * h)) for p, s in sums.items() for h in range(2)}
    zero = ir.Constant(_HALF_I32, [0] * 8)
    for byte in range(4):
        w = {
            (t, h): load(builder, at(builder, a, (h, 32), (byte, 1)), _HALF_I32, 1 if byte else 4)
            for t, a in words.items()
            for h in range(2)
        }
        for nibble in range(2):
            for r, a in tables.items():
                table = at(builder, a, (2 * byte + nibble, TABLE))
                low, high = (load(builder, at(builder, table, (h, 32)), _HALF_F32) for h in range(2))
                for (t, h), v in w.items():
                    index = builder.lshr(v, ir.Constant(_HALF_I32, [4 * nibble] * 8))
                    sign = builder.shl(v, ir.Constant(_HALF_I32, [28 - 4 * nibble] * 8))
                    below, above = (
                        call(builder, "llvm.x86.avx2.permps", _HALF_F32, part, index) for part in (low, high)
                    )
                    found = builder.select(builder.icmp_signed("<", sign, zero), above, below)
                    halves[(r, t), h] = builder.fadd(halves[(r, t), h], found)
    both = ir.Constant(VECTOR_I32, list(range(LANES)))
    return {p: builder.shuffle_vector(halves[p, 0], halves[p, 1], both) for p in sums}


def _first(lane: int) -> Any:
    return ir.Constant(_HALF_I32, list(range(lane, lane + 8)))


def _add_signed(builder, words, tables, x, sums):
    """Without a permutation of floats: a bit becomes the sign of the activation, column by column."""
    flipped = {t: builder.not_(load(builder, a, VECTOR_I32)) for t, a in words.items()}
    for column in range(32):
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
def add_levels(typingctx, words, tile_stride, plane_stride, count, planes, ahead, x, x_stride, table, scales, y,
               y_stride, TILES, ROWS):  # fmt: skip
    """``y += scale * sum of codebook[code] * x``; only for machines that :func:`has_codebook_lookup` names.

    A step puts the codes of every fourth column together, in nibbles, which index the codebook in a register.

    Args:
        words, ahead, x, scales, y: as in :func:`add_planes`.
        table: float32 ``[16]``, the codebook, padded to 16.
    """
    tiles, rows = TILES.literal_value, ROWS.literal_value
    signature = types.void(*[types.int64] * 12, TILES, ROWS)

    def codegen(context, builder, signature, args):
        words, tile_stride, plane_stride, count, planes, ahead, x, x_stride, table, scales, y, y_stride = args[:12]
        if not has_codebook_lookup(features(context)):
            return context.get_dummy_value()
        places = [(r, t) for r in range(rows) for t in range(tiles)]
        levels = load(builder, table, VECTOR_F32)

        def word(i, sums):
            total = dict(zip(places, sums, strict=True))
            for quarter in range(4):

                def plane(p, codes, i=i, quarter=quarter):
                    following = []
                    for t in range(tiles):
                        address = at(builder, words, (tile_stride, t), (plane_stride, p), (i, VECTOR))
                        if quarter == 0:
                            prefetch(builder, builder.add(address, ahead))
                        bit = builder.lshr(load(builder, address, VECTOR_I32), ints(quarter))
                        field = builder.and_(bit, ints(0x11111111))
                        following.append(builder.or_(builder.shl(codes[t], ints(1)), field))
                    return following

                codes = loop(builder, planes, plane, [ints(0)] * tiles)
                for nibble in range(8):
                    column = 4 * nibble + quarter
                    values = [
                        splat(builder, load(builder, at(builder, x, (x_stride, r), (i, 32 * 4), (column, 4)), F32))
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
def add_shift(typingctx, sums, sums_stride, shift, y, y_stride, TILES, ROWS):
    """``y += sum * shift``: a number for each row of x, float32 ``[TILES, LANES]``."""
    tiles, rows = TILES.literal_value, ROWS.literal_value
    signature = types.void(*[types.int64] * 5, TILES, ROWS)

    def codegen(context, builder, signature, args):
        sums, sums_stride, shift, y, y_stride = args[:5]
        for r in range(rows):
            number = splat(builder, load(builder, at(builder, sums, (sums_stride, r)), F32))
            for t in range(tiles):
                to = at(builder, y, (y_stride, r), (t, VECTOR))
                value = load(builder, at(builder, shift, (t, VECTOR)), VECTOR_F32)
                store(builder, fma(builder, number, value, load(builder, to, VECTOR_F32)), to)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def widen(typingctx, source, stride, count, ahead, target, TILES, KIND):
    """`count` times ``TILES * LANES`` parameters, `stride` apart and stored as KIND, to float32 in a row.

    What lies `ahead` bytes further on is wanted next.
    """
    tiles, kind = TILES.literal_value, KIND.literal_value
    signature = types.void(*[types.int64] * 5, TILES, KIND)

    def codegen(context, builder, signature, args):
        source, stride, count, ahead, target = args[:5]

        def row(i, _):
            first = builder.add(at(builder, source, (i, stride)), ahead)
            for line in range(0, tiles * LANES * (4 if kind == F32_KIND else 2), 64):
                prefetch(builder, at(builder, first, (line, 1)))
            for t in range(tiles):
                value = _as_float(context, builder, at(builder, source, (i, stride)), t, kind)
                store(builder, value, at(builder, target, (i, tiles * VECTOR), (t, VECTOR)))
            return []

        loop(builder, count, row, [])
        return context.get_dummy_value()

    return signature, codegen


def _as_float(context, builder, source, tile, kind):
    if kind == F32_KIND:
        return load(builder, at(builder, source, (tile, 4 * LANES)), VECTOR_F32)
    address = at(builder, source, (tile, 2 * LANES))
    if kind == F16_KIND and features(context) & {"f16c", "fullfp16"}:
        return builder.fpext(load(builder, address, VECTOR_F16, 2), VECTOR_F32)
    raw = load(builder, address, VECTOR_I16, 2)
    if kind == F16_KIND:
        return half_to_float(builder, raw)
    return builder.bitcast(builder.shl(builder.zext(raw, VECTOR_I32), ints(16)), VECTOR_F32)


@intrinsic
def set_tables(typingctx, x, tables, count):
    """For every four activations their 16 signed sums: bit j of an index says whether column j is added (1) or taken.

    x is float32 ``[4 * count]``, `tables` float32 ``[count, 16]``. Returns the sum of x.
    """
    signature = types.float32(types.int64, types.int64, types.int64)
    signs = [ir.Constant(VECTOR_F32, [1.0 if c >> j & 1 else -1.0 for c in range(16)]) for j in range(4)]

    def codegen(context, builder, signature, args):
        x, tables, count = args

        def four(i, total):
            table = None
            for j in range(4):
                value = splat(builder, load(builder, at(builder, x, (i, 16), (j, 4)), F32))
                table = fma(builder, value, signs[j], table) if j else builder.fmul(value, signs[j])
            store(builder, table, at(builder, tables, (i, TABLE)))
            return [builder.fadd(total[0], table)]

        (total,) = loop(builder, count, four, [ZERO])
        return builder.extract_element(total, ir.IntType(32)(15))  # index 15 adds all columns

    return signature, codegen


@intrinsic(prefer_literal=True)
def decode_word(typingctx, words, plane_stride, planes, signed, start, scale, zero, codebook, out, out_stride, MODE):
    """Weights of 32 columns of a tile, in the order of operations of DEC-2 to DEC-4, as 16 rows of `out`.

    Args:
        words: of plane 0, int32 ``[LANES]``; of the next plane `plane_stride` further on; `planes` in all.
        signed: float32 ``[planes, LANES]``, what a 0 adds; a 1 takes it away.
        start: float32 ``[LANES]``, what sums start from.
        scale, zero: float32 ``[LANES]``: for ``(sum - zero) * scale`` (MODE 1), or ``codebook[sum] * scale`` (MODE 2);
            MODE 0 is the sum alone.
        out: float32, rows `out_stride` apart.
    """
    mode = MODE.literal_value
    signature = types.void(*[types.int64] * 10, MODE)

    def codegen(context, builder, signature, args):
        words, plane_stride, planes, signed, start, scale, zero, codebook, out, out_stride = args[:10]
        for half in range(2):

            def plane(p, sums, half=half):
                word = load(builder, at(builder, words, (plane_stride, p)), VECTOR_I32)
                value = load(builder, at(builder, signed, (p, VECTOR)), VECTOR_I32)
                steps = [builder.xor(value, _sign_of(builder, word, 16 * half + c)) for c in range(16)]
                return [builder.fadd(s, builder.bitcast(v, VECTOR_F32)) for s, v in zip(sums, steps, strict=True)]

            first = load(builder, start, VECTOR_F32)
            columns = loop(builder, planes, plane, [first] * 16)
            if mode == 1:
                down, by = load(builder, zero, VECTOR_F32), load(builder, scale, VECTOR_F32)
                columns = [builder.fmul(builder.fsub(v, down), by) for v in columns]
            if mode == 2:
                by = load(builder, scale, VECTOR_F32)
                columns = [builder.fmul(_level(builder, codebook, v), by) for v in columns]
            for row, value in enumerate(_transposed(builder, columns)):
                store(builder, value, at(builder, out, (out_stride, row), (half, VECTOR)))
        return context.get_dummy_value()

    return signature, codegen


def _level(builder, codebook, codes):
    """The codebook's entry for each float code."""
    index = builder.zext(builder.fptoui(codes, VECTOR_I32), ir.VectorType(I64, LANES))
    base = splat(builder, codebook)
    addresses = builder.add(base, builder.shl(index, ir.Constant(ir.VectorType(I64, LANES), [2] * LANES)))
    found = ir.Constant(VECTOR_F32, ir.Undefined)
    for lane in range(LANES):
        number = ir.IntType(32)(lane)
        entry = load(builder, builder.extract_element(addresses, number), F32)
        found = builder.insert_element(found, entry, number)
    return found


def _transposed(builder, vectors):
    """16 vectors of 16 lanes, rows for columns, in four rounds of exchanges."""
    vectors = list(vectors)
    for d in (8, 4, 2, 1):
        keep = [lane if lane & d == 0 else 16 + lane - d for lane in range(16)]
        move = [lane + d if lane & d == 0 else 16 + lane for lane in range(16)]
        low, high = (ir.Constant(VECTOR_I32, mask) for mask in (keep, move))
        for i in range(16):
            if i & d == 0:
                a, b = vectors[i], vectors[i + d]
                vectors[i], vectors[i + d] = builder.shuffle_vector(a, b, low), builder.shuffle_vector(a, b, high)
    return vectors


@intrinsic
def take(typingctx, counter):
    """The number at address `counter`, which grows by one: each thread takes another."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], I64.as_pointer())
        return builder.atomic_rmw("add", pointer, I64(1), "monotonic")

    return types.int64(types.int64), codegen


@intrinsic
def address_of(typingctx, pointer):
    """A pointer as an int64."""

    def codegen(context, builder, signature, args):
        return builder.ptrtoint(args[0], I64)

    return types.int64(pointer), codegen


def _pointer_intrinsic(kind: Any) -> Any:
    @intrinsic
    def pointer(typingctx, address):
        """A pointer to numbers at an int64 address."""

        def codegen(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), codegen

    return pointer


floats_at, longs_at, bytes_at = (_pointer_intrinsic(kind) for kind in (types.float32, types.int64, types.uint8))
