"""Prefill of fresh sequences: no token is cached, so all keys and values are rows of this step, one behind the other.

    keys of a tile   |.. window's edge ..|............ unmasked ............|.. diagonal ..|
                      rows' own reads     tensor memory accelerator          rows' own reads

Where every row of a tile sees a whole block of keys, the tensor memory accelerator copies the block without any addresses in
registers. The blocks at the edges are read with masks: behind a sequence's end lie rows of another, which may hold NaN.
Dao 2023, "FlashAttention-2"; Shah et al. 2024, "FlashAttention-3", section 3, for the copies.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .softmax import LOG2E, exponent_scale, shape_scores


@triton.jit
def prefill_fresh_kernel(
    q, k, v, k_blocks, v_blocks, out, tiles, query_start, sinks, alibi_slopes,
    q_token, q_head, k_token, v_token, scale, softcap,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, ALIBI: tl.constexpr, KV: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):  # fmt: skip
    # q [T, H, D] -> out [T, H, DV] for the tiles listed in `tiles`. k_blocks and v_blocks: descriptors of k [T, KV * D] and
    # v [T, KV * DV] for blocks [BLOCK_N, D] and [BLOCK_N, DV]. D and DV are powers of two.
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    H: tl.constexpr = KV * GROUP
    lane = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, D)
    offs_dv = tl.arange(0, DV)
    num_items = tl.load(tiles) * KV
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        kv = item % KV
        seq = tl.load(tiles + 2 + item // KV * 2)
        tile_row = tl.load(tiles + 3 + item // KV * 2)
        first_row = tl.load(query_start + seq)
        num_rows = tl.load(query_start + seq + 1) - first_row
        row = tile_row + lane // GROUP  # in the sequence: a fresh sequence's position
        head = kv * GROUP + lane % GROUP
        keep = (lane < BLOCK_Q * GROUP) & (row < num_rows)
        packed_row = (first_row + row).to(tl.int64)
        queries = tl.load(
            q + (packed_row * q_token + head * q_head)[:, None] + offs_d[None, :], mask=keep[:, None], other=0.0
        )
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        slope = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, DV], tl.float32)
        if SINKS:
            top = tl.load(sinks + head, mask=keep, other=0.0) * LOG2E
            total += 1.0
        if ALIBI:
            slope = tl.load(alibi_slopes + head, mask=keep, other=0.0)
        keys = k + first_row.to(tl.int64) * k_token + kv * D
        values = v + first_row.to(tl.int64) * v_token + kv * DV
        stop = tl.minimum(num_rows, tile_row + BLOCK_Q)
        diagonal = (tile_row + 1) // BLOCK_N * BLOCK_N
        inner = 0  # from here to the diagonal every row sees every key
        to_exponent = exponent_scale(scale, SOFTCAP, ALIBI)
        if WINDOW > 0:
            first_key = tl.maximum(tile_row - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
            inner = tl.maximum(tile_row + BLOCK_Q - WINDOW, 0)
            inner = tl.maximum(tl.minimum((inner + BLOCK_N - 1) // BLOCK_N * BLOCK_N, diagonal), first_key)
            acc, top, total = _attend_edge(
                queries, acc, top, total, row, slope, first_key, inner, num_rows, keys, values, k_token, v_token, scale,
                softcap, WINDOW, SOFTCAP, ALIBI, D, DV, BLOCK_N, NUM_STAGES,
            )  # fmt: skip
        for start in tl.range(inner, diagonal, BLOCK_N, num_stages=NUM_STAGES):
            scores = tl.dot(queries, k_blocks.load([first_row + start, kv * D]).T)
            distance = (start + tl.arange(0, BLOCK_N)[None, :] - row[:, None]).to(tl.float32)
            scores = shape_scores(scores, distance, slope[:, None], scale, softcap, SOFTCAP, ALIBI)
            new_top = tl.maximum(top, tl.max(scores, 1) * to_exponent)
            weights = tl.exp2(scores * to_exponent - new_top[:, None])
            factor = tl.exp2(top - new_top)
            acc = acc * factor[:, None]
            acc = tl.dot(weights.to(q.dtype.element_ty), v_blocks.load([first_row + start, kv * DV]), acc)
            total = total * factor + tl.sum(weights, 1)
            top = new_top
        acc, top, total = _attend_edge(
            queries, acc, top, total, row, slope, diagonal, stop, num_rows, keys, values, k_token, v_token, scale, softcap,
            WINDOW, SOFTCAP, ALIBI, D, DV, BLOCK_N, NUM_STAGES,
        )  # fmt: skip
        to = out + (packed_row * (H * DV) + head * DV)[:, None] + offs_dv[None, :]
        tl.store(to, (acc / total[:, None]).to(out.dtype.element_ty), mask=keep[:, None])


@triton.jit
def _attend_edge(
    q, acc, top, total, row, slope, key_start, key_end, num_rows, keys, values, k_token, v_token, scale, softcap,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    # Blocks of keys [key_start, key_end) of which some rows do not see everything; keys and values point at the sequence
    # and its kv head. A block that a row sees nothing of leaves its state as it was.
    to_exponent = exponent_scale(scale, SOFTCAP, ALIBI)
    offs_d = tl.arange(0, D)
    offs_dv = tl.arange(0, DV)
    for start in tl.range(key_start, key_end, BLOCK_N, num_stages=NUM_STAGES):
        position = start + tl.arange(0, BLOCK_N)
        inside = (position < num_rows)[:, None]
        at = position.to(tl.int64)[:, None]
        block = tl.load(keys + at * k_token + offs_d[None, :], mask=inside, other=0.0)
        scores = tl.dot(q, block.T)
        distance = (position[None, :] - row[:, None]).to(tl.float32)
        scores = shape_scores(scores, distance, slope[:, None], scale, softcap, SOFTCAP, ALIBI)
        visible = position[None, :] <= row[:, None]
        if WINDOW > 0:
            visible = visible & (row[:, None] - position[None, :] < WINDOW)
        scores = tl.where(visible, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * to_exponent)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen yet: exponentials are 0, not NaN
        weights = tl.exp2(scores * to_exponent - base[:, None])
        factor = tl.exp2(top - base)
        acc = acc * factor[:, None]
        block = tl.load(values + at * v_token + offs_dv[None, :], mask=inside, other=0.0)
        acc = tl.dot(weights.to(q.dtype), block, acc)
        total = total * factor + tl.sum(weights, 1)
        top = new_top
    return acc, top, total
