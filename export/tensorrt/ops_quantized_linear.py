"""camshaft::quantized_linear for TensorRT: quantize and dequantize layers around a product, for its compiler to make one kernel of.

    x ------> quantize or dynamic quantize -> dequantize --> matrix product -> + bias
    weight (int8, FP8, INT4 or FP4 network input) -> dequantize -^

Operands of the product are in the dtype of x; kernels that keep them quantized add up more exactly. Weights with a zero point are
refused. What differs from the definition: int8 saturates at -128, not -127; scales of int4 weights and the global scale of nvfp4
weights are rounded to the dtype of x. How IDynamicQuantizeLayer rounds scales of MXFP4 is not documented (the definition has the
rule of the MX specification).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ...graph.linear_format import BLOCK, LinearFormat
from ...graph.small_floats import E2M1_MAX, E4M3_MAX
from ..emitter import UnsupportedError
from .builder import Builder, Spec, Value

_TINY = torch.finfo(torch.float32).tiny
_FP8 = torch.float8_e4m3fn
_BLOCK_FORMATS = {"nvfp4": ("FP4", "FP8"), "mxfp4": ("FP4", "E8M0"), "mxfp8": ("FP8", "E8M0")}
"""What IDynamicQuantizeLayer yields: types of values and of scales."""


def quantized_linear(
    b: Builder,
    out: Spec,
    x: Value,
    weight: Value,
    scale: Value,
    zero_point: Value | None,
    global_scale: Value | None,
    bias: Value | None,
    x_scale: Value | None,
    format: str,
) -> Value:
    """Emits the operator. Raises UnsupportedError for formats that TensorRT does not have."""
    parsed = LinearFormat.parse(format)
    if zero_point is not None:
        raise UnsupportedError(f"weights with a zero point ({parsed}); TensorRT's are symmetric")
    rows = b.reshape(x, (math.prod(x.shape[:-1]), x.shape[-1]))
    values, outer = _activations(b, rows, x_scale, parsed)
    made = b.matmul(values, _weight(b, weight, scale, global_scale, parsed, x.dtype), transpose_y=True)
    if outer is not None:
        made = b.cast(b.elementwise("PROD", made, outer, torch.float32), x.dtype)
    if bias is not None:
        made = b.elementwise("SUM", made, bias, out.dtype)
    return b.reshape(made, out.shape)


# ------------------------------------------------------------------------------------------------------------- weights
def _weight(
    b: Builder, weight: Value, scale: Value, global_scale: Value | None, format: LinearFormat, dtype: torch.dtype
) -> Value:
    """The weight [N, K] in `dtype`."""
    kind = format.weights
    wanted = {"int4": "INT4", "nvfp4": "FP4", "mxfp4": "FP4"}.get(kind)
    if wanted is not None and weight.tensor.dtype.name != wanted:
        raise UnsupportedError(f"{kind} weights that are not an input of the network, read as {kind} alone")
    if kind in ("mxfp4", "mxfp8"):
        if scale.tensor.dtype.name != "E8M0":
            raise UnsupportedError(f"{kind} scales that are not an input of the network, read as {kind} alone")
        return _dequantize(b, weight.tensor, scale.tensor, dtype)
    if kind == "nvfp4":
        assert global_scale is not None
        blocks = _dequantize(b, scale.tensor, b.cast(global_scale, dtype).tensor, dtype)
        return _dequantize(b, weight.tensor, blocks.tensor, dtype)
    if kind == "int4":  # yields the dtype of its scale
        scale = b.cast(scale, dtype)
        scale = b.reshape(scale, (scale.shape[0], math.prod(scale.shape[1:])))
    if format.block:
        scale = _rows_of_blocks(b, scale, weight.shape)
    return _dequantize(b, weight.tensor, scale.tensor, dtype, channels=len(scale.shape) == 1)


def _rows_of_blocks(b: Builder, scale: Value, shape: tuple[int, ...]) -> Value:
    """Scales of 128 x 128 blocks as one for each row: TensorRT has blocks along one dimension."""
    rows, columns = shape
    if columns % BLOCK:
        raise UnsupportedError(f"blocks of {BLOCK} that do not divide {columns} columns")
    tall, wide = scale.shape
    spread = b.expand(b.reshape(scale, (tall, 1, wide)), (tall, BLOCK, wide))
    return b.slice(b.reshape(spread, (tall * BLOCK, wide)), 0, 0, rows)


def _dequantize(b: Builder, values: Any, scale: Any, dtype: torch.dtype, *, channels: bool = False) -> Value:
    layer = b.layer("dequantize", values, scale, b.type(dtype))
    if channels:
        layer.axis = 0
    return b.value(layer, dtype)


# --------------------------------------------------------------------------------------------------------- activations
def _activations(b: Builder, x: Value, x_scale: Value | None, format: LinearFormat) -> tuple[Value, Value | None]:
    """x [T, K] as `format` rounds it, in its dtype, and a scale [T, 1] or [] that its rows have beyond that."""
    kind = format.activations
    if kind == "none":
        return x, None
    if kind in ("int8_static", "fp8_static") and x_scale is None:
        raise UnsupportedError(f"{format} without the scale of its activations")
    if kind in ("int8", "int8_static", "fp8", "fp8_static", "fp8_block"):
        return _rounded(b, x, x_scale, format), None
    if kind not in _BLOCK_FORMATS:
        raise UnsupportedError(f"activations in {kind}; TensorRT takes a block's scale from its largest number")
    overall = None
    if kind == "nvfp4":  # the layer's own global scale has to be a constant
        overall = x_scale if x_scale is not None else _largest_over(b, x, E2M1_MAX * E4M3_MAX)
        scaled = b.elementwise("DIV", x, overall, torch.float32)
        return _block_quantized(b, scaled, kind, format.activation_block, x.dtype), overall
    return _block_quantized(b, x, kind, format.activation_block, x.dtype), overall


def _rounded(b: Builder, x: Value, x_scale: Value | None, format: LinearFormat) -> Value:
    """x quantized to int8 or FP8 and back, with the scale of the tensor, of each row, or of each block of a row.

    Beside weights in groups, rows are cut into as many: the compiler makes one kernel of both only if all scales are constants, and
    does not build it if they are not; where rows and groups do not meet, it makes the product of dequantized operands.
    """
    dtype = torch.int8 if format.activations.startswith("int8") else _FP8
    limit = 127.0 if dtype == torch.int8 else E4M3_MAX
    length = x.shape[1]
    if format.activation_block or format.group > 0 or format.weights == "int4":
        length = format.activation_block or format.group or length // 2
        if x.shape[1] % length:
            raise UnsupportedError(f"blocks of {length} that do not divide {x.shape[1]} columns")
    shape = (math.prod(x.shape) // length, length)
    if format.activation_block:
        blocks = b.reshape(x, shape)
        return b.reshape(_quantized(b, blocks, _largest_over(b, blocks, limit), dtype), x.shape)
    scale = x_scale if x_scale is not None else _largest_over(b, x, limit)
    if length == x.shape[1]:
        return _quantized(b, x, scale, dtype)
    scale = b.reshape(b.expand(scale, (x.shape[0], x.shape[1] // length)), (shape[0], 1))
    return b.reshape(_quantized(b, b.reshape(x, shape), scale, dtype), x.shape)


def _quantized(b: Builder, x: Value, scale: Value, dtype: torch.dtype) -> Value:
    """x quantized and back; scale [] or [rows, 1]."""
    scale = b.reshape(scale, scale.shape[:1])
    layer = b.layer("quantize", x.tensor, scale.tensor, b.type(dtype))
    if scale.shape:
        layer.axis = 0
    values = b.value(layer, dtype)
    return _dequantize(b, values.tensor, scale.tensor, x.dtype, channels=bool(scale.shape))


def _largest_over(b: Builder, x: Value, limit: float) -> Value:
    """max-abs / limit of each row, float32 [T, 1]."""
    largest = b.cast(b.reduce("MAX", b.unary("ABS", x), [-1], True), torch.float32)
    scale = b.elementwise("DIV", largest, limit, torch.float32)
    return b.elementwise("MAX", scale, _TINY, torch.float32)


def _block_quantized(b: Builder, x: Value, kind: str, block: int, dtype: torch.dtype) -> Value:
    """x rounded in blocks along K with the scales that IDynamicQuantizeLayer computes, in `dtype`."""
    values, scales = (getattr(b.trt.DataType, name) for name in _BLOCK_FORMATS[kind])
    one, same = (b.constant(1.0, of, ()) for of in (torch.float32, dtype))
    layer = b.layer("dynamic_quantize", x.tensor, 1, block, values, scales)
    scale = layer.get_output(1)
    if kind == "nvfp4":
        layer.set_input(1, one.tensor)
        scale = _dequantize(b, scale, same.tensor, dtype).tensor
    return _dequantize(b, layer.get_output(0), scale, dtype)
