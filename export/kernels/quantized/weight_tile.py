"""Rows of 16 bits by a stored weight of 4 or 8 bits: y [T, N] = x [T, K] @ (value - zero_point) * scale [N, K]^T.

A program owns a tile of BLOCK_N rows of the weight, BLOCK_M rows of x and a span of K. It reads words of 32 bits, unpacks them in
registers (`unpack`) and multiplies on the tensor cores, with the weight as the left or as the right operand.

    scales   on the values     (value - zero_point) * scale, rounded to x's dtype: exact for e2m1 and e4m3 values with e4m3 or e8m0
                               scales; integers with float32 scales lose up to two roundings of 8 bits
             on the sums       float32, exact: after a step of K within one group, or after the last, for scales of whole rows
    K split  in SPLITS         partial sums -> workspace [SPLITS, T, N] float32; who arrives last adds them in order

Rows of x may be numbers of 8 bits in 16, with a scale for each (x_scale), or for each 128 of each (x_group_scale).

Import this module only where Triton is installed. TRITON_INTERPRET=1 runs it on CPU tensors, slowly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gemm_skinny import arrivals, on_device
from .stored import Stored
from .unpack import decode_scale, pair_columns, unpack

X_GROUP = tl.constexpr(128)
"""Values of x that share a group's scale."""


@dataclass(frozen=True, kw_only=True)
class WeightTileConfig:
    """How the work is cut. block_m: most rows of x in a program; splits: of K; weight_left: which operand the weight is.

    scale_sums: scales of groups multiply sums, where block_k divides the group; scales of rows always do.
    """

    block_n: int
    block_k: int
    splits: int = 1
    warps: int = 4
    stages: int = 4
    weight_left: bool = False
    scale_sums: bool = False
    block_m: int = 64


# ---------------------------------------------------------------------------------------------------------- device code
@triton.jit
def _per_row(values, LEFT: tl.constexpr):
    # a number for each row of x, to broadcast over the sums
    return values[None, :] if LEFT else values[:, None]


@triton.jit
def _per_column(values, LEFT: tl.constexpr):
    return values[:, None] if LEFT else values[None, :]


@triton.jit
def group_numbers(at, offs_n, start, K, GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Scales or zero points of a step's groups: [BLOCK_N, groups of the step], of row n / BLOCK_ROWS."""
    COUNT: tl.constexpr = BLOCK_K // GROUP if BLOCK_K > GROUP else 1
    groups = tl.cdiv(K, GROUP)
    group = start // GROUP + tl.arange(0, COUNT)
    return tl.load(
        at + (offs_n // BLOCK_ROWS)[:, None] * groups + group[None, :], mask=(group < groups)[None, :], other=0.0
    )


@triton.jit
def over_words(numbers, WORDS: tl.constexpr):
    """[BLOCK_N, groups] -> [BLOCK_N, WORDS], each as often as its group has words."""
    ROWS: tl.constexpr = numbers.shape[0]
    GROUPS: tl.constexpr = numbers.shape[1]
    wide = tl.broadcast_to(numbers[:, :, None], [ROWS, GROUPS, WORDS // GROUPS])
    return tl.reshape(wide, [ROWS, WORDS])


@triton.jit
def _finish(
    total, scale, global_scale, x_scale, bias, offs_m, n, keep_m, keep_n, GROUP: tl.constexpr, LEFT: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    # float32 sums -> scaled by row, matrix and token, biased
    if GROUP == 0:
        total = total * _per_column(tl.load(scale + n, mask=keep_n, other=0.0), LEFT)
    if GROUP == -1:
        total = total * tl.load(scale)
    if global_scale is not None:
        total = total * tl.load(global_scale)
    if x_scale is not None:
        total = total * _per_row(tl.load(x_scale + offs_m, mask=keep_m, other=0.0), LEFT)
    if BIAS:
        total += _per_column(tl.load(bias + n, mask=keep_n, other=0.0).to(tl.float32), LEFT)
    return total


@triton.jit(do_not_specialize=["num_rows"])
def _weight_tile_kernel(
    x, words, scale, zero_point, global_scale, x_scale, x_group_scale, bias, out, partial, arrived, num_rows, N, K,
    KIND: tl.constexpr, V: tl.constexpr, GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr, ON_SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr, LEFT: tl.constexpr,
    EVEN_K: tl.constexpr, BIAS: tl.constexpr, STAGES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    tile, split, tile_m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    WORDS: tl.constexpr = BLOCK_K // V
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_n = tl.minimum(n, N - 1).to(tl.int64)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_m = m.to(tl.int64)
    keep_m, keep_n = m < num_rows, n < N
    span = tl.cdiv(tl.cdiv(K, SPLITS), BLOCK_K) * BLOCK_K
    first = split * span
    end = tl.minimum(first + span, K)
    row_zero = None
    if zero_point is not None and GROUP == 0:
        row_zero = tl.load(zero_point + offs_n).to(tl.float32)
    if LEFT:
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(first, end, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        word = start // V + tl.arange(0, WORDS)
        w_at = words + offs_n[:, None] * (K // V) + word[None, :]
        x_at = x + offs_m[:, None] * K + k[None, :]
        if EVEN_K:
            w = tl.load(w_at, eviction_policy="evict_first")
            rows = tl.load(x_at, mask=keep_m[:, None], other=0.0)
        else:
            w = tl.load(w_at, mask=word[None, :] < K // V, other=0, eviction_policy="evict_first")
            rows = tl.load(x_at, mask=keep_m[:, None] & (k[None, :] < K), other=0.0)
        zero = None
        factor = None
        if row_zero is not None:
            zero = tl.broadcast_to(row_zero[:, None], [BLOCK_N, WORDS])
        elif zero_point is not None:
            zeros = group_numbers(zero_point, offs_n, start, K, GROUP, BLOCK_ROWS, BLOCK_K)
            zero = over_words(zeros.to(tl.float32), WORDS)
        if GROUP > 0:
            scales = decode_scale(group_numbers(scale, offs_n, start, K, GROUP, BLOCK_ROWS, BLOCK_K))
            if not ON_SUMS:
                factor = over_words(scales, WORDS)
        values = unpack(w, zero, factor, KIND, x.dtype.element_ty, ASM)
        rows = pair_columns(rows, V)
        if GROUP > 0 and ON_SUMS:
            if LEFT:
                part = tl.dot(values, tl.trans(rows))
            else:
                part = tl.dot(rows, tl.trans(values))
            part = part * _per_column(tl.reshape(scales, [BLOCK_N]), LEFT)
            if x_group_scale is not None:
                at = x_group_scale + offs_m * tl.cdiv(K, X_GROUP) + start // X_GROUP
                part = part * _per_row(tl.load(at, mask=keep_m, other=0.0), LEFT)
            acc += part
        elif LEFT:
            acc = tl.dot(values, tl.trans(rows), acc)
        else:
            acc = tl.dot(rows, tl.trans(values), acc)
    at = _per_row(offs_m, LEFT) * N + _per_column(n, LEFT)
    keep = _per_row(keep_m, LEFT) & _per_column(keep_n, LEFT)
    if SPLITS == 1:
        acc = _finish(acc, scale, global_scale, x_scale, bias, offs_m, n, keep_m, keep_n, GROUP, LEFT, BIAS)
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=keep)
    else:
        size = num_rows.to(tl.int64) * N
        tl.store(partial + split * size + at, acc, mask=keep)
        tl.debug_barrier()  # all threads have stored before one of them says so
        counter = arrived + tile_m * tl.num_programs(0) + tile
        ticket = tl.atomic_add(counter, 1, sem="acq_rel")
        if ticket == SPLITS - 1:
            tl.store(counter, 0)  # ready for the next launch
            total = tl.zeros_like(acc)
            for part in tl.static_range(SPLITS):
                total += tl.load(partial + part * size + at, mask=keep, other=0.0, cache_modifier=".cg")
            total = _finish(total, scale, global_scale, x_scale, bias, offs_m, n, keep_m, keep_n, GROUP, LEFT, BIAS)
            tl.store(out + at, total.to(out.dtype.element_ty), mask=keep)


# --------------------------------------------------------------------------------------------------------------- launch
def fits(weight: Stored, config: WeightTileConfig) -> bool:
    """Whether steps of the configuration end where groups do, and scales can be where it has them."""
    group = weight.group
    if group <= 0:
        return True
    if config.scale_sums:
        return group % config.block_k == 0
    return group % config.block_k == 0 or (config.block_k % group == 0 and group % weight.values_per_word == 0)


def multiply_weight_tile(
    x: Tensor,
    weight: Stored,
    bias: Tensor | None,
    dtype: torch.dtype,
    config: WeightTileConfig,
    *,
    x_scale: Tensor | None = None,
    x_group_scale: Tensor | None = None,
) -> Tensor:
    """x [T, K] (contiguous; bfloat16, or another float for plain instructions) by the weight [N, K] -> [T, N] in `dtype`.

    x_scale: float32 [T] or [T, 1] that multiply the rows of x; x_group_scale: float32 [T, ceil(K / 128)] that multiply 128 values
    each, only with a configuration that scales sums of 128 or fewer. Raises ValueError where the configuration does not fit.
    """
    num_rows, k = x.shape
    n = weight.rows
    config = _shortened(config, weight, k)
    if not fits(weight, config) or (x_group_scale is not None and not config.scale_sums):
        raise ValueError(
            f"a weight {[n, k]} in groups of {weight.group} does not fit {config}: block_k must divide a group, or, where values "
            "are scaled, be a multiple of it"
        )
    out = torch.empty((num_rows, n), dtype=dtype, device=x.device)
    if not out.numel():
        return out
    block_m = min(max(16, triton.next_power_of_2(num_rows)), config.block_m)
    tiles, tiles_m = triton.cdiv(n, config.block_n), triton.cdiv(num_rows, block_m)
    partial = arrived = None
    if config.splits > 1:
        partial = torch.empty((config.splits, num_rows, n), dtype=torch.float32, device=x.device)
        arrived = arrivals(
            x.device, torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0, tiles * tiles_m
        )
    with on_device(x):
        _weight_tile_kernel[(tiles, config.splits, tiles_m)](
            x, weight.words, weight.scale, weight.zero_point, weight.global_scale, x_scale, x_group_scale, bias, out,
            partial, arrived, num_rows, n, k, KIND=weight.kind, V=weight.values_per_word, GROUP=weight.group,
            BLOCK_ROWS=weight.block_rows, ON_SUMS=config.scale_sums, BLOCK_M=block_m, BLOCK_N=config.block_n,
            BLOCK_K=config.block_k, SPLITS=config.splits, LEFT=config.weight_left, EVEN_K=k % config.block_k == 0,
            BIAS=bias is not None, STAGES=config.stages, ASM=written_out(x.device), num_warps=config.warps,
        )  # fmt: skip
    return out


def written_out(device: torch.device) -> bool:
    """Whether the device has the instructions that `unpack` writes out."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def _shortened(config: WeightTileConfig, weight: Stored, k: int) -> WeightTileConfig:
    """The configuration with no longer steps than a row, and than a group whose sums are scaled."""
    longest = triton.next_power_of_2(max(k, 16))
    if config.scale_sums and weight.group > 0:
        longest = min(longest, weight.group)
    return replace(config, block_k=min(config.block_k, longest))
