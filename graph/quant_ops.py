"""Semantic operators of quantized graphs: tensors to integers or small floats and back.

Scales say by their shape what they belong to:

    []               one for the tensor
    [n]              one for each index of dimension `axis`, which has n
    x's rank         one for each block; block sizes are x.shape[i] / scale.shape[i], so [N, K / 64] are groups of 64 along K

Formats: int8 (round half to even, -128 to 127), float8_e4m3fn (up to 448), and two values to a byte, the first in the low half:
"int4" (-8 to 7) and "fp4" (e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .registry import define
from .small_floats import quotient

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the low three bits of an e2m1 number mean; the fourth is the sign."""

PACKED_FORMATS = ("int4", "fp4")
QUANTIZED_DTYPES = (torch.int8, torch.float8_e4m3fn)


def spread_scale(scale: Tensor, shape: tuple[int, ...], axis: int) -> Tensor:
    """A scale in fp32, of a shape that broadcasts over a tensor of `shape`. Raises ValueError if it does not fit."""
    wide = scale.float()
    if scale.dim() == 0:
        return wide
    if scale.dim() == 1 and (len(shape) > 1 or scale.shape[0] == shape[0]):
        if scale.shape[0] != shape[axis]:
            raise ValueError(f"{scale.shape[0]} scales for dimension {axis} of {list(shape)}, allowed: {shape[axis]}")
        view = [1] * len(shape)
        view[axis] = scale.shape[0]
        return wide.view(view)
    if scale.dim() != len(shape) or any(size % parts for size, parts in zip(shape, scale.shape)):
        raise ValueError(f"block scales {list(scale.shape)} do not divide a tensor {list(shape)}")
    for dim, (size, parts) in enumerate(zip(shape, scale.shape)):
        wide = wide.repeat_interleave(size // parts, dim)
    return wide


def unpack(packed: Tensor, format: str) -> Tensor:
    """uint8 [.., K / 2] to the fp32 values [.., K] of its halves."""
    if format not in PACKED_FORMATS:
        raise ValueError(f"packed format {format!r} is unknown, allowed: {', '.join(PACKED_FORMATS)}")
    halves = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).long()
    if format == "int4":
        return torch.where(halves > 7, halves - 16, halves).float()
    table = torch.tensor((*FP4_VALUES, *(-value for value in FP4_VALUES)), device=packed.device)
    return table[halves]


def _quantize(x: Tensor, scale: Tensor, axis: int, dtype: torch.dtype) -> Tensor:
    if dtype not in QUANTIZED_DTYPES:
        raise ValueError(f"cannot quantize to {dtype}, allowed: {', '.join(map(str, QUANTIZED_DTYPES))}")
    scaled = x.float() / spread_scale(scale, tuple(x.shape), axis)
    if dtype == torch.int8:
        return scaled.round().clamp(-128, 127).to(dtype)
    return scaled.clamp(-448.0, 448.0).to(dtype)


# x (float, any shape) -> the same shape in `dtype` (int8 or float8_e4m3fn): x / scale, rounded to nearest even, saturated.
define(
    "quantize(Tensor x, Tensor scale, int axis, ScalarType dtype) -> Tensor",
    _quantize,
    lambda x, scale, axis, dtype: torch.empty(x.shape, dtype=dtype, device=x.device),
)


def _dequantize(x: Tensor, scale: Tensor, axis: int, dtype: torch.dtype) -> Tensor:
    return (x.float() * spread_scale(scale, tuple(x.shape), axis)).to(dtype)


# x (int8 or float8_e4m3fn) -> the same shape in `dtype`: x * scale in fp32, rounded once.
define(
    "dequantize(Tensor x, Tensor scale, int axis, ScalarType dtype) -> Tensor",
    _dequantize,
    lambda x, scale, axis, dtype: torch.empty(x.shape, dtype=dtype, device=x.device),
)


def _dequantize_packed(
    packed: Tensor, scale: Tensor, global_scale: Tensor | None, format: str, dtype: torch.dtype
) -> Tensor:
    values = unpack(packed, format)
    blocks = spread_scale(scale, tuple(values.shape), 0)
    if global_scale is not None:
        blocks = blocks * global_scale.float()
    return (values * blocks).to(dtype)


# Weights of two values to a byte: uint8 [N, K / 2] -> [N, K] in `dtype`. scale [N, K / group], in `dtype` or, beside a
# global_scale [] that multiplies them all, float8_e4m3fn (NVFP4: format "fp4", groups of 16).
define(
    "dequantize_packed(Tensor packed, Tensor scale, Tensor? global_scale, str format, ScalarType dtype) -> Tensor",
    _dequantize_packed,
    lambda packed, scale, global_scale, format, dtype: torch.empty(
        (*packed.shape[:-1], packed.shape[-1] * 2), dtype=dtype, device=packed.device
    ),
)

FP8_MAX = 448.0
"""Largest finite float8_e4m3fn."""


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """The definition of camshaft::quantize_rows: x [.., K] -> (float8_e4m3fn [.., K], float32 scales [.., 1])."""
    wide = x.float()
    scale = quotient(wide.abs().amax(-1, keepdim=True), FP8_MAX).clamp(min=torch.finfo(torch.float32).tiny)
    return (wide * (1.0 / scale)).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale


def saturate(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`; what float8_e4m3fn cannot hold becomes its largest value, not NaN. int8: rounded to -127 to 127."""
    if dtype == torch.int8:
        return x.float().round().clamp(-127, 127).to(dtype)
    return (x.clamp(-FP8_MAX, FP8_MAX) if dtype == torch.float8_e4m3fn else x).to(dtype)


def quantized_rows_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    """What quantize_rows returns, without values."""
    return (
        torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device),
        torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device),
    )


# Dynamic scales, one for each row: x [.., K] -> (float8_e4m3fn [.., K], fp32 scales [.., 1] = max |row| / 448).
define(
    "quantize_rows(Tensor x) -> (Tensor, Tensor)",
    quantize_rows,
    quantized_rows_fake,
)


def _scaled_linear(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    product = torch.matmul(x.float(), weight.float().t()) * x_scale * weight_scale
    return (product if bias is None else product + bias.float()).to(dtype)


# Linear layer on float8_e4m3fn operands: x [.., K] with scales [.., 1], weight [N, K] with scales [N], bias [N] or None;
# products summed in fp32, scaled, rounded once. Returns [.., N] in `dtype`.
define(
    "scaled_linear(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, ScalarType dtype) -> Tensor",
    _scaled_linear,
    lambda x, x_scale, weight, weight_scale, bias, dtype: torch.empty(
        (*x.shape[:-1], weight.shape[0]), dtype=dtype, device=x.device
    ),
)

QUANT_DEFINITIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.camshaft.quantize.default: _quantize,
    torch.ops.camshaft.dequantize.default: _dequantize,
    torch.ops.camshaft.dequantize_packed.default: _dequantize_packed,
    torch.ops.camshaft.quantize_rows.default: quantize_rows,
    torch.ops.camshaft.scaled_linear.default: _scaled_linear,
}
"""Operators to the functions that define them."""
