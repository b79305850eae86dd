"""Random batches for paged attention and a dense attention to compare with; shared by the CPU and the GPU tests."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Case:
    """Arguments of one `paged_attention` call, and the dense tokens that the cache pages hold."""

    tensors: dict[str, Tensor]
    options: dict[str, Any]
    dense: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Per sequence its keys [L, KV, D] and values [L, KV, Dv]."""

    def call(self, kernel: Any, **more: Any) -> Tensor:
        """Run `kernel` on the case; writes the new rows to its caches."""
        return kernel(**self.tensors, **self.options, **more)

    def clone(self) -> Case:
        """The same call with its own copy of the caches, which a call changes."""
        fresh = {name: self.tensors[name].clone() for name in ("k_cache", "v_cache")}
        return Case(self.tensors | fresh, self.options, self.dense)


def make_case(
    lengths: list[tuple[int, int]], *, heads: int = 4, kv_heads: int = 2, dim: int = 16, value_dim: int | None = None,
    block_size: int = 16, window: int = 0, softcap: float = 0.0, sinks: bool = False, alibi: bool = False,
    padding: int = 0, fused_qkv: bool = False, shared_blocks: int = 0, dtype: torch.dtype = torch.float32,
    device: str = "cpu", seed: int = 0, score_scale: float = 1.0, cache_dtype: torch.dtype | None = None,
    head_major: bool = False, trees: bool = False,
) -> Case:  # fmt: skip
    """A batch of sequences given as (query rows, tokens after the step), with shuffled blocks and NaN in unused slots.

    `shared_blocks`: that many first blocks are the same for all sequences. `fused_qkv`: q, k, v are slices of one
    buffer. Blocks that lie wholly behind the window are freed: their table entries point at block 0, full of NaN.
    `cache_dtype`: of the caches, if it is not `dtype`; keys and values are numbers that it holds exactly.
    `head_major`: blocks lie in memory as [kv heads, block size, dim]. `trees`: two of three sequences of 2 to 64 rows are
    token trees, with a `tree_mask`.
    """
    rng = torch.Generator().manual_seed(seed)
    value_dim = value_dim or dim
    rows = sum(n for n, _ in lengths)
    total = rows + padding

    def rand(*shape: int) -> Tensor:
        numbers = torch.randn(*shape, generator=rng).to(dtype).float()
        if cache_dtype is None:
            return numbers
        numbers = numbers.to(cache_dtype).float()
        return numbers.masked_fill(numbers.abs() < 2**-6, 0.0)  # no subnormal ones: the interpreter flushes them

    if fused_qkv:
        widths = [heads * dim, kv_heads * dim, kv_heads * value_dim]
        parts = rand(total, sum(widths)).to(dtype).split(widths, dim=1)
        q, k, v = (p.unflatten(1, (-1, d)) for p, d in zip(parts, (dim, dim, value_dim)))
    else:
        q, k, v = (rand(total, h, d).to(dtype) for h, d in ((heads, dim), (kv_heads, dim), (kv_heads, value_dim)))
    needed = [-(-length // block_size) for _, length in lengths]
    num_blocks = sum(needed) + 2
    order = (torch.randperm(num_blocks - 1, generator=rng) + 1).tolist()  # block 0 is never given out
    k_cache = torch.full((num_blocks, block_size, kv_heads, dim), float("nan"), dtype=dtype)
    v_cache = torch.full((num_blocks, block_size, kv_heads, value_dim), float("nan"), dtype=dtype)
    tables = torch.zeros(len(lengths), max(needed, default=0) + 1, dtype=torch.int32)
    slots, starts, dense = torch.full((total,), -1, dtype=torch.int64), [0], []
    shared_tokens = shared_blocks * block_size
    prefix = (rand(shared_tokens, kv_heads, dim), rand(shared_tokens, kv_heads, value_dim))
    shared = [order.pop() for _ in range(shared_blocks)]
    for s, (n, length) in enumerate(lengths):
        start, done = starts[-1], length - n
        blocks = [shared[b] if b < shared_blocks else order.pop() for b in range(needed[s])]
        keys, values = rand(length, kv_heads, dim), rand(length, kv_heads, value_dim)
        assert done >= shared_tokens
        keys[:shared_tokens], values[:shared_tokens] = prefix
        keys[done:], values[done:] = k[start : start + n].float(), v[start : start + n].float()
        dense.append((keys, values))
        position = torch.arange(length)
        slot = torch.tensor(blocks, dtype=torch.int64)[position // block_size] * block_size + position % block_size
        slots[start : start + n] = slot[done:]
        k_cache.flatten(0, 1)[slot[:done]] = keys[:done].to(dtype)
        v_cache.flatten(0, 1)[slot[:done]] = values[:done].to(dtype)
        freed = max(0, done + 1 - window) // block_size if window and n else 0
        tables[s, : needed[s]] = torch.tensor([0 if b < freed else block for b, block in enumerate(blocks)])
        starts.append(start + n)
    k_cache, v_cache = (cache.to(cache_dtype or dtype) for cache in (k_cache, v_cache))
    if head_major:
        k_cache, v_cache = (cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in (k_cache, v_cache))
    tensors = {
        "q": q, "k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache, "slot_mapping": slots, "block_tables": tables,
        "query_start": torch.tensor(starts, dtype=torch.int32),
        "seq_lens": torch.tensor([length for _, length in lengths], dtype=torch.int32),
    }  # fmt: skip
    if trees:
        tensors["tree_mask"] = torch.tensor(
            _tree_masks([n for n, _ in lengths], seed) + [0] * padding, dtype=torch.int64
        )
    options: dict[str, Any] = {
        "scale": score_scale * dim**-0.5, "window": window, "softcap": softcap,
        "sinks": torch.randn(heads, generator=rng).to(device) if sinks else None,
        "alibi_slopes": (0.5 ** torch.arange(1, heads + 1)).to(device) if alibi else None,
        "max_query_len": max((n for n, _ in lengths), default=0),
        "max_seq_len": max((length for _, length in lengths), default=0),
    }  # fmt: skip
    if device != "cpu":  # a copy would drop the strides of fused slices
        moved = {name: t.to(device) for name, t in tensors.items()}  # keeps the strides of what fills its memory
        if fused_qkv:
            whole = torch.cat([t.flatten(1) for t in (q, k, v)], dim=1).to(device)
            cut = whole.split([t.shape[1] * t.shape[2] for t in (q, k, v)], dim=1)
            moved |= {name: p.unflatten(1, (-1, t.shape[2])) for name, p, t in zip("qkv", cut, (q, k, v))}
        tensors = moved
    return Case(tensors, options, dense)


def _tree_masks(counts: list[int], seed: int) -> list[int]:
    """A mask for every row: of sequences of `counts` rows, some are random trees behind up to two rows of text."""
    rng, masks = random.Random(seed), []
    for s, count in enumerate(counts):
        if s % 3 == 2 or not 2 <= count <= 64:
            masks += [0] * count
            continue
        own: list[int] = []
        for row in range(count):
            parent = row - 1 if row < s % 3 else rng.randrange(max(0, row - 6), row) if row else -1
            own.append((own[parent] if row else 0) | 1 << row)
        masks += [mask - (1 << 64) if mask >> 63 else mask for mask in own]
    return masks


def _walk_paths(masks: list[int], done: int, behind: Tensor, hidden: Tensor) -> None:
    """Corrects [n, L] distances and what is hidden for the rows of trees: their texts are the context and their ancestors."""
    for row, mask in enumerate(masks):
        if mask:
            path = [*range(done), *(done + j for j in range(row + 1) if mask >> j & 1)]
            hidden[row] = True
            hidden[row, path] = False
            behind[row, path] = torch.arange(len(path)).flip(0)


def dense_attention(case: Case) -> Tensor:
    """The same attention from the dense tokens, in float64 on the CPU, one head and sequence at a time."""
    o, q = case.options, case.tensors["q"].double().cpu()
    starts = case.tensors["query_start"].tolist()
    heads, value_dim = q.shape[1], case.tensors["v"].shape[2]
    out = torch.zeros(q.shape[0], heads, value_dim, dtype=torch.float64)
    for s, (keys, values) in enumerate(case.dense):
        n, length = starts[s + 1] - starts[s], keys.shape[0]
        i = torch.arange(length - n, length)[:, None]
        j = torch.arange(length)[None, :]
        behind, hidden = i - j, j > i
        if "tree_mask" in case.tensors:
            _walk_paths(case.tensors["tree_mask"][starts[s] : starts[s + 1]].tolist(), length - n, behind, hidden)
        if o["window"]:
            hidden = hidden | (behind >= o["window"])
        for h in range(heads):
            kv = h // (heads // keys.shape[1])
            score = q[starts[s] : starts[s + 1], h] @ keys[:, kv].double().T * o["scale"]
            if o["softcap"]:
                score = o["softcap"] * torch.tanh(score / o["softcap"])
            if o["alibi_slopes"] is not None:
                score = score - o["alibi_slopes"][h].double().cpu() * behind
            weight = torch.exp(score.masked_fill(hidden, float("-inf")))
            below = weight.sum(1, keepdim=True)
            if o["sinks"] is not None:
                below = below + torch.exp(o["sinks"][h].double().cpu())
            out[starts[s] : starts[s + 1], h] = weight / below @ values[:, kv].double()
    return out
