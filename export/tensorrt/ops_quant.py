"""Quantized tensors for TensorRT: Quantize and Dequantize layers, from which its compiler makes quantized kernels.

    x -> quantize -> dequantize -> linear       int8 or fp8 products, if the weight is dequantized too
    packed weight -> dequantize -> linear       weight-only int4 or fp4; the network input is packed, two values to a byte

A scale of the dtype that the product is computed in is what the compiler's patterns expect; fp32 is right as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...graph.quant_ops import PACKED_FORMATS, QUANTIZED_DTYPES
from ...graph.serialize import target_name
from ..emitter import UnsupportedError
from .builder import Builder, Emit, Spec, Value

_PACKED = "camshaft.dequantize_packed.default"
_TENSORRT_NAMES = {"int4": "INT4", "fp4": "FP4"}


def packed_format(node: fx.Node) -> str | None:
    """The format of the packed weights that a placeholder holds, or None: what reads it says what it is."""
    formats = set()
    for user in node.users:
        packed = user.op == "call_function" and target_name(user.target) == _PACKED and user.args[0] is node
        formats.add(user.args[3] if packed else None)
    return formats.pop() if len(formats) == 1 else None


def graph_input(b: Builder, node: fx.Node, name: str, spec: Spec) -> Value:
    """A network input for a placeholder; packed weights (uint8 [.., K / 2]) become a 4-bit tensor [.., K], the same bytes."""
    format = packed_format(node)
    if format not in PACKED_FORMATS or spec.dtype != torch.uint8:
        return b.input(name, spec.dtype, spec.shape)
    shape = (*spec.shape[:-1], spec.shape[-1] * 2)
    tensor = b.network.add_input(name, getattr(b.trt.DataType, _TENSORRT_NAMES[format]), shape)
    return Value(spec.dtype, spec.shape, tensor)


def _layer(b: Builder, kind: str, x: Any, rank: int, scale: Value, axis: int, dtype: torch.dtype) -> Value:
    layer = b.layer(kind, x, scale.tensor, b.type(dtype))
    if len(scale.shape) == 1:
        layer.axis = axis % rank
    return b.value(layer, dtype)


def _quantize(b: Builder, out: Spec, x: Value, scale: Value, axis: int, dtype: torch.dtype) -> Value:
    if dtype not in QUANTIZED_DTYPES:
        raise UnsupportedError(f"quantizing to {dtype}")
    return _layer(b, "quantize", x.tensor, len(x.shape), scale, axis, dtype)


def _dequantize(b: Builder, out: Spec, x: Value, scale: Value, axis: int, dtype: torch.dtype) -> Value:
    if x.dtype not in QUANTIZED_DTYPES:
        raise UnsupportedError(f"dequantizing {x.dtype}")
    return _layer(b, "dequantize", x.tensor, len(x.shape), scale, axis, dtype)


def _dequantize_packed(
    b: Builder, out: Spec, packed: Value, scale: Value, global_scale: Value | None, format: str, dtype: torch.dtype
) -> Value:
    if packed.tensor.dtype.name != _TENSORRT_NAMES.get(format):
        raise UnsupportedError(f"{format} weights that are not an input of the network, packed as {format} alone")
    rank = len(out.shape)
    if len(scale.shape) != rank:
        raise UnsupportedError(f"{format} weights with scales {list(scale.shape)} that are not one per block")
    if global_scale is not None:  # scales that are quantized themselves
        scale = _layer(b, "dequantize", scale.tensor, rank, b.cast(global_scale, dtype), 0, dtype)
    # 4-bit layers yield the dtype of their scale
    return b.cast(_layer(b, "dequantize", packed.tensor, rank, scale, 0, scale.dtype), dtype)


QUANT_OPERATORS: dict[str, Emit] = {
    "camshaft.quantize.default": _quantize,
    "camshaft.dequantize.default": _dequantize,
    "camshaft.dequantize_packed.default": _dequantize_packed,
}
"""Operator names to the functions that emit them."""
