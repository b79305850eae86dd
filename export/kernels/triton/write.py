"""Kernels over rows: rope, keys and values into the cache, and the tiles of the sequences that have several rows."""

from __future__ import annotations

import triton
import triton.language as tl

from .rotate import load_turned
from .softmax import saturate

ALL, CONTINUING = 0, 1
"""Kinds of sequences that `tiles_kernel` lists: every one, and those with cached tokens."""
_CONTINUING = tl.constexpr(CONTINUING)


@triton.jit(do_not_specialize=["num_seqs"])
def write_kernel(
    q, k, v, cos, sin, q_turned, k_turned, k_cache, v_cache, out, slot_mapping, query_start, num_seqs,
    q_token, q_head, k_token, k_head, v_token, v_head, cos_token, sin_token,
    kc_block, kc_offset, kc_head, vc_block, vc_offset, vc_head,
    BLOCK_SIZE: tl.constexpr, H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    ROTATED: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_Q: tl.constexpr, KEEP_KEYS: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    # One row: k [KV, D] and v [KV, DV] to its slot; a padding row's out [H, DV] becomes 0.
    # ROTATED: k is turned on the way, and q [H, D] to q_turned [T, H, D] (not in padding rows). KEEP_KEYS: the turned k also
    # to k_turned [T, KV, D], in every row.
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + row)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    if (slot >= 0) | KEEP_KEYS:
        for start in tl.static_range(0, KV * D, BLOCK):
            index = start + tl.arange(0, BLOCK)
            keep = index < KV * D
            head, d = index // D, index % D
            key = load_turned(
                k + row * k_token + head * k_head, d, keep, cos, sin, row, cos_token, sin_token, ROTATED, INTERLEAVED,
                ASM,
            )  # fmt: skip
            tl.store(
                k_cache + block * kc_block + offset * kc_offset + head * kc_head + d,
                saturate(key, k_cache),
                mask=keep & (slot >= 0),
            )
            if KEEP_KEYS:
                tl.store(k_turned + row * (KV * D) + index, key, mask=keep)
    if slot >= 0:
        for start in tl.static_range(0, KV * DV, BLOCK):
            index = start + tl.arange(0, BLOCK)
            keep = index < KV * DV
            head, d = index // DV, index % DV
            value = tl.load(v + row * v_token + head * v_head + d, mask=keep)
            tl.store(
                v_cache + block * vc_block + offset * vc_offset + head * vc_head + d,
                saturate(value, v_cache),
                mask=keep,
            )
    if row >= tl.load(query_start + num_seqs):
        for start in range(0, H * DV, BLOCK):
            index = start + tl.arange(0, BLOCK)
            tl.store(out + row * (H * DV) + index, tl.zeros([BLOCK], out.dtype.element_ty), mask=index < H * DV)
    elif ROTATED > 0:
        for start in range(0, H * D, BLOCK_Q):
            index = start + tl.arange(0, BLOCK_Q)
            keep = index < H * D
            head, d = index // D, index % D
            query = load_turned(
                q + row * q_token + head * q_head, d, keep, cos, sin, row, cos_token, sin_token, ROTATED, INTERLEAVED,
                ASM,
            )  # fmt: skip
            tl.store(q_turned + row * (H * D) + index, query, mask=keep)


@triton.jit(do_not_specialize=["num_seqs", "bound"])
def tiles_kernel(
    query_start, seq_lens, tiles, num_seqs, bound, KIND: tl.constexpr,
    MIN_ROWS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    # tiles [1 + bound, 2]: (number of tiles, 0), then (sequence, first row in it) of every tile of BLOCK_Q rows, for the
    # sequences of KIND with MIN_ROWS rows or more. Every program adds up all sequences and writes BLOCK_T tiles.
    tile = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    seq = tl.zeros([BLOCK_T], tl.int32)  # the first one whose tiles end behind this tile
    first = tl.zeros([BLOCK_T], tl.int32)  # its first tile
    total = 0
    for start in range(0, num_seqs, BLOCK_S):
        at = start + tl.arange(0, BLOCK_S)
        inside = at < num_seqs
        rows = tl.load(query_start + at + 1, mask=inside, other=0) - tl.load(query_start + at, mask=inside, other=0)
        listed = rows >= MIN_ROWS
        if KIND == _CONTINUING:
            listed = listed & (tl.load(seq_lens + at, mask=inside, other=0) != rows)
        count = tl.where(listed, (rows + BLOCK_Q - 1) // BLOCK_Q, 0)
        end = total + tl.cumsum(count, 0)
        behind = (end[None, :] <= tile[:, None]) & inside[None, :]
        seq += tl.sum(behind.to(tl.int32), 1)
        first = tl.maximum(first, tl.max(tl.where(behind, end[None, :], 0), 1))
        total += tl.sum(count, 0)
    keep = (tile < total) & (tile < bound)
    rows = tl.load(query_start + seq + 1, mask=keep, other=0) - tl.load(query_start + seq, mask=keep, other=0)
    row = ((rows + BLOCK_Q - 1) // BLOCK_Q - 1 - (tile - first)) * BLOCK_Q  # the longest first: the last rows
    tl.store(tiles + 2 + 2 * tile, seq, mask=keep)
    tl.store(tiles + 3 + 2 * tile, row, mask=keep)
    if tl.program_id(0) == 0:
        tl.store(tiles, total)
