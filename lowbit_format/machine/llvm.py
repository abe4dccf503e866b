"""SIMD code of sixteen lanes in LLVM, written through llvmlite: what all Numba intrinsics of this package are made of.

Numba keeps no array in registers, so innermost loops are emitted as LLVM code. It names no instruction set: LLVM lowers
``<16 x float>`` to what the machine has. A place in memory is always an int64 address, an offset a number of bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core.registry import cpu_target

LANES = 16  # elements of a vector, whatever their type

I1, I8, I16, I32, I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
VECTOR_I8, VECTOR_I16, VECTOR_I32, VECTOR_F16, VECTOR_F32 = (ir.VectorType(t, LANES) for t in (I8, I16, I32, F16, F32))
ZERO = ir.Constant(VECTOR_F32, [0.0] * LANES)


def loop(builder: Any, count: Any, body: Callable[[Any, list[Any]], Sequence[Any]], carried: Sequence[Any]) -> Any:
    """Emit ``for i in range(count)`` and return the carried values after it.

    Args:
        count: int64, at least 1.
        body: of ``(i, values)``; emits one iteration and returns the next `values`.
        carried: the first `values`.
    """
    entry = builder.block
    inside, after = builder.append_basic_block("loop"), builder.append_basic_block("after")
    builder.branch(inside)
    builder.position_at_end(inside)
    i = builder.phi(I64)
    i.add_incoming(I64(0), entry)
    phis = [builder.phi(v.type) for v in carried]
    for phi, v in zip(phis, carried, strict=True):
        phi.add_incoming(v, entry)
    values = body(i, phis)
    following = builder.add(i, I64(1))
    end = builder.block
    i.add_incoming(following, end)
    for phi, v in zip(phis, values, strict=True):
        phi.add_incoming(v, end)
    builder.cbranch(builder.icmp_signed("<", following, count), inside, after)
    builder.position_at_end(after)
    return list(values)


def at(builder: Any, address: Any, *parts: Any) -> Any:
    """`address` plus ``a * b`` for each pair ``(a, b)`` in `parts`; a and b are int64 values or Python ints."""
    for a, b in parts:
        if isinstance(a, int) and isinstance(b, int):
            offset = I64(a * b)
        else:
            offset = builder.mul(*(I64(v) if isinstance(v, int) else v for v in (a, b)))
        address = builder.add(address, offset)
    return address


def load(builder: Any, address: Any, kind: Any, align: int = 4) -> Any:
    """The value of type `kind` at `address`, a multiple of `align`."""
    value = builder.load(builder.inttoptr(address, kind.as_pointer()))
    value.align = align
    return value


def store(builder: Any, value: Any, address: Any, align: int = 4) -> None:
    """Write `value` to `address`, a multiple of `align`."""
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = align


def array_address(context: Any, builder: Any, kind: Any, array: Any) -> Any:
    """Address of the first element of `array`, an argument of Numba's array type `kind`."""
    return builder.ptrtoint(context.make_array(kind)(context, builder, array).data, I64)


def prefetch(builder: Any, address: Any) -> None:
    """Fetch the cache line at `address` into the second-level cache. The address need not be readable."""
    pointer = builder.inttoptr(address, I8.as_pointer())
    name = "llvm.prefetch.p0"
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
    known = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    builder.call(known, [pointer, I32(0), I32(2), I32(1)])


def splat(builder: Any, value: Any, lanes: int = LANES) -> Any:
    """A vector with `value` in every lane."""
    kind = ir.VectorType(value.type, lanes)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, I32(0))
    first = ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), first)


def ints(value: int) -> Any:
    """A constant int32 vector with `value` in every lane."""
    return ir.Constant(VECTOR_I32, [value] * LANES)


def half_to_float(builder: Any, half: Any) -> Any:
    """The bits of float16 (int16 lanes) to float32 by integer operations; exact for finite values.

    After a shift by 13 bits the exponent is 112 too small. The product with 2**112 is exact, also for subnormals.
    """
    wide = builder.zext(half, VECTOR_I32)
    magnitude = builder.shl(builder.and_(wide, ints(0x7FFF)), ints(13))
    value = builder.fmul(builder.bitcast(magnitude, VECTOR_F32), ir.Constant(VECTOR_F32, [2.0**112] * LANES))
    sign = builder.shl(builder.and_(wide, ints(0x8000)), ints(16))
    return builder.bitcast(builder.or_(builder.bitcast(value, VECTOR_I32), sign), VECTOR_F32)


class _BFloat(ir.HalfType):  # type: ignore[misc]
    """LLVM's type for bfloat16, which llvmlite does not name."""

    def __str__(self) -> str:
        return "bfloat"


_BFloat._create_instance()  # else it would be the one of its base class


def float_to_bfloat(builder: Any, value: Any, native: bool) -> Any:
    """float32 rounded to the bits of bfloat16 (int16 lanes), ties to even; a NaN stays one.

    With `native` by the instruction of machines that have ``avx512bf16``, which takes subnormal numbers for 0.
    """
    if native:
        return builder.bitcast(builder.fptrunc(value, ir.VectorType(_BFloat(), LANES)), VECTOR_I16)
    bits = builder.bitcast(value, VECTOR_I32)
    odd = builder.and_(builder.lshr(bits, ints(16)), ints(1))
    rounded = builder.lshr(builder.add(builder.add(bits, ints(0x7FFF)), odd), ints(16))
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(is_nan, ints(0x7FC0), rounded), VECTOR_I16)


def fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """``a * b + c`` of float32 vectors, with a single rounding on machines that have the instruction."""
    return call(builder, f"llvm.fmuladd.v{a.type.count}f32", a.type, a, b, c)


def call(builder: Any, name: str, result: Any, *args: Any) -> Any:
    """Call the intrinsic function of LLVM called `name`."""
    module = builder.module
    known = module.globals.get(name) or ir.Function(module, ir.FunctionType(result, [a.type for a in args]), name)
    return builder.call(known, args)


def features(context: Any | None = None) -> frozenset[str]:
    """Instruction sets of the machine that code is made for, by their names in LLVM: ``avx2``, ``avx512f``, …

    They are part of the key of Numba's cache on disk, so several machines can share its directory.
    """
    context = cpu_target.target_context if context is None else context
    listed: str = context.codegen().magic_tuple()[2]
    return frozenset(name[1:] for name in listed.split(",") if name.startswith("+"))
