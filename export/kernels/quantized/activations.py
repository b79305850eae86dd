"""Rows of x rounded as a format says of activations, one program for each row.

    fp8, int8                a scale for each token: out values, scale [T]
    fp8_static, int8_static  the same with a given scale, which is also stored for each token
    fp8_block                a scale for each 128 values: out values, scales [T, ceil(K / 128)]
    nvfp4, nvfp4_search,     out values times their blocks' scales, which 16 bits hold exactly; nvfp4 with a scale for each token
    mxfp4, mxfp8

Values are numbers of 8 bits or fewer; they are stored in 8 bits, or in the dtype of x where the next kernel multiplies 16 bits.
The numerics are those of `graph.quantized_linear.quantize_activations`, to the last bit. A row with a NaN gets NaN for its scale.

For fp8 by int4, `quantize_planes` stores even columns before odd ones, and sums of groups (`packed_fp8`).

Import this module only where Triton is installed. TRITON_INTERPRET=1 runs it on CPU tensors, slowly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gemm_skinny import on_device
from ..row_quantize import MAX_WIDTH

BLOCKS = {"fp8_block": 128, "nvfp4": 16, "nvfp4_search": 16, "mxfp4": 32, "mxfp8": 32}
"""Kinds of activations whose scales belong to so many values."""
_TINY = tl.constexpr(1.1754943508222875e-38)
_FP8_MAX = tl.constexpr(448.0)
_INT8_MAX = tl.constexpr(127.0)
_FP4_MAX = tl.constexpr(6.0)
_SEARCH_MAX = tl.constexpr(280.0)
_ROUND = tl.constexpr(12582912.0)
"""1.5 * 2^23: added and subtracted, it rounds what is below 2^22 to the nearest integer, ties to even."""


@dataclass(frozen=True)
class Rounded:
    """Rows as the products take them: values [T, K]; scale [T] and group_scale [T, ceil(K / 128)] float32, or None."""

    values: Tensor
    scale: Tensor | None = None
    group_scale: Tensor | None = None

    def scaled(self, dtype: torch.dtype) -> Tensor:
        """Values times their scales [T, K], rounded to `dtype`."""
        values = self.values
        if self.group_scale is not None:
            spread = self.group_scale.repeat_interleave(BLOCKS["fp8_block"], 1)[:, : values.shape[1]]
            values = (values * spread).to(dtype)
        if self.scale is not None:
            values = (values * self.scale[:, None]).to(dtype)
        return values


@triton.jit
def _clamp(x, limit):
    x = tl.maximum(x, -limit, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _nearest(x):
    return (x + _ROUND) - _ROUND


@triton.jit
def _largest(values):
    num_nans = tl.sum((values != values).to(tl.int32), 0)
    return tl.where(num_nans > 0, float("nan"), tl.max(tl.abs(values), 0))


@triton.jit
def _scaled_row(values, given, INTEGER: tl.constexpr):
    # float32 values of a row -> (rounded values, in float32 if integers, else float8e4nv; scale)
    largest = _largest(values)
    if given is None:
        step = tl.maximum(
            tl.div_rn(largest, _INT8_MAX if INTEGER else _FP8_MAX), _TINY, propagate_nan=tl.PropagateNan.ALL
        )
    else:
        step = tl.where(largest != largest, largest, tl.load(given))
    if INTEGER:
        return _nearest(_clamp(tl.div_rn(values, step), _INT8_MAX)), step
    elif given is None:
        return _clamp(values * tl.div_rn(1.0, step), _FP8_MAX).to(tl.float8e4nv), step
    else:
        return _clamp(tl.div_rn(values, step), _FP8_MAX).to(tl.float8e4nv), step


@triton.jit
def _row_kernel(x, out, scale, given, K: tl.constexpr, BLOCK: tl.constexpr, INTEGER: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    keep = column < K
    values = tl.load(x + row * K + column, mask=keep, other=0.0).to(tl.float32)
    rounded, step = _scaled_row(values, given, INTEGER)
    tl.store(out + row * K + column, rounded.to(out.dtype.element_ty), mask=keep)
    tl.store(scale + row, step)


@triton.jit
def _planes_kernel(
    x, out, scale, sums, given, K: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    keep = column < K
    values = tl.load(x + row * K + column, mask=keep, other=0.0).to(tl.float32)
    rounded, step = _scaled_row(values, given, False)
    plane = out + row * K + column % 2 * (K // 2) + column // 2
    tl.store(plane, rounded.to(out.dtype.element_ty), mask=keep)
    tl.store(scale + row, step)
    group = tl.arange(0, BLOCK // GROUP)
    total = tl.sum(tl.reshape(rounded.to(tl.float32), [BLOCK // GROUP, GROUP]), 1)
    tl.store(sums + row * GROUPS + group, total, mask=group < GROUPS)


@triton.jit
def _fp4(x):
    # to the next e2m1 number, ties to even, in float32
    size = tl.abs(x)
    step = tl.where(size < 2.0, 0.5, tl.where(size < 4.0, 1.0, 2.0))
    per_step = tl.where(size < 2.0, 2.0, tl.where(size < 4.0, 1.0, 0.5))
    rounded = tl.minimum(_nearest(size * per_step) * step, _FP4_MAX, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(x < 0.0, -rounded, rounded)


@triton.jit
def _fp4_scale(largest):
    # the e4m3 number that maps `largest` to 6
    return tl.minimum(tl.div_rn(largest, _FP4_MAX), _FP8_MAX).to(tl.float8e4nv).to(tl.float32)


@triton.jit
def _fp4_blocks(values, step):
    # blocks [B, SIZE] rounded with their steps [B], times these
    return _fp4(tl.div_rn(values, tl.maximum(step, _TINY, propagate_nan=tl.PropagateNan.ALL)[:, None])) * step[:, None]


@triton.jit
def _try_scale(values, largest, per_step, best, least, factor):
    # what loses less: `best` with the errors `least`, or the blocks with another scale
    rounded = _fp4_blocks(values, _fp4_scale(largest * factor))
    count = (tl.abs(rounded - values) * per_step).to(tl.int32)
    error = tl.sum(count * count, 1)
    better = error < least
    return tl.where(better[:, None], rounded, best), tl.where(better, error, least)


@triton.jit
def _searched_blocks(values, largest):
    # `graph.quantized_linear.SEARCH_FACTORS`
    per_step = tl.div_rn(1024.0, tl.maximum(largest, 1e-6))[:, None]
    best = values
    least = tl.full(largest.shape, 0x7FFFFFFF, tl.int32)
    best, least = _try_scale(values, largest, per_step, best, least, 1.0)
    best, least = _try_scale(values, largest, per_step, best, least, 1.5)
    best, least = _try_scale(values, largest, per_step, best, least, 0.95)
    best, least = _try_scale(values, largest, per_step, best, least, 1.05)
    best, least = _try_scale(values, largest, per_step, best, least, 0.9)
    best, least = _try_scale(values, largest, per_step, best, least, 1.4)
    best, least = _try_scale(values, largest, per_step, best, least, 1.6)
    return best


@triton.jit
def _power(exponent, finite):
    # 2^(exponent - 127) of exponents from 0 to 254; NaN where not finite
    bits = tl.where(exponent == 0, 0x00400000, exponent << 23)
    return tl.where(finite, bits, 0x7FC00000).to(tl.float32, bitcast=True)


@triton.jit
def _block_kernel(x, out, scale, given, K: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr, KIND: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCK // SIZE)
    column = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    keep = column < K
    values = tl.load(x + row * K + column, mask=keep, other=0.0).to(tl.float32)
    if KIND == "nvfp4" or KIND == "nvfp4_search":
        if given is None:
            most = _FP4_MAX * (_FP8_MAX if KIND == "nvfp4" else _SEARCH_MAX)
            overall = tl.div_rn(tl.max(tl.max(tl.abs(values), 1), 0), most)
            overall = tl.maximum(overall, _TINY, propagate_nan=tl.PropagateNan.ALL)
        else:
            overall = tl.load(given)
        values = tl.div_rn(values, overall)
        tl.store(scale + row, overall)
    largest = tl.max(tl.abs(values), 1)
    finite = largest < float("inf")
    if KIND == "nvfp4" or KIND == "nvfp4_search":
        step = _fp4_scale(largest)
    elif KIND == "mxfp4":
        bits = largest.to(tl.int32, bitcast=True)
        step = _power(tl.minimum(tl.maximum((bits >> 23) - 2, 0), 254), finite)
    elif KIND == "mxfp8":
        bits = tl.div_rn(largest, _FP8_MAX).to(tl.int32, bitcast=True)
        exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
        step = _power(tl.minimum(exponent, 254), finite)
    else:
        step = tl.div_rn(largest, _FP8_MAX)
        tl.store(scale + row * tl.cdiv(K, SIZE) + block, step, mask=block * SIZE < K)
    if KIND == "nvfp4_search":
        rounded = _searched_blocks(values, largest)
    elif KIND == "nvfp4" or KIND == "mxfp4":
        rounded = _fp4_blocks(values, step)
    else:
        scaled = tl.div_rn(values, tl.maximum(step, _TINY, propagate_nan=tl.PropagateNan.ALL)[:, None])
        rounded = _clamp(scaled, _FP8_MAX).to(tl.float8e4nv).to(tl.float32)
        if KIND == "mxfp8":
            rounded = rounded * step[:, None]
    tl.store(out + row * K + column, rounded.to(out.dtype.element_ty), mask=keep)


def round_rows(x: Tensor, kind: str, given: Tensor | None, dtype: torch.dtype) -> Rounded:
    """x [T, K] (contiguous) rounded to activations of `kind`, values stored in `dtype`.

    given: x_scale [] float32 of the static kinds, and of nvfp4 (with search or without) if it is not to be found for each token.
    dtype: what holds the values, x's, that of 8 bits, or float32; nvfp4, mxfp4 and mxfp8 need 16. Raises ValueError for rows wider
    than 32,768 and static kinds without a scale.
    """
    num_rows, k = x.shape
    _check(x, kind, given)
    if kind == "none":
        return Rounded(x)
    out = torch.empty((num_rows, k), dtype=dtype, device=x.device)
    size = BLOCKS.get(kind)
    block = triton.next_power_of_2(max(k, size or 1))
    shape = (num_rows, triton.cdiv(k, size)) if kind == "fp8_block" and size else (num_rows,)
    scale = torch.empty(shape, dtype=torch.float32, device=x.device)
    if num_rows:
        with on_device(x):
            if size is None:
                given = given if kind.endswith("_static") else None
                _row_kernel[(num_rows,)](
                    x, out, scale, given, K=k, BLOCK=block, INTEGER=kind.startswith("int8"), num_warps=_warps(block)
                )  # fmt: skip
            else:
                given = given if kind in ("nvfp4", "nvfp4_search") else None
                _block_kernel[(num_rows,)](
                    x, out, scale, given, K=k, BLOCK=block, SIZE=size, KIND=kind, num_warps=_warps(block)
                )
    if kind == "fp8_block":
        return Rounded(out, group_scale=scale)
    return Rounded(out, None if kind in ("mxfp4", "mxfp8") else scale)


def quantize_planes(
    x: Tensor, given: Tensor | None, group: int, dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, K] (contiguous) -> (fp8 [T, K]: even columns, then odd ones; scales [T]; sums of groups of values [T, K / group]).

    given: a static scale []. group: a power of two that divides K. dtype: of the values, for tests.
    """
    num_rows, k = x.shape
    _check(x, "fp8" if given is None else "fp8_static", given)
    out = torch.empty((num_rows, k), dtype=dtype, device=x.device)
    scale = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    sums = torch.empty((num_rows, k // group), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(k)
    if num_rows:
        with on_device(x):
            _planes_kernel[(num_rows,)](
                x, out, scale, sums, given, K=k, BLOCK=block, GROUP=group, GROUPS=k // group, num_warps=_warps(block)
            )
    return out, scale, sums


def _check(x: Tensor, kind: str, given: Tensor | None) -> None:
    if not x.is_contiguous() or x.shape[1] > MAX_WIDTH:
        raise ValueError(
            f"rows of {x.shape[1]} values with strides {x.stride()}, allowed: contiguous rows of at most {MAX_WIDTH}"
        )
    if kind.endswith("_static") and given is None:
        raise ValueError(f"activations in {kind} need x_scale, the scale that calibration finds")


def _warps(block: int) -> int:
    return max(1, min(16, block // 256))
