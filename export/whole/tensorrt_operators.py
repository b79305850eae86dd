"""Layers for the operators that only a whole graph has: caches, which `tensorrt.kv_cache` writes, and masked attention.

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
from ..tensorrt.kv_cache import gather_blocks, kv_cache_update, scatter_blocks
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
    return kv_cache_update(b, cache, update, b.cast(start, torch.int32))


def _write_blocks(b: Builder, out: Spec, cache: Value, update: Value, slots: Value) -> Value:
    return scatter_blocks(b, cache, update, b.cast(slots, torch.int32))


def _read_blocks(b: Builder, out: Spec, cache: Value, tables: Value) -> Value:
    return gather_blocks(b, cache, b.cast(tables, torch.int32))


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
