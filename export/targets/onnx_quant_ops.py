"""The table of operators for ONNX, quantized linear layers on ONNX Runtime's CPU kernels.

    weights           activations        as
    int4              none               MatMulNBits computing in float32
    int4              int8               MatMulNBits computing in int8: a scale for each block of a token, not one for all
    int4              int8_static        rounded activations as float32 -> MatMulNBits
    int8              none               DequantizeLinear -> FusedMatMul: weights stay int8, one layer at a time is float32
    int8, per row     int8, int8_static  MatMulInteger, exact sums
    int8, in groups   int8, int8_static  rounded activations as float32 -> DequantizeLinear -> FusedMatMul

What happens to weights alone is done by ONNX Runtime when a session is opened (constant folding). Other formats have no kernels.
Measured with ONNX Runtime 1.31: MatMulNBits with 8 bits in float32 is ten times slower than DequantizeLinear and a float32 product;
uint8 by int8 products saturate on processors without VNNI and int8 by int8 has no vector kernel there, so both sides are uint8.
"""

from __future__ import annotations

import torch

from ...graph.linear_format import LinearFormat
from ..emitter import UnsupportedError
from .onnx_graph import MICROSOFT, Builder, Emit, Value, static

_FLOAT32, _INT8 = 1, 4
"""Accuracy levels of MatMulNBits: what products are computed in."""
_BLOCKS = (256, 128, 64, 32, 16)
"""Groups along K that MatMulNBits has."""
_TINY = torch.finfo(torch.float32).tiny
_ROUNDED = ("int8", "int8_static")


def quantized_linear(
    b: Builder,
    out: Value,
    x: Value,
    weight: Value,
    scale: Value,
    zero_point: Value | None,
    global_scale: Value | None,
    bias: Value | None,
    x_scale: Value | None,
    format: str,
) -> str:
    """camshaft::quantized_linear."""
    parsed = LinearFormat.parse(format)
    if parsed.weights not in ("int4", "int8") or parsed.activations not in ("none", *_ROUNDED):
        raise UnsupportedError(
            f"quantized linear layers in {format} (allowed: int4 and int8 weights, int8 activations)"
        )
    if x.dtype != torch.float32 or len(x.shape) < 2:
        raise UnsupportedError(f"quantized linear layers of {x.dtype} {list(x.shape)}")
    blockwise = parsed.weights == "int4" and parsed.activations == "int8"
    values, outer = (x.name, None) if blockwise else _round_activations(b, x, x_scale, parsed)
    if parsed.weights == "int4":
        level = _INT8 if blockwise else _FLOAT32
        result = _packed_product(b, values, static(x.shape[-1], "a width"), weight, scale, zero_point, level)
    elif parsed.activations in _ROUNDED and not parsed.group and zero_point is None:
        result = b.op("Mul", b.op("Mul", _integer_product(b, values, weight), outer), scale)
        outer = None
    else:
        dense = _dequantize(b, weight, scale, zero_point)
        result = b.op("FusedMatMul", values, dense, domain=MICROSOFT, transB=1)
    if outer is not None:
        result = b.op("Mul", result, outer)
    return result if bias is None else b.op("Add", result, b.cast(bias, torch.float32))


# --------------------------------------------------------------------------------------------------------- activations
def _round_activations(b: Builder, x: Value, x_scale: Value | None, format: LinearFormat) -> tuple[str, str | None]:
    """(integers in float32, their scale [.., 1] or []), or x itself and None."""
    if format.activations == "none":
        return x.name, None
    if format.activations == "int8_static":
        if x_scale is None:
            raise UnsupportedError(f"{format} without the scale of its activations")
        scale = x_scale.name
    else:
        amax = b.op("ReduceMax", b.op("Abs", x), b.ints(-1), keepdims=1)
        scale = b.op("Max", b.op("Div", amax, b.constant(127.0, torch.float32)), b.constant(_TINY, torch.float32))
    low, high = (b.constant(limit, torch.float32) for limit in (-127.0, 127.0))
    return b.op("Clip", b.op("Round", b.op("Div", x, scale)), low, high), scale


# ------------------------------------------------------------------------------------------------------------- weights
def _integer_product(b: Builder, values: str, weight: Value) -> str:
    """Integers in float32 [.., K] times int8 [N, K] transposed: exact sums, in float32."""
    offset, zero = b.constant(128.0, torch.float32), b.constant(128, torch.uint8)
    left = b.op("Cast", b.op("Add", values, offset), to=b.element_type(torch.uint8))
    right = b.op("Transpose", _shifted(b, weight, 128, torch.uint8), perm=[1, 0])
    return b.op("Cast", b.op("MatMulInteger", left, right, zero, zero), to=b.element_type(torch.float32))


def _shifted(b: Builder, value: Value, by: int, dtype: torch.dtype) -> str:
    """Small integers plus `by`, in `dtype`."""
    wide = b.op("Add", b.cast(value, torch.int32), b.constant(by, torch.int32))
    return b.op("Cast", wide, to=b.element_type(dtype))


def _dequantize(b: Builder, weight: Value, scale: Value, zero_point: Value | None) -> str:
    """int8 [N, K] in float32."""
    zero = None if zero_point is None else _shifted(b, zero_point, -128, torch.int8)
    if len(scale.shape) == 1:
        return b.op("DequantizeLinear", weight, scale, zero, axis=0)
    columns, groups = static(weight.shape[1], "a width"), static(scale.shape[1], "a number of groups")
    return b.op("DequantizeLinear", weight, scale, zero, axis=1, block_size=columns // groups)


def _packed_product(
    b: Builder, values: str, width: int, weight: Value, scale: Value, zero_point: Value | None, level: int
) -> str:
    """float32 [.., K] times a packed int4 weight [N, K] transposed."""
    rows = static(weight.shape[0], "a number of outputs")
    groups = static(scale.shape[1], "a number of groups") if len(scale.shape) == 2 else 1
    block = next((size for size in _BLOCKS if (width // groups) % size == 0), None)
    if block is None:
        raise UnsupportedError(f"int4 weights with groups of {width // groups} (allowed: multiples of 16)")
    blocks = width // block
    packed = weight.name
    if zero_point is None:  # two's complement counts from 8 once the sign bit is turned over
        packed = b.op("BitwiseXor", packed, b.constant(0x88, torch.uint8))
    packed = b.op("Reshape", packed, b.ints(rows, blocks, block // 2))
    scales = _spread(b, scale.name, rows, groups, blocks)
    zeros = None
    if zero_point is not None:
        zeros = _pack_halves(b, _spread(b, zero_point.name, rows, groups, blocks), rows, blocks)
    sizes = {"K": width, "N": rows, "bits": 4, "block_size": block, "accuracy_level": level}
    return b.op("MatMulNBits", values, packed, scales, zeros, domain=MICROSOFT, **sizes)


def _spread(b: Builder, part: str, rows: int, groups: int, blocks: int) -> str:
    """[N] or [N, groups] as [N, blocks], every value as often as its group has blocks."""
    if groups == blocks:
        return b.op("Reshape", part, b.ints(rows, blocks))
    wide = b.op("Expand", b.op("Reshape", part, b.ints(rows, groups, 1)), b.ints(rows, groups, blocks // groups))
    return b.op("Reshape", wide, b.ints(rows, blocks))


def _pack_halves(b: Builder, codes: str, rows: int, blocks: int) -> str:
    """uint8 [N, blocks] of four bits each, two to a byte, the first in the low half."""
    if blocks % 2:
        codes = b.op("Concat", codes, b.op("Expand", b.constant([0], torch.uint8), b.ints(rows, 1)), axis=1)
    pairs = b.op("Reshape", codes, b.ints(rows, (blocks + 1) // 2, 2))
    low, high = b.multi("Split", 2, pairs, b.ints(1, 1), axis=2)
    both = b.op("BitwiseOr", low, b.op("BitShift", high, b.constant(4, torch.uint8), direction="LEFT"))
    return b.op("Reshape", both, b.ints(rows, (blocks + 1) // 2))


QUANT_OPERATORS: dict[str, Emit] = {"camshaft.quantized_linear.default": quantized_linear}
"""Operator names to the functions that write them."""
