"""One row times a large fp8 matrix: y [N] = x [K] @ weight [N, K]^T * weight_scale [N], x in 16 or 32 bits. Bound by reading it.

    program    BLOCK_N rows of the weight; K in steps of BLOCK_K
    thread     GROUP values side by side of each of its rows: 16 bytes, multiplied in fp32, summed, and added to one accumulator

The rows kernel of `gemm_skinny` has an accumulator for every value of a step, so registers limit how many bytes a thread can ask
for at once. Here they hold mostly weights in flight. x is not rounded: it has no scale, and any range that fp32 has.

Several rows are that many products of one row, each with the bits that it has alone; every row reads the whole matrix.

Import this module only where Triton is installed. TRITON_INTERPRET=1 runs it on CPU tensors, slowly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gemm_skinny import on_device

GROUP = 16
"""Weights that a thread loads at once; K must be a multiple of it."""


@dataclass(frozen=True, kw_only=True)
class OneRowConfig:
    """How the work is cut: weight rows of a program, values of a row per step, warps, steps in flight."""

    block_n: int
    block_k: int
    warps: int = 4
    stages: int = 1


@triton.jit
def _one_row_kernel(
    x, weight, weight_scale, bias, out, N,
    K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(N, BLOCK_N)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_n = tl.minimum(n, N - 1).to(tl.int64)
    at = weight + offs_n[:, None] * K
    acc = tl.zeros([BLOCK_N, BLOCK_K // GROUP], tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        if K % BLOCK_K == 0:
            w = tl.load(at + k[None, :], eviction_policy="evict_first")
            values = tl.load(x + row * K + k)
        else:
            w = tl.load(at + k[None, :], mask=k[None, :] < K, other=0.0, eviction_policy="evict_first")
            values = tl.load(x + row * K + k, mask=k < K, other=0.0)
        products = w.to(tl.float32) * values.to(tl.float32)[None, :]
        acc += tl.sum(tl.reshape(products, [BLOCK_N, BLOCK_K // GROUP, GROUP]), 2)
    keep = n < N
    total = tl.sum(acc, 1) * tl.load(weight_scale + n, mask=keep, other=0.0)
    if BIAS:
        total += tl.load(bias + n, mask=keep, other=0.0).to(tl.float32)
    tl.store(out + row * N + n, total.to(out.dtype.element_ty), mask=keep)


def multiply_one_row(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype, config: OneRowConfig
) -> Tensor:
    """x [T, K] (bf16, fp16 or fp32), weight [N, K] fp8 with scales [N] fp32, contiguous -> [T, N] in `dtype`.

    Raises ValueError where K is no multiple of 16.
    """
    num_rows, k = x.shape
    n = weight.shape[0]
    if k % GROUP:
        raise ValueError(f"weight {list(weight.shape)}: rows of {k} values, allowed: a multiple of {GROUP}; pad them")
    out = torch.empty((num_rows, n), dtype=dtype, device=x.device)
    block_k = min(config.block_k, triton.next_power_of_2(k))
    if out.numel():
        with on_device(x):
            _one_row_kernel[(num_rows * triton.cdiv(n, config.block_n),)](
                x, weight, weight_scale, bias, out, n, K=k, BLOCK_N=config.block_n, BLOCK_K=block_k, GROUP=GROUP,
                STAGES=config.stages, BIAS=bias is not None, num_warps=config.warps,
            )  # fmt: skip
    return out
