"""Decode: sequences with one query row. A program streams a piece of the keys of one kv head past its G query heads.

    keys of a sequence   |0 ......... span|span ...... 2 span|2 span .. length-1|new|
    program (split)              0                 1                  2            the last one adds the new token,
                                                                                   which comes from k, v, not the cache

Dao et al. 2023, "Flash-Decoding". How many splits a sequence uses follows from its length on the device.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rotate import load_turned
from .softmax import LOG2E, attend_keys, exponent_scale, saturate, shape_scores
from .transposed import attend_keys_transposed


@triton.jit(do_not_specialize=["num_seqs", "num_tokens", "table_row"])
def decode_kernel(
    q, k, v, cos, sin, k_cache, v_cache, out, part_acc, part_top, part_total, arrived,
    slot_mapping, block_tables, query_start, seq_lens, sinks, alibi_slopes, num_seqs, num_tokens,
    q_token, q_head, k_token, k_head, v_token, v_head, cos_token, sin_token,
    kc_block, kc_offset, kc_head, vc_block, vc_offset, vc_head, table_row, scale, softcap,
    Q_SCALE: tl.constexpr, COMPUTE: tl.constexpr, ROTATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, ALIBI: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    KV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SAME_STRIDES: tl.constexpr,
    WRITE: tl.constexpr, SPLITS: tl.constexpr, MIN_SPAN: tl.constexpr, JOIN: tl.constexpr, BLOCK_G: tl.constexpr,
    NUM_STAGES: tl.constexpr, ASM: tl.constexpr, TRANSPOSED: tl.constexpr, PAIRS: tl.constexpr,
    KC_BLOCK: tl.constexpr, VC_BLOCK: tl.constexpr,
):  # fmt: skip
    # WRITE: all sequences have one row at most; the new keys and values are stored here, and padding rows zeroed.
    # ROTATED: q and k are turned as they are loaded, by the angles cos, sin [T, ROTATED] of their row.
    # TRANSPOSED, PAIRS, KC_BLOCK (= kc_block), VC_BLOCK: the other way to attend to keys, see transposed.py.
    # JOIN: the program of a (sequence, kv head) that ends last adds the splits up; `arrived` [S, KV] is 0 before and after.
    kv = tl.program_id(0) % KV  # the heads of a KV block run side by side: they share its memory pages
    split = tl.program_id(0) // KV % SPLITS
    seq = tl.program_id(0) // (KV * SPLITS)
    H: tl.constexpr = KV * GROUP
    lane = tl.arange(0, BLOCK_M)
    head = kv * GROUP + lane
    keep = lane < GROUP
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    wide = keep[:, None] & (offs_dv[None, :] < DV)
    if WRITE:
        padding = (split == 0) & (seq >= tl.load(query_start + num_seqs)) & (seq < num_tokens)
        blank = out + seq.to(tl.int64) * (H * DV) + head[:, None] * DV + offs_dv[None, :]
        tl.store(blank, tl.zeros([BLOCK_M, BLOCK_DV], out.dtype.element_ty), mask=wide & padding)
        if seq >= num_seqs:
            return
    row = tl.load(query_start + seq)
    if tl.load(query_start + seq + 1) != row + 1:
        return
    row = row.to(tl.int64)
    length = tl.load(seq_lens + seq)
    first = tl.maximum(length - WINDOW, 0) if WINDOW > 0 else 0
    begin = first // BLOCK_N * BLOCK_N
    span = tl.maximum(tl.cdiv(tl.cdiv(length - begin, SPLITS), BLOCK_N) * BLOCK_N, MIN_SPAN)
    start = begin + split * span
    if start >= length:
        return
    stop = tl.minimum(start + span, length)
    queries = load_turned(
        q + row * q_token + head[:, None] * q_head, offs_d[None, :], keep[:, None] & (offs_d[None, :] < D), cos, sin,
        row, cos_token, sin_token, ROTATED, INTERLEAVED, ASM,
    )  # fmt: skip
    if Q_SCALE != 1.0:
        queries = queries.to(tl.float32) * Q_SCALE
    queries = queries.to(COMPUTE)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    slope = tl.zeros([BLOCK_M], tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)  # of the new token's value
    value = tl.zeros([BLOCK_DV], v_cache.dtype.element_ty)
    if SINKS:  # one more logit, counted once: by the first split
        top = tl.where(split == 0, tl.load(sinks + head, mask=keep, other=0.0) * LOG2E, top)
        total = tl.where(split == 0, 1.0, total)
    if ALIBI:
        slope = tl.load(alibi_slopes + head, mask=keep, other=0.0)
    if WRITE:
        slot = tl.load(slot_mapping + row)
        fresh = (slot >= 0) & (stop == length)
        block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
        is_key, is_value = (offs_d < D) & fresh, (offs_dv < DV) & fresh
        key = load_turned(
            k + row * k_token + kv * k_head, offs_d, is_key, cos, sin, row, cos_token, sin_token, ROTATED, INTERLEAVED,
            ASM,
        )  # fmt: skip
        key = saturate(key, k_cache)
        value = saturate(tl.load(v + row * v_token + kv * v_head + offs_dv, mask=is_value, other=0.0), v_cache)
        tl.store(k_cache + block * kc_block + offset * kc_offset + kv * kc_head + offs_d, key, mask=is_key)
        tl.store(v_cache + block * vc_block + offset * vc_offset + kv * vc_head + offs_dv, value, mask=is_value)
        score = tl.sum(queries.to(tl.float32) * key.to(COMPUTE).to(tl.float32)[None, :], 1)
        score = shape_scores(score, tl.zeros([BLOCK_M], tl.float32), slope, scale, softcap, SOFTCAP, ALIBI)
        exponent = tl.where(fresh, score * exponent_scale(scale, SOFTCAP, ALIBI), float("-inf"))
        new_top = tl.maximum(top, exponent)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2(exponent - base)
        total = total * tl.exp2(top - base) + weight
        top = new_top
        stop = tl.where(fresh, length - 1, stop)
    table = block_tables + seq.to(tl.int64) * table_row
    if TRANSPOSED:
        acc, top, total = attend_keys_transposed(
            q=queries, weight=weight, value=value.to(COMPUTE), top=top, total=total, length=length, slope=slope,
            first_key=first, key_start=start, key_end=stop, table=table, k_cache=k_cache + kv * kc_head,
            v_cache=v_cache + kv * vc_head, kc_offset=kc_offset, vc_offset=vc_offset, scale=scale, softcap=softcap,
            KC_BLOCK=KC_BLOCK, VC_BLOCK=VC_BLOCK, WINDOW=WINDOW, SOFTCAP=SOFTCAP, ALIBI=ALIBI, BLOCK_SIZE=BLOCK_SIZE,
            D=D, DV=DV, BLOCK_D=BLOCK_D, BLOCK_DV=BLOCK_DV, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
            SAME_STRIDES=SAME_STRIDES, PAIRS=PAIRS, NUM_STAGES=NUM_STAGES, ASM=ASM,
        )  # fmt: skip
    else:
        acc = weight[:, None] * value.to(COMPUTE).to(tl.float32)[None, :]
        totals = tl.where(tl.arange(0, BLOCK_N)[None, :] == 0, total[:, None], 0.0)
        acc, top, totals = attend_keys(
            q=queries, acc=acc, top=top, total=totals, row_position=tl.zeros([BLOCK_M], tl.int32) + (length - 1),
            slope=slope, first_key=first, key_start=start, key_end=stop, table=table,
            k_cache=k_cache + kv * kc_head, v_cache=v_cache + kv * vc_head, kc_block=kc_block, kc_offset=kc_offset,
            vc_block=vc_block, vc_offset=vc_offset, scale=scale, softcap=softcap, MASKED=True, WINDOW=WINDOW,
            SOFTCAP=SOFTCAP, ALIBI=ALIBI, BLOCK_SIZE=BLOCK_SIZE, D=D, DV=DV, BLOCK_D=BLOCK_D, BLOCK_DV=BLOCK_DV,
            BLOCK_N=BLOCK_N, SAME_STRIDES=SAME_STRIDES, NUM_STAGES=NUM_STAGES, ASM=ASM,
        )  # fmt: skip
        total = tl.sum(totals, 1)
    num_active = tl.cdiv(length - begin, span)
    to = out + row * (H * DV) + head[:, None] * DV + offs_dv[None, :]
    if SPLITS == 1 or num_active == 1:
        tl.store(to, (acc / total[:, None]).to(out.dtype.element_ty), mask=wide)
    else:
        pair = seq.to(tl.int64) * KV + kv
        part = (pair * GROUP + lane) * SPLITS + split
        tl.store(part_top + part, top, mask=keep)
        tl.store(part_total + part, total, mask=keep)
        tl.store(part_acc + part[:, None] * DV + offs_dv[None, :], acc, mask=wide)
        if JOIN:
            tl.debug_barrier()  # the stores of all threads come before the arrival is counted
            if tl.atomic_add(arrived + pair, 1, sem="acq_rel") == num_active - 1:
                tl.store(arrived + pair, 0)
                _join(
                    part_acc, part_top, part_total, out, pair, row, num_active, KV, GROUP, DV, BLOCK_G, BLOCK_DV, SPLITS
                )


@triton.jit
def _join(
    part_acc, part_top, part_total, out, pair, row, num_active,
    KV: tl.constexpr, GROUP: tl.constexpr, DV: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_DV: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    # out [GROUP, DV] of a (sequence, kv head) from its splits, four at a time. The loads bypass the first-level cache.
    STEP: tl.constexpr = 4 if SPLITS > 4 else SPLITS
    lane = tl.arange(0, BLOCK_G)
    offs_dv = tl.arange(0, BLOCK_DV)
    part = (pair * GROUP + lane) * SPLITS
    split = tl.arange(0, SPLITS)
    seen = (lane[:, None] < GROUP) & (split[None, :] < num_active)
    tops = tl.load(part_top + part[:, None] + split[None, :], mask=seen, other=float("-inf"), cache_modifier=".cg")
    largest = tl.max(tops, 1)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    totals = tl.load(part_total + part[:, None] + split[None, :], mask=seen, other=0.0, cache_modifier=".cg")
    total = tl.sum(totals * tl.exp2(tops - base[:, None]), 1)
    acc = tl.zeros([BLOCK_G, BLOCK_DV], tl.float32)
    for start in range(0, num_active, STEP):
        at = start + tl.arange(0, STEP)
        inside = (at[:, None] < num_active) & (lane[None, :] < GROUP)
        index = part[None, :] + at[:, None]
        factor = tl.exp2(
            tl.load(part_top + index, mask=inside, other=float("-inf"), cache_modifier=".cg") - base[None, :]
        )
        pieces = tl.load(
            part_acc + index[:, :, None] * DV + offs_dv[None, None, :],
            mask=inside[:, :, None] & (offs_dv[None, None, :] < DV), other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        acc += tl.sum(pieces * factor[:, :, None], 0)
    result = acc / total[:, None]
    head = pair % KV * GROUP + lane
    to = out + row * (KV * GROUP * DV) + head[:, None] * DV + offs_dv[None, :]
    tl.store(to, result.to(out.dtype.element_ty), mask=(lane[:, None] < GROUP) & (offs_dv[None, :] < DV))


@triton.jit
def join_kernel(
    part_acc, part_top, part_total, out, query_start, seq_lens,
    WINDOW: tl.constexpr, KV: tl.constexpr, GROUP: tl.constexpr, DV: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, MIN_SPAN: tl.constexpr,
):  # fmt: skip
    # The second kernel where splits are not joined by the program that ends last; grid (KV, S).
    kv, seq = tl.program_id(0), tl.program_id(1)
    row = tl.load(query_start + seq)
    if tl.load(query_start + seq + 1) != row + 1:
        return
    length = tl.load(seq_lens + seq)
    first = tl.maximum(length - WINDOW, 0) if WINDOW > 0 else 0
    begin = first // BLOCK_N * BLOCK_N
    span = tl.maximum(tl.cdiv(tl.cdiv(length - begin, SPLITS), BLOCK_N) * BLOCK_N, MIN_SPAN)
    num_active = tl.cdiv(length - begin, span)
    if num_active == 1:
        return
    pair = seq.to(tl.int64) * KV + kv
    _join(
        part_acc,
        part_top,
        part_total,
        out,
        pair,
        row.to(tl.int64),
        num_active,
        KV,
        GROUP,
        DV,
        BLOCK_G,
        BLOCK_DV,
        SPLITS,
    )
