"""The table of operators for ONNX, second part: norms, RoPE, matrix products, attention, convolutions, pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .onnx_graph import MICROSOFT, Builder, Emit, UnsupportedError, Value, static


# -------------------------------------------------------------------------------------------------------------- norms
def _ones(b: Builder, shape: Sequence[int], dtype: torch.dtype, fill: float = 1.0) -> str:
    from onnx import helper

    value = helper.make_tensor("value", b.element_type(dtype), [1], [fill])
    return b.op("ConstantOfShape", b.ints(*shape), value=value)


def _scale(b: Builder, x: Value, weight: Value | None, offset: float) -> str:
    if x.dtype != torch.float32 or (weight is not None and (weight.dtype != x.dtype or len(weight.shape) != 1)):
        raise UnsupportedError(f"an RMS norm of {x.dtype} with weight {weight}")
    if weight is None:
        return _ones(b, [static(x.shape[-1], "a hidden size")], x.dtype)
    return b.op("Add", weight, b.constant(offset, x.dtype)) if offset else weight.name


def _rms_norm(
    b: Builder, out: Value, x: Value, weight: Value | None, eps: float, offset: float, cast_first: bool
) -> str:
    return b.op("RMSNormalization", x, _scale(b, x, weight, offset), axis=-1, epsilon=float(eps))


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
    scale = _scale(b, x, weight, offset)
    if x.shape == residual.shape and len(x.shape) in (2, 3):
        made = b.multi("SkipSimplifiedLayerNormalization", 4, x, residual, scale, domain=MICROSOFT, epsilon=float(eps))
        return [made[0], made[3]]
    total = b.op("Add", x, residual)
    return [b.op("RMSNormalization", total, scale, axis=-1, epsilon=float(eps)), total]


def _aten_rms_norm(
    b: Builder, out: Value, x: Value, shape: Sequence[int], weight: Value | None = None, eps: float | None = None
) -> str:
    if len(shape) != 1:
        raise UnsupportedError(f"an RMS norm over {len(shape)} dimensions")
    return _rms_norm(b, out, x, weight, torch.finfo(x.dtype).eps if eps is None else eps, 0.0, True)


def _layer_norm(
    b: Builder,
    out: Value,
    x: Value,
    shape: Sequence[int],
    weight: Value | None = None,
    bias: Value | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> str:
    scale = weight.name if weight is not None else _ones(b, shape, x.dtype)
    return b.op("LayerNormalization", x, scale, bias, axis=-len(shape), epsilon=float(eps))


def _group_norm(
    b: Builder,
    out: Value,
    x: Value,
    num_groups: int,
    weight: Value | None = None,
    bias: Value | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> str:
    channels = static(x.shape[1], "a number of channels")
    scale = weight or _ones(b, [channels], x.dtype)
    shift = bias or _ones(b, [channels], x.dtype, 0.0)
    return b.op("GroupNormalization", x, scale, shift, num_groups=num_groups, epsilon=float(eps))


def _batch_norm(
    b: Builder,
    out: Value,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    mean: Value | None,
    var: Value | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> str:
    if training or mean is None or var is None:
        raise UnsupportedError("batch norm in training")
    channels = static(x.shape[1], "a number of channels")
    scale = weight or _ones(b, [channels], x.dtype)
    shift = bias or _ones(b, [channels], x.dtype, 0.0)
    return b.op("BatchNormalization", x, scale, shift, mean, var, epsilon=float(eps))


# --------------------------------------------------------------------------------------------------------------- rope
def _rope(b: Builder, out: Value, x: Value, cos: Value, sin: Value, interleaved: bool) -> str:
    batch, _, heads, size = x.shape
    rotated = cos.shape[-1]
    if batch != cos.shape[0] or None in (heads, size, rotated) or x.dtype != cos.dtype or x.dtype != torch.float32:
        raise UnsupportedError(f"rope of {x.dtype} {list(x.shape)} with cos {cos.dtype} {list(cos.shape)}")
    assert heads is not None and size is not None and rotated is not None
    # cos and sin carry every angle twice; ONNX takes it once, with x as [B, T, H * D]
    begin, end, step = (0, rotated, 2) if interleaved else (0, rotated // 2, 1)
    halves = [b.op("Slice", table, b.ints(begin), b.ints(end), b.ints(-1), b.ints(step)) for table in (cos, sin)]
    packed = b.reshape(x, (*x.shape[:2], heads * size))
    turned = b.op(
        "RotaryEmbedding",
        packed,
        *halves,
        num_heads=heads,
        interleaved=int(interleaved),
        rotary_embedding_dim=0 if rotated == size else rotated,
    )
    return b.reshape(turned, x.shape)


# ----------------------------------------------------------------------------------------------------------- products
def _linear(b: Builder, out: Value, x: Value, weight: Value, bias: Value | None = None) -> str:
    if len(x.shape) < 2 or len(weight.shape) != 2:
        raise UnsupportedError(f"linear of shapes {list(x.shape)}, {list(weight.shape)}")
    result = b.op("FusedMatMul", x, weight, domain=MICROSOFT, transB=1)
    return result if bias is None else b.op("Add", result, bias)


def _matmul(b: Builder, out: Value, x: Value, y: Value) -> str:
    return b.op("MatMul", x, y)


def _addmm(b: Builder, out: Value, bias: Value, x: Value, y: Value, beta: float = 1, alpha: float = 1) -> str:
    product = b.op("MatMul", x, y)
    if alpha != 1:
        product = b.op("Mul", product, b.constant(alpha, out.dtype))
    return b.op("Add", product, b.op("Mul", bias, b.constant(beta, out.dtype)) if beta != 1 else bias)


def _einsum(b: Builder, out: Value, equation: str, tensors: Sequence[Value], path: Any = None) -> str:
    return b.op("Einsum", *(b.cast(tensor, out.dtype) for tensor in tensors), equation=equation)


def _sdpa(
    b: Builder,
    out: Value,
    q: Value,
    k: Value,
    v: Value,
    mask: Value | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> str:
    if dropout_p or len(q.shape) != 4 or (mask is not None and is_causal):
        raise UnsupportedError("attention with dropout, with a mask and is_causal, or of other than four dimensions")
    extra: dict[str, Any] = {} if scale is None else {"scale": float(scale)}
    return b.op("Attention", q, k, v, mask, is_causal=int(is_causal), **extra)


def _convolution(
    b: Builder,
    out: Value,
    x: Value,
    weight: Value,
    bias: Value | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> str:
    num_axes = len(weight.shape) - 2
    if isinstance(padding, str) or len(x.shape) != num_axes + 2:
        raise UnsupportedError(f"a convolution with padding {padding!r} of {len(x.shape)} dimensions")
    pads = _each(padding, num_axes)
    return b.op(
        "Conv",
        x,
        weight,
        bias,
        strides=_each(stride, num_axes),
        pads=[*pads, *pads],
        dilations=_each(dilation, num_axes),
        group=groups,
        kernel_shape=list(weight.shape[2:]),
    )


def _each(value: Any, count: int) -> list[int]:
    items = [value] if isinstance(value, int) else list(value)
    return items * count if len(items) == 1 else items


def _max_pool(
    b: Builder,
    out: Value,
    x: Value,
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> str:
    num_axes = len(x.shape) - 2
    sizes, pads = _each(kernel, num_axes), _each(padding, num_axes)
    return b.op(
        "MaxPool",
        x,
        kernel_shape=sizes,
        strides=_each(stride, num_axes) or sizes,
        pads=[*pads, *pads],
        dilations=_each(dilation, num_axes),
        ceil_mode=int(ceil_mode),
    )


def _adaptive_pool(b: Builder, out: Value, x: Value, size: Any) -> str:
    if any(item != 1 for item in size) or len(x.shape) != len(size) + 2:
        raise UnsupportedError(f"adaptive pooling to {size}")
    return b.op("GlobalAveragePool", x)


NN_OPERATORS: dict[str, Emit] = {
    "camshaft.rms_norm.default": _rms_norm,
    "camshaft.add_rms_norm.default": _add_rms_norm,
    "camshaft.rope.default": _rope,
    "aten.rms_norm.default": _aten_rms_norm,
    "aten.layer_norm.default": _layer_norm,
    "aten.group_norm.default": _group_norm,
    "aten.batch_norm.default": _batch_norm,
    "aten.linear.default": _linear,
    "aten.matmul.default": _matmul,
    "aten.mm.default": _matmul,
    "aten.bmm.default": _matmul,
    "aten.addmm.default": _addmm,
    "aten.baddbmm.default": _addmm,
    "aten.einsum.default": _einsum,
    "aten.scaled_dot_product_attention.default": _sdpa,
    "aten.conv1d.default": _convolution,
    "aten.conv2d.default": _convolution,
    "aten.max_pool1d.default": _max_pool,
    "aten.max_pool2d.default": _max_pool,
    "aten.adaptive_avg_pool1d.default": _adaptive_pool,
    "aten.adaptive_avg_pool2d.default": _adaptive_pool,
}
"""Operator names to the functions that write them."""
