"""Attention for TensorRT: the fused layer where it can do what the graph asks for, matrix products and softmax elsewhere.

    fused:      q * scale, k, v -> IAttention (causal, or with a mask) -> [B, H, T, V]      16-bit floats
    written:    (q @ k^T) in fp32 * scale -> softcap, ALiBi, mask, sinks -> softmax -> @ v  everything else

Heads stay grouped in the written form: q [B, G, H / G, T, D] against k, v [B, G, 1, S, D].
"""

from __future__ import annotations

import numpy as np
import torch

from ..emitter import UnsupportedError
from .builder import HALF, Builder, Emit, Spec, Value

_FLOAT = torch.float32


def _attention(
    b: Builder,
    out: Spec,
    q: Value,
    k: Value,
    v: Value,
    mask: Value | None,
    sinks: Value | None,
    alibi_slopes: Value | None,
    scale: float,
    window: int,
    softcap: float,
) -> Value:
    if mask is not None:
        raise UnsupportedError("camshaft.attention with a mask of its own (it is always causal)")
    num_queries, num_keys = q.shape[2], k.shape[2]
    plain = sinks is None and alibi_slopes is None and not softcap
    if plain and can_fuse(q, k, v):
        if not window and num_queries == num_keys:
            made = fused_attention(b, q, k, v, scale, causal=True)
        else:
            made = fused_attention(b, q, k, v, scale, mask=_causal_mask(b, num_queries, num_keys, window))
    else:
        made = _written(b, q, k, v, sinks, alibi_slopes, scale, window, softcap)
    return b.transpose(made, 1, 2)


def can_fuse(q: Value, k: Value, v: Value) -> bool:
    """Whether IAttention takes these: one 16-bit dtype, and values of the size of keys."""
    return q.dtype in HALF and q.dtype == k.dtype == v.dtype and q.shape[3] == v.shape[3]


def fused_attention(
    b: Builder, q: Value, k: Value, v: Value, scale: float, *, mask: Value | None = None, causal: bool = False
) -> Value:
    """IAttention on q [B, H, T, D], k and v [B, G, S, D], H a multiple of G. Returns [B, H, T, D].

    mask: bool (true where a query sees a key) or of q's dtype (added), [1 or B, 1 or H, T, S]; causal: instead of a mask, with
    the first query at the first key. The layer has no scale, so q is multiplied in fp32 and rounded once.
    """
    scaled = b.cast(b.elementwise("PROD", q, scale, _FLOAT), q.dtype)
    trt, softmax = b.trt, b.trt.AttentionNormalizationOp.SOFTMAX
    tensors = (scaled.tensor, k.tensor, v.tensor)
    if b.library.has_method("add_attention_v2"):
        kind = trt.CausalMaskKind.UPPER_LEFT if causal else trt.CausalMaskKind.NONE
        layer = b.layer("attention_v2", *tensors, softmax, kind)
    else:
        layer = b.layer("attention", *tensors, softmax, causal)
    if mask is not None:
        layer.mask = mask.tensor
    layer.decomposable = True  # head sizes that no kernel takes
    return b.value(layer, q.dtype)


def _causal_mask(b: Builder, num_queries: int, num_keys: int, window: int) -> Value:
    """Boolean [1, 1, T, S] from two ranges: stored whole it would grow with the square of the length."""
    i = b.constant(np.arange(num_keys - num_queries, num_keys).reshape(1, 1, -1, 1), torch.int32)
    j = b.constant(np.arange(num_keys).reshape(1, 1, 1, -1), torch.int32)
    seen = b.unary("NOT", b.elementwise("GREATER", j, i, torch.int32))
    if not window:
        return seen
    near = b.elementwise("LESS", b.elementwise("SUB", i, j, torch.int32), window, torch.int32)
    return b.elementwise("AND", seen, near, torch.bool)


def _written(
    b: Builder,
    q: Value,
    k: Value,
    v: Value,
    sinks: Value | None,
    alibi_slopes: Value | None,
    scale: float,
    window: int,
    softcap: float,
) -> Value:
    """`graph.ops.dense_attention`, up to its last transpose."""
    (batch, heads, num_queries, _), (groups, num_keys) = q.shape, k.shape[1:3]
    scores = _scores(b, q, k, scale)
    if softcap:
        scores = b.activation("TANH", b.elementwise("DIV", scores, softcap, _FLOAT))
        scores = b.elementwise("PROD", scores, softcap, _FLOAT)
    if alibi_slopes is not None:
        slopes = b.reshape(b.cast(alibi_slopes, _FLOAT), (1, groups, heads // groups, 1, 1))
        i = np.arange(num_keys - num_queries, num_keys, dtype=np.float32)[:, None]
        distance = b.elementwise("SUB", b.constant(np.arange(num_keys)[None, :], _FLOAT), b.constant(i, _FLOAT), _FLOAT)
        scores = b.elementwise("SUM", scores, b.elementwise("PROD", slopes, distance, _FLOAT), _FLOAT)
    scores = b.select(_causal_mask(b, num_queries, num_keys, window), scores, b.constant(float("-inf"), _FLOAT, ()))
    if sinks is not None:
        sink = b.reshape(b.cast(sinks, _FLOAT), (1, groups, heads // groups, 1, 1))
        column = b.expand(sink, (*scores.shape[:-1], 1))
        probs = b.slice(b.softmax(b.concat([scores, column], 4), 4), 4, 0, num_keys)
    else:
        probs = b.softmax(scores, 4)
    return _weighted(b, probs, v, (batch, heads, num_queries, v.shape[3]))


def _scores(b: Builder, q: Value, k: Value, scale: float) -> Value:
    """[B, G, H / G, T, S] in fp32, scaled."""
    (batch, heads, num_queries, size), groups = q.shape, k.shape[1]
    grouped = b.reshape(q, (batch, groups, heads // groups, num_queries, size))
    keys = b.reshape(k, (batch, groups, 1, *k.shape[2:]))
    product = b.cast(b.matmul(grouped, keys, transpose_y=True), _FLOAT)
    return product if scale == 1 else b.elementwise("PROD", product, scale, _FLOAT)


def _weighted(b: Builder, probs: Value, v: Value, shape: tuple[int, ...]) -> Value:
    values = b.reshape(v, (v.shape[0], v.shape[1], 1, *v.shape[2:]))
    return b.reshape(b.matmul(b.cast(probs, v.dtype), values), shape)


def _sdpa(
    b: Builder,
    out: Spec,
    q: Value,
    k: Value,
    v: Value,
    attn_mask: Value | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:
    if dropout_p or len(q.shape) != 4 or (attn_mask is not None and is_causal):
        raise UnsupportedError("attention with dropout, with a mask and is_causal, or of other than four dimensions")
    factor = q.shape[3] ** -0.5 if scale is None else float(scale)
    mask = None if attn_mask is None else b.raise_rank(attn_mask, 4)
    if can_fuse(q, k, v):
        if mask is not None and mask.dtype != torch.bool:
            mask = b.cast(mask, q.dtype)
        return fused_attention(b, q, k, v, factor, mask=mask, causal=is_causal)
    scores = _scores(b, q, k, factor)
    if is_causal:  # unlike camshaft.attention, the first query stands at the first key
        mask = b.reshape(
            b.constant(np.tri(q.shape[2], k.shape[2], dtype=np.int32), torch.bool), (1, 1, q.shape[2], k.shape[2])
        )
    if mask is not None:
        grouped = _grouped_mask(b, mask, q.shape[1], k.shape[1])
        if mask.dtype == torch.bool:
            scores = b.select(grouped, scores, b.constant(float("-inf"), _FLOAT, ()))
        else:
            scores = b.elementwise("SUM", scores, b.cast(grouped, _FLOAT), _FLOAT)
    return _weighted(b, b.softmax(scores, 4), v, out.shape)


def _grouped_mask(b: Builder, mask: Value, heads: int, groups: int) -> Value:
    batch, per_head, rows, columns = mask.shape
    if per_head == 1:
        return b.reshape(mask, (batch, 1, 1, rows, columns))
    return b.reshape(mask, (batch, groups, heads // groups, rows, columns))


ATTENTION_OPERATORS: dict[str, Emit] = {
    "camshaft.attention.default": _attention,
    "aten.scaled_dot_product_attention.default": _sdpa,
}
"""Operator names to the functions that emit them."""
