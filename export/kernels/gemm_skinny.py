"""Products of few rows with a large matrix, bound by reading it: y [T, N] = x [T, K] @ weight [N, K]^T, T from 1 to 64.

Two kernels. Both read every weight once and sum in an order that the configuration fixes, so equal inputs give equal bits.

    rows    T <= 4     a program owns BLOCK_N rows of the weight; products in fp32 on the plain units
    tile    T <= 64    a program owns a tile [BLOCK_N, span of K]; products on tensor cores. The weight is the left operand
                       (its BLOCK_N rows fill the instruction) and x, padded to BLOCK_M rows, the right one.

    K split in SPLITS      tile n:  | split 0 | split 1 | split 2 |    partial sums -> workspace [SPLITS, T, N] fp32;
                                                                       who arrives last adds them, in order of the splits

fp8 operands carry scales, x_scale [T] and weight_scale [N], which multiply the fp32 sum. x may also be bf16 or fp16, without
scales, beside an fp8 weight, which is then widened in registers: both types hold every float8_e4m3fn.

Import this module only where Triton is installed. TRITON_INTERPRET=1 runs it on CPU tensors, slowly.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .triton.softmax import widen

MAX_ROWS = 64
"""Most rows of x that the tile kernel takes."""
MAX_ROWS_FMA = 4
"""Most rows of x that the rows kernel takes."""


@dataclass(frozen=True, kw_only=True)
class RowsConfig:
    """How the rows kernel cuts the work: weight rows of a program, values of a row per step, warps, steps in flight."""

    block_n: int
    block_k: int
    warps: int = 4
    stages: int = 1


@dataclass(frozen=True, kw_only=True)
class TileConfig:
    """How the tile kernel cuts the work. splits: of K; weight_left: which operand of the tensor cores the weight is.

    tma: the tensor memory accelerator fetches the weight (compute capability 9.0; rows of a multiple of 16 bytes). asm: an fp8
    weight beside wider rows is widened by written-out instructions (compute capability 8.9 and later).
    """

    block_n: int
    block_k: int
    splits: int = 1
    warps: int = 4
    stages: int = 4
    weight_left: bool = True
    tma: bool = False
    asm: bool = False


# ---------------------------------------------------------------------------------------------------------- device code
@triton.jit
def _finish(total, x_scale, weight_scale, bias, m, n, keep_m, keep_n, SCALED: tl.constexpr, BIAS: tl.constexpr):
    # total [BLOCK_N, BLOCK_M] fp32 -> scaled, biased
    if SCALED:
        if x_scale is not None:
            total = total * tl.load(x_scale + m, mask=keep_m, other=0.0)[None, :]
        total = total * tl.load(weight_scale + n, mask=keep_n, other=0.0)[:, None]
    if BIAS:
        total += tl.load(bias + n, mask=keep_n, other=0.0).to(tl.float32)[:, None]
    return total


@triton.jit
def _dot_row(x, m, num_rows, K, k, wide, acc, EVEN_K: tl.constexpr):
    # acc [BLOCK_N, BLOCK_K] += wide * x[m], row m repeated from the last where there are fewer
    at = x + tl.minimum(m, num_rows - 1) * K + k
    row = tl.load(at) if EVEN_K else tl.load(at, mask=k < K, other=0.0)
    return acc + wide * row.to(tl.float32)[None, :]


@triton.jit
def _store_row(
    acc, x_scale, weight_scale, bias, out, m, num_rows, n, N, SCALED: tl.constexpr, BIAS: tl.constexpr
):  # fmt: skip
    total = tl.sum(acc, 1)
    keep = (n < N) & (m < num_rows)
    if SCALED:
        if x_scale is not None:
            total = total * tl.load(x_scale + tl.minimum(m, num_rows - 1))
        total = total * tl.load(weight_scale + n, mask=keep, other=0.0)
    if BIAS:
        total += tl.load(bias + n, mask=keep, other=0.0).to(tl.float32)
    tl.store(out + m * N + n, total.to(out.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["num_rows"])
def _rows_kernel(
    x, weight, x_scale, weight_scale, bias, out, num_rows, N, K,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, SCALED: tl.constexpr,
    BIAS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_n = tl.minimum(n, N - 1).to(tl.int64)
    acc0 = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    acc1 = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    acc2 = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    acc3 = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        at = weight + offs_n[:, None] * K + k[None, :]
        if EVEN_K:
            tile = tl.load(at, eviction_policy="evict_first")
        else:
            tile = tl.load(at, mask=k[None, :] < K, other=0.0, eviction_policy="evict_first")
        wide = tile.to(tl.float32)
        acc0 = _dot_row(x, 0, num_rows, K, k, wide, acc0, EVEN_K)
        if ROWS > 1:
            acc1 = _dot_row(x, 1, num_rows, K, k, wide, acc1, EVEN_K)
        if ROWS > 2:
            acc2 = _dot_row(x, 2, num_rows, K, k, wide, acc2, EVEN_K)
            acc3 = _dot_row(x, 3, num_rows, K, k, wide, acc3, EVEN_K)
    _store_row(acc0, x_scale, weight_scale, bias, out, 0, num_rows, n, N, SCALED, BIAS)
    if ROWS > 1:
        _store_row(acc1, x_scale, weight_scale, bias, out, 1, num_rows, n, N, SCALED, BIAS)
    if ROWS > 2:
        _store_row(acc2, x_scale, weight_scale, bias, out, 2, num_rows, n, N, SCALED, BIAS)
        _store_row(acc3, x_scale, weight_scale, bias, out, 3, num_rows, n, N, SCALED, BIAS)


@triton.jit
def _widen(w, dtype: tl.constexpr, ASM: tl.constexpr):
    # float8_e4m3fn -> dtype, exact. ASM: as instructions that stay where they are; the compiler would otherwise convert after the
    # values have been brought into the tensor cores' order, one or two bytes at a time.
    if ASM and w.dtype == tl.float8e4nv and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b16 low, high, h0, h1, h2, h3;
            .reg .b32 first, second;
            .reg .f32 f0, f1, f2, f3;
            mov.b32 {low, high}, $2;
            cvt.rn.f16x2.e4m3x2 first, low;
            cvt.rn.f16x2.e4m3x2 second, high;
            mov.b32 {h0, h1}, first;
            mov.b32 {h2, h3}, second;
            cvt.f32.f16 f0, h0;
            cvt.f32.f16 f1, h1;
            cvt.f32.f16 f2, h2;
            cvt.f32.f16 f3, h3;
            cvt.rn.bf16x2.f32 $0, f1, f0;
            cvt.rn.bf16x2.f32 $1, f3, f2;
            }
            """,
            "=r,=r,r", [w], dtype=tl.bfloat16, is_pure=False, pack=4,
        )  # fmt: skip
    return widen(w, dtype, ASM)


@triton.jit(do_not_specialize=["num_rows"])
def _tile_kernel(
    x, weight, tiles, x_scale, weight_scale, bias, out, partial, arrived, num_rows, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr, EVEN_K: tl.constexpr,
    SCALED: tl.constexpr, BIAS: tl.constexpr, WEIGHT_LEFT: tl.constexpr, TMA: tl.constexpr, STAGES: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    tile, split = tl.program_id(0), tl.program_id(1)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_n = tl.minimum(n, N - 1).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    keep_m = m < num_rows
    keep_n = n < N
    span = tl.cdiv(tl.cdiv(K, SPLITS), BLOCK_K) * BLOCK_K
    first = split * span
    end = tl.minimum(first + span, K)
    if WEIGHT_LEFT:
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(first, end, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        w_at = weight + offs_n[:, None] * K + k[None, :]
        x_at = x + m[:, None] * K + k[None, :]
        if TMA:
            w = tiles.load([tile * BLOCK_N, start])  # zeros beyond the tensor
        elif EVEN_K:
            w = tl.load(w_at, eviction_policy="evict_first")
        else:
            w = tl.load(w_at, mask=k[None, :] < K, other=0.0, eviction_policy="evict_first")
        if EVEN_K:
            rows = tl.load(x_at, mask=keep_m[:, None], other=0.0)
        else:
            rows = tl.load(x_at, mask=keep_m[:, None] & (k[None, :] < K), other=0.0)
        if w.dtype != rows.dtype:
            w = _widen(w, rows.dtype, ASM)
        if WEIGHT_LEFT:
            acc = tl.dot(w, tl.trans(rows), acc)
        else:
            acc = tl.dot(rows, tl.trans(w), acc)
    total = acc if WEIGHT_LEFT else tl.trans(acc)
    at = m[None, :] * N + n[:, None]
    keep = keep_m[None, :] & keep_n[:, None]
    if SPLITS == 1:
        total = _finish(total, x_scale, weight_scale, bias, m, n, keep_m, keep_n, SCALED, BIAS)
        tl.store(out + at, total.to(out.dtype.element_ty), mask=keep)
    else:
        size = num_rows * N
        tl.store(partial + split * size + at, total, mask=keep)
        tl.debug_barrier()  # all threads have stored before one of them says so
        ticket = tl.atomic_add(arrived + tile, 1, sem="acq_rel")
        if ticket == SPLITS - 1:
            tl.store(arrived + tile, 0)  # ready for the next launch
            total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for part in tl.static_range(SPLITS):
                total += tl.load(partial + part * size + at, mask=keep, other=0.0, cache_modifier=".cg")
            total = _finish(total, x_scale, weight_scale, bias, m, n, keep_m, keep_n, SCALED, BIAS)
            tl.store(out + at, total.to(out.dtype.element_ty), mask=keep)


# --------------------------------------------------------------------------------------------------------------- launch
def multiply_rows(
    x: Tensor, weight: Tensor, x_scale: Tensor | None, weight_scale: Tensor | None, bias: Tensor | None,
    dtype: torch.dtype, config: RowsConfig,
) -> Tensor:  # fmt: skip
    """The rows kernel: x [T, K], weight [N, K] of one dtype, contiguous -> [T, N] in `dtype`. T from 1 to 4.

    x_scale [T] or [T, 1] and weight_scale [N], fp32: both or none; the latter alone where x is wider than an fp8 weight.
    """
    num_rows, k = x.shape
    n = weight.shape[0]
    assert 1 <= num_rows <= MAX_ROWS_FMA, num_rows
    out = torch.empty((num_rows, n), dtype=dtype, device=x.device)
    block_k = min(config.block_k, triton.next_power_of_2(k))
    with on_device(x):
        _rows_kernel[(triton.cdiv(n, config.block_n),)](
            x, weight, x_scale, weight_scale, bias, out, num_rows, n, k,
            ROWS=triton.next_power_of_2(num_rows), BLOCK_N=config.block_n, BLOCK_K=block_k, EVEN_K=k % block_k == 0,
            SCALED=weight_scale is not None, BIAS=bias is not None, STAGES=config.stages,
            num_warps=config.warps,
        )  # fmt: skip
    return out


def multiply_tile(
    x: Tensor, weight: Tensor, x_scale: Tensor | None, weight_scale: Tensor | None, bias: Tensor | None,
    dtype: torch.dtype, config: TileConfig,
) -> Tensor:  # fmt: skip
    """The tile kernel: x [T, K], weight [N, K] of one dtype, contiguous -> [T, N] in `dtype`. T from 1 to 64.

    x_scale [T] or [T, 1] and weight_scale [N], fp32: both or none; the latter alone where x is wider than an fp8 weight.
    """
    num_rows, k = x.shape
    n = weight.shape[0]
    assert 1 <= num_rows <= MAX_ROWS, num_rows
    out = torch.empty((num_rows, n), dtype=dtype, device=x.device)
    tiles = triton.cdiv(n, config.block_n)
    partial = arrived = None
    if config.splits > 1:
        partial = torch.empty((config.splits, num_rows, n), dtype=torch.float32, device=x.device)
        arrived = arrivals(x.device, torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0, tiles)
    fetched = TensorDescriptor.from_tensor(weight, [config.block_n, config.block_k]) if config.tma else None
    with on_device(x):
        _tile_kernel[(tiles, config.splits)](
            x, weight, fetched, x_scale, weight_scale, bias, out, partial, arrived, num_rows, n, k,
            BLOCK_M=max(16, triton.next_power_of_2(num_rows)), BLOCK_N=config.block_n, BLOCK_K=config.block_k,
            SPLITS=config.splits, EVEN_K=k % config.block_k == 0, SCALED=weight_scale is not None, BIAS=bias is not None,
            WEIGHT_LEFT=config.weight_left, TMA=config.tma, STAGES=config.stages,
            ASM=config.asm and x.is_cuda, num_warps=config.warps,
        )  # fmt: skip
    return out


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the tensor's GPU the current one, on which Triton launches; nothing for the CPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@functools.cache
def _counters(device: torch.device, stream: int, size: int) -> Tensor:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the first split product on a stream cannot be captured; run the step once on that stream before"
        )
    return torch.zeros(size, dtype=torch.int32, device=device)


def arrivals(device: torch.device, stream: int, tiles: int) -> Tensor:
    """Zeroed counters, one per tile, which every launch leaves zeroed.

    They belong to a stream, on which launches follow each other. Graphs captured on one stream share them, so two of those must
    not be replayed at the same time. Raises RuntimeError if they are first asked for while a graph is captured.
    """
    return _counters(device, stream, triton.next_power_of_2(max(tiles, 4096)))
