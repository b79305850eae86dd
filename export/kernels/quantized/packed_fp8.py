"""int4 weights by fp8 rows on the fp8 tensor cores, many rows: y [T, N], scales for groups of 128 or more of K, or for rows.

A nibble u from 0 to 15 in a byte is the e4m3 number u * 2^-9 (subnormal up to 7, and so on without a gap), so the low and the high
halves of a byte are fp8 numbers after a mask and a shift. They belong to the even and the odd columns, in which x is stored
(`activations.quantize_planes`). Zero points, 8 for two's complement whose bit 3 is flipped, act on sums of x:

    y = x_scale * sum over groups g:  scale_g * (512 * sum over k of (u_k * 2^-9) x_k  -  zero_point_g * sum over k of x_k)

Import this module only where Triton is installed. TRITON_INTERPRET=1 runs it on CPU tensors (values in float32), slowly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..gemm_skinny import on_device
from ..tile_order import grouped_tile
from .stored import Stored
from .weight_tile import written_out

_SPLIT_BYTES = tl.constexpr("and.b32 $0, $2, 0x0F0F0F0F; shr.u32 $1, $2, 4; and.b32 $1, $1, 0x0F0F0F0F;")
_SPLIT_SIGNED = tl.constexpr(
    "xor.b32 $1, $2, 0x88888888; and.b32 $0, $1, 0x0F0F0F0F; shr.u32 $1, $1, 4; and.b32 $1, $1, 0x0F0F0F0F;"
)


@dataclass(frozen=True, kw_only=True)
class PackedFp8Config:
    """How the work is cut: rows of x and of the weight in a tile, warps, steps in flight, rows of tiles that share weights."""

    block_m: int = 128
    block_n: int = 128
    warps: int = 8
    stages: int = 4
    group: int = 8


@triton.jit
def _halves(w, SIGNED: tl.constexpr, ASM: tl.constexpr):
    # bytes -> (low, high halves): as fp8 numbers u * 2^-9, or as u in float32
    if ASM:
        return tl.inline_asm_elementwise(
            _SPLIT_SIGNED if SIGNED else _SPLIT_BYTES, "=&r,=&r,r", [w], dtype=(tl.float8e4nv, tl.float8e4nv),
            is_pure=True, pack=4,
        )  # fmt: skip
    else:
        u = w.to(tl.int32)
        if SIGNED:
            u = u ^ 0x88
        return (u & 15).to(tl.float32), (u >> 4).to(tl.float32)


@triton.jit(do_not_specialize=["num_rows"])
def _packed_fp8_kernel(
    x, weight, scale, zero_point, sums, x_scale, bias, out, num_rows, N, K,
    STEP: tl.constexpr, GROUPED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
    BIAS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile_m, tile_n = grouped_tile(tl.program_id(0), tiles_m, tiles_n, GROUP)
    m0, n0 = tile_m * BLOCK_M, tile_n * BLOCK_N
    m, n = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
    keep_m, keep_n = m < num_rows, n < N
    steps = K // STEP
    row_sums = sums + m.to(tl.int64) * steps
    groups = steps if GROUPED else 1
    at = n.to(tl.int64) * groups
    unit: tl.constexpr = 512.0 if ASM else 1.0
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for step in range(steps):
        w = weight.load([n0, step * (STEP // 2)])
        even = x.load([m0, step * (STEP // 2)])
        odd = x.load([m0, K // 2 + step * (STEP // 2)])
        low, high = _halves(w, zero_point is None, ASM)
        part = tl.dot(low, even.T)
        part = tl.dot(high, odd.T, part)
        group = step if GROUPED else 0
        if zero_point is None:
            zero = tl.full([BLOCK_N], 8.0, tl.float32)
        else:
            zero = tl.load(zero_point + at + group, mask=keep_n, other=0.0).to(tl.float32)
        total = tl.load(row_sums + step, mask=keep_m, other=0.0)
        part = part * unit - zero[:, None] * total[None, :]
        if GROUPED:
            part = part * tl.load(scale + at + group, mask=keep_n, other=0.0)[:, None]
        acc += part
    if not GROUPED:
        acc *= tl.load(scale + n, mask=keep_n, other=0.0)[:, None]
    acc *= tl.load(x_scale + m, mask=keep_m, other=0.0)[None, :]
    if BIAS:
        acc += tl.load(bias + n, mask=keep_n, other=0.0).to(tl.float32)[:, None]
    y = out + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y, tl.trans(acc).to(out.dtype.element_ty), mask=keep_m[:, None] & keep_n[None, :])


def step_of(weight: Stored) -> int | None:
    """Values of K in a step, whose sums of x the kernel needs; None where it does not take the weight."""
    step = weight.group or 128
    whole = weight.kind == "int4" and weight.columns % step == 0 and weight.columns % 32 == 0
    return step if whole and 64 <= step <= 256 else None


def multiply_packed_fp8(
    planes: Tensor,
    weight: Stored,
    sums: Tensor,
    x_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    config: PackedFp8Config,
) -> Tensor:
    """Rows from `quantize_planes` (planes [T, K], sums [T, K / step_of(weight)], x_scale [T]) by an int4 weight -> [T, N].

    Raises ValueError for a weight that the kernel does not take.
    """
    step = step_of(weight)
    if step is None:
        raise ValueError(
            f"a weight of {weight.kind} in groups of {weight.group} along {weight.columns}; allowed: int4, 64 to 256"
        )
    num_rows, k = planes.shape
    n = weight.rows
    out = torch.empty((num_rows, n), dtype=dtype, device=planes.device)
    if out.numel():
        tiles = triton.cdiv(num_rows, config.block_m) * triton.cdiv(n, config.block_n)
        with on_device(planes):
            _packed_fp8_kernel[(tiles,)](
                TensorDescriptor.from_tensor(planes, [config.block_m, step // 2]),
                TensorDescriptor.from_tensor(weight.words.view(torch.uint8), [config.block_n, step // 2]),
                weight.scale, weight.zero_point, sums, x_scale, bias, out, num_rows, n, k, STEP=step,
                GROUPED=weight.group > 0, BLOCK_M=config.block_m, BLOCK_N=config.block_n, GROUP=config.group,
                BIAS=bias is not None, ASM=written_out(planes.device), num_warps=config.warps, num_stages=config.stages,
            )  # fmt: skip
    return out
