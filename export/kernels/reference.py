"""Paged attention in plain torch: the oracle of the other kernels, on any device and dtype.

The cache is a pool of blocks; a sequence's block table says where its tokens are:

    position of a token     0 .. bs-1   bs .. 2bs-1   2bs .. 3bs-1
    block_tables[s]         [   7     ,      2      ,      5      , 0 ...]
    slot of position p      block_tables[s][p // bs] * bs + p % bs

One step packs the new rows of all sequences behind each other; a sequence's rows are its LAST positions:

    rows                    query_start[s] ......... query_start[s+1]-1
    positions               seq_lens[s]-n  ......... seq_lens[s]-1            n = query_start[s+1]-query_start[s]

The rows of a token tree (tree_mask) lie behind one another all the same, keys and values at the slots above, but a row's place in
its text is its depth: it follows the context and those of the rows that it sees (Miao et al. 2024, "SpecInfer", section 4.2).

    row          0     1     2     3        a       0: last known token, a and b two drafts after it,
    token        0     a     b     c        |       c a draft after b
    mask         0001  0011  0101  1101     0 - b - c
    position     n     n+1   n+1   n+2      n = seq_lens[s]-4
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
    tree_mask: Tensor | None = None,
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
        tree_mask: [T] int64, or None. A row of mask m, m != 0, sees all that precedes its sequence's rows, and row j of its
            sequence, at most itself, iff bit j of m is set: its own bit and those of its ancestors. Its position is that of
            the last token before the sequence's rows plus the number of bits; window and alibi_slopes measure the distance
            of these positions. A row of mask 0 is a row of a text as without masks.

    Returns:
        [T, H, Dv] in q's dtype. Rows from query_start[-1] on are padding and zero. Scores and softmax are float32
        (float64 where q is).

    Raises:
        ValueError: where shapes, dtypes or devices do not fit (see `checks`).
    """
    check_arguments(
        q, k, v, k_cache, v_cache, slot_mapping, block_tables, query_start, seq_lens, sinks, alibi_slopes, window,
        softcap, tree_mask,
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
        masks = None if tree_mask is None else tree_mask[first_row:end_row]
        distance, visible = _distances(end_row - first_row, first_position, first_key, masks, q.device)
        if window:
            visible &= distance < window
        out[first_row:end_row] = _attend(
            q[first_row:end_row], keys, values, distance, visible, scale, softcap, sinks, alibi_slopes
        ).to(q.dtype)
    return out


def _distances(
    num_rows: int, first_position: int, first_key: int, masks_R: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """([R, L] int64 by how many positions a row is behind a key, [R, L] bool whether it may see it, windows left aside).

    The keys are those of positions first_key ... first_position + R - 1, as without masks; what is hidden may be at any distance.
    """
    rows = torch.arange(num_rows, device=device)
    columns = torch.arange(first_key, first_position + num_rows, device=device)
    distance_RL = first_position + rows[:, None] - columns
    visible_RL = distance_RL >= 0
    if masks_R is None:
        return distance_RL, visible_RL
    seen_RR = (masks_R[:, None] >> rows.clamp(max=63) & 1).bool() & (rows < 64) & (rows <= rows[:, None])
    depth_R = seen_RR.sum(1) - 1
    before = first_position - first_key
    distance = torch.cat([
        first_position + depth_R[:, None] - columns[:before],
        depth_R[:, None] + 1 - seen_RR.cumsum(1),
    ], dim=1)  # fmt: skip
    visible = torch.cat([visible_RL[:, :before], seen_RR], dim=1)
    in_tree = (masks_R != 0)[:, None]
    return torch.where(in_tree, distance, distance_RL), torch.where(in_tree, visible, visible_RL)


def _attend(
    q_RHD: Tensor, keys_LKD: Tensor, values_LKD: Tensor, distance_RL: Tensor, visible_RL: Tensor,
    scale: float, softcap: float, sinks: Tensor | None, alibi_slopes: Tensor | None,
) -> Tensor:  # fmt: skip
    """Attention of one sequence's R rows over its L gathered keys; returns [R, H, Dv] in the softmax's dtype."""
    dtype = torch.float64 if q_RHD.dtype == torch.float64 else torch.float32
    group = q_RHD.shape[1] // keys_LKD.shape[1]
    keys = keys_LKD.to(dtype).repeat_interleave(group, dim=1)
    values = values_LKD.to(dtype).repeat_interleave(group, dim=1)
    scores_HRL = torch.einsum("rhd,lhd->hrl", q_RHD.to(dtype), keys) * scale
    if softcap:
        scores_HRL = softcap * torch.tanh(scores_HRL / softcap)
    if alibi_slopes is not None:
        scores_HRL = scores_HRL - alibi_slopes.to(dtype)[:, None, None] * distance_RL
    scores_HRL = scores_HRL.masked_fill(~visible_RL, float("-inf"))
    if sinks is not None:
        extra = sinks.to(dtype)[:, None, None].expand(-1, scores_HRL.shape[1], 1)
        probabilities = torch.cat([scores_HRL, extra], dim=-1).softmax(-1)[..., :-1]
    else:
        probabilities = scores_HRL.softmax(-1)
    return torch.einsum("hrl,lhd->rhd", probabilities, values)
