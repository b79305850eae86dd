"""Prefill: sequences with several query rows. A tile holds BLOCK_Q rows times the G heads of a kv head.

    keys of a tile   |0 ............. unmasked ............|.. masked: the diagonal ..|
                     every row sees them, no comparisons    the last BLOCK_Q + BLOCK_N keys at most

Tiles are listed once a step by `tiles_kernel`; as many programs as the device runs at once take one after the other.
Dao 2023, "FlashAttention-2".
"""

from __future__ import annotations

import triton
import triton.language as tl

from .softmax import LOG2E, attend_keys
from .tree import load_tree, num_bits


@triton.jit(do_not_specialize=["table_row"])
def prefill_kernel(
    q, k_cache, v_cache, out, tiles, block_tables, query_start, seq_lens, sinks, alibi_slopes, tree_mask,
    q_token, q_head, kc_block, kc_offset, kc_head, vc_block, vc_offset, vc_head, table_row, scale, softcap,
    Q_SCALE: tl.constexpr, COMPUTE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
    ALIBI: tl.constexpr, BLOCK_SIZE: tl.constexpr, KV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SAME_STRIDES: tl.constexpr, MASK_ALL: tl.constexpr, NUM_STAGES: tl.constexpr, ASM: tl.constexpr,
    TREE: tl.constexpr,
):  # fmt: skip
    # MASK_ALL: every block goes through the same code, so that a row's result does not depend on its place in a tile.
    # TREE: some rows may be of token trees, with masks in tree_mask [T] int64; the context is what all of them see.
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    H: tl.constexpr = KV * GROUP
    lane = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    num_items = tl.load(tiles) * KV
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        kv = item % KV
        seq = tl.load(tiles + 2 + item // KV * 2)
        tile_row = tl.load(tiles + 3 + item // KV * 2)
        first_row = tl.load(query_start + seq)
        num_rows = tl.load(query_start + seq + 1) - first_row
        length = tl.load(seq_lens + seq)
        row = tile_row + lane // GROUP
        head = kv * GROUP + lane % GROUP
        keep = (lane < BLOCK_Q * GROUP) & (row < num_rows)
        packed_row = (first_row + row).to(tl.int64)
        num_before = length - num_rows
        lowest = num_before + tile_row  # position of the tile's rows
        seen_by_all = lowest + 1  # keys before this one
        row_position = num_before + row
        tree = None
        stop = tl.minimum(length, lowest + BLOCK_Q)
        if TREE:
            tree = load_tree(tree_mask, packed_row, row, keep)
            row_position = tl.where(tree != 0, num_before + num_bits(tree) - 1, row_position)
            any_tree = tl.max((tree != 0).to(tl.int32), 0) > 0
            lowest = tl.where(any_tree, num_before, lowest)
            seen_by_all = tl.where(any_tree, num_before, seen_by_all)
        first_key = tl.maximum(lowest - WINDOW + 1, 0) if WINDOW > 0 else 0
        start = first_key // BLOCK_N * BLOCK_N
        queries = tl.load(
            q + (packed_row * q_token + head * q_head)[:, None] + offs_d[None, :],
            mask=keep[:, None] & (offs_d[None, :] < D), other=0.0,
        )  # fmt: skip
        if Q_SCALE != 1.0:
            queries = queries.to(tl.float32) * Q_SCALE
        queries = queries.to(COMPUTE)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        slope = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        if SINKS:
            top = tl.load(sinks + head, mask=keep, other=0.0) * LOG2E
            total += 1.0
        if ALIBI:
            slope = tl.load(alibi_slopes + head, mask=keep, other=0.0)
        table = block_tables + seq.to(tl.int64) * table_row
        keys, values = k_cache + kv * kc_head, v_cache + kv * vc_head
        if (WINDOW == 0) and (not MASK_ALL):
            diagonal = seen_by_all // BLOCK_N * BLOCK_N
            acc, top, total = attend_keys(
                queries, acc, top, total, row_position, slope, first_key, start, diagonal, table, keys, values,
                kc_block, kc_offset, vc_block, vc_offset, scale, softcap, False, WINDOW, SOFTCAP, ALIBI, BLOCK_SIZE,
                D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, SAME_STRIDES, NUM_STAGES, ASM,
            )  # fmt: skip
            start = diagonal
        acc, top, total = attend_keys(
            queries, acc, top, total, row_position, slope, first_key, start, stop, table, keys, values,
            kc_block, kc_offset, vc_block, vc_offset, scale, softcap, True, WINDOW, SOFTCAP, ALIBI, BLOCK_SIZE,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, SAME_STRIDES, NUM_STAGES, ASM, tree, num_before, TREE,
        )  # fmt: skip
        result = acc / total[:, None]
        to = out + (packed_row * (H * DV) + head * DV)[:, None] + offs_dv[None, :]
        tl.store(to, result.to(out.dtype.element_ty), mask=keep[:, None] & (offs_dv[None, :] < DV))
