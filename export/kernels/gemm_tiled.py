"""Products of many rows on the tensor cores: y [T, N] = x [T, K] @ weight [N, K]^T, tiles fetched by the tensor memory accelerator.

    program p: tiles p, p + programs, ... in the order of `tile_order`: groups of GROUP rows of tiles, neighbours share weights
    tile [BLOCK_M, BLOCK_N]: the sum over K runs from 0 to K in steps of BLOCK_K, in one fp32 accumulator, never split

So a row's result depends on that row, the weight and the configuration: with the configuration fixed, not on T nor on other rows
(batch invariance; He et al. 2025, "Defeating Nondeterminism in LLM Inference"). fp8 and int8 operands carry scales, x_scale [T] and
weight_scale [N], applied to the sum, fp32 or int32.

Import this module only where Triton is installed. TRITON_INTERPRET=1 runs it on CPU tensors, slowly.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .gemm_skinny import on_device
from .tile_order import grouped_tile

ALIGNMENT_BYTES = 16
"""What addresses and row lengths of both operands must be multiples of."""


@dataclass(frozen=True, kw_only=True)
class TiledConfig:
    """How the work is cut. group: rows of tiles that share weights; persistent: as many programs as processors."""

    block_m: int
    block_n: int
    block_k: int
    warps: int = 8
    stages: int = 3
    group: int = 8
    persistent: bool = True


@triton.jit(do_not_specialize=["num_rows", "programs"])
def _tiled_kernel(
    x, weight, x_scale, weight_scale, bias, out, num_rows, N, K, programs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, SCALED: tl.constexpr,
    BIAS: tl.constexpr, INTEGER: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, programs, flatten=True):
        tile_m, tile_n = grouped_tile(tile, tiles_m, tiles_n, GROUP)
        m0, n0 = tile_m * BLOCK_M, tile_n * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32 if INTEGER else tl.float32)
        for step in range(tl.cdiv(K, BLOCK_K)):
            rows = x.load([m0, step * BLOCK_K])  # zeros beyond the tensor
            w = weight.load([n0, step * BLOCK_K])
            acc = tl.dot(rows, w.T, acc, out_dtype=acc.dtype)
        total = acc.to(tl.float32)
        m = m0 + tl.arange(0, BLOCK_M)
        n = n0 + tl.arange(0, BLOCK_N)
        keep_m, keep_n = m < num_rows, n < N
        if SCALED:
            row = tl.load(x_scale + m, mask=keep_m, other=0.0)
            total = total * row[:, None] * tl.load(weight_scale + n, mask=keep_n, other=0.0)[None, :]
        if BIAS:
            total += tl.load(bias + n, mask=keep_n, other=0.0).to(tl.float32)[None, :]
        at = out + m.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(at, total.to(out.dtype.element_ty), mask=keep_m[:, None] & keep_n[None, :])


def multiply_tiled(
    x: Tensor, weight: Tensor, x_scale: Tensor | None, weight_scale: Tensor | None, bias: Tensor | None,
    dtype: torch.dtype, config: TiledConfig,
) -> Tensor:  # fmt: skip
    """x [T, K], weight [N, K] of one dtype, contiguous, rows of a multiple of 16 bytes -> [T, N] in `dtype`.

    x_scale [T] or [T, 1] and weight_scale [N], fp32: both or none.
    """
    num_rows, k = x.shape
    n = weight.shape[0]
    out = torch.empty((num_rows, n), dtype=dtype, device=x.device)
    if num_rows == 0:
        return out
    tiles = triton.cdiv(num_rows, config.block_m) * triton.cdiv(n, config.block_n)
    programs = min(tiles, _num_processors(x.device)) if config.persistent else tiles
    with on_device(x):
        _tiled_kernel[(programs,)](
            TensorDescriptor.from_tensor(x, [config.block_m, config.block_k]),
            TensorDescriptor.from_tensor(weight, [config.block_n, config.block_k]),
            x_scale, weight_scale, bias, out, num_rows, n, k, programs,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP=config.group,
            SCALED=x_scale is not None, BIAS=bias is not None, INTEGER=x.dtype == torch.int8,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return out


@functools.cache
def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
