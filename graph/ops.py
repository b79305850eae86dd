"""Semantic operators: what the passes match and the targets lower.

Every operator has a schema, a reference implementation (plain torch, any device) and a shape function. The reference
implementation is the definition: the `eager` target runs it, `inductor` inlines it, other targets must agree with it.

Shape legend: B batch (1 for a packed row), T tokens, H query heads, G key/value heads, D head size, V value head size,
R rotated dimensions, I intermediate size, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import quantized_linear as quantized_linear  # registers its operator
from .quant_ops import QUANT_DEFINITIONS, quantize_rows, quantized_rows_fake
from .registry import define

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
"""Activations of gated layers, by the name that stands in the graph."""


# ---------------------------------------------------------------------------------------------------------- attention
def causal_mask(num_queries: int, num_keys: int, window: int, device: torch.device) -> Tensor:
    """Boolean [num_queries, num_keys], true where row i (aligned to the end) may see key j: j <= i and i - j < window."""
    i = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    j = torch.arange(num_keys, device=device)[None, :]
    visible = j <= i
    return visible & (i - j < window) if window else visible


def dense_attention(
    q_BHTD: Tensor,
    k_BGTD: Tensor,
    v_BGTV: Tensor,
    sinks_H: Tensor | None,
    slopes_H: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """Causal attention written out; softmax in fp32. Returns [B, T, H, V] in the dtype of q."""
    num_heads, num_kv = q_BHTD.shape[1], k_BGTD.shape[1]
    k = k_BGTD.repeat_interleave(num_heads // num_kv, dim=1)
    v = v_BGTV.repeat_interleave(num_heads // num_kv, dim=1)
    num_queries, num_keys = q_BHTD.shape[2], k.shape[2]
    scores = torch.matmul(q_BHTD, k.transpose(2, 3)).float() * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes_H is not None:
        i = torch.arange(num_keys - num_queries, num_keys, device=scores.device)[:, None]
        j = torch.arange(num_keys, device=scores.device)[None, :]
        scores = scores + slopes_H.float()[:, None, None] * (j - i)
    scores = scores.masked_fill(~causal_mask(num_queries, num_keys, window, scores.device), float("-inf"))
    if sinks_H is not None:
        sinks = sinks_H.float()[None, :, None, None].expand(scores.shape[0], -1, num_queries, 1)
        probs = torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
    else:
        probs = torch.softmax(scores, dim=-1)
    return torch.matmul(probs.to(v.dtype), v).transpose(1, 2).contiguous()


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    num_queries, num_keys = q.shape[2], k.shape[2]
    if sinks is not None or softcap or alibi_slopes is not None or q.dtype != v.dtype:
        return dense_attention(q, k, v, sinks, alibi_slopes, scale, window, softcap)
    square = num_queries == num_keys and not window
    mask = None if square else causal_mask(num_queries, num_keys, window, q.device)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=square, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2).contiguous()


def _attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))


define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? sinks, Tensor? alibi_slopes, "
    "float scale, int window, float softcap) -> Tensor",
    _attention,
    _attention_fake,
)


def _mask(like: Tensor, kind: str, size: int) -> Tensor:
    num_tokens = like.shape[1]
    if kind not in ("causal", "sliding"):
        raise ValueError(f"a {kind!r} attention mask cannot be run, allowed: 'causal', 'sliding'")
    visible = causal_mask(num_tokens, num_tokens, size if kind == "sliding" else 0, like.device)
    zero = torch.zeros((), dtype=torch.float32, device=like.device)
    return torch.where(visible, zero, torch.finfo(torch.float32).min)[None, None]


def _mask_fake(like: Tensor, kind: str, size: int) -> Tensor:
    return like.new_empty((1, 1, like.shape[1], like.shape[1]), dtype=torch.float32)


# Stands for a causal mask while a model is traced; resolved to attributes of camshaft::attention by `resolve_masks`.
define("mask(Tensor like, str kind, int size) -> Tensor", _mask, _mask_fake)


def _paged_attention_missing(*args: Any, **kwargs: Any) -> Tensor:
    raise RuntimeError(
        "paged attention is run by an engine with a bound KV cache, not as a plain operator; "
        "compile the program and call Engine.step"
    )


def _paged_attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], q.shape[2], v.shape[3]))


# q [1, T, H, D], k [1, T, G, D], v [1, T, G, V] -> [1, T, H, V]; writes k and v at slot_mapping, then attends.
define(
    "paged_attention(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor slot_mapping, "
    "Tensor block_tables, Tensor query_start, Tensor seq_lens, Tensor? sinks, Tensor? alibi_slopes, "
    "float scale, int window, float softcap) -> Tensor",
    _paged_attention_missing,
    _paged_attention_fake,
)


def _paged_rope_attention_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], q.shape[2], v.shape[3]))


# paged_attention(rope(q, cos, sin, interleaved), rope(k, cos, sin, interleaved), v, ...); cos, sin [1, T, R].
define(
    "paged_rope_attention(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor slot_mapping, "
    "Tensor block_tables, Tensor query_start, Tensor seq_lens, Tensor? sinks, Tensor? alibi_slopes, "
    "float scale, int window, float softcap, Tensor cos, Tensor sin, bool interleaved) -> Tensor",
    _paged_attention_missing,
    _paged_rope_attention_fake,
)


# ------------------------------------------------------------------------------------------------- norms, rope, gates
def _rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float, cast_first: bool) -> Tensor:
    normed = x.float()
    normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(x.dtype)
    if cast_first:
        return weight * normed.to(x.dtype)
    scale = weight.float() + offset if offset else weight.float()
    return (normed * scale).to(x.dtype)


# RMSNorm (Zhang and Sennrich 2019), in fp32. cast_first: the normalised value is cast to x's dtype before the weight is
# applied (Llama); otherwise weight + offset is applied in fp32 (Gemma with offset 1, OLMo 2 with offset 0).
define(
    "rms_norm(Tensor x, Tensor? weight, float eps, float offset, bool cast_first) -> Tensor",
    _rms_norm,
    lambda x, weight, eps, offset, cast_first: torch.empty_like(x),
)


def _add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, cast_first: bool
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _rms_norm(total, weight, eps, offset, cast_first), total


# Returns (normed, x + residual).
define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, float offset, bool cast_first) "
    "-> (Tensor, Tensor)",
    _add_rms_norm,
    lambda x, residual, weight, eps, offset, cast_first: (torch.empty_like(x), torch.empty_like(x)),
)


def _rope(x_BTHD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, interleaved: bool) -> Tensor:
    rotated = cos_BTR.shape[-1]
    x, rest = x_BTHD[..., :rotated], x_BTHD[..., rotated:]
    cos, sin = cos_BTR.unsqueeze(2), sin_BTR.unsqueeze(2)
    if interleaved:
        turned = torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
    else:
        turned = torch.cat((-x[..., rotated // 2 :], x[..., : rotated // 2]), dim=-1)
    out = (x * cos + turned * sin).to(x_BTHD.dtype)
    return torch.cat((out, rest), dim=-1) if rest.shape[-1] else out


# RoPE (Su et al. 2021) on x [B, T, H, D] with cos, sin [B, T, R], R <= D; the first R dimensions turn. cos and sin carry
# every angle twice, as halves (interleaved = False, pairs are (i, i + R/2)) or side by side (True, pairs (2i, 2i + 1)).
define(
    "rope(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor",
    _rope,
    lambda x, cos, sin, interleaved: torch.empty(x.shape, dtype=x.dtype, device=x.device),
)


def _glu(gate_up: Tensor, activation: str) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up


# Gated linear unit (Shazeer 2020): activation(gate) * up on gate_up [..., 2 I] with the gate first. Returns [..., I].
define(
    "glu(Tensor gate_up, str activation) -> Tensor",
    _glu,
    lambda gate_up, activation: gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2)),
)


# ---------------------------------------------------------------------------------------------------------------- MoE
def _expert_gate(hidden: Tensor, activation: str, interleaved: bool, gated: bool) -> Tensor:
    if activation == "swiglu_clamped":  # gpt-oss: alpha 1.702, limit 7, gate and up side by side
        gate, up = hidden[..., ::2].clamp(max=7.0), hidden[..., 1::2].clamp(-7.0, 7.0)
        return (up + 1) * (gate * torch.sigmoid(gate * 1.702))
    if not gated:
        return ACTIVATIONS[activation](hidden)
    gate, up = (hidden[..., ::2], hidden[..., 1::2]) if interleaved else hidden.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up


def _moe(
    x_TC: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    up_E: Tensor,
    down_E: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    gated: bool,
    transposed: bool,
    interleaved: bool,
) -> Tensor:
    num_experts, top_k = up_E.shape[0], index_TK.shape[1]
    flat = index_TK.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=num_experts + 1).tolist()
    rows = order // top_k
    out = torch.zeros((x_TC.shape[0], top_k, x_TC.shape[1]), dtype=x_TC.dtype, device=x_TC.device).flatten(0, 1)
    begin = 0
    for expert, count in enumerate(counts[:num_experts]):
        if count:
            chosen = order[begin : begin + count]
            x = x_TC[rows[begin : begin + count]]
            up = up_E[expert].t() if transposed else up_E[expert]
            hidden = F.linear(x, up, None if up_bias is None else up_bias[expert])
            hidden = _expert_gate(hidden, activation, interleaved, gated)
            down = down_E[expert].t() if transposed else down_E[expert]
            y = F.linear(hidden, down, None if down_bias is None else down_bias[expert])
            out[chosen] = (y * weight_TK.reshape(-1)[chosen, None]).to(out.dtype)
        begin += count
    return out.view(x_TC.shape[0], top_k, -1).sum(dim=1)


# Mixture-of-experts layer: x [T, C], index [T, K] (experts; E marks a masked choice), weight [T, K]; gate/up projection
# [E, 2 I, C] and down projection [E, C, I] ([E, C, 2 I] and [E, I, C] where transposed). Returns [T, C].
define(
    "moe(Tensor x, Tensor index, Tensor weight, Tensor up, Tensor down, Tensor? up_bias, Tensor? down_bias, "
    "str activation, bool gated, bool transposed, bool interleaved) -> Tensor",
    _moe,
    lambda x, index, weight, up, down, up_bias, down_bias, activation, gated, transposed, interleaved: torch.empty_like(
        x
    ),
)


# ------------------------------------------------------------------------------------------------- fused with quantization
def _rms_norm_quantize(
    x: Tensor, weight: Tensor | None, eps: float, offset: float, cast_first: bool
) -> tuple[Tensor, Tensor]:
    return quantize_rows(_rms_norm(x, weight, eps, offset, cast_first))


# quantize_rows(rms_norm(x, ...)): (float8_e4m3fn like x, fp32 scales [.., 1]).
define(
    "rms_norm_quantize(Tensor x, Tensor? weight, float eps, float offset, bool cast_first) -> (Tensor, Tensor)",
    _rms_norm_quantize,
    lambda x, weight, eps, offset, cast_first: quantized_rows_fake(x),
)


def _add_rms_norm_quantize(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, cast_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    normed, total = _add_rms_norm(x, residual, weight, eps, offset, cast_first)
    return *quantize_rows(normed), total


# Returns (*quantize_rows(rms_norm(x + residual, ...)), x + residual).
define(
    "add_rms_norm_quantize(Tensor x, Tensor residual, Tensor? weight, float eps, float offset, bool cast_first) "
    "-> (Tensor, Tensor, Tensor)",
    _add_rms_norm_quantize,
    lambda x, residual, weight, eps, offset, cast_first: (*quantized_rows_fake(x), torch.empty_like(x)),
)


def _glu_quantize(gate_up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return quantize_rows(_glu(gate_up, activation))


# quantize_rows(glu(gate_up, activation)): gate_up [.., 2 I] -> (float8_e4m3fn [.., I], fp32 scales [.., 1]).
define(
    "glu_quantize(Tensor gate_up, str activation) -> (Tensor, Tensor)",
    _glu_quantize,
    lambda gate_up, activation: quantized_rows_fake(gate_up[..., : gate_up.shape[-1] // 2]),
)


def inline(target: Any) -> Callable[..., Any] | None:
    """The plain torch definition of a semantic operator that a compiler may see through, or None where it must stay."""
    return _INLINE.get(target)


_INLINE: dict[Any, Callable[..., Any]] = {
    torch.ops.camshaft.rms_norm.default: _rms_norm,
    torch.ops.camshaft.add_rms_norm.default: _add_rms_norm,
    torch.ops.camshaft.rope.default: _rope,
    torch.ops.camshaft.glu.default: _glu,
    torch.ops.camshaft.attention.default: _attention,
    torch.ops.camshaft.rms_norm_quantize.default: _rms_norm_quantize,
    torch.ops.camshaft.add_rms_norm_quantize.default: _add_rms_norm_quantize,
    torch.ops.camshaft.glu_quantize.default: _glu_quantize,
    **QUANT_DEFINITIONS,
}

DEFINITIONS: dict[Any, Callable[..., Any]] = {**_INLINE, torch.ops.camshaft.moe.default: _moe}
"""Operators to their Python definitions, to be called without going through the dispatcher."""
