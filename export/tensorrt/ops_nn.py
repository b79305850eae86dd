"""The table of operators for TensorRT, second part: norms, RoPE, matrix products, mixture of experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..emitter import UnsupportedError
from .builder import HALF, Builder, Emit, Spec, Value
from .ops_math import activate, compute_dtype


# -------------------------------------------------------------------------------------------------------------- norms
def _rms_norm(
    b: Builder, out: Spec, x: Value, weight: Value | None, eps: float, offset: float, cast_first: bool
) -> Value:
    normed = _normalized(b, b.cast(x, torch.float32), [len(x.shape) - 1], eps)
    if weight is None:
        return b.cast(normed, out.dtype)
    if cast_first:
        return b.elementwise("PROD", weight, b.cast(normed, x.dtype), out.dtype)
    scale = b.cast(weight, torch.float32)
    if offset:
        scale = b.elementwise("SUM", scale, offset, torch.float32)
    return b.cast(b.elementwise("PROD", normed, scale, torch.float32), out.dtype)


def _normalized(b: Builder, x: Value, dims: Sequence[int], eps: float) -> Value:
    """x / sqrt(mean(x^2) + eps), in fp32."""
    square = b.reduce("AVG", b.elementwise("PROD", x, x, x.dtype), dims, True)
    root = b.unary("RECIP", b.unary("SQRT", b.elementwise("SUM", square, eps, x.dtype)))
    return b.elementwise("PROD", x, root, x.dtype)


def _add_rms_norm(
    b: Builder,
    out: tuple[Spec, Spec],
    x: Value,
    residual: Value,
    weight: Value | None,
    eps: float,
    offset: float,
    cast_first: bool,
) -> list[Value]:
    total = b.elementwise("SUM", x, residual, out[1].dtype)
    return [_rms_norm(b, out[0], total, weight, eps, offset, cast_first), total]


def _aten_rms_norm(
    b: Builder, out: Spec, x: Value, shape: Sequence[int], weight: Value | None = None, eps: float | None = None
) -> Value:
    dims = list(range(len(x.shape) - len(shape), len(x.shape)))
    wide = b.cast(x, torch.float32)
    normed = _normalized(b, wide, dims, torch.finfo(x.dtype).eps if eps is None else eps)
    if weight is not None:
        normed = b.elementwise("PROD", normed, b.cast(weight, torch.float32), torch.float32)
    return b.cast(normed, out.dtype)


def _layer_norm(
    b: Builder,
    out: Spec,
    x: Value,
    shape: Sequence[int],
    weight: Value | None = None,
    bias: Value | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Value:
    dims = list(range(len(x.shape) - len(shape), len(x.shape)))
    dtype = torch.float32
    wide = b.cast(x, dtype)
    made = _normalized(b, b.elementwise("SUB", wide, b.reduce("AVG", wide, dims, True), dtype), dims, eps)
    if weight is not None:
        made = b.elementwise("PROD", made, b.cast(weight, dtype), dtype)
    if bias is not None:
        made = b.elementwise("SUM", made, b.cast(bias, dtype), dtype)
    return b.cast(made, out.dtype)


# --------------------------------------------------------------------------------------------------------------- rope
def _rope(b: Builder, out: Spec, x: Value, cos: Value, sin: Value, interleaved: bool) -> Value:
    size, rotated = x.shape[-1], cos.shape[-1]
    half, last = rotated // 2, len(x.shape) - 1
    dtype = torch.promote_types(x.dtype, cos.dtype)
    part = b.slice(x, last, 0, rotated)
    if interleaved:
        pairs = b.reshape(part, (*x.shape[:-1], half, 2))
        odd, even = (b.slice(pairs, last + 1, begin, 1) for begin in (1, 0))
        turned = b.reshape(b.concat([b.unary("NEG", odd), even], last + 1), part.shape)
    else:
        left, right = b.slice(part, last, 0, half), b.slice(part, last, half, half)
        turned = b.concat([b.unary("NEG", right), left], last)
    tables = [b.reshape(table, (*table.shape[:-1], 1, rotated)) for table in (cos, sin)]
    straight, crossed = (b.elementwise("PROD", a, t, dtype) for a, t in zip((part, turned), tables))
    made = b.cast(b.elementwise("SUM", straight, crossed, dtype), out.dtype)
    return b.concat([made, b.slice(x, last, rotated, size - rotated)], last) if rotated < size else made


# ----------------------------------------------------------------------------------------------------------- products
_NARROW, _WIDE = 4096, 16384
"""Columns of a product that make few programs, and enough of them."""
_LONG = 2048
"""Summed elements from which a product may be cut."""


def _linear(b: Builder, out: Spec, x: Value, weight: Value, bias: Value | None = None) -> Value:
    if len(weight.shape) != 2:
        raise UnsupportedError(f"linear with a weight {list(weight.shape)}")
    rows = b.reshape(x, (math.prod(x.shape[:-1]), x.shape[-1]))
    made = _product(b, rows, weight)
    if bias is not None:
        made = b.elementwise("SUM", made, bias, out.dtype)
    return b.reshape(made, out.shape)


def _product(b: Builder, x: Value, weight: Value) -> Value:
    """x [M, K] @ weight [N, K].T, in the form that TensorRT runs fastest: it has no good kernels of its own for few rows.

    Measured on an H200 with the products of a layer of Llama-3.1-8B in bf16, 1 to 256 rows. Four parts of the summed dimension
    win to 32 rows and lose at 64, two win at 128 and 256. Wide results (28,672 columns) are enough work as they are from 16 rows
    on, but 32 rows run 14% faster as 64; 64 rows by 6,144 columns 20% faster as 128. (One row as multiplications and a sum is 14%
    faster alone, and makes a whole layer a third slower.)
    """
    count, (columns, summed) = x.shape[0], weight.shape
    wide = columns > _WIDE
    if x.dtype not in HALF or summed < _LONG:
        return b.matmul(x, weight, transpose_y=True)
    if 16 < count <= 32 and wide or 32 < count <= 64 and _NARROW < columns <= _WIDE:
        return _with_more_rows(b, x, weight, 64 if wide else 128)
    parts = 4 if count <= (8 if wide else 32) else 2 if 64 < count <= 256 and not wide else 1
    if parts == 1 or summed % parts:
        return b.matmul(x, weight, transpose_y=True)
    return _in_parts(b, x, weight, parts)


def _with_more_rows(b: Builder, x: Value, weight: Value, rows: int) -> Value:
    """x [M, K] @ weight [N, K].T as a product of `rows` rows, those behind the first M zeros."""
    return b.slice(b.matmul(b.longer(x, 0, rows), weight, transpose_y=True), 0, 0, x.shape[0])


def _in_parts(b: Builder, x: Value, weight: Value, parts: int) -> Value:
    """x [M, K] @ weight [N, K].T as the sum, in float32, of products over `parts` pieces of K."""
    count, summed = x.shape
    left = b.transpose(b.reshape(x, (count, parts, summed // parts)), 0, 1)
    right = b.transpose(b.reshape(weight, (weight.shape[0], parts, summed // parts)), 0, 1)
    products = b.cast(b.matmul(left, right, transpose_y=True), torch.float32)
    total = b.layer("reduce", products.tensor, b.trt.ReduceOperation.SUM, 1, False)
    return b.cast(b.value(total, torch.float32), x.dtype)


def _matmul(b: Builder, out: Spec, x: Value, y: Value) -> Value:
    left = b.reshape(x, (1, *x.shape)) if len(x.shape) == 1 else x
    right = b.reshape(y, (*y.shape, 1)) if len(y.shape) == 1 else y
    return b.reshape(b.matmul(left, right), out.shape)


def _addmm(b: Builder, out: Spec, bias: Value, x: Value, y: Value, *, beta: float = 1, alpha: float = 1) -> Value:
    product = b.matmul(x, y)
    if alpha == 1 and beta == 1:
        return b.elementwise("SUM", product, bias, out.dtype)
    dtype = compute_dtype(out.dtype)
    left, right = b.elementwise("PROD", product, alpha, dtype), b.elementwise("PROD", bias, beta, dtype)
    return b.cast(b.elementwise("SUM", left, right, dtype), out.dtype)


def _einsum(b: Builder, out: Spec, equation: str, tensors: Sequence[Value], path: Any = None) -> Value:
    if "." in equation:
        raise UnsupportedError(f"einsum {equation!r} with an ellipsis")
    if out.dtype not in (torch.float32, *HALF):
        raise UnsupportedError(f"a matrix product of {out.dtype}")
    operands = [b.cast(tensor, out.dtype).tensor for tensor in tensors]
    return b.value(b.layer("einsum", operands, equation.replace(" ", "")), out.dtype)


# ---------------------------------------------------------------------------------------------------------------- MoE
def _moe(
    b: Builder,
    out: Spec,
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
) -> Value:
    """Few choices gather the weights of their experts; with many, every expert computes every token and most are dropped.

    P = T K pairs of a token and its expert (gathered), or the E experts with T tokens each (dense):
        gathered: x [P, 1, C] @ up[index] -> [P, 1, 2 I] -> gate -> @ down[index] -> [P, 1, C] -> * weight, summed over K
        dense:    x [1, T, C] @ up        -> [E, T, 2 I] -> gate -> @ down        -> [E, T, C] -> * weight, summed over E
    """
    (tokens, size), choices, experts = x.shape, index.shape[1], up.shape[0]
    gathered = tokens * choices <= experts
    if gathered:
        last = b.constant(experts - 1, index.dtype, (1, 1))
        flat = b.reshape(b.elementwise("MIN", index, last, index.dtype), (tokens * choices,))

        def pick(value: Value) -> Value:
            return b.gather(value, flat, 0)

        rows = b.reshape(
            b.expand(b.reshape(x, (tokens, 1, size)), (tokens, choices, size)), (tokens * choices, 1, size)
        )
    else:

        def pick(value: Value) -> Value:
            return value

        rows = b.reshape(x, (1, tokens, size))
    hidden = _expert_product(b, rows, pick(up), None if up_bias is None else pick(up_bias), transposed)
    hidden = _expert_gate(b, hidden, activation, gated, interleaved)
    result = _expert_product(b, hidden, pick(down), None if down_bias is None else pick(down_bias), transposed)
    if gathered:
        kept = b.elementwise("LESS", index, experts, index.dtype)  # E marks a masked choice
        zero = b.constant(0, weight.dtype, (1, 1))
        scale = b.reshape(b.select(kept, weight, zero), (tokens, choices, 1))
        scaled = _scaled(b, b.reshape(result, (tokens, choices, size)), scale, out.dtype)
        return b.cast(b.reduce("SUM", b.cast(scaled, compute_dtype(out.dtype)), [1], False), out.dtype)
    scale = _expert_weights(b, index, weight, experts)
    scaled = _scaled(b, result, scale, out.dtype)
    unused = b.elementwise("EQUAL", scale, 0, scale.dtype)  # what an expert makes of others' tokens may overflow
    scaled = b.select(unused, b.constant(0, out.dtype, (1, 1, 1)), scaled)
    return b.cast(b.reduce("SUM", b.cast(scaled, compute_dtype(out.dtype)), [0], False), out.dtype)


def _scaled(b: Builder, result: Value, scale: Value, dtype: torch.dtype) -> Value:
    working = torch.promote_types(result.dtype, scale.dtype)
    return b.cast(b.elementwise("PROD", result, scale, working), dtype)


def _expert_weights(b: Builder, index: Value, weight: Value, experts: int) -> Value:
    """[E, T, 1]: the weight with which a token uses an expert, 0 where it does not."""
    tokens, choices = index.shape
    names = b.constant(range(experts), index.dtype, (experts, 1, 1))
    chosen = b.elementwise("EQUAL", b.reshape(index, (1, tokens, choices)), names, index.dtype)
    zero = b.constant(0, weight.dtype, (1, 1, 1))
    spread = b.select(chosen, b.reshape(weight, (1, tokens, choices)), zero)
    return b.cast(b.reduce("SUM", b.cast(spread, compute_dtype(weight.dtype)), [2], True), weight.dtype)


def _expert_product(b: Builder, x: Value, weight: Value, bias: Value | None, transposed: bool) -> Value:
    made = b.matmul(x, weight, transpose_y=not transposed)
    if bias is None:
        return made
    return b.elementwise("SUM", made, b.reshape(bias, (bias.shape[0], 1, bias.shape[1])), made.dtype)


def _expert_gate(b: Builder, hidden: Value, activation: str, gated: bool, interleaved: bool) -> Value:
    dtype, last = hidden.dtype, len(hidden.shape) - 1
    if not gated:
        return activate(b, hidden, activation, dtype)
    half, begin, step = hidden.shape[-1] // 2, hidden.shape[-1] // 2, 1
    if interleaved or activation == "swiglu_clamped":
        begin, step = 1, 2
    gate, up = b.slice(hidden, last, 0, half, step), b.slice(hidden, last, begin, half, step)
    if activation != "swiglu_clamped":
        return b.elementwise("PROD", activate(b, gate, activation, dtype), up, dtype)
    gate = b.elementwise("MIN", gate, 7.0, dtype)
    up = b.elementwise("MIN", b.elementwise("MAX", up, -7.0, dtype), 7.0, dtype)
    wide = compute_dtype(dtype)
    slope = b.cast(b.elementwise("PROD", gate, 1.702, wide), dtype)
    opened = b.elementwise("PROD", gate, activate(b, slope, "sigmoid", dtype), dtype)
    return b.elementwise("PROD", b.elementwise("SUM", up, 1, dtype), opened, dtype)


NN_OPERATORS: dict[str, Emit] = {
    "camshaft.rms_norm.default": _rms_norm,
    "camshaft.add_rms_norm.default": _add_rms_norm,
    "camshaft.rope.default": _rope,
    "camshaft.moe.default": _moe,
    "aten.rms_norm.default": _aten_rms_norm,
    "aten.layer_norm.default": _layer_norm,
    "aten.linear.default": _linear,
    "aten.matmul.default": _matmul,
    "aten.mm.default": _matmul,
    "aten.bmm.default": _matmul,
    "aten.addmm.default": _addmm,
    "aten.baddbmm.default": _addmm,
    "aten.einsum.default": _einsum,
}
"""Operator names to the functions that emit them."""
