"""Kernels that end in fp8: add + RMSNorm and gated activations, each with its dynamic quantization, in one pass over a row.

A program owns a row and keeps it in registers: values, the largest of them, scale, cast. The numerics are those of the operators
that they join (`camshaft::add_rms_norm` or `camshaft::glu`, rounded to the compute dtype, then `camshaft::quantize_rows`).

Import this module only where Triton is installed. TRITON_INTERPRET=1 runs it on CPU tensors, slowly.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gemm_skinny import on_device

MAX_WIDTH = 32768
"""Widest row that a program holds."""
FP8 = torch.float8_e4m3fn
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
_FP8_MAX = tl.constexpr(448.0)
_TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _store_quantized(values, out, scale, row, column, keep, WIDTH: tl.constexpr):
    largest = tl.max(tl.where(keep, tl.abs(values), 0.0), 0)
    step = tl.maximum(tl.div_rn(largest, _FP8_MAX), _TINY)
    scaled = values * tl.div_rn(1.0, step)
    scaled = tl.minimum(tl.maximum(scaled, -_FP8_MAX), _FP8_MAX)
    tl.store(out + row * WIDTH + column, scaled.to(out.dtype.element_ty), mask=keep)
    tl.store(scale + row, step)


@triton.jit
def _norm_kernel(
    x, residual, weight, total, out, scale, eps, offset,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, GAIN: tl.constexpr, CAST_FIRST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    keep = column < WIDTH
    added = tl.load(x + row * WIDTH + column, mask=keep, other=0.0).to(tl.float32)
    added += tl.load(residual + row * WIDTH + column, mask=keep, other=0.0).to(tl.float32)
    rounded = added.to(total.dtype.element_ty)
    tl.store(total + row * WIDTH + column, rounded, mask=keep)
    wide = rounded.to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, 0) / WIDTH + eps)
    if GAIN:
        gain = tl.load(weight + column, mask=keep, other=0.0).to(tl.float32)
        if CAST_FIRST:
            normed = normed.to(total.dtype.element_ty).to(tl.float32) * gain
        else:
            normed = normed * (gain + offset)
    normed = normed.to(total.dtype.element_ty).to(tl.float32)
    _store_quantized(normed, out, scale, row, column, keep, WIDTH)


@triton.jit
def _glu_kernel(y, out, scale, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    keep = column < WIDTH
    gate = tl.load(y + row * 2 * WIDTH + column, mask=keep, other=0.0).to(tl.float32)
    up = tl.load(y + row * 2 * WIDTH + WIDTH + column, mask=keep, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        active = gate * tl.sigmoid(gate)
    elif ACTIVATION == "gelu":
        active = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        active = gate * tl.sigmoid(2.0 * inner)
    else:
        active = tl.maximum(gate, 0.0)
    value = active.to(y.dtype.element_ty).to(tl.float32) * up
    value = value.to(y.dtype.element_ty).to(tl.float32)
    _store_quantized(value, out, scale, row, column, keep, WIDTH)


def add_rms_norm_quantize(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float,
    cast_first: bool,
    dtype: torch.dtype = FP8,
) -> tuple[Tensor, Tensor, Tensor]:
    """x, residual [.., H] (contiguous), weight [H] or None -> (float8_e4m3fn [.., H], scales fp32 [.., 1], x + residual).

    dtype: of the first result; another one than float8_e4m3fn leaves the scaled values unrounded, for tests.
    """
    width = _width(x, x.shape[-1])
    total = torch.empty_like(x)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    if x.numel():
        block = triton.next_power_of_2(width)
        with on_device(x):
            _norm_kernel[(x.numel() // width,)](
                x, residual, weight, total, out, scale, eps, offset, WIDTH=width, BLOCK=block, GAIN=weight is not None,
                CAST_FIRST=cast_first,                num_warps=_warps(block),
            )  # fmt: skip
    return out, scale, total


def glu_quantize(y: Tensor, activation: str, dtype: torch.dtype = FP8) -> tuple[Tensor, Tensor]:
    """y [.., 2 I] (contiguous; the gate first) -> (float8_e4m3fn [.., I] of activation(gate) * up, scales fp32 [.., 1]).

    dtype: as in `add_rms_norm_quantize`.
    """
    width = _width(y, y.shape[-1] // 2)
    if activation not in ACTIVATIONS:
        raise ValueError(f"glu_quantize: activation {activation!r} is unknown, allowed: {', '.join(ACTIVATIONS)}")
    out = torch.empty((*y.shape[:-1], width), dtype=dtype, device=y.device)
    scale = torch.empty((*y.shape[:-1], 1), dtype=torch.float32, device=y.device)
    if y.numel():
        block = triton.next_power_of_2(width)
        with on_device(y):
            _glu_kernel[(out.numel() // width,)](
                y, out, scale, WIDTH=width, BLOCK=block, ACTIVATION=activation, num_warps=_warps(block)
            )  # fmt: skip
    return out, scale


def _width(tensor: Tensor, width: int) -> int:
    if not tensor.is_contiguous() or width > MAX_WIDTH:
        raise ValueError(
            f"rows of {width} values in a tensor of strides {tensor.stride()}, allowed: contiguous rows of at most "
            f"{MAX_WIDTH}; leave the quantization to quantize_rows"
        )
    return width


def _warps(block: int) -> int:
    """16 bytes a thread and load, as far as 16 warps go."""
    return max(1, min(16, block // 256))
