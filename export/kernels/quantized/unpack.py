"""Stored weights to numbers that tensor cores multiply, in registers: words of 32 bits to 8 or 4 values each.

A word holds V = 8 values of 4 bits or 4 of 8 bits, the first in the lowest bits. Values whose bits are 16 apart, p and p + V / 2,
make a pair of 16-bit numbers with one shift and one or two logical operations; so a tile is unpacked in the order

    pair p = 0 .. V/2 - 1   |   word i   |   half h        of value p + V / 2 * h of word i

and x is brought into the same order (`pair_columns`), which leaves the product as it is. Where a thread's words lie in the tensor
cores' order, no value moves between threads.

bfloat16, exact:

    int4    0x4300 | u is 128 + u; subtracted is 128 + zero point (two's complement: bit 3 flipped, zero point 8)
    int8    (0x4300 | low 7 bits) - (0x4300 | sign bit) is value, because 0x4380 is 256
    e2m1    sign, exponent and mantissa in bfloat16's places, times 2^126 (the difference of the biases)
    e4m3    likewise, times 2^120; NaN, which no weight holds, becomes 480

Other dtypes, other GPUs and Triton's interpreter take plain shifts and float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


def _program(pairs: int, value: str, *, added: bool, factor: bool) -> tl.constexpr:
    """PTX: one word to 2 * pairs bfloat16. value: lines that leave pair {p} in `a`; added, factor: pairs that follow the word."""
    word = 2 * pairs
    lines = [".reg .b32 t, a, b, c;", f"mov.b32 t, ${word};"]
    for p in range(pairs):
        lines += [
            value.format(
                p=p, s=4 * p, t=8 * p, up=12 - 4 * p, up8=8 - 8 * p, e2m1=_shift(6 - 4 * p), e4m3=_shift(4 - 8 * p)
            )
        ]
        if added:
            lines.append(f"add.rn.bf16x2 a, a, ${word + 1};")
        if factor:
            lines.append(f"mul.rn.bf16x2 a, a, ${word + 1 + added};")
        lines.append(f"mov.b32 {{${2 * p}, ${2 * p + 1}}}, a;")
    return tl.constexpr("{\n" + "\n".join(lines) + "\n}")


def _shift(left: int) -> str:
    return f"shl.b32 b, t, {left}" if left >= 0 else f"shr.u32 b, t, {-left}"


_NIBBLE = "shr.u32 a, t, {s}; lop3.b32 a, a, 0x000F000F, 0x43004300, 0xEA;"
_SIGNED_NIBBLE = (
    "xor.b32 b, t, 0x88888888; shr.u32 a, b, {s}; lop3.b32 a, a, 0x000F000F, 0x43004300, 0xEA;"
    "mov.b32 c, 0xC308C308; add.rn.bf16x2 a, a, c;"  # -136
)
_E2M1 = (
    "shl.b32 a, t, {up}; {e2m1}; and.b32 a, a, 0x80008000; lop3.b32 a, b, 0x01C001C0, a, 0xEA;"
    "mov.b32 c, 0x7E807E80; mul.rn.bf16x2 a, a, c;"  # 2^126
)
_INT8 = (
    "shr.u32 b, t, {t}; lop3.b32 a, b, 0x007F007F, 0x43004300, 0xEA; lop3.b32 c, b, 0x00800080, 0x43004300, 0xEA;"
    "sub.rn.bf16x2 a, a, c;"
)
_E4M3 = (
    "shl.b32 a, t, {up8}; {e4m3}; and.b32 a, a, 0x80008000; lop3.b32 a, b, 0x07F007F0, a, 0xEA;"
    "mov.b32 c, 0x7B807B80; mul.rn.bf16x2 a, a, c;"  # 2^120
)
_INT4_ZERO = _program(4, _NIBBLE, added=True, factor=False)
_INT4_ZERO_SCALED = _program(4, _NIBBLE, added=True, factor=True)
_INT4 = _program(4, _SIGNED_NIBBLE, added=False, factor=False)
_INT4_SCALED = _program(4, _SIGNED_NIBBLE, added=False, factor=True)
_FP4 = _program(4, _E2M1, added=False, factor=False)
_FP4_SCALED = _program(4, _E2M1, added=False, factor=True)
_INT8_PLAIN = _program(2, _INT8, added=False, factor=False)
_INT8_SCALED = _program(2, _INT8, added=False, factor=True)
_INT8_ZERO = _program(2, _INT8, added=True, factor=False)
_INT8_ZERO_SCALED = _program(2, _INT8, added=True, factor=True)
_FP8 = _program(2, _E4M3, added=False, factor=False)
_FP8_SCALED = _program(2, _E4M3, added=False, factor=True)


@triton.jit
def pair_columns(x, V: tl.constexpr):
    """x [M, K] with its columns in the order of unpacked weights."""
    M: tl.constexpr = x.shape[0]
    K: tl.constexpr = x.shape[1]
    return tl.reshape(tl.permute(tl.reshape(x, [M, K // V, 2, V // 2]), (0, 3, 1, 2)), [M, K])


@triton.jit
def _join8(l0, l1, l2, l3, h0, h1, h2, h3):
    # pairs (l, h) of words [N, I] -> [N, 8 I] in the order of the module's text
    low = tl.join(tl.join(l0, l2), tl.join(l1, l3))
    high = tl.join(tl.join(h0, h2), tl.join(h1, h3))
    return tl.reshape(tl.permute(tl.join(low, high), (0, 2, 3, 1, 4)), [l0.shape[0], l0.shape[1] * 8])


@triton.jit
def _join4(l0, l1, h0, h1):
    return tl.reshape(
        tl.permute(tl.join(tl.join(l0, l1), tl.join(h0, h1)), (0, 2, 1, 3)), [l0.shape[0], l0.shape[1] * 4]
    )


@triton.jit
def twice(x):
    """Numbers as bfloat16, each twice in an int32."""
    return x.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF | (
        x.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) << 16
    )


@triton.jit
def plain(words, p: tl.constexpr, zero_point, factor, KIND: tl.constexpr, dtype: tl.constexpr):
    # Value p of each word; zero_point and factor: float32 of the words' shape, or None
    if KIND == "int4":
        if zero_point is None:
            value = ((words << (28 - 4 * p)) >> 28).to(tl.float32)
        else:
            value = ((words >> (4 * p)) & 15).to(tl.float32) - zero_point
    elif KIND == "fp4":
        code = words >> (4 * p)
        value = (((code & 7) << 22) | ((code & 8) << 28)).to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126
    elif KIND == "int8":
        value = ((words << (24 - 8 * p)) >> 24).to(tl.float32)
        if zero_point is not None:
            value += 128.0 - zero_point
    else:
        code = words >> (8 * p)
        value = (((code & 127) << 20) | ((code & 128) << 24)).to(
            tl.float32, bitcast=True
        ) * 1.329227995784916e36  # 2^120
    if factor is not None:
        value *= factor
    return value.to(dtype)


@triton.jit
def _unpack_plain(words, zero_point, factor, KIND: tl.constexpr, dtype: tl.constexpr):
    v0 = plain(words, 0, zero_point, factor, KIND, dtype)
    v1 = plain(words, 1, zero_point, factor, KIND, dtype)
    v2 = plain(words, 2, zero_point, factor, KIND, dtype)
    v3 = plain(words, 3, zero_point, factor, KIND, dtype)
    if KIND == "int8" or KIND == "fp8":
        return _join4(v0, v1, v2, v3)
    v4 = plain(words, 4, zero_point, factor, KIND, dtype)
    v5 = plain(words, 5, zero_point, factor, KIND, dtype)
    v6 = plain(words, 6, zero_point, factor, KIND, dtype)
    v7 = plain(words, 7, zero_point, factor, KIND, dtype)
    return _join8(v0, v1, v2, v3, v4, v5, v6, v7)


@triton.jit
def _words8(program: tl.constexpr, constraints: tl.constexpr, args):
    l0, h0, l1, h1, l2, h2, l3, h3 = tl.inline_asm_elementwise(
        program, constraints, args,
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True, pack=1,
    )  # fmt: skip
    return _join8(l0, l1, l2, l3, h0, h1, h2, h3)


@triton.jit
def _words4(program: tl.constexpr, constraints: tl.constexpr, args):
    l0, h0, l1, h1 = tl.inline_asm_elementwise(
        program, constraints, args, dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=1
    )
    return _join4(l0, l1, h0, h1)


@triton.jit
def _unpack_bfloat16(words, zero_point, factor, KIND: tl.constexpr):
    if KIND == "int4":
        if zero_point is not None and factor is not None:
            return _words8(
                _INT4_ZERO_SCALED, "=h,=h,=h,=h,=h,=h,=h,=h,r,r,r", [words, twice(-128.0 - zero_point), twice(factor)]
            )
        elif zero_point is not None:
            return _words8(_INT4_ZERO, "=h,=h,=h,=h,=h,=h,=h,=h,r,r", [words, twice(-128.0 - zero_point)])
        elif factor is not None:
            return _words8(_INT4_SCALED, "=h,=h,=h,=h,=h,=h,=h,=h,r,r", [words, twice(factor)])
        else:
            return _words8(_INT4, "=h,=h,=h,=h,=h,=h,=h,=h,r", [words])
    elif KIND == "fp4":
        if factor is not None:
            return _words8(_FP4_SCALED, "=h,=h,=h,=h,=h,=h,=h,=h,r,r", [words, twice(factor)])
        else:
            return _words8(_FP4, "=h,=h,=h,=h,=h,=h,=h,=h,r", [words])
    elif KIND == "int8":
        if zero_point is not None and factor is not None:
            return _words4(_INT8_ZERO_SCALED, "=h,=h,=h,=h,r,r,r", [words, twice(128.0 - zero_point), twice(factor)])
        elif zero_point is not None:
            return _words4(_INT8_ZERO, "=h,=h,=h,=h,r,r", [words, twice(128.0 - zero_point)])
        elif factor is not None:
            return _words4(_INT8_SCALED, "=h,=h,=h,=h,r,r", [words, twice(factor)])
        else:
            return _words4(_INT8_PLAIN, "=h,=h,=h,=h,r", [words])
    else:
        if factor is not None:
            return _words4(_FP8_SCALED, "=h,=h,=h,=h,r,r", [words, twice(factor)])
        else:
            return _words4(_FP8, "=h,=h,=h,=h,r", [words])


@triton.jit
def unpack(words, zero_point, factor, KIND: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    """int32 words [N, I] -> (value - zero_point) * factor in `dtype` [N, V I], columns in the module's order.

    zero_point and factor: float32 [N, I] or None. ASM: written-out instructions for bfloat16, compute capability 9.0 and newer.
    """
    if ASM and dtype == tl.bfloat16:
        return _unpack_bfloat16(words, zero_point, factor, KIND)
    else:
        return _unpack_plain(words, zero_point, factor, KIND, dtype)


@triton.jit
def decode_scale(scale):
    """Stored scales as float32: float32 and e4m3 numbers, or the exponents of powers of two (uint8, e8m0)."""
    if scale.dtype == tl.uint8:
        exponent = scale.to(tl.int32)
        bits = tl.where(exponent == 0, 0x00400000, exponent << 23)
        return tl.where(exponent == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)
    else:
        return scale.to(tl.float32)
