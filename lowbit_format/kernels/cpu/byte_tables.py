"""The innermost loops for 8-bit activations, in LLVM: tables whose entries are bytes, and their sums.

A table has the 16 signed sums of four activations, as in :mod:`.intrinsics`, each rounded to a multiple of a *step*,
which is a multiple of a *unit* (:mod:`..rounded_sums`). A byte is a quarter of a float, so one instruction looks up
four times as many. Sums of bytes times multipliers are integers, exact, and one unit and one scale turn them into
floats. For a word of 32 columns there are eight tables and multipliers, in the order in which registers take them::

    tables[n, b, i], multipliers[n, b]
        n: low or high nibble, b: byte of the word, i: entry of the table of columns 8 b + 4 n and on

There are two ways to look up. With AVX-512 VBMI a permutation has 64 entries: the four tables of a word's low
nibbles at once. So words stay as they are, and ``vpdpbusd`` multiplies and adds up the four bytes that each row has.
Everywhere else an instruction has 16 entries, one table (``pshufb``, NEON's ``tbl``): the bytes of four tiles are
brought into an order in which a register has one byte of many rows, and ``pmaddubsw`` multiplies and adds up the two
nibbles.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ...machine.llvm import (
    F32,
    I8,
    I16,
    I32,
    LANES,
    VECTOR_F32,
    VECTOR_I32,
    ZERO,
    at,
    call,
    features,
    fma,
    ints,
    load,
    loop,
    prefetch,
    splat,
    store,
)
from ..rounded_sums import LARGEST, SMALLEST, UNITS
from .intrinsics import VECTOR
from .tiles import STRIP, WORD

TABLE = 16  # bytes: the signed sums of four columns
HALF_TABLES = 4 * TABLE  # of a word's low nibbles, or of its high ones
WORD_TABLES = 2 * HALF_TABLES
WORD_MULTIPLIERS = 8
MARGIN = HALF_TABLES  # bytes behind the tables that may be read

_VBMI = {"avx512f", "avx512bw", "avx512vbmi", "avx512vnni"}
_LOOKUPS = {  # instruction set -> bytes of a register, and the function of LLVM that looks up its bytes in 16 entries
    "avx512bw": (64, "llvm.x86.avx512.pshuf.b.512"),
    "avx2": (32, "llvm.x86.avx2.pshuf.b"),
    "ssse3": (16, "llvm.x86.ssse3.pshuf.b.128"),
    "neon": (16, "llvm.aarch64.neon.tbl1.v16i8"),
}
_MULTIPLICATIONS = {  # of bytes to 16 bits (pmaddubsw), and of those to 32 (pmaddwd)
    "avx512bw": ("llvm.x86.avx512.pmaddubs.w.512", "llvm.x86.avx512.pmaddw.d.512"),
    "avx2": ("llvm.x86.avx2.pmadd.ub.sw", "llvm.x86.avx2.pmadd.wd"),
    "ssse3": ("llvm.x86.ssse3.pmadd.ub.sw.128", "llvm.x86.sse2.pmadd.wd"),
}
_BYTES = ir.VectorType(I8, VECTOR)
# LLVM 22 counts the operands of vpdpbusd in bytes, those before it in words.
_DOT_OPERAND = _BYTES if llvmlite.binding.llvm_version_info[0] >= 22 else VECTOR_I32
_ROUND = 1.5 * 2**23  # behind the sum with it, the lowest bits of a float are those of the nearest integer


def has_byte_lookup(instruction_sets: frozenset[str]) -> bool:
    """Whether a machine with these instruction sets can run :func:`add_planes_of_bytes`."""
    return not instruction_sets.isdisjoint(_LOOKUPS)


def looks_up_64(instruction_sets: frozenset[str]) -> bool:
    """Whether such a machine looks up 64 entries at once, and not 16."""
    return instruction_sets >= _VBMI


@intrinsic
def set_byte_tables(typingctx, x, tables, multipliers, first, count, unit, total):
    """Fill tables with the signed sums of every four activations, rounded to multiples of their steps.

    Args:
        x: float32, the activations of a row of x from half word 0 on; a half word is 16 columns.
        tables: int8 ``[half words / 2, 2, 4, 16]``, those of the row.
        multipliers: uint8 ``[half words / 2, 2, 4]``: the step of each table, in units.
        first, count: the half words to fill, which share the unit.
        unit, total: float32, addresses to write the unit and the sum of the activations to. The unit is NaN if an
            activation is not finite.
    """
    signature = types.void(*[types.int64] * 7)
    signs = [ir.Constant(VECTOR_F32, [1.0 if c >> j & 1 else -1.0 for c in range(16)]) for j in range(4)]

    def codegen(context, builder, signature, args):
        x, tables, multipliers, first, count, unit, total = args
        half_columns = WORD // 2

        def sizes(number):
            """Activations of a half word; and of each quad, in its four lanes, the sum of absolute values."""
            value = load(builder, at(builder, x, (number, 4 * half_columns)), VECTOR_F32)
            size = builder.bitcast(builder.and_(builder.bitcast(value, VECTOR_I32), ints(0x7FFFFFFF)), VECTOR_F32)
            for distance in (1, 2):  # (|x0| + |x1|) + (|x2| + |x3|)
                size = builder.fadd(size, _exchanged(builder, size, distance))
            return value, size

        def largest(i, carried):
            value, size = sizes(builder.add(first, i))
            return [_larger(builder, size, carried[0]), builder.fadd(carried[1], value)]

        most, added = loop(builder, count, largest, [ZERO, ZERO])
        for distance in (4, 8):
            most = _larger(builder, _exchanged(builder, most, distance), most)
        for distance in (1, 2, 4, 8):
            added = builder.fadd(added, _exchanged(builder, added, distance))
        is_some = builder.fcmp_ordered(">", most, _floats(SMALLEST))
        share = builder.select(is_some, builder.fdiv(_floats(UNITS), most), ZERO)
        by = builder.select(is_some, builder.fdiv(_floats(UNITS * LARGEST), most), ZERO)
        nothing = builder.fsub(added, added)  # NaN if an activation is not finite
        of_one = builder.fadd(builder.fdiv(most, _floats(UNITS * LARGEST)), nothing)
        store(builder, builder.extract_element(of_one, I32(0)), unit)
        store(builder, builder.extract_element(added, I32(0)), total)

        def half(i, _):
            number = builder.add(first, i)
            word, odd = builder.lshr(number, number.type(1)), builder.and_(number, number.type(1))
            to_tables = at(builder, tables, (word, WORD_TABLES), (odd, 2 * TABLE))
            to_multipliers = at(builder, multipliers, (word, WORD_MULTIPLIERS), (odd, 2))
            _, size = sizes(number)
            wanted = builder.fadd(builder.fmul(size, share), _floats(0.5))
            multiplier = builder.fsub(builder.fadd(wanted, _floats(_ROUND)), _floats(_ROUND))
            multiplier = _larger(builder, multiplier, _floats(1.0))
            as_bytes = _lowest_bytes(builder, multiplier)
            factors = builder.fdiv(by, multiplier)
            for quad in range(4):
                place = quad % 2, quad // 2  # nibble, byte
                one = builder.extract_element(as_bytes, I32(4 * quad))
                store(builder, one, at(builder, to_multipliers, (place[0], 4), (place[1], 1)), align=1)
                entries = None
                for j in range(4):
                    address = at(builder, x, (number, 4 * half_columns), (4 * quad + j, 4))
                    value = splat(builder, load(builder, address, F32))
                    entries = fma(builder, value, signs[j], entries) if j else builder.fmul(value, signs[j])
                factor = builder.shuffle_vector(factors, factors, _mask([4 * quad] * LANES))
                rounded = _lowest_bytes(builder, builder.fmul(entries, factor))
                store(builder, rounded, at(builder, to_tables, (place[0], HALF_TABLES), (place[1], TABLE)), align=1)
            return []

        loop(builder, count, half, [])
        return context.get_dummy_value()

    return signature, codegen


def _larger(builder: Any, a: Any, b: Any) -> Any:
    """The larger one of each lane; `b` where `a` is NaN."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _lowest_bytes(builder: Any, value: Any) -> Any:
    """The lowest byte of each float, rounded to an integer."""
    shifted = builder.bitcast(builder.fadd(value, _floats(_ROUND)), VECTOR_I32)
    return builder.trunc(shifted, ir.VectorType(I8, LANES))


def _floats(value: float) -> Any:
    """A constant float32 vector with `value` in every lane."""
    return ir.Constant(VECTOR_F32, [float(np.float32(value))] * LANES)


def _exchanged(builder: Any, vector: Any, distance: int) -> Any:
    """`vector` with lanes i and i ^ `distance` exchanged."""
    return builder.shuffle_vector(vector, vector, ir.Constant(VECTOR_I32, [i ^ distance for i in range(LANES)]))


@intrinsic(prefer_literal=True)
def add_planes_of_bytes(
    typingctx,
    # addresses
    words,
    tables,
    multipliers,
    units,
    scales,
    y,
    # sizes
    count,
    planes,
    # strides
    tile_stride,
    plane_stride,
    table_stride,
    multiplier_stride,
    unit_stride,
    y_stride,
    ahead,
    # constants
    TILES,
    ROWS,
    BYTES,
):
    """``y += unit * sum over planes of scale * (sum of multiplier * entry)`` over one block, looked up by bits.

    Args:
        words, scales, y, count, planes, tile_stride, plane_stride, y_stride, ahead: as in
            :func:`.intrinsics.add_planes`.
        tables: int8 ``[ROWS (table_stride), count, 2, 4, 16]`` of :func:`set_byte_tables`; from the first byte on that
            is read of a word. `MARGIN` bytes more may be read.
        multipliers: uint8 ``[ROWS (multiplier_stride), count, 2, 4]``, likewise from that byte on; two bytes more may
            be read.
        units: float32 ``[ROWS (unit_stride)]``.
        TILES, ROWS: numbers of tiles, up to four, and of rows of x.
        BYTES: of each word, 4; or 2 of one word, where the group is half of it.
    """
    tiles, rows, size = TILES.literal_value, ROWS.literal_value, BYTES.literal_value
    signature = types.void(*[types.int64] * 15, TILES, ROWS, BYTES)

    def codegen(context, builder, signature, args):
        words, tables, multipliers, units, scales, y, count, planes = args[:8]
        tile_stride, plane_stride, table_stride, multiplier_stride, unit_stride, y_stride, ahead = args[8:15]
        machine = features(context)
        if not has_byte_lookup(machine):
            return context.get_dummy_value()
        by_64 = looks_up_64(machine)
        width, _ = _lookup(machine)
        for part in range(VECTOR // width):  # bytes part * width and on of every vector of words
            kind = ir.VectorType(F32, width // 4)
            places = [(r, t) for r in range(rows) for t in range(tiles)]

            def plane(p, totals, part=part, kind=kind, places=places):
                at_words = [
                    at(builder, words, (plane_stride, p), (tile_stride, t), (part, width)) for t in range(tiles)
                ]
                of_x = [
                    (at(builder, tables, (table_stride, r)), at(builder, multipliers, (multiplier_stride, r)))
                    for r in range(rows)
                ]
                sums = (
                    _sums_by_64(builder, at_words, of_x, count, ahead, size)
                    if by_64
                    else _sums_by_16(builder, at_words, of_x, count, ahead, size, machine)
                )
                following = []
                for (r, t), total in zip(places, totals, strict=True):
                    place = at(builder, scales, (p, tiles * VECTOR), (t, VECTOR), (part, width))
                    value = builder.sitofp(sums[r, t], kind)
                    following.append(_fma(builder, value, load(builder, place, kind), total))
                return following

            totals = loop(builder, planes, plane, [ir.Constant(kind, [0.0] * (width // 4))] * len(places))
            for (r, t), total in zip(places, totals, strict=True):
                unit = splat(builder, load(builder, at(builder, units, (unit_stride, r)), F32))
                to = at(builder, y, (y_stride, r), (t, VECTOR), (part, width))
                store(builder, _fma(builder, total, _first(builder, unit, kind), load(builder, to, kind)), to)
        return context.get_dummy_value()

    return signature, codegen


def _first(builder: Any, vector: Any, kind: Any) -> Any:
    """The first lanes of `vector`, as many as `kind` has."""
    return builder.shuffle_vector(vector, vector, _mask(range(kind.count)))


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return call(builder, f"llvm.fmuladd.v{a.type.count}f32", a.type, a, b, c)


def _sums_by_64(builder, words, of_x, count, ahead, size):
    """``vpermb`` looks up the nibbles of all four bytes of a word, each in the table of its own: mask and number the
    tables in one instruction, permute, multiply and add the bytes of a row.

    Args:
        words: addresses, of the words of each tile.
        of_x: addresses of tables and multipliers, for each row of x.

    Returns:
        int32 ``[LANES]`` for each row of x and tile.
    """
    places = [(r, t) for r in range(len(of_x)) for t in range(len(words))]
    nibbles, numbers = ints(0x0F0F0F0F), ints(0x30201000)

    def word(i, sums):
        at_words = [at(builder, a, (i, VECTOR)) for a in words]
        for address in at_words:
            prefetch(builder, builder.add(address, ahead))
        loaded = [load(builder, a, VECTOR_I32, size) for a in at_words]
        sums = dict(zip(places, sums, strict=True))
        for n in range(2):
            index = [
                builder.bitcast(builder.or_(builder.and_(builder.lshr(w, ints(4 * n)), nibbles), numbers), _BYTES)
                for w in loaded
            ]
            for r, (tables, multipliers) in enumerate(of_x):
                table = load(builder, at(builder, tables, (i, WORD_TABLES), (n, HALF_TABLES)), _BYTES, 1)
                four = load(builder, at(builder, multipliers, (i, WORD_MULTIPLIERS), (n, 4)), I32, 1)
                if size < 4:  # other bytes are of another group
                    four = builder.and_(four, I32((1 << 8 * size) - 1))
                factors = builder.bitcast(splat(builder, four), _DOT_OPERAND)
                for t, mine in enumerate(index):
                    entries = call(builder, "llvm.x86.avx512.permvar.qi.512", _BYTES, table, mine)
                    sums[r, t] = call(
                        builder, "llvm.x86.avx512.vpdpbusd.512", VECTOR_I32,
                        sums[r, t], factors, builder.bitcast(entries, _DOT_OPERAND),
                    )  # fmt: skip
        return [sums[place] for place in places]

    found = loop(builder, count, word, [ints(0)] * len(places))
    return dict(zip(places, found, strict=True))


def _sums_by_16(builder, words, of_x, count, ahead, size, machine):
    """Lookups in one table at a time, for as many bytes of the words of four tiles as a register has.

    Sixteen bytes of a vector are four words: their bytes b of four tiles become sixteen of a vector of their own. The
    entries of both nibbles, side by side, are multiplied and added to numbers of 16 bits. Those of the first half of a
    word's bytes and those of the second, side by side, are added to sums of 32 bits.

    Arguments and result as of :func:`_sums_by_64`, with a quarter of the register's bytes for ``LANES``.
    """
    width, _ = _lookup(machine)
    kind, pairs, fours = (ir.VectorType(t, width // n) for t, n in ((I8, 1), (I16, 2), (I32, 4)))
    nibbles, tiles = _of(kind, 0x0F), range(len(words))

    def word(i, sums):
        at_words = [at(builder, a, (i, VECTOR)) for a in words]
        for address in at_words:
            prefetch(builder, builder.add(address, ahead))
        loaded = [load(builder, a, kind, 1) for a in at_words]
        loaded += [_of(kind, 0)] * (STRIP - len(loaded))
        index = {}
        for b, of_byte in enumerate(_by_byte(builder, loaded, width)[:size]):
            for n in range(2):
                shifted = builder.bitcast(builder.lshr(builder.bitcast(of_byte, pairs), _of(pairs, 4 * n)), kind)
                index[b, n] = builder.and_(shifted, nibbles)
        sums = list(sums)
        for r, (tables, multipliers) in enumerate(of_x):
            halves: list[list[Any]] = [[], []]  # of the bytes: sums of tiles 0 and 1, and of 2 and 3
            for b in range(size):
                factors = _two_factors(builder, at(builder, multipliers, (i, WORD_MULTIPLIERS), (b, 1)), kind)
                of_byte = at(builder, tables, (i, WORD_TABLES), (b, TABLE))
                found = [
                    _look_up(builder, at(builder, of_byte, (n, HALF_TABLES)), index[b, n], machine) for n in range(2)
                ]
                both = [_interleaved(builder, *found, h) for h in range(2)]
                products = [_multiply_pairs(builder, factors, one, machine) for one in both]
                half = halves[2 * b // size]
                half[:] = [builder.add(*two) for two in zip(half, products, strict=True)] if half else products
            for t in tiles:
                side_by_side = _interleaved(builder, halves[0][t // 2], halves[1][t // 2], t % 2)
                at_sum = r * len(words) + t
                sums[at_sum] = builder.add(sums[at_sum], _add_pairs(builder, side_by_side, machine))
        return sums

    found = loop(builder, count, word, [_of(fours, 0)] * (len(of_x) * len(words)))
    return {(r, t): found[r * len(words) + t] for r in range(len(of_x)) for t in tiles}


def _two_factors(builder, address, kind):
    """The multipliers of the two nibbles of a byte, in turn in all lanes of `kind`; `address` is that of the first."""
    low, high = (builder.zext(load(builder, at(builder, address, (n, 4)), I8, 1), I16) for n in range(2))
    two = builder.or_(low, builder.shl(high, I16(8)))
    pairs = ir.VectorType(I16, kind.count // 2)
    one = builder.insert_element(ir.Constant(pairs, ir.Undefined), two, I32(0))
    return builder.bitcast(builder.shuffle_vector(one, one, _mask([0] * pairs.count)), kind)


def _multiply_pairs(builder, factors, entries, machine):
    """Sums of two products of bytes, the factors unsigned, as numbers of 16 bits, which they fit in."""
    pairs = ir.VectorType(I16, entries.type.count // 2)
    name = _multiplications(machine)[0]
    if name:
        return call(builder, name, pairs, factors, entries)
    wide = ir.VectorType(I16, entries.type.count)
    products = builder.mul(builder.zext(factors, wide), builder.sext(entries, wide))
    even, odd = (builder.shuffle_vector(products, products, _mask(range(h, wide.count, 2))) for h in range(2))
    return builder.add(even, odd)


def _add_pairs(builder, numbers, machine):
    """Sums of two numbers of 16 bits, as numbers of 32 bits."""
    fours = ir.VectorType(I32, numbers.type.count // 2)
    name = _multiplications(machine)[1]
    if name:
        return call(builder, name, fours, numbers, _of(numbers.type, 1))
    low = builder.ashr(builder.shl(builder.bitcast(numbers, fours), _of(fours, 16)), _of(fours, 16))
    return builder.add(low, builder.ashr(builder.bitcast(numbers, fours), _of(fours, 16)))


def _lookup(machine: frozenset[str]) -> tuple[int, str]:
    """Bytes of a register, and the function of LLVM that looks them up."""
    return next(found for name, found in _LOOKUPS.items() if name in machine)


def _multiplications(machine: frozenset[str]) -> tuple[str, str]:
    """The functions of LLVM that multiply bytes and numbers of 16 bits, and add pairs of products; or none."""
    return next((found for name, found in _MULTIPLICATIONS.items() if name in machine), ("", ""))


def _look_up(builder, table, index, machine):
    """Entries `index` of the 16 at address `table`."""
    kind = ir.VectorType(I8, 16)
    loaded = load(builder, table, kind, 1)
    whole = builder.shuffle_vector(loaded, loaded, _mask(list(range(16)) * (index.type.count // 16)))
    return call(builder, _lookup(machine)[1], index.type, whole, index)


def _by_byte(builder, tiles, width):
    """From vectors of the words of four tiles: for each byte of a word a vector with that byte of 16 words in each 16
    bytes, first the four of tile 0, then those of tile 1, …
    """
    fours = ir.VectorType(I32, width // 4)
    within = [16 * lane + 4 * (i % 4) + i // 4 for lane in range(width // 16) for i in range(16)]
    grouped = [builder.bitcast(builder.shuffle_vector(v, v, _mask(within)), fours) for v in tiles]
    found = []
    for half in range(2):  # bytes 0 and 1, then 2 and 3
        first, second = (_interleaved(builder, grouped[t], grouped[t + 1], half) for t in (0, 2))
        eights = ir.VectorType(ir.IntType(64), width // 8)
        first, second = builder.bitcast(first, eights), builder.bitcast(second, eights)
        found += [builder.bitcast(_interleaved(builder, first, second, h), tiles[0].type) for h in range(2)]
    return found


def _interleaved(builder, a, b, half):
    """The elements of half `half` of every 16 bytes of `a` and `b`, in turn (``unpacklo`` and ``unpackhi``)."""
    count = a.type.count
    here = 128 // a.type.element.width
    lanes = range(0, count, here)
    mask = [lane + half * here // 2 + i // 2 + (i % 2) * count for lane in lanes for i in range(here)]
    return builder.shuffle_vector(a, b, _mask(mask))


def _mask(places: Any) -> Any:
    places = list(places)
    return ir.Constant(ir.VectorType(I32, len(places)), places)


def _of(kind: Any, value: int) -> Any:
    """A constant vector with `value` in every lane."""
    return ir.Constant(kind, [value] * kind.count)
