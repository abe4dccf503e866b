"""The innermost loops for 8-bit activations, in LLVM: tables whose entries are bytes, and their sums.

A table has the 16 signed sums of four activations, as in :mod:`.intrinsics`, each rounded to a multiple of a *step*
(:mod:`..rounded_sums`). A byte is a quarter of a float, so one instruction looks up four times as many. Sums of bytes
are integers, exact, and one step and one scale turn them into floats. For a word of 32 columns there are eight tables,
in the order in which registers take them::

    tables[n, b, i]   n: low or high nibble, b: byte of the word, i: entry of the table of columns 8 b + 4 n and on

There are two ways to look up. With AVX-512 VBMI a permutation has 64 entries: the four tables of a word's low
nibbles at once. So words stay as they are, and ``vpdpbusd`` adds up the four bytes that each row has. Everywhere else
an instruction has 16 entries, one table (``pshufb``, NEON's ``tbl``): the bytes of four tiles are brought into an
order in which a register has one byte of many rows.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding
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
from ..rounded_sums import LARGEST, SMALLEST
from .intrinsics import VECTOR
from .tiles import STRIP, WORD

TABLE = 16  # bytes: the signed sums of four columns
HALF_TABLES = 4 * TABLE  # of a word's low nibbles, or of its high ones
WORD_TABLES = 2 * HALF_TABLES
MARGIN = HALF_TABLES  # bytes behind the tables that may be read

_VBMI = {"avx512f", "avx512bw", "avx512vbmi", "avx512vnni"}
_LOOKUPS = {  # instruction set -> bytes of a register, and the function of LLVM that looks up its bytes in 16 entries
    "avx512bw": (64, "llvm.x86.avx512.pshuf.b.512"),
    "avx2": (32, "llvm.x86.avx2.pshuf.b"),
    "ssse3": (16, "llvm.x86.ssse3.pshuf.b.128"),
    "neon": (16, "llvm.aarch64.neon.tbl1.v16i8"),
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
def set_byte_tables(typingctx, x, tables, first, count, step, total):
    """Fill tables with the signed sums of every four activations, rounded to multiples of one step.

    Args:
        x: float32, the activations of a row of x from half word 0 on; a half word is 16 columns.
        tables: int8 ``[half words / 2, 2, 4, 16]``, those of the row. Where sixteen entries are looked up at once,
            each has 128 more, as a uint8.
        first, count: the half words to fill, which share the step.
        step, total: float32, addresses to write the step and the sum of the activations to. The step is NaN if an
            activation is not finite.
    """
    signature = types.void(*[types.int64] * 6)
    signs = [ir.Constant(VECTOR_F32, [1.0 if c >> j & 1 else -1.0 for c in range(16)]) for j in range(4)]

    def codegen(context, builder, signature, args):
        x, tables, first, count, step, total = args
        bias = 0 if looks_up_64(features(context)) else 128
        half_columns = WORD // 2

        def largest(i, carried):
            most, added = carried
            value = load(builder, at(builder, x, (builder.add(first, i), 4 * half_columns)), VECTOR_F32)
            size = builder.bitcast(builder.and_(builder.bitcast(value, VECTOR_I32), ints(0x7FFFFFFF)), VECTOR_F32)
            for distance in (1, 2):  # (|x0| + |x1|) + (|x2| + |x3|)
                size = builder.fadd(size, _exchanged(builder, size, distance))
            is_more = builder.fcmp_ordered(">", size, most)
            return [builder.select(is_more, size, most), builder.fadd(added, value)]

        most, added = loop(builder, count, largest, [ZERO, ZERO])
        for distance in (4, 8):
            other = _exchanged(builder, most, distance)
            most = builder.select(builder.fcmp_ordered(">", other, most), other, most)
        for distance in (1, 2, 4, 8):
            added = builder.fadd(added, _exchanged(builder, added, distance))
        limit, smallest = ir.Constant(F32, float(LARGEST)), ir.Constant(VECTOR_F32, [_float32(SMALLEST)] * LANES)
        limits = splat(builder, limit)
        by = builder.select(builder.fcmp_ordered(">", most, smallest), builder.fdiv(limits, most), ZERO)
        nothing = builder.fsub(added, added)  # NaN if an activation is not finite
        of_one = builder.fadd(builder.fdiv(most, limits), nothing)
        store(builder, builder.extract_element(of_one, I32(0)), step)
        store(builder, builder.extract_element(added, I32(0)), total)

        def half(i, _):
            number = builder.add(first, i)
            word, odd = builder.lshr(number, number.type(1)), builder.and_(number, number.type(1))
            to = at(builder, tables, (word, WORD_TABLES), (odd, 2 * TABLE))
            for quad in range(4):
                entries = None
                for j in range(4):
                    place = at(builder, x, (number, 4 * half_columns), (4 * quad + j, 4))
                    value = splat(builder, load(builder, place, F32))
                    entries = fma(builder, value, signs[j], entries) if j else builder.fmul(value, signs[j])
                shifted = builder.fadd(builder.fmul(entries, by), ir.Constant(VECTOR_F32, [_ROUND] * LANES))
                entry = builder.add(builder.bitcast(shifted, VECTOR_I32), ints(bias))
                place = at(builder, to, (quad % 2, HALF_TABLES), (quad // 2, TABLE))
                store(builder, builder.trunc(entry, ir.VectorType(I8, LANES)), place, align=1)
            return []

        loop(builder, count, half, [])
        return context.get_dummy_value()

    return signature, codegen


def _exchanged(builder: Any, vector: Any, distance: int) -> Any:
    """`vector` with lanes i and i ^ `distance` exchanged."""
    return builder.shuffle_vector(vector, vector, ir.Constant(VECTOR_I32, [i ^ distance for i in range(LANES)]))


def _float32(value: float) -> float:
    """A float that LLVM's text form has as a float32."""
    import numpy as np

    return float(np.float32(value))


@intrinsic(prefer_literal=True)
def add_planes_of_bytes(
    typingctx,
    # addresses
    words,
    tables,
    steps,
    scales,
    y,
    # sizes
    count,
    planes,
    # strides
    tile_stride,
    plane_stride,
    table_stride,
    step_stride,
    y_stride,
    ahead,
    # constants
    TILES,
    ROWS,
    BYTES,
):
    """``y += step * sum over planes of scale * (sum of the entries that the plane's bits look up)``, over one block.

    Args:
        words, scales, y, count, planes, tile_stride, plane_stride, y_stride, ahead: as in
            :func:`.intrinsics.add_planes`.
        tables: int8 ``[ROWS (table_stride), count, 2, 4, 16]`` of :func:`set_byte_tables`; from the first byte on that
            is read of a word. `MARGIN` bytes more may be read.
        steps: float32 ``[ROWS (step_stride)]``.
        TILES, ROWS: numbers of tiles, up to four, and of rows of x.
        BYTES: of each word, 4; or 2 of one word, where the group is half of it.
    """
    tiles, rows, size = TILES.literal_value, ROWS.literal_value, BYTES.literal_value
    signature = types.void(*[types.int64] * 13, TILES, ROWS, BYTES)

    def codegen(context, builder, signature, args):
        words, tables, steps, scales, y, count, planes = args[:7]
        tile_stride, plane_stride, table_stride, step_stride, y_stride, ahead = args[7:13]
        machine = features(context)
        if not has_byte_lookup(machine):
            return context.get_dummy_value()
        by_64 = looks_up_64(machine)
        width, lookup = next(found for name, found in _LOOKUPS.items() if name in machine)
        for part in range(VECTOR // width):  # bytes part * width and on of every vector of words
            kind = ir.VectorType(F32, width // 4)
            places = [(r, t) for r in range(rows) for t in range(tiles)]

            def plane(p, totals, part=part, kind=kind, places=places):
                at_words = [
                    at(builder, words, (plane_stride, p), (tile_stride, t), (part, width)) for t in range(tiles)
                ]
                at_tables = [at(builder, tables, (table_stride, r)) for r in range(rows)]
                sums = (
                    _sums_by_64(builder, at_words, at_tables, count, ahead, size)
                    if by_64
                    else _sums_by_16(builder, at_words, at_tables, count, ahead, size, width, lookup)
                )
                following = []
                for (r, t), total in zip(places, totals, strict=True):
                    place = at(builder, scales, (p, tiles * VECTOR), (t, VECTOR), (part, width))
                    value = builder.sitofp(sums[r, t], kind)
                    following.append(_fma(builder, value, load(builder, place, kind), total))
                return following

            totals = loop(builder, planes, plane, [ir.Constant(kind, [0.0] * (width // 4))] * len(places))
            for (r, t), total in zip(places, totals, strict=True):
                step = splat(builder, load(builder, at(builder, steps, (step_stride, r)), F32))
                to = at(builder, y, (y_stride, r), (t, VECTOR), (part, width))
                store(builder, _fma(builder, total, _first(builder, step, kind), load(builder, to, kind)), to)
        return context.get_dummy_value()

    return signature, codegen


def _first(builder: Any, vector: Any, kind: Any) -> Any:
    """The first lanes of `vector`, as many as `kind` has."""
    return builder.shuffle_vector(vector, vector, _mask(range(kind.count)))


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return call(builder, f"llvm.fmuladd.v{a.type.count}f32", a.type, a, b, c)


def _sums_by_64(builder, words, tables, count, ahead, size):
    """``vpermb`` looks up the nibbles of all four bytes of a word, each in the table of its own: mask and number the
    tables in one instruction, permute, and add the bytes of a row.

    Returns:
        int32 ``[LANES]`` for each row of x and tile.
    """
    places = [(r, t) for r in range(len(tables)) for t in range(len(words))]
    nibbles, numbers = ints(0x0F0F0F0F), ints(0x30201000)
    ones = builder.bitcast(ints((1 << 8 * size) // 255), _DOT_OPERAND)  # 1 for each byte of the group, else 0

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
            for r, a in enumerate(tables):
                table = load(builder, at(builder, a, (i, WORD_TABLES), (n, HALF_TABLES)), _BYTES, 1)
                for t, mine in enumerate(index):
                    entries = call(builder, "llvm.x86.avx512.permvar.qi.512", _BYTES, table, mine)
                    sums[r, t] = call(
                        builder, "llvm.x86.avx512.vpdpbusd.512", VECTOR_I32,
                        sums[r, t], ones, builder.bitcast(entries, _DOT_OPERAND),
                    )  # fmt: skip
        return [sums[place] for place in places]

    found = loop(builder, count, word, [ints(0)] * len(places))
    return dict(zip(places, found, strict=True))


def _sums_by_16(builder, words, tables, count, ahead, size, width, lookup):
    """Lookups in one table at a time, for `width` bytes of the words of four tiles.

    Sixteen bytes of a vector are four words: their bytes b of four tiles become sixteen of a vector of their own. Pairs
    of entries are added as one 16-bit number, and the higher ones once more by themselves: what is left of the first
    sum is that of the lower ones. In a block they fit.

    Returns:
        int32 ``[width / 4]`` for each row of x and tile.
    """
    kind, pairs, fours = (ir.VectorType(t, width // n) for t, n in ((I8, 1), (I16, 2), (I32, 4)))
    nibbles, eight = _of(kind, 0x0F), _of(pairs, 8)

    def word(i, sums):
        at_words = [at(builder, a, (i, VECTOR)) for a in words]
        for address in at_words:
            prefetch(builder, builder.add(address, ahead))
        loaded = [load(builder, a, kind, 1) for a in at_words]
        loaded += [_of(kind, 0)] * (STRIP - len(loaded))
        sums = list(sums)
        for b, of_byte in enumerate(_by_byte(builder, loaded, width)[:size]):
            for n in range(2):
                shifted = builder.bitcast(builder.lshr(builder.bitcast(of_byte, pairs), _of(pairs, 4 * n)), kind)
                index = builder.and_(shifted, nibbles)
                for r, a in enumerate(tables):
                    place = at(builder, a, (i, WORD_TABLES), (n, HALF_TABLES), (b, TABLE))
                    entries = builder.bitcast(_look_up(builder, place, index, lookup), pairs)
                    sums[2 * r] = builder.add(sums[2 * r], entries)
                    sums[2 * r + 1] = builder.add(sums[2 * r + 1], builder.lshr(entries, eight))
        return sums

    found = loop(builder, count, word, [_of(pairs, 0)] * (2 * len(tables)))
    lookups = builder.trunc(builder.mul(count, count.type(128 * 2 * size)), I32)
    bias = builder.insert_element(ir.Constant(fours, ir.Undefined), lookups, I32(0))
    bias = builder.shuffle_vector(bias, bias, _mask([0] * (width // 4)))
    sums = {}
    for r in range(len(tables)):
        both, high = found[2 * r : 2 * r + 2]
        low = builder.sub(both, builder.shl(high, eight))
        two = [_interleaved(builder, low, high, half) for half in range(2)]  # tiles 0 and 1, and 2 and 3
        for t in range(len(words)):
            numbers = builder.bitcast(_interleaved(builder, two[t // 2], _of(pairs, 0), t % 2), fours)
            sums[r, t] = builder.sub(numbers, bias)
    return sums


def _look_up(builder, table, index, lookup):
    """Entries `index` of the 16 at address `table`, by the function of LLVM called `lookup`."""
    kind = ir.VectorType(I8, 16)
    loaded = load(builder, table, kind, 1)
    whole = builder.shuffle_vector(loaded, loaded, _mask(list(range(16)) * (index.type.count // 16)))
    return call(builder, lookup, index.type, whole, index)


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
