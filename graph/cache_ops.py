"""Operators of a graph whose KV caches go in and come out: functional updates, reads by block table, masked attention.

Each has a reference implementation (plain torch, any device), which is its definition, and a shape function. They are what
`expose_cache` writes; an emitter may update in place, because no graph reads a cache after it was updated.

Shape legend: B sequences, S rows of a sequence in this step, L entries of a cache that attention sees, H query heads, G key/value
heads, D head size, V value head size, N blocks, P tokens of a block, W entries of a block table, T = B * S.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIB = torch.library.Library("camshaft", "FRAGMENT")


def _define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.split("(")[0]
    _LIB.define(schema)
    _LIB.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"camshaft::{name}", fake, lib=_LIB)


def _update_cache(cache_BGLD: Tensor, update_BGSD: Tensor, start_B: Tensor) -> Tensor:
    num_rows = update_BGSD.shape[2]
    entries_BS = start_B.long()[:, None] + torch.arange(num_rows, device=start_B.device)
    index = entries_BS[:, None, :, None].expand(update_BGSD.shape)
    return cache_BGLD.scatter(2, index, update_BGSD)


# A linear cache [B, G, L, D] with update [B, G, S, D] at entries start[b] .. start[b] + S - 1 of sequence b, start + S <= L.
_define(
    "update_cache(Tensor cache, Tensor update, Tensor start) -> Tensor",
    _update_cache,
    lambda cache, update, start: torch.empty_like(cache),
)


def _write_blocks(cache_NPGD: Tensor, update_TGD: Tensor, slots_T: Tensor) -> Tensor:
    flat = cache_NPGD.flatten(0, 1)
    return flat.index_copy(0, slots_T.long(), update_TGD).view(cache_NPGD.shape)


# A paged cache [N, P, G, D] with row t of update [T, G, D] at slot block * P + offset = slots[t]. Which of several rows with one
# slot stays is not defined.
_define(
    "write_blocks(Tensor cache, Tensor update, Tensor slots) -> Tensor",
    _write_blocks,
    lambda cache, update, slots: torch.empty_like(cache),
)


def _read_blocks(cache_NPGD: Tensor, block_tables_BW: Tensor) -> Tensor:
    return cache_NPGD[block_tables_BW.long()].flatten(1, 2).transpose(1, 2).contiguous()


# The blocks that a table [B, W] names, in its order: [B, G, W * P, D].
_define(
    "read_blocks(Tensor cache, Tensor block_tables) -> Tensor",
    _read_blocks,
    lambda cache, block_tables: cache.new_empty(
        (block_tables.shape[0], cache.shape[2], block_tables.shape[1] * cache.shape[1], cache.shape[3])
    ),
)


def _masked_attention(
    q_BHSD: Tensor,
    k_BGLD: Tensor,
    v_BGLV: Tensor,
    mask_B1SL: Tensor,
    bias_BHSL: Tensor | None,
    sinks_H: Tensor | None,
    scale: float,
    softcap: float,
) -> Tensor:
    repeats = q_BHSD.shape[1] // k_BGLD.shape[1]
    k, v = k_BGLD.repeat_interleave(repeats, dim=1), v_BGLV.repeat_interleave(repeats, dim=1)
    scores = torch.matmul(q_BHSD, k.transpose(2, 3)).float() * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias_BHSL is not None:
        scores = scores + bias_BHSL
    scores = scores.masked_fill(~mask_B1SL, float("-inf"))
    if sinks_H is not None:
        sinks = sinks_H.float()[None, :, None, None].expand(*scores.shape[:3], 1)
        probs = torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
    else:
        probs = torch.softmax(scores, dim=-1)
    return torch.matmul(probs.to(v.dtype), v)


# Attention of q [B, H, S, D] over k [B, G, L, D] and v [B, G, L, V], softmax in fp32: scores are scale * q k^T, then softcap *
# tanh(scores / softcap) if softcap is not 0, then plus bias [B, H, S, L] (float32), then -inf where mask [B, 1, S, L] (bool) is
# false; sinks [H] are one more logit per head in the denominator. Every row sees at least one entry. Returns [B, H, S, V].
_define(
    "masked_attention(Tensor q, Tensor k, Tensor v, Tensor mask, Tensor? bias, Tensor? sinks, float scale, "
    "float softcap) -> Tensor",
    _masked_attention,
    lambda q, k, v, mask, bias, sinks, scale, softcap: q.new_empty((*q.shape[:3], v.shape[3])),
)
