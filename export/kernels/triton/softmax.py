"""The inner loop of attention over a paged cache: online softmax in base 2 (Milakov and Gimelshein 2018)."""

from __future__ import annotations

import triton
import triton.language as tl

from .tree import place_in_tree

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def saturate(x, cache):
    # x as an element of the cache: float8_e4m3fn ends at 448 and has no infinity; NaN stays NaN. int8: the nearest integer, even
    # in the middle, from -127 to 127: adding 1.5 * 2^23 leaves no bits behind the point
    element = cache.dtype.element_ty
    if element == tl.float8e4nv:
        x = tl.maximum(x.to(tl.float32), -448.0, propagate_nan=tl.PropagateNan.ALL)
        x = tl.minimum(x, 448.0, propagate_nan=tl.PropagateNan.ALL)
    elif element == tl.int8:
        x = tl.minimum(tl.maximum(x.to(tl.float32), -127.0), 127.0)
        x = (x + 12582912.0) - 12582912.0
    return x.to(element)


@triton.jit
def widen(x, dtype: tl.constexpr, ASM: tl.constexpr):
    # x as numbers that tl.dot multiplies. fp8 -> float16 is written out: the compiler would otherwise convert behind the
    # shared memory, and read values from it one byte at a time, because 8-bit tiles cannot be transposed on the way.
    if ASM and x.dtype == tl.float8e4nv and dtype == tl.float16:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b16 low, high;
            mov.b32 {low, high}, $2;
            cvt.rn.f16x2.e4m3x2 $0, low;
            cvt.rn.f16x2.e4m3x2 $1, high;
            }
            """,
            "=r,=r,r", [x], dtype=tl.float16, is_pure=False, pack=4,
        )  # fmt: skip
    return x.to(dtype)


@triton.jit
def shape_scores(scores, distance, slope, scale, softcap, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr):
    # Products q . k -> logits / exponent_scale(scale), where the distance of a key to its row, j - i, is at most 0
    if SOFTCAP:
        scores = softcap * (2.0 / (1.0 + tl.exp2(scores * (scale * -2.0 * LOG2E / softcap))) - 1.0)
    elif ALIBI:
        scores = scores * scale
    if ALIBI:
        scores += slope * distance
    return scores


@triton.jit
def exponent_scale(scale, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr):
    # What turns shaped scores into exponents of two; the plain case folds the softmax's scale into it
    return LOG2E if SOFTCAP or ALIBI else scale * LOG2E


@triton.jit
def attend_keys(
    q, acc, top, total, row_position, slope, first_key, key_start, key_end, table, k_cache, v_cache,
    kc_block, kc_offset, vc_block, vc_offset, scale, softcap,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    SAME_STRIDES: tl.constexpr, NUM_STAGES: tl.constexpr, ASM: tl.constexpr,
    tree=None, num_before=None, TREE: tl.constexpr = False,
):  # fmt: skip
    # Query vectors q [M, BLOCK_D] over keys [key_start, key_end), key_start a multiple of BLOCK_N. The state is acc
    # [M, BLOCK_DV], top [M] (maximum exponent) and total: [M], or [M, BLOCK_N] to be summed by the caller (one reduction
    # less a step). The caches point at the kv head. Not MASKED: every row sees every key, key_end is a multiple too.
    # Keys below first_key are not read (a window's row of blocks may have been freed). A block that a row sees nothing of
    # leaves its state as it was, to the last bit.
    # TREE: rows may be of token trees, tree [M] (tree.py), behind the num_before tokens in front of the sequence's rows.
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    lanes = tl.arange(0, BLOCK_N)
    to_exponent = exponent_scale(scale, SOFTCAP, ALIBI)
    for start in tl.range(key_start, key_end, BLOCK_N, num_stages=NUM_STAGES):
        start = tl.multiple_of(start, BLOCK_N)
        position = start + lanes
        if MASKED:
            inside = position < key_end
            if WINDOW > 0:
                inside = inside & (position >= first_key)
            block = tl.load(table + position // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        else:
            block = tl.load(table + position // BLOCK_SIZE).to(tl.int64)
        offset = position % BLOCK_SIZE
        k_row = block * kc_block + offset * kc_offset
        v_row = k_row if SAME_STRIDES else block * vc_block + offset * vc_offset
        k_at = k_cache + k_row[:, None] + offs_d[None, :]
        v_at = v_cache + v_row[:, None] + offs_dv[None, :]
        if MASKED:
            keys = tl.load(k_at, mask=inside[:, None] & (offs_d[None, :] < D), other=0.0)
        elif D != BLOCK_D:
            keys = tl.load(k_at, mask=offs_d[None, :] < D, other=0.0)
        else:
            keys = tl.load(k_at)
        scores = tl.dot(q, tl.trans(keys.to(q.dtype)), input_precision="ieee")
        distance = position[None, :] - row_position[:, None]
        visible = distance <= 0
        if MASKED and TREE:
            distance, visible = place_in_tree(tree, position - num_before, distance, visible)
        scores = shape_scores(scores, distance.to(tl.float32), slope[:, None], scale, softcap, SOFTCAP, ALIBI)
        if MASKED:
            visible = inside[None, :] & visible
            if WINDOW > 0:
                visible = visible & (distance > -WINDOW)
            scores = tl.where(visible, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * to_exponent)
        base = new_top
        if MASKED:
            base = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen yet: exponentials are 0, not NaN
        weights = tl.exp2(scores * to_exponent - base[:, None])
        factor = tl.exp2(top - base)
        if MASKED:
            values = tl.load(v_at, mask=inside[:, None] & (offs_dv[None, :] < DV), other=0.0)
        elif DV != BLOCK_DV:
            values = tl.load(v_at, mask=offs_dv[None, :] < DV, other=0.0)
        else:
            values = tl.load(v_at)
        acc = acc * factor[:, None]
        acc = tl.dot(weights.to(q.dtype), widen(values, q.dtype, ASM), acc, input_precision="ieee")
        if len(total.shape) == 2:
            total = total * factor[:, None] + weights
        else:
            total = total * factor + tl.sum(weights, 1)
        top = new_top
    return acc, top, total
