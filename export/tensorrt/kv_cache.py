"""KV caches inside a network: a linear cache that is updated in place, and a pool of blocks reached through tables.

    linear:  cache [B, G, L, D]     update [B, G, T, D] goes to rows write_indices[b] .. write_indices[b] + T - 1
    blocks:  pool [N, block_size, G, D]     token t lives in slot = block * block_size + offset

The output of an update must be bound to the address of the cache that went in.
"""

from __future__ import annotations

import torch

from ..emitter import UnsupportedError
from .builder import Builder, Value


def kv_cache_update(b: Builder, cache: Value, update: Value, write_indices: Value) -> Value:
    """Writes keys or values into a linear cache, in place, and returns it.

    cache [B, G, L, D]: a network input, L the longest sequence; update [B, G, T, D] of its dtype; write_indices [B] int32,
    where each sequence goes on. The result must become a network output, bound to the cache's own memory.
    """
    if not cache.tensor.is_network_input:
        raise UnsupportedError("a KV cache that is not an input of the network")
    if write_indices.dtype != torch.int32:
        raise UnsupportedError(f"a KV cache with write indices of {write_indices.dtype} (allowed: int32)")
    mode = b.trt.KVCacheMode.LINEAR
    return b.value(b.layer("kv_cache_update", cache.tensor, update.tensor, write_indices.tensor, mode), cache.dtype)


def gather_blocks(b: Builder, pool: Value, block_tables: Value) -> Value:
    """The cached rows of each sequence: pool [N, block_size, G, D], block_tables [S, W] -> [S, G, W * block_size, D].

    Unused entries of a table must name some block (0 will do); the attention that follows masks their rows.
    """
    _, block_size, groups, size = pool.shape
    sequences, width = block_tables.shape
    rows = b.reshape(b.gather(pool, block_tables, 0), (sequences, width * block_size, groups, size))
    return b.transpose(rows, 1, 2)


def scatter_blocks(b: Builder, pool: Value, update: Value, slot_mapping: Value) -> Value:
    """The pool with update [T, G, D] written at slot_mapping [T] (int32 or int64).

    Every slot must exist: rows that write nothing (-1 in the engine's metadata) need a slot of their own in a spare block.
    """
    flat = b.reshape(pool, (pool.shape[0] * pool.shape[1], *pool.shape[2:]))
    indices = b.reshape(slot_mapping, (slot_mapping.shape[0], 1))
    layer = b.layer("scatter", flat.tensor, indices.tensor, b.cast(update, pool.dtype).tensor, b.trt.ScatterMode.ND)
    return b.reshape(b.value(layer, pool.dtype), pool.shape)
