"""Kernels that end in fp8: dynamic quantization alone, behind add + RMSNorm, and behind gated activations.

A program owns a row and keeps it in registers: values, the largest of them, scale, cast. The numerics are those of the operators
that they join (`camshaft::add_rms_norm` or `camshaft::glu`, rounded to the compute dtype, then `camshaft::quantize_rows`).

Few rows of a gated activation leave most of the GPU idle while exponentials are computed, so they take two launches, which give
the same bits:

    gate     [T, parts] programs: activation(gate) * up of a part of a row -> [T, I], and its largest -> [T, parts]
    scale    [T, parts] programs: the largest of all parts, scale, cast

A row with a NaN gets a NaN for its scale and values, as by the definitions.

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
MAX_SPLIT_ROWS, PART = 64, 1024
"""Up to so many rows of a gated activation are cut into parts of so many values, wider ones."""
FP8 = torch.float8_e4m3fn
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
_FP8_MAX = tl.constexpr(448.0)
_TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _largest(values):
    # Of values that are not negative; NaN if one is NaN, which a maximum alone may drop
    num_nans = tl.sum((values != values).to(tl.int32), 0)
    return tl.where(num_nans > 0, float("nan"), tl.max(values, 0))


@triton.jit
def _store_scaled(values, largest, out, scale, row, column, keep, first, WIDTH: tl.constexpr):
    # Of a row, or of a part of it; the first one stores the scale
    step = tl.maximum(tl.div_rn(largest, _FP8_MAX), _TINY, propagate_nan=tl.PropagateNan.ALL)
    scaled = values * tl.div_rn(1.0, step)
    scaled = tl.maximum(scaled, -_FP8_MAX, propagate_nan=tl.PropagateNan.ALL)
    scaled = tl.minimum(scaled, _FP8_MAX, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + row * WIDTH + column, scaled.to(out.dtype.element_ty), mask=keep)
    tl.store(scale + row, step, mask=first)


@triton.jit
def _store_quantized(values, out, scale, row, column, keep, WIDTH: tl.constexpr):
    largest = _largest(tl.where(keep, tl.abs(values), 0.0))
    _store_scaled(values, largest, out, scale, row, column, keep, row >= 0, WIDTH)


@triton.jit
def _quantize_kernel(x, out, scale, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    keep = column < WIDTH
    values = tl.load(x + row * WIDTH + column, mask=keep, other=0.0).to(tl.float32)
    _store_quantized(values, out, scale, row, column, keep, WIDTH)


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
def _gated(y, row, column, keep, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr):
    # activation(gate) * up of some columns of a row, rounded to y's dtype twice, in fp32
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
        active = tl.maximum(gate, 0.0, propagate_nan=tl.PropagateNan.ALL)
    value = active.to(y.dtype.element_ty).to(tl.float32) * up
    return value.to(y.dtype.element_ty).to(tl.float32)


@triton.jit
def _glu_kernel(y, out, scale, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    keep = column < WIDTH
    value = _gated(y, row, column, keep, WIDTH, ACTIVATION)
    _store_quantized(value, out, scale, row, column, keep, WIDTH)


@triton.jit
def _glu_parts_kernel(
    y, values, largest, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, ACTIVATION: tl.constexpr
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = part * BLOCK + tl.arange(0, BLOCK)
    keep = column < WIDTH
    value = _gated(y, row, column, keep, WIDTH, ACTIVATION)
    tl.store(values + row * WIDTH + column, value.to(values.dtype.element_ty), mask=keep)
    tl.store(largest + row * PARTS + part, _largest(tl.where(keep, tl.abs(value), 0.0)))


@triton.jit
def _scale_parts_kernel(
    values, largest, out, scale, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
    PADDED_PARTS: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = part * BLOCK + tl.arange(0, BLOCK)
    keep = column < WIDTH
    value = tl.load(values + row * WIDTH + column, mask=keep, other=0.0).to(tl.float32)
    parts = tl.arange(0, PADDED_PARTS)
    top = _largest(tl.load(largest + row * PARTS + parts, mask=parts < PARTS, other=0.0))
    _store_scaled(value, top, out, scale, row, column, keep, part == 0, WIDTH)


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
    out, scale = _results(x, width, dtype)
    if x.numel():
        block = triton.next_power_of_2(width)
        with on_device(x):
            _norm_kernel[(x.numel() // width,)](
                x, residual, weight, total, out, scale, eps, offset, WIDTH=width, BLOCK=block, GAIN=weight is not None,
                CAST_FIRST=cast_first, num_warps=_warps(block),
            )  # fmt: skip
    return out, scale, total


def quantize_rows(x: Tensor, dtype: torch.dtype = FP8) -> tuple[Tensor, Tensor]:
    """x [.., K] (contiguous) -> (float8_e4m3fn [.., K], scales fp32 [.., 1]). dtype: as in `add_rms_norm_quantize`."""
    width = _width(x, x.shape[-1])
    out, scale = _results(x, width, dtype)
    if x.numel():
        block = triton.next_power_of_2(width)
        with on_device(x):
            _quantize_kernel[(x.numel() // width,)](x, out, scale, WIDTH=width, BLOCK=block, num_warps=_warps(block))
    return out, scale


def glu_quantize(y: Tensor, activation: str, dtype: torch.dtype = FP8) -> tuple[Tensor, Tensor]:
    """y [.., 2 I] (contiguous; the gate first) -> (float8_e4m3fn [.., I] of activation(gate) * up, scales fp32 [.., 1]).

    dtype: as in `add_rms_norm_quantize`.
    """
    width = _width(y, y.shape[-1] // 2)
    if activation not in ACTIVATIONS:
        raise ValueError(f"glu_quantize: activation {activation!r} is unknown, allowed: {', '.join(ACTIVATIONS)}")
    if y.numel() // (2 * width) <= MAX_SPLIT_ROWS and width > PART:
        return glu_quantize_parts(y, activation, dtype)
    return glu_quantize_whole(y, activation, dtype)


def glu_quantize_whole(y: Tensor, activation: str, dtype: torch.dtype = FP8) -> tuple[Tensor, Tensor]:
    """`glu_quantize` in one launch: a program owns a row."""
    width = y.shape[-1] // 2
    out, scale = _results(y, width, dtype)
    if out.numel():
        block = triton.next_power_of_2(width)
        with on_device(y):
            _glu_kernel[(out.numel() // width,)](
                y, out, scale, WIDTH=width, BLOCK=block, ACTIVATION=activation, num_warps=_warps(block)
            )  # fmt: skip
    return out, scale


def glu_quantize_parts(y: Tensor, activation: str, dtype: torch.dtype = FP8, part: int = PART) -> tuple[Tensor, Tensor]:
    """`glu_quantize` in two launches: a program owns `part` values of a row."""
    width = y.shape[-1] // 2
    out, scale = _results(y, width, dtype)
    if out.numel():
        rows, parts = out.numel() // width, triton.cdiv(width, part)
        values = torch.empty((rows, width), dtype=y.dtype, device=y.device)
        largest = torch.empty((rows, parts), dtype=torch.float32, device=y.device)
        with on_device(y):
            _glu_parts_kernel[(rows, parts)](
                y, values, largest, WIDTH=width, BLOCK=part, PARTS=parts, ACTIVATION=activation, num_warps=_warps(part)
            )  # fmt: skip
            _scale_parts_kernel[(rows, parts)](
                values, largest, out, scale, WIDTH=width, BLOCK=part, PARTS=parts,
                PADDED_PARTS=triton.next_power_of_2(parts), num_warps=_warps(part),
            )  # fmt: skip
    return out, scale


def _results(x: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return (
        torch.empty((*x.shape[:-1], width), dtype=dtype, device=x.device),
        torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device),
    )


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
