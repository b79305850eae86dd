"""The table of operators for a whole model in standard ONNX: caches, masked attention, experts, and 16-bit floats.

It replaces those entries of the segments' tables that use ONNX Runtime's own operators or take float32 alone; the rest is shared.

Attention is the standard `Attention` operator where that one computes what is meant: its CPU kernel (ONNX Runtime 1.31) was
compared with a float64 reference for boolean masks, a bias, grouped heads and a soft cap (before the mask). It has no sinks, and
takes a bias only in the dtype of q, in which ALiBi's distances would be rounded: these go as MatMul and Softmax in float32.
"""

from __future__ import annotations

from typing import Any

import torch

from ..targets.onnx_graph import Builder, Emit, UnsupportedError, Value, static
from ..targets.onnx_ops import promoted


def whole_operators() -> dict[str, Emit]:
    """The table: operator names to the functions that write them, standard ONNX only."""
    from ..targets.onnx_graph import operators

    return {**operators(), **_WHOLE}


# -------------------------------------------------------------------------------------------------------------- caches
def _update_cache(b: Builder, out: Value, cache: Value, update: Value, start: Value) -> str:
    return b.op("TensorScatter", cache, update, start, axis=2, mode="linear")


def _write_blocks(b: Builder, out: Value, cache: Value, update: Value, slots: Value) -> str:
    size = b.constant(static(cache.shape[1], "a block size"), torch.int64)
    block = b.op("Div", slots, size)
    offset = b.op("Mod", slots, size)
    last = b.ints(1)
    # two indices rather than a reshaped cache: ScatterND may then work in place on a caller's buffer
    where = b.op("Concat", b.op("Unsqueeze", block, last), b.op("Unsqueeze", offset, last), axis=1)
    return b.op("ScatterND", cache, where, update)


def _read_blocks(b: Builder, out: Value, cache: Value, tables: Value) -> str:
    blocks = b.op("Gather", cache, tables, axis=0)
    heads, size = (static(cache.shape[axis], "a cache's size") for axis in (2, 3))
    return b.op("Transpose", b.op("Reshape", blocks, b.ints(0, -1, heads, size)), perm=[0, 2, 1, 3])


# ----------------------------------------------------------------------------------------------------------- attention
def _masked_attention(
    b: Builder,
    out: Value,
    q: Value,
    k: Value,
    v: Value,
    mask: Value,
    bias: Value | None,
    sinks: Value | None,
    scale: float,
    softcap: float,
) -> str:
    k, v, mask, bias = _seen_entries(b, k, v, mask, bias)
    if sinks is None and (bias is None or q.dtype == torch.float32):
        seen = mask.name if bias is None else b.op("Where", mask, bias, b.constant(float("-inf"), torch.float32))
        # softmax_precision 1 is float32
        return b.op("Attention", q, k, v, seen, scale=float(scale), softcap=float(softcap), softmax_precision=1)
    heads, groups = (static(x.shape[1], "a number of heads") for x in (q, k))
    repeats = heads // groups
    # q [B, G, R, S, D]: the heads of a group share its keys without a copy of them
    grouped = b.op("Reshape", q, b.ints(0, groups, repeats, -1, static(q.shape[3], "a head size")))
    keys = b.op("Unsqueeze", b.op("Transpose", k, perm=[0, 1, 3, 2]), b.ints(2))
    scores = b.op("MatMul", grouped, keys)
    f32 = torch.float32
    scores = b.cast(Value(scores, q.dtype, ()), f32)
    scores = b.op("Mul", scores, b.constant(scale, f32))
    if softcap:
        cap = b.constant(softcap, f32)
        scores = b.op("Mul", b.op("Tanh", b.op("Div", scores, cap)), cap)
    if bias is not None:
        size = b.op("Shape", bias)
        tail = b.op("Slice", size, b.ints(2), b.ints(4))
        shape = b.op("Concat", b.ints(-1, groups, repeats), tail, axis=0)
        scores = b.op("Add", scores, b.op("Reshape", bias, shape))
    seen = b.op("Unsqueeze", mask, b.ints(2))
    scores = b.op("Where", seen, scores, b.constant(float("-inf"), f32))
    probs = (
        b.op("Softmax", scores, axis=-1) if sinks is None else _softmax_with_sinks(b, scores, sinks, groups, repeats)
    )
    values = b.op("Unsqueeze", v, b.ints(2))
    made = b.op("MatMul", b.cast(Value(probs, f32, ()), v.dtype), values)
    return b.op("Reshape", made, b.ints(0, heads, -1, static(v.shape[3], "a head size")))


def _seen_entries(
    b: Builder, k: Value, v: Value, mask: Value, bias: Value | None
) -> tuple[Value, Value, Value, Value | None]:
    """Keys, values, mask and bias up to the last entry that any row sees: a step does not pay for the rest of a cache."""
    i32 = torch.int32
    seen = b.op("ReduceMax", b.cast(mask, i32), b.ints(0, 1, 2), keepdims=0)
    size = b.op("Squeeze", b.op("Cast", b.op("Shape", mask, start=3, end=4), to=b.element_type(i32)), b.ints(0))
    numbers = b.op("Range", b.constant(1, i32), b.op("Add", size, b.constant(1, i32)), b.constant(1, i32))
    end = b.op("Cast", b.op("ReduceMax", b.op("Mul", seen, numbers), keepdims=1), to=b.element_type(torch.int64))

    def cut(value: Value, axis: int) -> Value:
        shape = tuple(None if at == axis else size for at, size in enumerate(value.shape))
        return Value(b.op("Slice", value, b.ints(0), end, b.ints(axis)), value.dtype, shape)

    return cut(k, 2), cut(v, 2), cut(mask, 3), None if bias is None else cut(bias, 3)


def _softmax_with_sinks(b: Builder, scores: str, sinks: Value, groups: int, repeats: int) -> str:
    """Softmax of scores [B, G, R, S, L] with one more logit per head, whose probability is dropped."""
    f32 = torch.float32
    logit = b.op("Reshape", b.cast(sinks, f32), b.ints(1, groups, repeats, 1, 1))
    highest = b.op("Max", b.op("ReduceMax", scores, b.ints(-1), keepdims=1), logit)
    weights = b.op("Exp", b.op("Sub", scores, highest))
    total = b.op("ReduceSum", weights, b.ints(-1), keepdims=1)
    return b.op("Div", weights, b.op("Add", total, b.op("Exp", b.op("Sub", logit, highest))))


# --------------------------------------------------------------------------------------------------- norms, rope, gates
def _rms_norm(
    b: Builder, out: Value, x: Value, weight: Value | None, eps: float, offset: float, cast_first: bool
) -> str:
    f32 = torch.float32
    ones = b.op("Expand", b.constant(1, f32), b.ints(static(x.shape[-1], "a hidden size")))
    wide = b.cast(x, f32)
    if weight is None or (cast_first and x.dtype != f32):
        normed = b.op("RMSNormalization", wide, ones, axis=-1, epsilon=float(eps))
        normed = b.cast(Value(normed, f32, x.shape), x.dtype)
        return normed if weight is None else b.op("Mul", normed, b.cast(weight, x.dtype))
    scale = b.cast(weight, f32)
    scale = b.op("Add", scale, b.constant(offset, f32)) if offset and not cast_first else scale
    normed = b.op("RMSNormalization", wide, scale, axis=-1, epsilon=float(eps))
    return b.cast(Value(normed, f32, x.shape), out.dtype)


def _add_rms_norm(
    b: Builder,
    out: tuple[Value, Value],
    x: Value,
    residual: Value,
    weight: Value | None,
    eps: float,
    offset: float,
    cast_first: bool,
) -> list[str]:
    total = b.op("Add", x, residual)
    return [_rms_norm(b, out[0], Value(total, x.dtype, x.shape), weight, eps, offset, cast_first), total]


def _rope(b: Builder, out: Value, x: Value, cos: Value, sin: Value, interleaved: bool) -> str:
    from ..targets.onnx_nn_ops import NN_OPERATORS

    if x.dtype == cos.dtype == torch.float32:
        return str(NN_OPERATORS["camshaft.rope.default"](b, out, x, cos, sin, interleaved))
    if interleaved:
        raise UnsupportedError(f"interleaved rope of {x.dtype}")
    rotated = static(cos.shape[-1], "a number of rotated dimensions")
    size = static(x.shape[-1], "a head size")
    dtype = promoted(x, cos)
    sizes = [rotated // 2, rotated // 2, *([size - rotated] if size > rotated else [])]
    first, second, *rest = b.multi("Split", len(sizes), x, b.ints(*sizes), axis=-1)
    turned = b.op("Concat", b.op("Neg", second), first, axis=-1)
    head = b.op("Concat", first, second, axis=-1)
    tables = [b.op("Unsqueeze", b.cast(table, dtype), b.ints(2)) for table in (cos, sin)]
    parts = [b.op("Mul", b.cast(Value(part, x.dtype, ()), dtype), table) for part, table in zip((head, turned), tables)]
    made = b.cast(Value(b.op("Add", *parts), dtype, ()), x.dtype)
    return b.op("Concat", made, *rest, axis=-1) if rest else made


def _activation(b: Builder, x: str, name: str) -> str:
    if name == "relu":
        return b.op("Relu", x)
    if name == "silu":
        return b.op("Mul", x, b.op("Sigmoid", x))
    if name in ("gelu", "gelu_tanh"):
        return b.op("Gelu", x, approximate="none" if name == "gelu" else "tanh")
    raise UnsupportedError(f"activation {name!r}")


def _glu(b: Builder, out: Value, gate_up: Value, activation: str) -> str:
    size = static(out.shape[-1], "a hidden size")
    gate, up = b.multi("Split", 2, gate_up, b.ints(size, size), axis=-1)
    return b.op("Mul", _activation(b, gate, activation), up)


def _linear(b: Builder, out: Value, x: Value, weight: Value, bias: Value | None = None) -> str:
    if len(weight.shape) != 2 or out.shape.count(None) > 1:
        raise UnsupportedError(f"linear of shapes {list(x.shape)}, {list(weight.shape)}")
    rows = x.name if len(x.shape) == 2 else b.reshape(x, (None, x.shape[-1]))
    made = b.op("Gemm", rows, weight, bias, transB=1)
    return made if len(x.shape) == 2 else b.reshape(made, out.shape)


# ------------------------------------------------------------------------------------------------------------- experts
def _moe(
    b: Builder,
    out: Value,
    x: Value,
    index: Value,
    weight: Value,
    up: Value,
    down: Value,
    up_bias: Value | None,
    down_bias: Value | None,
    activation: str,
    gated: bool,
    transposed: bool,
    interleaved: bool,
) -> str:
    """Every expert for every token, weighted with 0 where it was not chosen: right and simple, not sparing.

    Rows T lie on the last axis, [E, .., T], where weights are stored [E, rows out, rows in], so that no weight is transposed.
    """
    experts = static(up.shape[0], "a number of experts")
    axis = 2 if transposed else 1
    tokens = b.op("Unsqueeze", x if transposed else b.op("Transpose", x, perm=[1, 0]), b.ints(0))

    def project(value: str, matrix: Value, bias: Value | None) -> str:
        made = b.op("MatMul", value, matrix) if transposed else b.op("MatMul", matrix, value)
        return made if bias is None else b.op("Add", made, b.op("Unsqueeze", bias, b.ints(3 - axis)))

    hidden = project(tokens, up, up_bias)
    size = static(up.shape[axis], "a hidden size")
    hidden = _expert_gate(b, hidden, size, axis, x.dtype, activation, gated, interleaved)
    made = b.cast(Value(project(hidden, down, down_bias), x.dtype, ()), weight.dtype)
    # an index of E (a choice that is masked) is outside of OneHot's range: all off. Float32, for OneHot knows no bfloat16.
    switch = b.constant([0, 1], torch.float32)
    chosen = b.op("OneHot", index, b.constant(experts, torch.int64), switch, axis=-1)  # [T, K, E]
    chosen = b.cast(Value(chosen, torch.float32, ()), weight.dtype)
    share = b.op("ReduceSum", b.op("Mul", chosen, b.op("Unsqueeze", weight, b.ints(-1))), b.ints(1), keepdims=0)
    share = b.op("Unsqueeze", b.op("Transpose", share, perm=[1, 0]), b.ints(axis))
    total = b.op("ReduceSum", b.op("Mul", made, share), b.ints(0), keepdims=0)
    total = total if transposed else b.op("Transpose", total, perm=[1, 0])
    return b.cast(Value(total, weight.dtype, out.shape), out.dtype)


def _expert_gate(
    b: Builder, hidden: str, size: int, axis: int, dtype: torch.dtype, activation: str, gated: bool, interleaved: bool
) -> str:
    clamped = activation == "swiglu_clamped"
    if not gated and not clamped:
        return _activation(b, hidden, activation)
    if interleaved or clamped:
        gate, up = (b.op("Slice", hidden, b.ints(first), b.ints(size), b.ints(axis), b.ints(2)) for first in (0, 1))
    else:
        gate, up = b.multi("Split", 2, hidden, b.ints(size // 2, size // 2), axis=axis)
    if not clamped:
        return b.op("Mul", _activation(b, gate, activation), up)
    low, high = b.constant(-7.0, dtype), b.constant(7.0, dtype)
    gate = b.op("Min", gate, high)
    up = b.op("Min", b.op("Max", up, low), high)
    gate = b.op("Mul", gate, b.op("Sigmoid", b.op("Mul", gate, b.constant(1.702, dtype))))
    return b.op("Mul", b.op("Add", up, b.constant(1.0, dtype)), gate)


def _silu(b: Builder, out: Value, x: Value) -> str:
    return _activation(b, x.name, "silu")


def _gelu(b: Builder, out: Value, x: Value, approximate: Any = "none") -> str:
    return _activation(b, x.name, "gelu_tanh" if approximate == "tanh" else "gelu")


_WHOLE: dict[str, Emit] = {
    "camshaft.update_cache.default": _update_cache,
    "camshaft.write_blocks.default": _write_blocks,
    "camshaft.read_blocks.default": _read_blocks,
    "camshaft.masked_attention.default": _masked_attention,
    "camshaft.rms_norm.default": _rms_norm,
    "camshaft.add_rms_norm.default": _add_rms_norm,
    "camshaft.rope.default": _rope,
    "camshaft.glu.default": _glu,
    "camshaft.moe.default": _moe,
    "aten.linear.default": _linear,
    "aten.silu.default": _silu,
    "aten.gelu.default": _gelu,
}
"""Operators that only whole models have, or that are written otherwise there."""
