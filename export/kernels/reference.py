"""Paged attention in plain torch: the oracle of the other kernels, on any device and dtype.

The cache is a pool of blocks; a sequence's block table says where its tokens are:

    position of a token     0 .. bs-1   bs .. 2bs-1   2bs .. 3bs-1
    block_tables[s]         [   7     ,      2      ,      5      , 0 ...]
    slot of position p      block_tables[s][p // bs] * bs + p % bs

One step packs the new rows of all sequences behind each other; a sequence's rows are its LAST positions:

    rows                    query_start[s] ......... query_start[s+1]-1
    positions               seq_lens[s]-n  ......... seq_lens[s]-1            n = query_start[s+1]-query_start[s]
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...graph.quant_ops import saturate
from .checks import check_arguments
from .rope import Rope


def write_cache(k_TKD: Tensor, v_TKD: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write each row's key and value at its slot, in place; slot -1 writes nothing.

    k [T, KV, D], v [T, KV, Dv]; caches [N, block size, KV, D or Dv], of any float dtype: float8_e4m3fn saturates at 448.
    slot_mapping [T] int64.
    """
    block_size = k_cache.shape[1]
    rows = (slot_mapping >= 0).nonzero().squeeze(1)
    slots = slot_mapping[rows]
    index = (slots // block_size, slots % block_size)
    k_cache[index] = saturate(k_TKD[rows], k_cache.dtype)
    v_cache[index] = saturate(v_TKD[rows], v_cache.dtype)


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
    rope: Rope | None = None,
) -> Tensor:
    """Write k and v into the cache, then attend over it, causally, one sequence after the other.

    Args:
        q, k, v: [T, H, D], [T, KV, D], [T, KV, Dv]; the last dimension contiguous. Head h reads kv head h // (H // KV).
        k_cache, v_cache: [N, block size, KV, D] and [N, block size, KV, Dv], changed in place.
        slot_mapping: [T] int64, block * block size + offset, -1 writes nothing.
        block_tables: [S, W] int32. query_start: [S+1] int32, ascending. seq_lens: [S] int32, tokens after this step.
        scale: multiplies q . k.
        window: row i sees j iff j <= i and i - j < window; 0 means no limit.
        softcap: s becomes softcap * tanh(s / softcap); 0 means none.
        sinks: [H] float32, one more logit per head in the softmax's denominator (after softcap, not scaled), or None.
        alibi_slopes: [H] float32; slope * (j - i) is added to the scaled score, after softcap, or None (Press et al.
            2021, section 3).
        max_query_len, max_seq_len: upper bounds, for kernels that launch from host numbers; not used here.
        rope: turns q and k first; keys are cached as they are turned.

    Returns:
        [T, H, Dv] in q's dtype. Rows from query_start[-1] on are padding and zero. Scores and softmax are float32
        (float64 where q is).

    Raises:
        ValueError: where shapes, dtypes or devices do not fit (see `checks`).
    """
    check_arguments(
        q, k, v, k_cache, v_cache, slot_mapping, block_tables, query_start, seq_lens, sinks, alibi_slopes, window,
        softcap,
    )  # fmt: skip
    if rope is not None:
        rope.check(q)
        q, k = rope.turn(q), rope.turn(k)
    write_cache(k, v, k_cache, v_cache, slot_mapping)
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    starts, lens = query_start.tolist(), seq_lens.tolist()
    for s, seq_len in enumerate(lens):
        first_row, end_row = starts[s], starts[s + 1]
        if first_row == end_row:
            continue
        first_position = seq_len - (end_row - first_row)
        first_key = max(0, first_position - window + 1) if window else 0
        positions = torch.arange(first_key, seq_len, device=q.device)
        block_size = k_cache.shape[1]
        blocks = block_tables[s, positions // block_size].long()
        keys, values = k_cache[blocks, positions % block_size], v_cache[blocks, positions % block_size]
        out[first_row:end_row] = _attend(
            q[first_row:end_row], keys, values, first_position, first_key, scale, window, softcap, sinks, alibi_slopes
        ).to(q.dtype)
    return out


def _attend(
    q_RHD: Tensor, keys_LKD: Tensor, values_LKD: Tensor, first_position: int, first_key: int,
    scale: float, window: int, softcap: float, sinks: Tensor | None, alibi_slopes: Tensor | None,
) -> Tensor:  # fmt: skip
    """Attention of one sequence's R rows over its L gathered keys; returns [R, H, Dv] in the softmax's dtype."""
    dtype = torch.float64 if q_RHD.dtype == torch.float64 else torch.float32
    group = q_RHD.shape[1] // keys_LKD.shape[1]
    keys = keys_LKD.to(dtype).repeat_interleave(group, dim=1)
    values = values_LKD.to(dtype).repeat_interleave(group, dim=1)
    scores_HRL = torch.einsum("rhd,lhd->hrl", q_RHD.to(dtype), keys) * scale
    if softcap:
        scores_HRL = softcap * torch.tanh(scores_HRL / softcap)
    rows = torch.arange(q_RHD.shape[0], device=q_RHD.device)[:, None] + first_position
    columns = torch.arange(keys.shape[0], device=q_RHD.device)[None, :] + first_key
    if alibi_slopes is not None:
        scores_HRL = scores_HRL + alibi_slopes.to(dtype)[:, None, None] * (columns - rows)
    visible = columns <= rows
    if window:
        visible &= rows - columns < window
    scores_HRL = scores_HRL.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        extra = sinks.to(dtype)[:, None, None].expand(-1, scores_HRL.shape[1], 1)
        probabilities = torch.cat([scores_HRL, extra], dim=-1).softmax(-1)[..., :-1]
    else:
        probabilities = scores_HRL.softmax(-1)
    return torch.einsum("hrl,lhd->rhd", probabilities, values)
