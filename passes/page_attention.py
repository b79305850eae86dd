"""page_attention: attention over one row becomes attention over a paged KV cache.

    before                                          after
    o = camshaft.attention(q, k, v, None,           o = camshaft.paged_attention(q', k', v', k_cache_0, v_cache_0,
            sinks, slopes, scale, w, cap)                   slot_mapping_0, block_tables_0, query_start, seq_lens,
                                                            sinks, slopes, scale, w, cap)
    q [1, H, T, D], k [1, G, T, D]                  q' [1, T, H, D], k' [1, T, G, D]; o [1, T, H, V] as before

New inputs: a key and a value cache per layer [blocks, block_size, G, D]; per cache group (layers with the same window share
one) slot_mapping [T] int64 and block_tables [sequences, blocks] int32; query_start [sequences + 1] and seq_lens
[sequences] int32. Caches may be of another dtype (float8_e4m3fn) than q, k and v: keys and values are converted when they are
written and read. Outputs change their meaning: a row may hold pieces of several sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..graph.program import CacheSpec, LayerCache, Program
from .base import GraphPass, Stage
from .match import aten, call, is_call, value
from .resolve_masks import ATTENTION

PAGED_ATTENTION = torch.ops.camshaft.paged_attention.default


@dataclass
class PageAttention(GraphPass):
    """Rewrites every attention to read and write a paged cache of `block_size` tokens a block.

    cache_dtype: what keys and values are stored as; None: the dtype in which they are computed.
    """

    block_size: int
    cache_dtype: torch.dtype | None = None

    name = "page_attention"
    stage = Stage.CACHE
    numerics = "changed"

    def run(self, program: Program) -> int:
        nodes = [node for node in program.graph.nodes if is_call(node, ATTENTION)]
        if not nodes:
            return 0
        layers = []
        for node in nodes:
            k, v, window = value(node.args[1]), value(node.args[2]), node.args[7]
            layers.append(
                LayerCache(
                    num_kv_heads=int(k.shape[1]),
                    head_dim=int(k.shape[3]),
                    value_dim=int(v.shape[3]),
                    window=window,
                    dtype=self.cache_dtype or k.dtype,
                )
            )
        cache = CacheSpec(layers=tuple(layers), block_size=self.block_size)
        program.cache = cache
        shared = {
            name: program.add_input(name, kind="metadata", key=name, example=torch.zeros(n, dtype=torch.int32))
            for name, n in (("seq_lens", 4), ("query_start", 5))
        }
        tables = []
        for group in range(len(cache.windows)):
            table = program.add_input(
                f"block_tables_{group}",
                kind="metadata",
                key=f"block_tables.{group}",
                example=torch.zeros((4, 8), dtype=torch.int32),
            )
            slots = program.add_input(
                f"slot_mapping_{group}",
                kind="metadata",
                key=f"slot_mapping.{group}",
                example=torch.zeros(8, dtype=torch.int64),
            )
            tables.append((slots, table))
        for index, node in enumerate(nodes):
            layer = layers[index]
            blocks = (8, self.block_size, layer.num_kv_heads)
            k_cache = program.add_input(
                f"k_cache_{index}",
                kind="cache",
                key=f"k.{index}",
                example=torch.empty((*blocks, layer.head_dim), dtype=layer.dtype, device="meta"),
            )
            v_cache = program.add_input(
                f"v_cache_{index}",
                kind="cache",
                key=f"v.{index}",
                example=torch.empty((*blocks, layer.value_dim), dtype=layer.dtype, device="meta"),
            )
            slots, table = tables[cache.group_of(index)]
            with program.graph.inserting_before(node):
                q, k, v = (call(program, aten.transpose.int, operand, 1, 2) for operand in node.args[:3])
                new = call(
                    program,
                    PAGED_ATTENTION,
                    q,
                    k,
                    v,
                    k_cache,
                    v_cache,
                    slots,
                    table,
                    shared["query_start"],
                    shared["seq_lens"],
                    *node.args[4:],
                )
            node.replace_all_uses_with(new)
        return len(nodes)
