"""Rotary embedding of vectors as they are loaded (Su et al. 2021): what camshaft::rope computes, rounded where it rounds."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_turned(
    x, d, mask, cos, sin, row, cos_token, sin_token, ROTATED: tl.constexpr, INTERLEAVED: tl.constexpr
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
        along = plain.to(tl.float32) * c.to(tl.float32)
        across = other.to(tl.float32) * s.to(tl.float32)
        if plain.dtype == c.dtype:  # a product of equal dtypes is rounded to it
            along = along.to(plain.dtype).to(tl.float32)
            across = across.to(plain.dtype).to(tl.float32)
        turned = tl.where(is_first, along - across, along + across)
        result = tl.where(d < ROTATED, turned.to(plain.dtype), plain)
    return result
