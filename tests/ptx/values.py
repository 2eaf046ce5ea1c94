"""Arithmetic on registers, as numpy functions: one array, one element a thread.

Registers hold bits: uint16, uint32, uint64, or bool for a predicate.
"""

import numpy as np

CANONICAL_NAN = np.uint32(0x7FFFFFFF)  # what float32 instructions yield, whatever came in


def canonical(x):
    """float32 results as bits; every NaN in its canonical form."""
    nan = x != x
    bits = np.ascontiguousarray(x).view(np.uint32)
    return np.where(nan, CANONICAL_NAN, bits) if nan.any() else bits


def approximate(x, *operands):
    """Results of an instruction that may err: off by -2 to 1 units in the last place.

    How far follows from the operands: equal operands yield equal results, as on a device.
    """
    bits = canonical(x)
    mixed = operands[0].view(np.uint32)
    for other in operands[1:]:
        mixed = mixed ^ (other.view(np.uint32) >> np.uint32(3))
    off = (mixed * np.uint32(0x9E3779B1) >> np.uint32(30)).view(np.int32) - np.int32(2)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    normal = (magnitude > np.uint32(0x00800010)) & (magnitude < np.uint32(0x7F7FFFF0))
    # 1.0 from a whole operand (2**0, x / x) is exact.
    normal &= magnitude != np.uint32(0x3F800000)
    return np.where(normal, (bits.view(np.int32) + off).view(np.uint32), bits)


def bf16_to_f32(x):
    return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x):
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(x != x, np.uint16(0x7FFF), rounded.astype(np.uint16))


def f16_to_f32(x):
    return x.view(np.float16).astype(np.float32)


def f32_to_f16(x):
    return np.where(x != x, np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))


def f32_to_tf32(x):
    """cvt.rna: to 10 bits of mantissa, ties away from zero; returned as bits."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(x), rounded, bits)


def fma(a, b, c):
    """The product is exact in float64; rounding twice errs by one unit in rare cases."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def maximum(a, b):
    """max.f32: of a number and a NaN the number."""
    return np.fmax(a, b)


def minimum(a, b):
    return np.fmin(a, b)


def join(low, high):
    """Two 16-bit halves as one word."""
    return low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))


def two(function, *operands):
    """An f32x2 instruction on 64-bit registers."""
    halves = [np.ascontiguousarray(x).view(np.float32) for x in operands]
    return canonical(function(*halves)).view(np.uint64)


def shift(x, by, left):
    """shl and shr by a register: beyond the width zero, or the sign of a signed x."""
    bits = x.dtype.itemsize * 8
    by = by.astype(np.int64)
    small = np.minimum(by, bits - 1).astype(x.dtype)
    if not left and x.dtype.kind == "i":
        return x >> small
    return np.where(by >= bits, x.dtype.type(0), x << small if left else x >> small)


def funnel(low, high, by, left):
    """shf.l.wrap and shf.r.wrap."""
    both = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
    by = (by & np.uint32(31)).astype(np.uint64)
    out = both << by >> np.uint64(32) if left else both >> by
    return out.astype(np.uint32)


def extract(x, position, length, signed):
    """bfe."""
    field = (x.astype(np.int64) >> position) & ((1 << length) - 1)
    if signed and length:
        field = np.where(field >> (length - 1) & 1, field - (1 << length), field)
    return field.astype(np.uint32)


def permute(a, b, selector):
    """prmt.b32, default mode."""
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    out = 0
    for n in range(4):
        nibble = selector >> (4 * n) & 15
        byte = (both >> np.uint64(8 * (nibble & 7))).astype(np.uint8)
        if nibble & 8:
            byte = (byte.view(np.int8) >> 7).view(np.uint8)
        out = out | byte.astype(np.uint32) << np.uint32(8 * n)
    return out


def logic(a, b, c, table):
    """lop3.b32: any function of three bits, by its truth table."""
    out = a & np.uint32(0)
    for n in range(8):
        if table >> n & 1:
            term = a if n & 4 else ~a
            term = term & (b if n & 2 else ~b) & (c if n & 1 else ~c)
            out = out | term
    return out


def halves(word, kind):
    """Words of two 16-bit floats -> [N, 2] float32."""
    if kind == "f16":
        return np.ascontiguousarray(word).view(np.float16).astype(np.float32).reshape(-1, 2)
    return bf16_to_f32(np.ascontiguousarray(word).view(np.uint16)).reshape(-1, 2)


def narrow(name, kind, *operands):
    """Arithmetic on 16-bit floats, one or two in a register, rounded once."""
    scalar = kind.removesuffix("x2")
    widen, rounded = {"bf16": (bf16_to_f32, f32_to_bf16), "f16": (f16_to_f32, f32_to_f16)}[scalar]
    operands = np.broadcast_arrays(*operands)
    a, b, *c = (widen(np.ascontiguousarray(x).view(np.uint16)).astype(np.float64) for x in operands)
    if name in ("max", "min"):
        single = (np.fmax if name == "max" else np.fmin)(a, b).astype(np.float32)
    else:
        # float64 holds a product of two exactly; the rounding to float32 before the last one is
        # to odd, which keeps it from rounding twice.
        exact = {"mul": lambda: a * b, "fma": lambda: a * b + c[0], "add": lambda: a + b,
                 "sub": lambda: a - b}[name]()  # fmt: skip
        single = exact.astype(np.float32)
        wide = single.astype(np.float64)
        inexact = (wide != exact) & np.isfinite(single)
        away = np.abs(wide) > np.abs(exact)
        bits = single.view(np.uint32) - (inexact & away).astype(np.uint32)
        single = (bits | inexact.astype(np.uint32)).view(np.float32)
    out = rounded(single)
    return out.view(np.uint32) if kind.endswith("x2") else out


def maximum_of_pairs(a, b):
    """max.u16x2."""
    low = np.uint32(0xFFFF)
    return np.maximum(a & ~low, b & ~low) | np.maximum(a & low, b & low)


def quotient(a, b):
    """div of integers, towards zero."""
    wide = a.astype(np.int64), b.astype(np.int64)
    out = np.abs(wide[0]) // np.maximum(np.abs(wide[1]), 1)
    return (out * np.sign(wide[0]) * np.sign(wide[1])).astype(a.dtype)
