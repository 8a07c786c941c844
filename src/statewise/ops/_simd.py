"""Sixteen float32 lanes as one value inside a Numba kernel.

LLVM's loop vectoriser gives up on kernels with more than a few arrays (it would have to check that they do not
overlap), and it cannot keep a recurrent state in registers. With an explicit vector type a kernel says what it means:
one `f32x16` is one AVX-512 register, or two of AVX2, or four of NEON, and plain Python operators work on it.

    h = exp2(step * a) * h + u * b     # b may be a scalar: it is broadcast

Loads and stores take an array and an offset in elements; memory has to be contiguous from there on. An array of uint16
stands for bfloat16 (NumPy has no such type): it is widened when loaded and rounded to nearest when stored.
"""

from __future__ import annotations

import itertools
import operator
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

LANES = 16

_F32, _F64, _I32, _I16, _I1 = ir.FloatType(), ir.DoubleType(), ir.IntType(32), ir.IntType(16), ir.IntType(1)
_V, _VD, _VI, _VH, _VM = (ir.VectorType(t, LANES) for t in (_F32, _F64, _I32, _I16, _I1))


class _Lanes(types.Type):
    def __init__(self, name: str) -> None:
        super().__init__(name)


f32x16 = _Lanes("f32x16")
# For the few numbers that float32 would spoil: twice the registers.
f64x16 = _Lanes("f64x16")


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, _VD if fe_type is f64x16 else _V)


def _constant(value: float) -> ir.Constant:
    return ir.Constant(_V, [float(np.float32(value))] * LANES)


def _integers(value: int) -> ir.Constant:
    return ir.Constant(_VI, [value] * LANES)


def _splat(builder: Any, scalar: Any) -> Any:
    nothing = ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined)
    one = builder.insert_element(nothing, scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, nothing, ir.Constant(_VI, [0] * LANES))


def _call(builder: Any, name: str, result: Any, *args: Any) -> Any:
    function = ir.FunctionType(result, [a.type for a in args])
    declared = builder.module.globals.get(name) or ir.Function(builder.module, function, name)
    return builder.call(declared, args)


def _wide(builder: Any) -> None:
    """Let LLVM use registers of 512 bits in this function: for many processors it would choose 256."""
    attributes = builder.function.attributes
    for name in ('"min-legal-vector-width"="512"', '"prefer-vector-width"="512"'):
        set.add(attributes, name)  # llvmlite's own `add` refuses attributes with a value


def _as_vector(builder: Any, value: Any, typ: Any) -> Any:
    return value if isinstance(typ, _Lanes) else _splat(builder, value)


_PAIRS = [
    (vector, *pair)
    for vector, number in ((f32x16, types.float32), (f64x16, types.float64))
    for pair in ((vector, vector), (vector, number), (number, vector))
]


def _operator(function: Any, emit: str) -> None:
    class Template(ConcreteTemplate):
        cases = tuple(itertools.starmap(signature, _PAIRS))

    infer_global(function)(Template)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        a, b = (_as_vector(builder, v, t) for v, t in zip(args, sig.args))
        return getattr(builder, emit)(a, b)

    for _, *pair in _PAIRS:
        lower_builtin(function, *pair)(lower)


for _function, _emit in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
    (operator.iadd, "fadd"),
    (operator.imul, "fmul"),
):
    _operator(_function, _emit)


def _width(array: Any) -> int:
    """Bytes of a number in memory: 4 for float32, 2 for bfloat16, 0 for what is neither."""
    if not isinstance(array, types.Array) or array.layout != "C":
        return 0
    return {types.float32: 4, types.uint16: 2}.get(array.dtype, 0)


def _widened(builder: Any, half: Any) -> Any:
    """bfloat16 is the upper half of a float32."""
    return builder.bitcast(builder.shl(builder.zext(half, _VI), _integers(16)), _V)


def _rounded(builder: Any, value: Any) -> Any:
    bits = builder.bitcast(value, _VI)
    odd = builder.and_(builder.lshr(bits, _integers(16)), _integers(1))
    nearest = builder.add(bits, builder.add(odd, _integers(0x7FFF)))
    # Rounding could turn the bits of a NaN into an infinity.
    number = builder.fcmp_ordered("==", value, value)
    bits = builder.select(number, nearest, builder.or_(bits, _integers(0x00400000)))
    return builder.trunc(builder.lshr(bits, _integers(16)), _VH)


def _pointer(context: Any, builder: Any, typ: Any, array: Any, offset: Any, to: Any, width: int) -> Any:
    data = context.make_array(typ)(context, builder, array).data
    address = builder.add(
        builder.ptrtoint(data, ir.IntType(64)), builder.mul(offset, ir.Constant(ir.IntType(64), width))
    )
    return builder.inttoptr(address, to.as_pointer())


@intrinsic
def _memory(typingctx: Any, address: Any, like: Any) -> Any:
    pointer = types.CPointer(like.dtype)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(pointer))

    return pointer(types.int64, like), codegen


@intrinsic
def _zeros(typingctx: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _wide(builder)
        return _constant(0.0)

    return f32x16(), codegen


@intrinsic
def _fill(typingctx: Any, scalar: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _splat(builder, args[0])

    return f32x16(types.float32), codegen


@intrinsic
def _load(typingctx: Any, array: Any, offset: Any) -> Any:
    if not (width := _width(array)):
        return None

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _wide(builder)
        to = _V if width == 4 else _VH
        loaded = builder.load(_pointer(context, builder, sig.args[0], args[0], args[1], to, width), align=width)
        return loaded if width == 4 else _widened(builder, loaded)

    return f32x16(array, types.int64), codegen


def _half(odd: int) -> Any:
    @intrinsic
    def half(typingctx: Any, array: Any, offset: Any) -> Any:
        if not (width := _width(array)):
            return None

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            _wide(builder)
            array, offset = args
            if width == 4:
                offset = builder.add(offset, ir.Constant(ir.IntType(64), odd * LANES))
                return builder.load(_pointer(context, builder, sig.args[0], array, offset, _V, 4), align=4)
            pairs = builder.load(_pointer(context, builder, sig.args[0], array, offset, _VI, 2), align=2)
            bits = builder.and_(pairs, _integers(0xFFFF0000)) if odd else builder.shl(pairs, _integers(16))
            return builder.bitcast(bits, _V)

        return f32x16(array, types.int64), codegen

    return half


@intrinsic
def _store(typingctx: Any, array: Any, offset: Any, value: Any) -> Any:
    if not (width := _width(array)):
        return None

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value = args[2] if width == 4 else _rounded(builder, args[2])
        builder.store(value, _pointer(context, builder, sig.args[0], args[0], args[1], value.type, width), align=width)
        return context.get_dummy_value()

    return types.void(array, types.int64, f32x16), codegen


@intrinsic
def _load_wide(typingctx: Any, array: Any, offset: Any) -> Any:
    if not isinstance(array, types.Array) or array.layout != "C" or array.dtype is not types.float64:
        return None

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _wide(builder)
        return builder.load(_pointer(context, builder, sig.args[0], args[0], args[1], _VD, 8), align=8)

    return f64x16(array, types.int64), codegen


@intrinsic
def _store_wide(typingctx: Any, array: Any, offset: Any, value: Any) -> Any:
    if not isinstance(array, types.Array) or array.layout != "C" or array.dtype is not types.float64:
        return None

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store(args[2], _pointer(context, builder, sig.args[0], args[0], args[1], _VD, 8), align=8)
        return context.get_dummy_value()

    return types.void(array, types.int64, f64x16), codegen


@intrinsic
def _narrow(typingctx: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.fptrunc(args[0], _V)

    return f32x16(f64x16), codegen


@intrinsic
def _address(typingctx: Any, array: Any, offset: Any) -> Any:
    if not (width := _width(array)):
        return None

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, sig.args[0], args[0], args[1], _V, width)
        return builder.ptrtoint(pointer, ir.IntType(64))

    return types.int64(array, types.int64), codegen


def _prefetching(write: int) -> Any:
    @intrinsic
    def ask(typingctx: Any, at: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            how = [ir.Constant(_I32, v) for v in (write, 2 + write, 1)]
            _call(builder, "llvm.prefetch.p0", ir.VoidType(), builder.inttoptr(args[0], _V.as_pointer()), *how)
            return context.get_dummy_value()

        return types.void(types.int64), codegen

    return ask


def _first(builder: Any, count: Any) -> Any:
    """Mask of the first `count` lanes."""
    order = ir.Constant(_VI, list(range(LANES)))
    one = builder.insert_element(ir.Constant(_VI, ir.Undefined), builder.trunc(count, _I32), ir.Constant(_I32, 0))
    wanted = builder.shuffle_vector(one, ir.Constant(_VI, ir.Undefined), ir.Constant(_VI, [0] * LANES))
    return builder.icmp_signed("<", order, wanted)


@intrinsic
def _load_part(typingctx: Any, array: Any, offset: Any, count: Any) -> Any:
    if not (width := _width(array)):
        return None

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _wide(builder)
        to, name = (_V, "f32") if width == 4 else (_VH, "i16")
        pointer = _pointer(context, builder, sig.args[0], args[0], args[1], to, width)
        mask, align, rest = _first(builder, args[2]), ir.Constant(_I32, width), ir.Constant(to, [0] * LANES)
        loaded = _call(builder, f"llvm.masked.load.v16{name}.p0", to, pointer, align, mask, rest)
        return loaded if width == 4 else _widened(builder, loaded)

    return f32x16(array, types.int64, types.int64), codegen


@intrinsic
def _store_part(typingctx: Any, array: Any, offset: Any, count: Any, value: Any) -> Any:
    if not (width := _width(array)):
        return None

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value, name = (args[3], "f32") if width == 4 else (_rounded(builder, args[3]), "i16")
        pointer = _pointer(context, builder, sig.args[0], args[0], args[1], value.type, width)
        mask, align = _first(builder, args[2]), ir.Constant(_I32, width)
        _call(builder, f"llvm.masked.store.v16{name}.p0", ir.VoidType(), value, pointer, align, mask)
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64, f32x16), codegen


@intrinsic
def _total(typingctx: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        # By halves: a fixed order, and four additions deep instead of sixteen. Of float64 likewise.
        v, width = args[0], LANES
        while width > 1:
            width //= 2
            typ = ir.VectorType(_I32, width)
            low = builder.shuffle_vector(v, v, ir.Constant(typ, list(range(width))))
            high = builder.shuffle_vector(v, v, ir.Constant(typ, list(range(width, 2 * width))))
            v = builder.fadd(low, high)
        return builder.extract_element(v, ir.Constant(_I32, 0))

    return (types.float64(f64x16) if value is f64x16 else types.float32(f32x16)), codegen


@intrinsic
def _transposed(typingctx: Any, source: Any, at: Any, stride: Any, into: Any, to: Any, into_stride: Any) -> Any:
    if _width(source) != 4 or _width(into) != 4:
        return None

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _wide(builder)
        source, at, stride, into, to, into_stride = args
        rows = []
        for _ in range(LANES):
            rows.append(builder.load(_pointer(context, builder, sig.args[0], source, at, _V, 4), align=4))
            at = builder.add(at, stride)
        for s in (1, 2, 4, 8):  # swap the off-diagonal blocks of size s
            low = [l if not l & s else LANES + l - s for l in range(LANES)]
            high = [l + s if not l & s else LANES + l for l in range(LANES)]
            for i in range(LANES):
                if not i & s:
                    a, b = rows[i], rows[i + s]
                    rows[i] = builder.shuffle_vector(a, b, ir.Constant(_VI, low))
                    rows[i + s] = builder.shuffle_vector(a, b, ir.Constant(_VI, high))
        for row in rows:
            builder.store(row, _pointer(context, builder, sig.args[3], into, to, _V, 4), align=4)
            to = builder.add(to, into_stride)
        return context.get_dummy_value()

    return types.void(source, types.int64, types.int64, into, types.int64, types.int64), codegen


@intrinsic
def _within(typingctx: Any, value: Any, first: Any, low: Any, high: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value, first, low, high = args

        def spread(n: Any) -> Any:
            one = builder.insert_element(ir.Constant(_VI, ir.Undefined), builder.trunc(n, _I32), ir.Constant(_I32, 0))
            return builder.shuffle_vector(one, ir.Constant(_VI, ir.Undefined), ir.Constant(_VI, [0] * LANES))

        order = builder.add(ir.Constant(_VI, list(range(LANES))), spread(first))
        inside = builder.and_(
            builder.icmp_signed(">=", order, spread(low)), builder.icmp_signed("<=", order, spread(high))
        )
        return builder.select(inside, value, _constant(0.0))

    return f32x16(f32x16, types.int64, types.int64, types.int64), codegen


# Minimax coefficients of (2^f - 1) / f on [-1/2, 1/2]; the relative error they leave in 2^f is 2e-9, far below float32.
_EXP2 = (
    0.693147202855128,
    0.24022647913619674,
    0.05550332471026881,
    0.009618437358302156,
    0.0013398874445391777,
    0.00015353361813074014,
)


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return _call(builder, "llvm.fmuladd.v16f32", _V, a, b, c)


@intrinsic
def _multiply_add(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _fma(builder, *args)

    return f32x16(f32x16, f32x16, f32x16), codegen


def _clamp(builder: Any, x: Any, low: Any, high: Any) -> Any:
    # Ordered compares keep NaN, unlike the minimum and maximum of LLVM.
    x = builder.select(builder.fcmp_ordered("<", x, low), low, x)
    return builder.select(builder.fcmp_ordered(">", x, high), high, x)


@intrinsic
def _exp2(typingctx: Any, x: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        x = _clamp(builder, args[0], _constant(-126.0), _constant(127.0))
        # Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the sum. Flags given here keep Numba from
        # adding the kernel's own, of which "reassoc" would cancel the pair.
        magic, exact = _constant(12582912.0), ("contract",)
        shifted = builder.fadd(x, magic, flags=exact)
        f = builder.fsub(x, builder.fsub(shifted, magic, flags=exact), flags=exact)
        p = _constant(_EXP2[5])
        for c in reversed(_EXP2[:5]):
            p = _fma(builder, p, f, _constant(c))
        p = _fma(builder, p, f, _constant(1.0))
        exponent = builder.shl(builder.bitcast(shifted, _VI), _integers(23))
        return builder.bitcast(builder.add(builder.bitcast(p, _VI), exponent), _V)

    return f32x16(f32x16), codegen


@intrinsic
def _clamped(typingctx: Any, x: Any, low: Any, high: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _clamp(builder, args[0], _splat(builder, args[1]), _splat(builder, args[2]))

    return f32x16(f32x16, types.float32, types.float32), codegen


@intrinsic
def _outside(typingctx: Any, x: Any, low: Any, high: Any, value: Any, other: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        x, low, high, inside, outside = args
        below = builder.fcmp_ordered("<", x, _splat(builder, low))
        above = builder.fcmp_ordered(">", x, _splat(builder, high))
        return builder.select(builder.or_(below, above), outside, inside)

    return f32x16(f32x16, types.float32, types.float32, f32x16, f32x16), codegen


@intrinsic
def _magnitude(typingctx: Any, x: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _call(builder, "llvm.fabs.v16f32", _V, args[0])

    return f32x16(f32x16), codegen


@intrinsic
def _positive(typingctx: Any, x: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        zero = _constant(0.0)
        return builder.select(builder.fcmp_ordered("<", args[0], zero), zero, args[0])

    return f32x16(f32x16), codegen


# The public names; an intrinsic takes a hidden first argument, which type checkers cannot see, hence Any.
_from_address: Any = _memory
zeros: Any = _zeros  # () -> lanes of zeros
fill: Any = _fill  # (scalar)
load: Any = _load  # (array, offset)
store: Any = _store  # (array, offset, lanes)
load_wide: Any = _load_wide  # (array of float64, offset): sixteen float64, which know +, -, * and /
store_wide: Any = _store_wide  # (array of float64, offset, wide lanes)
narrow: Any = _narrow  # (wide lanes): rounded to float32
load_part: Any = _load_part  # (array, offset, count): the first `count` lanes, zeros after them
store_part: Any = _store_part  # (array, offset, count, lanes)
address: Any = _address  # (array, offset) -> int
prefetch: Any = _prefetching(0)  # (address): start to bring a cache line; harmless past the end of an array
prefetch_to_write: Any = _prefetching(1)
# (array, offset): 32 numbers as two vectors, for products in which the order of the numbers is free. Of float32 they
# are the first and the last sixteen; of bfloat16 those with even and with odd places, which takes one instruction a
# vector where `load` takes two and moves lanes. `halves` brings other numbers into the same order.
first_half: Any = _half(0)
second_half: Any = _half(1)
total: Any = _total  # sum of the lanes, a number of their kind
exp2: Any = _exp2  # 2**x, relative error about 1e-7; x is clamped to [-126, 127], NaN stays
# (a, b, c): a b + c. Whether it is fused is decided by the processor alone. The optimiser fuses a product and a sum or
# does not, and may decide differently in another loop.
multiply_add: Any = _multiply_add
clamp: Any = _clamped  # (x, low, high); NaN stays
if_inside: Any = _outside  # (x, low, high, value, other): value where low <= x <= high, else other
magnitude: Any = _magnitude
positive: Any = _positive  # max(x, 0)
within: Any = _within  # (x, first, low, high): zero but for the lanes l with low <= first + l <= high
# (source, offset, stride, into, offset, stride): a block of 16 x 16 numbers, transposed; strides between rows
transpose: Any = _transposed

_ENDLESS = 1 << 40
# Vectors that fit the registers: 32 of AVX-512 hold 32, 16 of AVX2 hold 8.
REGISTERS = 32 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8
LOG2E = np.float32(1.4426950408889634)
_ONE, _TWO = np.float32(1), np.float32(2)
_SERIES = tuple(np.float32(2 / k) for k in (15, 13, 11, 9, 7, 5, 3))

# Helpers on lanes are inlined: how a vector is passed between functions depends on the processor.
inlined = numba.njit(inline="always")


@inlined
def memory(at, like):
    """The numbers that stand from address `at` on, as a flat array with the dtype of the array `like`.

    An address costs a tenth of what an array costs on its way from Python to a kernel.
    """
    return carray(_from_address(at, like), (_ENDLESS,))


@inlined
def lanes(array, offset, count):
    """The lanes from `offset` on; zeros from lane `count` on, where the array ends for us."""
    if count >= LANES:
        v = load(array, offset)
    else:
        v = load_part(array, offset, count)
    return v


@inlined
def halves(values, like):
    """Of 32 float32 numbers, those that `first_half` and `second_half` would give for an array such as `like`."""
    if like.itemsize == 2:
        even, odd = values[0::2].copy(), values[1::2].copy()
        values[:16] = even
        values[16:32] = odd


@inlined
def put(array, offset, count, value):
    """Store the first `count` lanes."""
    if count >= LANES:
        store(array, offset, value)
    else:
        store_part(array, offset, count, value)


@inlined
def sigmoid(u):
    return _ONE / (exp2(u * -LOG2E) + _ONE)


@inlined
def softplus(u):
    """log(1 + e^u): max(u, 0) + log1p(e^-|u|), the logarithm as an odd series in t / (2 + t) <= 1/3."""
    t = exp2(magnitude(u) * -LOG2E)
    s = t / (t + _TWO)
    q = s * s
    p = q * _SERIES[0] + _SERIES[1]
    p = p * q + _SERIES[2]
    p = p * q + _SERIES[3]
    p = p * q + _SERIES[4]
    p = p * q + _SERIES[5]
    p = p * q + _SERIES[6]
    p = p * q + _TWO
    return positive(u) + s * p
