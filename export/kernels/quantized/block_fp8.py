"""fp8 by fp8 with scales of blocks, many rows: y [T, N] = sum over blocks b of 128 of K: x_b @ weight_b^T * x_scale * scale.

    x       float8_e4m3fn [T, K], scales float32 [T, ceil(K / 128)]
    weight  float8_e4m3fn [N, K], scales float32 [ceil(N / 128), ceil(K / 128)]

A program owns a tile [BLOCK_M, BLOCK_N]; BLOCK_N divides 128, so a step of K has one scale of the weight. The sum of a block is
scaled and added in float32, which also bounds what tensor cores lose in long fp8 sums (DeepSeek-AI 2024, "DeepSeek-V3 Technical
Report", section 3.3.2).

Import this module only where Triton is installed. TRITON_INTERPRET=1 runs it on CPU tensors, slowly.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..gemm_skinny import on_device
from ..gemm_tiled import ALIGNMENT_BYTES, TiledConfig
from ..tile_order import grouped_tile

BLOCK = 128
"""Values along K, and rows of the weight, that share a scale; the step of K."""
_BLOCK = tl.constexpr(BLOCK)


@triton.jit(do_not_specialize=["num_rows"])
def _block_fp8_kernel(
    x, weight, x_scale, scale, bias, out, num_rows, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile_m, tile_n = grouped_tile(tl.program_id(0), tiles_m, tiles_n, GROUP)
    m0, n0 = tile_m * BLOCK_M, tile_n * BLOCK_N
    m, n = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
    keep_m, keep_n = m < num_rows, n < N
    steps = tl.cdiv(K, _BLOCK)
    row_scales = x_scale + m.to(tl.int64) * steps
    block_scales = scale + n0 // _BLOCK * steps
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(steps):
        rows = x.load([m0, step * _BLOCK])  # zeros beyond the tensor
        w = weight.load([n0, step * _BLOCK])
        factor = tl.load(row_scales + step, mask=keep_m, other=0.0) * tl.load(block_scales + step)
        acc += tl.dot(rows, w.T) * factor[:, None]
    if BIAS:
        acc += tl.load(bias + n, mask=keep_n, other=0.0).to(tl.float32)[None, :]
    at = out + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=keep_m[:, None] & keep_n[None, :])


def multiply_block_fp8(
    x: Tensor, weight: Tensor, x_scale: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype, config: TiledConfig
) -> Tensor:  # fmt: skip
    """x [T, K] by weight [N, K], both fp8 and contiguous, with scales as in the module's text -> [T, N] in `dtype`.

    Raises ValueError for rows whose bytes are no multiple of 16, and for tiles wider than a block.
    """
    num_rows, k = x.shape
    n = weight.shape[0]
    if k * x.element_size() % ALIGNMENT_BYTES or BLOCK % config.block_n:
        raise ValueError(
            f"rows of {k} fp8 values in tiles of {config.block_n} columns, allowed: a multiple of {ALIGNMENT_BYTES} values, and "
            f"tiles that divide {BLOCK}"
        )
    out = torch.empty((num_rows, n), dtype=dtype, device=x.device)
    if out.numel():
        tiles = triton.cdiv(num_rows, config.block_m) * triton.cdiv(n, config.block_n)
        with on_device(x):
            _block_fp8_kernel[(tiles,)](
                TensorDescriptor.from_tensor(x, [config.block_m, BLOCK]),
                TensorDescriptor.from_tensor(weight, [config.block_n, BLOCK]),
                x_scale, scale, bias, out, num_rows, n, k, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
                GROUP=config.group, BIAS=bias is not None, num_warps=config.warps, num_stages=config.stages,
            )  # fmt: skip
    return out
