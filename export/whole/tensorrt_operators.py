"""Layers for the operators that only a whole graph has: caches that are updated in place, and masked attention.

update_cache:      KVCacheUpdate (cache [B, G, L, D], update [B, G, S, D], start [B] int32); its output shares the cache's memory
write_blocks:      ScatterND(cache [N, P, G, D], (slot / P, slot % P) [T, 2], update [T, G, D])
read_blocks:       Gather(cache, block_tables) -> [B, W, P, G, D] -> [B, G, W * P, D]
masked_attention:  IAttention with a mask (16-bit floats; no sinks, bias or soft cap), else products and softmax in fp32
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ...graph.serialize import target_name
from ..emitter import call_emitter
from ..tensorrt.builder import Builder, Emit, Spec, Value
from ..tensorrt.ops_attention import can_fuse, fused_attention

_FLOAT = torch.float32


class WholeBuilder(Builder):
    """The segments' Builder with the operators of a whole graph."""

    def node(self, node: fx.Node, values: Mapping[fx.Node, Any], spec: Any) -> Any:
        """Emits one node; see `Builder.node`."""
        name = target_name(node.target) if node.op == "call_function" else ""
        if name not in _WHOLE:
            return super().node(node, values, spec)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        self.scope = f"{node.name}.{name}"
        made = call_emitter(name, _WHOLE[name], self, spec, *args, **kwargs)
        assert (made.dtype, made.shape) == (spec.dtype, spec.shape), (node.format_node(), made, spec)
        return made


# -------------------------------------------------------------------------------------------------------------- caches
def _update_cache(b: Builder, out: Spec, cache: Value, update: Value, start: Value) -> Value:
    mode = b.trt.KVCacheMode.LINEAR
    layer = b.layer("kv_cache_update", cache.tensor, update.tensor, b.cast(start, torch.int32).tensor, mode)
    return b.value(layer, cache.dtype)


def _write_blocks(b: Builder, out: Spec, cache: Value, update: Value, slots: Value) -> Value:
    size = cache.shape[1]
    slots = b.cast(slots, torch.int32)
    block = b.elementwise("FLOOR_DIV", slots, size, torch.int32)
    offset = b.elementwise("SUB", slots, b.elementwise("PROD", block, size, torch.int32), torch.int32)
    where = b.concat([b.reshape(item, (*slots.shape, 1)) for item in (block, offset)], 1)
    layer = b.layer("scatter", cache.tensor, where.tensor, update.tensor, b.trt.ScatterMode.ND)
    return b.value(layer, cache.dtype)


def _read_blocks(b: Builder, out: Spec, cache: Value, tables: Value) -> Value:
    blocks = b.gather(cache, b.cast(tables, torch.int32), 0)
    batch, _, _, heads, size = blocks.shape
    return b.transpose(b.reshape(blocks, (batch, out.shape[2], heads, size)), 1, 2)


# ----------------------------------------------------------------------------------------------------------- attention
def _masked_attention(
    b: Builder,
    out: Spec,
    q: Value,
    k: Value,
    v: Value,
    mask: Value,
    bias: Value | None,
    sinks: Value | None,
    scale: float,
    softcap: float,
) -> Value:
    if bias is None and sinks is None and not softcap and can_fuse(q, k, v):
        return fused_attention(b, q, k, v, scale, mask=mask)
    (batch, heads, num_rows, size), (groups, num_entries) = q.shape, k.shape[1:3]
    grouped = b.reshape(q, (batch, groups, heads // groups, num_rows, size))
    keys = b.reshape(k, (batch, groups, 1, *k.shape[2:]))
    scores = b.elementwise("PROD", b.cast(b.matmul(grouped, keys, transpose_y=True), _FLOAT), scale, _FLOAT)
    if softcap:
        scores = b.activation("TANH", b.elementwise("DIV", scores, softcap, _FLOAT))
        scores = b.elementwise("PROD", scores, softcap, _FLOAT)
    if bias is not None:
        scores = b.elementwise("SUM", scores, b.reshape(bias, (batch, *scores.shape[1:])), _FLOAT)
    seen = b.reshape(mask, (batch, 1, 1, num_rows, num_entries))
    scores = b.select(seen, scores, b.constant(float("-inf"), _FLOAT, ()))
    if sinks is not None:
        sink = b.reshape(b.cast(sinks, _FLOAT), (1, groups, heads // groups, 1, 1))
        column = b.expand(sink, (*scores.shape[:-1], 1))
        probs = b.slice(b.softmax(b.concat([scores, column], 4), 4), 4, 0, num_entries)
    else:
        probs = b.softmax(scores, 4)
    values = b.reshape(v, (batch, groups, 1, *v.shape[2:]))
    return b.reshape(b.matmul(b.cast(probs, v.dtype), values), out.shape)


_WHOLE: dict[str, Emit] = {
    "camshaft.update_cache.default": _update_cache,
    "camshaft.write_blocks.default": _write_blocks,
    "camshaft.read_blocks.default": _read_blocks,
    "camshaft.masked_attention.default": _masked_attention,
}
"""Operator names to the functions that emit them."""
