"""Linear layers on CUDA: which kernel takes which product. Decided from the host integers T, N, K and the dtype alone.

    linear                 bf16 and fp16 weights    few rows: Triton; else cuBLAS
    scaled_linear          fp8 weights and rows     few rows: Triton; else cuBLASLt (`torch._scaled_mm`) or Triton's tiles, which
                                                    take many rows of many values, too
    weight_only_linear     fp8 weights, plain rows  one row: Triton; more are that many products of one row
    invariant_*            all of them              one kernel and configuration for any T: a row's result does not depend on T

The tables below are measurements on an H200 (`bench/gpu_linear.py`); on other GPUs they are right, and may not be the fastest.
Import this module only where Triton is installed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .gemm_one_row import OneRowConfig, multiply_one_row
from .gemm_skinny import RowsConfig, TileConfig, multiply_rows, multiply_tile
from .gemm_tiled import ALIGNMENT_BYTES, TiledConfig, multiply_tiled

Config = OneRowConfig | RowsConfig | TileConfig | TiledConfig
HALF = (torch.float16, torch.bfloat16)
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A line of a table: products of at most `rows` rows and `columns` columns (N) run in `config`; None: the library."""

    rows: int
    columns: int
    config: Config | None


_ANY = 1 << 62

HALF_TABLE = (
    Choice(rows=1, columns=_ANY, config=RowsConfig(block_n=4, block_k=2048, warps=4)),
    Choice(rows=16, columns=4096, config=TileConfig(block_n=64, block_k=128, splits=4)),
    Choice(rows=16, columns=8192, config=TileConfig(block_n=64, block_k=256, stages=3)),
    Choice(rows=32, columns=4096, config=TileConfig(block_n=64, block_k=128, splits=2)),
    Choice(rows=64, columns=65536, config=None),
    Choice(rows=64, columns=_ANY, config=TileConfig(block_n=128, block_k=64)),
    Choice(rows=_ANY, columns=_ANY, config=None),
)
"""For bf16 and fp16, first line that fits."""

FP8_TABLE = (
    Choice(rows=16, columns=4096, config=TileConfig(block_n=64, block_k=512, splits=2, stages=3)),
    Choice(rows=16, columns=_ANY, config=TileConfig(block_n=64, block_k=256)),
    Choice(rows=64, columns=4096, config=TileConfig(block_n=64, block_k=256, splits=2)),
    Choice(rows=64, columns=8192, config=TileConfig(block_n=64, block_k=256)),
    Choice(rows=64, columns=_ANY, config=TileConfig(block_n=128, block_k=128)),
    Choice(
        rows=128,
        columns=4096,
        config=TiledConfig(block_m=64, block_n=64, block_k=256, warps=4, stages=4, persistent=False),
    ),
    Choice(rows=128, columns=8192, config=TiledConfig(block_m=64, block_n=128, block_k=128, warps=4, stages=4)),
    Choice(rows=_ANY, columns=_ANY, config=None),
)
"""For float8_e4m3fn, first line that fits."""

WEIGHT_ONLY_TABLE = (
    Choice(rows=_ANY, columns=4096, config=OneRowConfig(block_n=4, block_k=2048, warps=4, stages=1)),
    Choice(rows=_ANY, columns=8192, config=OneRowConfig(block_n=4, block_k=2048, warps=2, stages=1)),
    Choice(rows=_ANY, columns=32768, config=OneRowConfig(block_n=4, block_k=4096, warps=4, stages=1)),
    Choice(rows=_ANY, columns=_ANY, config=OneRowConfig(block_n=8, block_k=4096, warps=8, stages=1)),
)
"""For an fp8 weight and rows of 16 bits, first line that fits. A line for one row may name any kernel that takes one."""

LIBRARY_ROWS, LIBRARY_K = 2048, 8192
"""Above so many rows of more values than this, cuBLASLt's product with row-wise scales is not used: at 8,192 rows of 14,336
values its results were infinite (cuBLAS of CUDA 13.0, H200), and LONG_FP8 takes 0.64 ms there instead of 0.61."""
LIBRARY_FEWEST_ROWS = 17
"""Of the same product: below, it had wrong results."""
LONG_FP8 = TiledConfig(block_m=128, block_n=256, block_k=128, warps=8, stages=3)

INVARIANT_HALF = TiledConfig(block_m=64, block_n=64, block_k=128, warps=4, stages=4, group=8, persistent=False)
INVARIANT_FP8 = TiledConfig(block_m=64, block_n=64, block_k=256, warps=4, stages=4, group=8, persistent=False)
"""Never chosen by T: changing one changes results, to the last bit."""


def choose(table: tuple[Choice, ...], num_rows: int, n: int) -> Config | None:
    """The configuration for T rows and N columns; None: the library's kernel."""
    return next(line.config for line in table if num_rows <= line.rows and n <= line.columns)


def choose_fp8(num_rows: int, n: int, k: int) -> Config | None:
    """The configuration for fp8 rows [T, K] and a weight [N, K]; None: the library's kernel, never where it is wrong."""
    config = choose(FP8_TABLE, num_rows, n)
    if config is None and num_rows > LIBRARY_ROWS and k > LIBRARY_K:
        return LONG_FP8
    assert config is not None or num_rows >= LIBRARY_FEWEST_ROWS, num_rows
    return config


def run(
    config: Config, x: Tensor, weight: Tensor, x_scale: Tensor | None, weight_scale: Tensor | None, bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """x [T, K] @ weight [N, K]^T in the kernel of `config` -> [T, N] in `dtype`.

    Scales [T, 1] and [N]: both or none; the latter alone where rows of 16 bits meet an fp8 weight (not in a TiledConfig).
    """
    if isinstance(config, OneRowConfig):
        assert x_scale is None and weight_scale is not None
        return multiply_one_row(x, weight, weight_scale, bias, dtype, config)
    if isinstance(config, RowsConfig):
        return multiply_rows(x, weight, x_scale, weight_scale, bias, dtype, config)
    if isinstance(config, TileConfig):
        return multiply_tile(x, weight, x_scale, weight_scale, bias, dtype, config)
    return multiply_tiled(x, weight, x_scale, weight_scale, bias, dtype, config)


# ------------------------------------------------------------------------------------------------------------ operators
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`camshaft::linear` on CUDA: x [.., K], weight [N, K], bias [N] or None, of one dtype -> [.., N]."""
    rows = _rows(x)
    config = None
    if x.dtype in HALF and x.dtype == weight.dtype and rows.shape[0] and _fits(weight):
        config = choose(HALF_TABLE, rows.shape[0], weight.shape[0])
    if config is None:
        return F.linear(x, weight, bias)
    return run(config, rows, weight, None, None, bias, x.dtype).view(*x.shape[:-1], weight.shape[0])


def scaled_linear(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`camshaft::scaled_linear` on CUDA: fp8 x [.., K] with scales [.., 1], fp8 weight [N, K] with scales [N]."""
    rows, scales = _rows(x), x_scale.reshape(-1, 1)
    config = choose_fp8(rows.shape[0], *weight.shape)
    if not rows.shape[0]:
        out = torch.empty((0, weight.shape[0]), dtype=dtype, device=x.device)
    elif config is None:
        out = scaled_library(rows, scales, weight, weight_scale, bias, dtype)
    else:
        out = run(config, rows, weight, scales, weight_scale, bias, dtype)
    return out.view(*x.shape[:-1], weight.shape[0])


def weight_only_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`camshaft::weight_only_linear` on CUDA: x [.., K], fp8 weight [N, K] with scales [N], bias [N] or None."""
    rows = _rows(x)
    config = choose(WEIGHT_ONLY_TABLE, rows.shape[0], weight.shape[0])
    assert config is not None
    return run(config, rows, weight, None, weight_scale, bias, dtype).view(*x.shape[:-1], weight.shape[0])


def scaled_library(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """cuBLASLt's fp8 product with a scale for each row [T, 1] and column [N]. N and K must be multiples of 16.

    Not to be trusted for every size: `choose_fp8` says where. Only bfloat16 comes out of it, and with row-wise scales only a
    bfloat16 bias goes in.
    """
    added = bias if bias is not None and bias.dtype != torch.bfloat16 else None
    out = torch._scaled_mm(
        x, weight.t(), scale_a=x_scale, scale_b=weight_scale.view(1, -1), bias=bias if added is None else None,
        out_dtype=torch.bfloat16, use_fast_accum=True,
    )  # fmt: skip
    return (out if added is None else out + added).to(dtype)


def invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`camshaft::invariant_linear` on CUDA: x [.., K], weight [N, K], bias [N] or None, of one dtype -> [.., N].

    Raises ValueError for dtypes and row lengths that its kernel cannot take: another would break what is promised.
    """
    _check_invariant(x, weight, HALF)
    out = run(INVARIANT_HALF, _rows(x), weight.contiguous(), None, None, bias, x.dtype)
    return out.view(*x.shape[:-1], weight.shape[0])


def invariant_scaled_linear(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`camshaft::invariant_scaled_linear` on CUDA: fp8 x [.., K] with scales [.., 1], fp8 weight [N, K] with scales [N]."""
    _check_invariant(x, weight, (FP8,))
    out = run(INVARIANT_FP8, _rows(x), weight.contiguous(), x_scale.reshape(-1, 1), weight_scale, bias, dtype)
    return out.view(*x.shape[:-1], weight.shape[0])


@dataclass(frozen=True)
class Layer:
    """What a linear layer's kernels are compiled for: weight [n, k] of `dtype`, and whether there is a bias."""

    n: int
    k: int
    dtype: torch.dtype
    bias: bool = False


ROW_CLASSES = (1, 2, 4, 16, 32, 64, 128, LIBRARY_ROWS + 1)
"""Numbers of rows between which no other kernel is compiled."""


@dataclass(frozen=True)
class _Job:
    """A kernel to compile: what runs it on as few rows of `x_dtype` as it takes."""

    config: Config
    rows: int
    x_dtype: torch.dtype


def prepare(
    layers: Iterable[Layer],
    dtype: torch.dtype,
    device: torch.device,
    *,
    one_row: bool = False,
    batch_invariant: bool = False,
) -> int:
    """Compiles the kernels that layers need for any number of rows, several at once; those in Triton's cache are only loaded.

    dtype: of the results. one_row: also what fp8 layers need for one row that is not quantized. batch_invariant: what the invariant
    operators need, and nothing else. Call it before a CUDA graph is captured, which cannot be done while a kernel is compiled.
    Returns how many there are.
    """
    jobs: dict[tuple[_Job, int, bool], Layer] = {}
    for layer in layers:
        for job in _invariant_jobs(layer) if batch_invariant else _jobs(layer, dtype, one_row):
            length = layer.k if isinstance(job.config, OneRowConfig) else layer.k % job.config.block_k
            jobs.setdefault((job, length, layer.bias), layer)

    def build(job: _Job, layer: Layer) -> None:
        x = torch.zeros((job.rows, layer.k), device=device).to(job.x_dtype)
        weight = torch.zeros((64, layer.k), device=device).to(layer.dtype)
        bias = torch.zeros(64, dtype=dtype, device=device) if layer.bias else None
        x_scale = torch.ones(job.rows, 1, device=device) if job.x_dtype == FP8 else None
        weight_scale = torch.ones(64, device=device) if layer.dtype == FP8 else None
        run(job.config, x, weight, x_scale, weight_scale, bias, dtype)

    with ThreadPoolExecutor(8 if device.type == "cuda" else 1) as pool:  # the interpreter runs one kernel at a time
        for begun in [pool.submit(build, job, layer) for (job, *_), layer in jobs.items()]:
            begun.result()
    return len(jobs)


def _jobs(layer: Layer, dtype: torch.dtype, one_row: bool) -> Iterator[_Job]:
    """The kernels of a layer, some of them more than once."""
    for rows in ROW_CLASSES:
        config = choose_fp8(rows, layer.n, layer.k) if layer.dtype == FP8 else choose(HALF_TABLE, rows, layer.n)
        if isinstance(config, TiledConfig):
            yield _Job(config, 16, layer.dtype)  # one kernel for any number of rows
        elif config is not None:
            padded = rows if isinstance(config, RowsConfig) else max(16, rows)
            yield _Job(config, padded, layer.dtype)
    if one_row and layer.dtype == FP8:
        config = choose(WEIGHT_ONLY_TABLE, 1, layer.n)
        assert config is not None
        yield _Job(config, 1, dtype)


def _invariant_jobs(layer: Layer) -> Iterator[_Job]:
    yield _Job(INVARIANT_FP8 if layer.dtype == FP8 else INVARIANT_HALF, 16, layer.dtype)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _fits(weight: Tensor) -> bool:
    return weight.is_contiguous() and weight.shape[1] * weight.element_size() % ALIGNMENT_BYTES == 0


def _check_invariant(x: Tensor, weight: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    length = x.shape[-1] * x.element_size()
    if x.dtype != weight.dtype or x.dtype not in allowed or length % ALIGNMENT_BYTES:
        raise ValueError(
            f"batch-invariant linear layer: x {x.dtype} and weight {weight.dtype} with rows of {length} bytes, allowed: one "
            f"dtype of {', '.join(map(str, allowed))} with rows of a multiple of {ALIGNMENT_BYTES} bytes; build without "
            "batch_invariant"
        )
