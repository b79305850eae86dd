"""Rotary embedding of vectors as they are loaded (Su et al. 2021): what camshaft::rope computes, rounded where it rounds.

The operator rounds each product before it adds: a compiler that sees both contracts them to a fused multiply-add, in 16 bits too
where it finds that all operands have 16 bits, and keys in the cache are then other numbers than the operator's by a unit in the
last place. Products with the rounding in the instruction (mul.rn) are not contracted.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _product(a, b, ASM: tl.constexpr):
    # a * b in float32, rounded there whatever is done with it
    a, b = a.to(tl.float32), b.to(tl.float32)
    if ASM:
        result = tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        result = a * b
    return result


@triton.jit
def load_turned(
    x, d, mask, cos, sin, row, cos_token, sin_token, ROTATED: tl.constexpr, INTERLEAVED: tl.constexpr, ASM: tl.constexpr
):  # fmt: skip
    # Elements d of the vectors that begin at x, which belong to rows `row` of cos and sin [T, ROTATED]; 0 where masked.
    # The first ROTATED elements are turned, each with its partner half of them away, or beside it. ROTATED 0: a plain load.
    plain = tl.load(x + d, mask=mask, other=0.0)
    if ROTATED == 0:
        result = plain
    else:
        turns = mask & (d < ROTATED)
        if INTERLEAVED:
            is_first = d % 2 == 0
            partner = d ^ 1
        else:
            is_first = d < ROTATED // 2
            partner = tl.where(is_first, d + ROTATED // 2, d - ROTATED // 2)
        other = tl.load(x + partner, mask=turns, other=0.0)
        c = tl.load(cos + row * cos_token + d, mask=turns, other=0.0)
        s = tl.load(sin + row * sin_token + d, mask=turns, other=0.0)
        along = _product(plain, c, ASM)
        across = _product(other, s, ASM)
        if plain.dtype == c.dtype:  # a product of equal dtypes is rounded to it
            along = along.to(plain.dtype).to(tl.float32)
            across = across.to(plain.dtype).to(tl.float32)
        turned = tl.where(is_first, along - across, along + across)
        result = tl.where(d < ROTATED, turned.to(plain.dtype), plain)
    return result
