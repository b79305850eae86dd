"""Paged attention on CUDA with Triton: cache write, split-KV decode, one kernel for prefill chunks and mixed batches.

All launches follow from host integers (T, S, max_query_len, max_seq_len and the shapes), nothing is read back and no
allocation depends on data, so a step can be captured in a CUDA graph and replayed for shorter sequences.

    write      grid (rows, slices of a row)       k, v -> cache at the slot; out = 0 in padding rows
    decode     grid (S, KV, splits)               one row a sequence: the G heads of a kv head share each key
      reduce   grid (S, H)                        joins the splits (Dao et al. 2023, "Flash-Decoding")
    mixed      grid (query tiles, KV)             BLOCK_Q rows x G heads share each key

A query tile finds its sequence by itself. Sequence s owns the tiles from query_start[s] // BLOCK_Q + s on; that start
ascends, and leaves every sequence at least as many tiles as it needs, so T // BLOCK_Q + S programs are enough:

    query_start   0        5  6           (S = 3, T = 19, BLOCK_Q = 4)
    first tile    0        2  3           tiles 0,1 | 2 | 3..6; tiles without rows return at once

Import this module only where Triton is installed. TRITON_INTERPRET=1 runs it on CPU tensors, slowly.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_arguments

_LOG2E = tl.constexpr(1.4426950408889634)
_WRITE_BLOCK = 1024
_MAX_SPLITS = 64
_MIN_KEYS_PER_SPLIT = 128
_MAX_HEAD_DIM = 512


@triton.jit(do_not_specialize=["num_seqs"])
def _write_kernel(
    k, v, k_cache, v_cache, out, slot_mapping, query_start, num_seqs,
    k_token, k_head, v_token, v_head, kc_block, kc_offset, kc_head, vc_block, vc_offset, vc_head,
    BLOCK_SIZE: tl.constexpr, H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slot_mapping + row)
    if slot >= 0:
        block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
        keep = index < KV * D
        head, d = index // D, index % D
        key = tl.load(k + row * k_token + head * k_head + d, mask=keep)
        to = k_cache + block * kc_block + offset * kc_offset + head * kc_head + d
        tl.store(to, key.to(k_cache.dtype.element_ty), mask=keep)
        keep = index < KV * DV
        head, d = index // DV, index % DV
        value = tl.load(v + row * v_token + head * v_head + d, mask=keep)
        to = v_cache + block * vc_block + offset * vc_offset + head * vc_head + d
        tl.store(to, value.to(v_cache.dtype.element_ty), mask=keep)
    if row >= tl.load(query_start + num_seqs):
        zero = tl.zeros([BLOCK], dtype=out.dtype.element_ty)
        tl.store(out + row * (H * DV) + index, zero, mask=index < H * DV)


@triton.jit
def _attend_keys(
    q, acc, top, total, row_position, slope, key_start, key_end, table, k_cache, v_cache,
    kc_block, kc_offset, vc_block, vc_offset, scale, softcap,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Online softmax, base 2, of query vectors q [M, BLOCK_D] over keys [key_start, key_end). The state is acc
    # [M, BLOCK_DV], top [M] (maximum of the scores, times log2 e) and total [M]; the caches point at the kv head.
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    for start in range(key_start, key_end, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        inside = position < key_end
        block = tl.load(table + position // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        offset = position % BLOCK_SIZE
        k_mask = inside[None, :]
        v_mask = inside[:, None]
        if D != BLOCK_D:
            k_mask = k_mask & (offs_d[:, None] < D)
        if DV != BLOCK_DV:
            v_mask = v_mask & (offs_dv[None, :] < DV)
        k_at = k_cache + (block * kc_block + offset * kc_offset)[None, :] + offs_d[:, None]
        keys = tl.load(k_at, mask=k_mask, other=0.0)
        scores = tl.dot(q, keys.to(q.dtype), input_precision="ieee") * scale
        if SOFTCAP:
            scores = softcap * (2.0 / (1.0 + tl.exp2(scores * (-2.0 * _LOG2E / softcap))) - 1.0)
        if ALIBI:
            scores += slope[:, None] * (position[None, :] - row_position[:, None]).to(tl.float32)
        visible = inside[None, :] & (position[None, :] <= row_position[:, None])
        if WINDOW > 0:
            visible = visible & (row_position[:, None] - position[None, :] < WINDOW)
        scores = tl.where(visible, scores * _LOG2E, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen yet: exponentials are 0, not NaN
        weights = tl.exp2(scores - base[:, None])
        factor = tl.exp2(top - base)
        v_at = v_cache + (block * vc_block + offset * vc_offset)[:, None] + offs_dv[None, :]
        values = tl.load(v_at, mask=v_mask, other=0.0)
        acc = tl.dot(weights.to(q.dtype), values.to(q.dtype), acc * factor[:, None], input_precision="ieee")
        total = total * factor + tl.sum(weights, 1)
        top = new_top
    return acc, top, total


@triton.jit
def _decode_kernel(
    q, k_cache, v_cache, out, part_acc, part_top, part_total, block_tables, query_start, seq_lens, sinks, alibi_slopes,
    q_token, q_head, kc_block, kc_offset, kc_head, vc_block, vc_offset, vc_head, table_row, scale, softcap,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, ALIBI: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    seq, kv, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(query_start + seq).to(tl.int64)
    if tl.load(query_start + seq + 1) == row:
        return
    length = tl.load(seq_lens + seq)
    first = tl.maximum(length - WINDOW, 0) if WINDOW > 0 else 0
    span = tl.cdiv(tl.cdiv(length - first, SPLITS), BLOCK_N) * BLOCK_N
    start = first + split * span
    stop = tl.minimum(start + span, length)
    lane = tl.arange(0, BLOCK_M)
    head = kv * GROUP + lane
    keep = lane < GROUP
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    queries = tl.load(
        q + row * q_token + head[:, None] * q_head + offs_d[None, :],
        mask=keep[:, None] & (offs_d[None, :] < D), other=0.0,
    )  # fmt: skip
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    slope = tl.zeros([BLOCK_M], tl.float32)
    if SINKS:  # one more logit, counted once: by the first split
        top = tl.where(split == 0, tl.load(sinks + head, mask=keep, other=0.0) * _LOG2E, top)
        total = tl.where(split == 0, 1.0, total)
    if ALIBI:
        slope = tl.load(alibi_slopes + head, mask=keep, other=0.0)
    acc, top, total = _attend_keys(
        q=queries, acc=tl.zeros([BLOCK_M, BLOCK_DV], tl.float32), top=top, total=total,
        row_position=tl.zeros([BLOCK_M], tl.int32) + (length - 1), slope=slope, key_start=start, key_end=stop,
        table=block_tables + seq.to(tl.int64) * table_row, k_cache=k_cache + kv.to(tl.int64) * kc_head,
        v_cache=v_cache + kv.to(tl.int64) * vc_head, kc_block=kc_block, kc_offset=kc_offset, vc_block=vc_block,
        vc_offset=vc_offset, scale=scale, softcap=softcap, WINDOW=WINDOW, SOFTCAP=SOFTCAP, ALIBI=ALIBI,
        BLOCK_SIZE=BLOCK_SIZE, D=D, DV=DV, BLOCK_D=BLOCK_D, BLOCK_DV=BLOCK_DV, BLOCK_N=BLOCK_N,
    )  # fmt: skip
    wide = keep[:, None] & (offs_dv[None, :] < DV)
    if SPLITS == 1:
        result = acc / total[:, None]
        to = out + row * (H * DV) + head[:, None] * DV + offs_dv[None, :]
        tl.store(to, result.to(out.dtype.element_ty), mask=wide)
    else:
        part = (seq.to(tl.int64) * H + head) * SPLITS + split
        tl.store(part_top + part, top, mask=keep)
        tl.store(part_total + part, total, mask=keep)
        if start < stop:
            tl.store(part_acc + part[:, None] * DV + offs_dv[None, :], acc, mask=wide)


@triton.jit
def _reduce_kernel(
    part_acc, part_top, part_total, out, query_start,
    H: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    seq, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(query_start + seq).to(tl.int64)
    if tl.load(query_start + seq + 1) == row:
        return
    part = (seq.to(tl.int64) * H + head) * SPLITS + tl.arange(0, SPLITS)
    offs_dv = tl.arange(0, BLOCK_DV)
    top = tl.load(part_top + part)
    largest = tl.max(top, 0)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    weight = tl.exp2(top - base)
    total = tl.sum(tl.load(part_total + part) * weight, 0)
    seen = top > float("-inf")  # a split without keys wrote no acc
    acc = tl.load(
        part_acc + part[:, None] * DV + offs_dv[None, :], mask=seen[:, None] & (offs_dv[None, :] < DV), other=0.0
    )
    result = tl.sum(acc * weight[:, None], 0) / total
    tl.store(out + row * (H * DV) + head * DV + offs_dv, result.to(out.dtype.element_ty), mask=offs_dv < DV)


@triton.jit(do_not_specialize=["num_seqs"])
def _mixed_kernel(
    q, k_cache, v_cache, out, block_tables, query_start, seq_lens, sinks, alibi_slopes, num_seqs,
    q_token, q_head, kc_block, kc_offset, kc_head, vc_block, vc_offset, vc_head, table_row, scale, softcap,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, ALIBI: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the last tiles first: under the causal mask they are the longest
    kv = tl.program_id(1)
    seq = 0  # the last sequence whose first tile is not behind this one
    beyond = num_seqs
    while beyond - seq > 1:
        middle = (seq + beyond) // 2
        if tl.load(query_start + middle) // BLOCK_Q + middle <= tile:
            seq = middle
        else:
            beyond = middle
    first_row = tl.load(query_start + seq)
    num_rows = tl.load(query_start + seq + 1) - first_row
    tile_row = (tile - (first_row // BLOCK_Q + seq)) * BLOCK_Q
    if tile_row >= num_rows:
        return
    length = tl.load(seq_lens + seq)
    lane = tl.arange(0, BLOCK_M)
    row = tile_row + lane // GROUP
    head = kv * GROUP + lane % GROUP
    keep = (lane < BLOCK_Q * GROUP) & (row < num_rows)
    packed_row = (first_row + row).to(tl.int64)
    row_position = length - num_rows + row
    stop = tl.minimum(length, length - num_rows + tile_row + BLOCK_Q)
    start = tl.maximum(length - num_rows + tile_row - WINDOW + 1, 0) if WINDOW > 0 else 0
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    queries = tl.load(
        q + (packed_row * q_token + head * q_head)[:, None] + offs_d[None, :],
        mask=keep[:, None] & (offs_d[None, :] < D), other=0.0,
    )  # fmt: skip
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    slope = tl.zeros([BLOCK_M], tl.float32)
    if SINKS:
        top = tl.load(sinks + head, mask=keep, other=0.0) * _LOG2E
        total += 1.0
    if ALIBI:
        slope = tl.load(alibi_slopes + head, mask=keep, other=0.0)
    acc, top, total = _attend_keys(
        q=queries, acc=tl.zeros([BLOCK_M, BLOCK_DV], tl.float32), top=top, total=total, row_position=row_position,
        slope=slope, key_start=start, key_end=stop, table=block_tables + tl.cast(seq, tl.int64) * table_row,
        k_cache=k_cache + kv.to(tl.int64) * kc_head, v_cache=v_cache + kv.to(tl.int64) * vc_head, kc_block=kc_block,
        kc_offset=kc_offset, vc_block=vc_block, vc_offset=vc_offset, scale=scale, softcap=softcap, WINDOW=WINDOW,
        SOFTCAP=SOFTCAP, ALIBI=ALIBI, BLOCK_SIZE=BLOCK_SIZE, D=D, DV=DV, BLOCK_D=BLOCK_D, BLOCK_DV=BLOCK_DV,
        BLOCK_N=BLOCK_N,
    )  # fmt: skip
    result = acc / total[:, None]
    to = out + (packed_row * (H * DV) + head * DV)[:, None] + offs_dv[None, :]
    tl.store(to, result.to(out.dtype.element_ty), mask=keep[:, None] & (offs_dv[None, :] < DV))


@functools.cache
def _num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 32 for the interpreter, so that its small cases are split too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 32


def _tile_sizes(widest: int, item_bytes: int) -> tuple[int, int, int, int]:
    """(most query vectors a tile, keys a step, warps, pipeline stages) that fit the shared memory and registers of an
    H100/H200 (227 KiB a block) for padded head size `widest`. float32 runs on the plain units: small tiles."""
    if item_bytes > 2:
        return (32, 32, 4, 1) if widest <= 128 else (16, 16, 4, 1)
    if widest <= 64:
        return 128, 64, 4, 3
    if widest <= 128:
        return 128, 64, 8, 2
    return (64, 64, 8, 2) if widest <= 256 else (32, 32, 8, 1)


def _num_splits(num_seqs: int, num_kv_heads: int, max_seq_len: int, processors: int) -> int:
    """Pieces to cut each sequence's keys into: about two programs a processor, a power of two, none too short."""
    wanted = 2 * processors // max(1, num_seqs * num_kv_heads)
    splits = max(1, min(wanted, max_seq_len // _MIN_KEYS_PER_SPLIT, _MAX_SPLITS))
    return 1 << (splits.bit_length() - 1)


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    max_query_len: int,
    max_seq_len: int,
) -> Tensor:
    """`reference.paged_attention` on CUDA: the same arguments and result; float16, bfloat16 or float32 queries.

    `max_query_len` must be a true upper bound: 1 picks the decode kernel, which computes one row a sequence.
    `max_seq_len` only picks the number of splits. The metadata's values are not checked: reading them would wait for
    the device. The cache may have another dtype than q; it is converted as it is read.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a head size above 512.
    """
    check_arguments(
        q, k, v, k_cache, v_cache, slot_mapping, block_tables, query_start, seq_lens, sinks, alibi_slopes, window,
        softcap,
    )  # fmt: skip
    num_tokens, num_heads, head_dim = q.shape
    block_size, num_kv_heads, value_dim = v_cache.shape[1:]
    if max(head_dim, value_dim) > _MAX_HEAD_DIM or q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(
            f"paged_attention (Triton): head sizes {head_dim} and {value_dim}, dtype {q.dtype}; allowed are sizes to "
            f"{_MAX_HEAD_DIM} and float16, bfloat16, float32: use reference.paged_attention"
        )
    out = torch.empty((num_tokens, num_heads, value_dim), dtype=q.dtype, device=q.device)
    num_seqs = seq_lens.shape[0]
    if num_tokens == 0:
        return out
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        widest = max(num_kv_heads * head_dim, num_heads * value_dim)
        _write_kernel[(num_tokens, triton.cdiv(widest, _WRITE_BLOCK))](
            k, v, k_cache, v_cache, out, slot_mapping, query_start, num_seqs,
            *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3],
            BLOCK_SIZE=block_size, H=num_heads, KV=num_kv_heads, D=head_dim, DV=value_dim, BLOCK=_WRITE_BLOCK,
        )  # fmt: skip
        if num_seqs and max_query_len:
            _attend(
                q, k_cache, v_cache, block_tables, query_start, seq_lens, out, scale, window, softcap, sinks,
                alibi_slopes, max_query_len, max_seq_len,
            )  # fmt: skip
    return out


def _attend(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, query_start: Tensor, seq_lens: Tensor,
    out: Tensor, scale: float, window: int, softcap: float, sinks: Tensor | None, alibi_slopes: Tensor | None,
    max_query_len: int, max_seq_len: int,
) -> None:  # fmt: skip
    """Launch the decode kernel (and its reduction) or the mixed kernel; `out` is filled in place."""
    num_tokens, num_heads, head_dim = q.shape
    block_size, num_kv_heads, value_dim = v_cache.shape[1:]
    num_seqs, group = seq_lens.shape[0], num_heads // num_kv_heads
    block_d, block_dv = (max(16, triton.next_power_of_2(d)) for d in (head_dim, value_dim))
    largest_m, block_n, warps, stages = _tile_sizes(max(block_d, block_dv), q.element_size())
    strides = (*q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3], block_tables.stride(0))
    common: dict[str, Any] = {
        "WINDOW": window, "SOFTCAP": softcap > 0, "SINKS": sinks is not None, "ALIBI": alibi_slopes is not None,
        "BLOCK_SIZE": block_size, "H": num_heads, "GROUP": group, "D": head_dim, "DV": value_dim, "BLOCK_D": block_d,
        "BLOCK_DV": block_dv, "BLOCK_N": block_n, "num_stages": stages,
    }  # fmt: skip
    smallest_m = max(16, triton.next_power_of_2(group))
    if max_query_len == 1:
        splits = _num_splits(num_seqs, num_kv_heads, max_seq_len, _num_processors(q.device))
        part_acc = part_top = part_total = None
        if splits > 1:
            shape = (num_seqs, num_heads, splits)
            part_acc = torch.empty((*shape, value_dim), dtype=torch.float32, device=q.device)
            part_top, part_total = torch.empty((2, *shape), dtype=torch.float32, device=q.device)
        _decode_kernel[(num_seqs, num_kv_heads, splits)](
            q, k_cache, v_cache, out, part_acc, part_top, part_total, block_tables, query_start, seq_lens, sinks,
            alibi_slopes, *strides, scale, softcap, **common, BLOCK_M=smallest_m, SPLITS=splits, num_warps=4,
        )  # fmt: skip
        if splits > 1:
            _reduce_kernel[(num_seqs, num_heads)](
                part_acc, part_top, part_total, out, query_start, H=num_heads, DV=value_dim, BLOCK_DV=block_dv,
                SPLITS=splits,
            )  # fmt: skip
        return
    block_m = max(smallest_m, min(largest_m, triton.next_power_of_2(max_query_len * group)))
    block_q = block_m // group
    _mixed_kernel[(num_tokens // block_q + num_seqs, num_kv_heads)](
        q, k_cache, v_cache, out, block_tables, query_start, seq_lens, sinks, alibi_slopes, num_seqs, *strides,
        scale, softcap, **common, BLOCK_M=block_m, BLOCK_Q=block_q, num_warps=4 if block_m <= 64 else warps,
    )  # fmt: skip
