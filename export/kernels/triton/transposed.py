"""The inner loop of decode attention with keys as the rows of both products.

    scores^T [keys, G] = K [keys, D] q^T [D, G]         acc^T [Dv, G] += V^T [Dv, keys] p^T [keys, G]

Tensor cores take 16 rows and 8 columns: here keys and elements fill the rows, and G query heads are padded to 8 columns,
where `softmax.attend_keys` pads them to 16 rows. That halves the products, the exponentials and the accumulator.

Values of 8 bits are read two at a time, as 16-bit numbers, which the load from shared memory can transpose; elements
2i and 2i + 1 of the values then go to two accumulators. 8-bit numbers would have to be widened and stored again first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .softmax import exponent_scale, shape_scores


@triton.jit
def _even_of_pairs(x, ASM: tl.constexpr):
    # The lower bytes of x (int16), which are float8_e4m3fn, as float16
    if ASM:  # of two numbers: both lower bytes into the lower half, then two conversions in one instruction
        even = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 sorted;
            .reg .b16 low, high;
            prmt.b32 sorted, $1, 0, 0x3120;
            mov.b32 {low, high}, sorted;
            cvt.rn.f16x2.e4m3x2 $0, low;
            }
            """,
            "=r,r", [x], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        even = (x & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
    return even


@triton.jit
def _odd_of_pairs(x, ASM: tl.constexpr):
    # As _even_of_pairs, the upper bytes; the compiler shares the permutation of bytes
    if ASM:
        odd = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 sorted;
            .reg .b16 low, high;
            prmt.b32 sorted, $1, 0, 0x3120;
            mov.b32 {low, high}, sorted;
            cvt.rn.f16x2.e4m3x2 $0, high;
            }
            """,
            "=r,r", [x], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        odd = ((x >> 8) & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
    return odd


@triton.jit
def attend_keys_transposed(
    q, weight, value, top, total, length, slope, first_key, key_start, key_end, table, k_cache, v_cache,
    kc_offset, vc_offset, scale, softcap, KC_BLOCK: tl.constexpr, VC_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SAME_STRIDES: tl.constexpr, PAIRS: tl.constexpr, NUM_STAGES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    # Query vectors q [M, BLOCK_D] of position length - 1 over keys [max(first_key, key_start), key_end), key_start a multiple
    # of BLOCK_N. The state before: weight [M] times value [BLOCK_DV], top [M] (maximum exponent), total [M]. Returns acc
    # [M, BLOCK_DV], top, total. PAIRS: an 8-bit v_cache is read by 16-bit numbers; DV and its strides are even.
    # KC_BLOCK, VC_BLOCK: strides of a KV block, constants so that a place in the cache takes few instructions.
    STEP: tl.constexpr = 2 if PAIRS else 1
    BLOCK_V: tl.constexpr = BLOCK_DV // STEP
    lanes = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_v = tl.arange(0, BLOCK_V)
    queries = tl.trans(q)
    value = value.to(tl.float32)
    if PAIRS:
        v_cache = v_cache.to(tl.pointer_type(tl.int16))
        value, odd_value = tl.split(tl.reshape(value, [BLOCK_V, 2]))
        odd = odd_value[:, None] * weight[None, :]
    acc = value[:, None] * weight[None, :]
    totals = tl.where(lanes[:, None] == 0, total[None, :], 0.0)
    to_exponent = exponent_scale(scale, SOFTCAP, ALIBI)
    ZERO: tl.constexpr = 0 if PAIRS else 0.0
    WHOLE: tl.constexpr = BLOCK_N % BLOCK_SIZE == 0  # a step is some KV blocks: places in them do not change
    k_inside = lanes % BLOCK_SIZE * kc_offset if WHOLE else lanes * 0
    v_inside = lanes % BLOCK_SIZE * (vc_offset // STEP) if WHOLE else lanes * 0
    k_tile = k_cache + (k_inside[:, None] + offs_d[None, :])
    v_tile = v_cache + (v_inside[None, :] + offs_v[:, None])
    for start in tl.range(key_start, key_end, BLOCK_N, num_stages=NUM_STAGES):
        start = tl.multiple_of(start, BLOCK_N)
        position = start + lanes
        inside = position < key_end
        if WINDOW > 0:
            inside = inside & (position >= first_key)
        entry = start // BLOCK_SIZE + lanes // BLOCK_SIZE if WHOLE else position // BLOCK_SIZE
        block = tl.load(table + entry, mask=inside, other=0).to(tl.int64)
        k_row = block * KC_BLOCK
        v_row = k_row if SAME_STRIDES and STEP == 1 else block * (VC_BLOCK // STEP)
        if not WHOLE:
            k_row = k_row + position % BLOCK_SIZE * kc_offset
            v_row = v_row + position % BLOCK_SIZE * (vc_offset // STEP)
        # Keys outside are other tokens' (of block 0, or of the last block's rest): their scores are replaced.
        if D != BLOCK_D:
            keys = tl.load(k_tile + k_row[:, None], mask=offs_d[None, :] < D, other=0.0)
        else:
            keys = tl.load(k_tile + k_row[:, None])
        scores = tl.dot(keys.to(q.dtype), queries, input_precision="ieee")
        distance = (position - (length - 1)).to(tl.float32)
        scores = shape_scores(scores, distance[:, None], slope[None, :], scale, softcap, SOFTCAP, ALIBI)
        scores = tl.where(inside[:, None], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 0) * to_exponent)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen yet: exponentials are 0, not NaN
        weights = tl.exp2(scores * to_exponent - base[None, :])
        factor = tl.exp2(top - base)[None, :]
        values = tl.load(v_tile + v_row[None, :], mask=inside[None, :] & (offs_v[:, None] < DV // STEP), other=ZERO)
        share = weights.to(q.dtype)
        if PAIRS:
            acc = tl.dot(_even_of_pairs(values, ASM), share, acc * factor)
            odd = tl.dot(_odd_of_pairs(values, ASM), share, odd * factor)
        else:
            acc = tl.dot(values.to(q.dtype), share, acc * factor, input_precision="ieee")
        totals = totals * factor + weights
        top = new_top
    if PAIRS:
        acc = tl.reshape(tl.permute(tl.join(acc, odd), [1, 0, 2]), [BLOCK_M, BLOCK_DV])
    else:
        acc = tl.trans(acc)
    return acc, top, tl.sum(totals, 0)
