"""Quantized tensors for TensorRT: Quantize and Dequantize layers, from which its compiler makes quantized kernels.

    x -> quantize -> dequantize -> linear       int8 or fp8 products, if the weight is dequantized too
    packed weight -> dequantize -> linear       weight-only int4 or fp4; the network input is packed, two values to a byte
    camshaft.quantized_linear                   in ops_quantized_linear

A scale of the dtype that the product is computed in is what the compiler's patterns expect; fp32 is right as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...graph.linear_format import LinearFormat
from ...graph.quant_ops import QUANTIZED_DTYPES
from ...graph.serialize import target_name
from ..emitter import UnsupportedError
from .builder import Builder, Emit, Spec, Value
from .ops_quantized_linear import quantized_linear

_PACKED = "camshaft.dequantize_packed.default"
_QUANTIZED_LINEAR = "camshaft.quantized_linear.default"
_TENSORRT_NAMES = {"int4": "INT4", "fp4": "FP4"}


def byte_type(node: fx.Node) -> str | None:
    """TensorRT's name for what the bytes of a placeholder are ("INT4", "FP4", "E8M0"), or None: what reads it says what it is."""
    found = {_byte_type(node, user) if user.op == "call_function" else None for user in node.users}
    return found.pop() if len(found) == 1 else None


def _byte_type(node: fx.Node, user: fx.Node) -> str | None:
    name = target_name(user.target)
    if name == _PACKED and user.args[0] is node:
        return _TENSORRT_NAMES.get(str(user.args[3]))
    if name == _QUANTIZED_LINEAR and node in user.args[1:3]:
        kind = LinearFormat.parse(str(user.args[7])).weights
        if user.args[1] is node:
            return {"int4": "INT4", "nvfp4": "FP4", "mxfp4": "FP4"}.get(kind)
        return "E8M0" if kind in ("mxfp4", "mxfp8") else None
    return None


def graph_input(b: Builder, node: fx.Node, name: str, spec: Spec) -> Value:
    """A network input for a placeholder; packed weights (uint8 [.., K / 2]) become a 4-bit tensor [.., K], the same bytes."""
    kind = byte_type(node)
    if kind is None or spec.dtype != torch.uint8:
        return b.input(name, spec.dtype, spec.shape)
    if not hasattr(b.trt.DataType, kind):
        raise UnsupportedError(f"the type {kind}, which {b.library.flavour} {b.library.version} does not have")
    shape = spec.shape if kind == "E8M0" else (*spec.shape[:-1], spec.shape[-1] * 2)
    return Value(spec.dtype, spec.shape, b.network.add_input(name, getattr(b.trt.DataType, kind), shape))


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
    _QUANTIZED_LINEAR: quantized_linear,
}
"""Operator names to the functions that emit them."""
