"""What `gpu_linear.py` measures: products of a Llama-3.1-8B layer, the configurations tried on each, clock and error."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from camshaft.export.kernels import gemm
from camshaft.export.kernels.gemm import FP8, Config
from camshaft.export.kernels.gemm_skinny import RowsConfig, TileConfig
from camshaft.export.kernels.gemm_tiled import TiledConfig
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""On the CPU, with TRITON_INTERPRET=1, tiny shapes run through everything: a check of the script, not a measurement."""
SHAPES = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "head": (128256, 4096),
}
"""[N, K]"""
if DEVICE == "cpu":
    SHAPES = {"qkv": (192, 128), "o": (128, 128), "gate_up": (512, 128), "down": (128, 256), "head": (512, 128)}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 8192)
QUICK_TOKENS = (2, 16, 64, 256, 2048)
MAX_HEAD_ROWS = 1024
BANDWIDTH, PEAK = 4.0e12, {"bf16": 788e12, "fp8": 1419e12}
"""Measured ceilings of an H200: bytes/s read, FLOP/s."""
CACHE_BYTES = 150e6
"""Copies of a weight hold at least this together: three times the L2 cache."""
MAX_ERROR = {"bf16": 4e-3, "fp8": 8e-3}
"""Largest error in the norm, relative: bf16 rounds the result to 8 bits; fp8 sums on tensor cores keep about 14."""
BF16 = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # Triton's interpreter has no products of bfloat16
Product = Callable[[Tensor, Tensor, "Tensor | None", "Tensor | None"], Tensor]
"""x [T, K], weight [N, K], x_scale [T, 1], weight_scale [N] -> [T, N] bf16"""


# ------------------------------------------------------------------------------------------------------------- variants
def name_of(config: Config) -> str:
    """A short name of a configuration."""
    if isinstance(config, RowsConfig):
        return f"rows n{config.block_n} k{config.block_k} w{config.warps} s{config.stages}"
    if isinstance(config, TileConfig):
        side = " tma" if config.tma else "" if config.weight_left else " right"
        return f"tile n{config.block_n} k{config.block_k} /{config.splits} w{config.warps} s{config.stages}{side}"
    size = f"{config.block_m}x{config.block_n}x{config.block_k}"
    return f"tiled {size} w{config.warps} s{config.stages}{'' if config.persistent else ' one'}"


def configs(dtype: str, rows: int, n: int, k: int, quick: bool) -> Iterator[Config]:
    """What is tried for T rows: only what can be fast there."""
    wide = 2 if dtype == "fp8" else 1
    if rows <= 4:
        for block_n, block_k, warps, stages in ROWS[rows if rows < 3 else 4][: 2 if quick else None]:
            yield RowsConfig(block_n=block_n, block_k=block_k, warps=warps, stages=stages)
    if rows <= 64:
        table = TILES if rows <= 16 else TILES_WIDE
        for block_n, block_k, splits, warps, stages, kind in table:
            programs = n // block_n * splits
            useful = programs <= 1100 if splits > 1 else programs >= 60
            if useful and not (quick and (splits == 2 or kind == "right")):
                yield TileConfig(
                    block_n=block_n, block_k=block_k * wide, splits=splits, warps=warps, stages=stages,
                    weight_left=kind != "right", tma=kind == "tma",
                )  # fmt: skip
    if rows >= 64:
        for block_m, block_n, block_k, warps, stages, persistent in TILED[:2] if quick else TILED:
            yield TiledConfig(
                block_m=block_m, block_n=block_n, block_k=block_k * wide, warps=warps, stages=stages,
                persistent=persistent,
            )  # fmt: skip


# by rows of x: block_n, block_k, warps, stages; a thread holds block_n * block_k / (32 * warps) sums for each row
ROWS = {
    1: (
        (4, 2048, 4, 1),
        (8, 1024, 4, 3),
        (2, 4096, 4, 1),
        (4, 1024, 4, 4),
        (4, 4096, 8, 1),
        (2, 2048, 4, 1),
        (8, 512, 4, 6),
    ),
    2: ((4, 1024, 4, 1), (4, 1024, 4, 4), (4, 512, 4, 6), (4, 2048, 8, 1), (8, 1024, 8, 4), (2, 2048, 4, 1)),
    4: ((4, 512, 4, 1), (4, 512, 4, 6), (4, 1024, 8, 1), (8, 512, 8, 4)),
}
# block_n, block_k (bf16; twice that for fp8), splits, warps, stages; how the weight comes: left operand, by TMA, or right
TILES = (
    *((64, 128, splits, 4, 4, "left") for splits in (1, 2, 4, 8)),
    *((64, 256, splits, 4, 3, "left") for splits in (1, 4)),
    *((128, 128, splits, 4, 4, "left") for splits in (1, 4, 8)),
    *((64, 128, splits, 4, 5, "tma") for splits in (1, 2, 4, 8)),
    *((128, 128, splits, 4, 4, "tma") for splits in (1, 2, 4)),
    (64, 64, 1, 4, 6, "left"),
    (32, 256, 1, 4, 4, "right"),
    (32, 128, 2, 4, 5, "right"),
    (16, 512, 1, 4, 4, "right"),
)
TILES_WIDE = (
    *((64, 128, splits, 4, 4, "left") for splits in (1, 2, 4)),
    *((64, 128, splits, 4, 4, "tma") for splits in (1, 2, 4)),
    *((128, 64, splits, 4, 4, "left") for splits in (1, 4)),
    *((128, 64, splits, 4, 5, "tma") for splits in (1, 2, 4)),
    (128, 128, 1, 8, 3, "left"),
    (64, 256, 1, 4, 3, "left"),
)
# block_m, block_n, block_k (bf16; twice that for fp8), warps, stages, persistent
TILED = (
    (128, 256, 64, 8, 3, True),
    (128, 128, 64, 8, 4, True),
    (64, 256, 64, 4, 4, True),
    (64, 128, 64, 4, 4, True),
    (128, 128, 64, 4, 4, False),
    (64, 64, 128, 4, 4, False),
)


def library(dtype: str, rows: int) -> dict[str, Product]:
    """cuBLAS and cuBLASLt."""
    if dtype == "bf16":
        return {"library": lambda x, w, xs, ws: F.linear(x, w)}
    one = torch.ones((), device=DEVICE)

    def rowwise(x: Tensor, w: Tensor, xs: Tensor | None, ws: Tensor | None) -> Tensor:
        assert xs is not None and ws is not None
        return gemm.scaled_library(x, xs, w, ws, None, BF16)

    def tensorwise(x: Tensor, w: Tensor, xs: Tensor | None, ws: Tensor | None) -> Tensor:
        return torch._scaled_mm(x, w.t(), scale_a=one, scale_b=one, out_dtype=BF16, use_fast_accum=True)

    return {"library": rowwise, "library, no scales": tensorwise}


def product_of(config: Config) -> Product:
    """A configuration as a product."""
    return lambda x, w, xs, ws: gemm.run(config, x, w, xs, ws, None, BF16)


# --------------------------------------------------------------------------------------------------------------- timing
STREAM = torch.cuda.Stream() if torch.cuda.is_available() else None


def seconds(calls: Sequence[Callable[[], Any]], expected: float, replays: int = 5) -> float:
    """Median time of a call, in a CUDA graph of about 2 ms that makes them in turn. expected: seconds of a call."""
    if DEVICE == "cpu":
        begun = time.perf_counter()
        calls[0]()
        return time.perf_counter() - begun
    rounds = max(1, round(max(2, min(32, 2e-3 / expected)) / len(calls)))
    with torch.cuda.stream(STREAM):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=STREAM):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)]
    for start, stop in events:
        start.record()
        graph.replay()
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in events) / (rounds * len(calls)) / 1e3


def synchronize() -> None:
    """Waits for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def floor(dtype: str, rows: int, n: int, k: int) -> float:
    """Least seconds by the ceilings: operands and result once through memory, or the multiplications."""
    size = 1 if dtype == "fp8" else 2
    return max(((n + rows) * k * size + rows * n * 2) / BANDWIDTH, 2 * rows * n * k / PEAK[dtype])


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn and scales [.., 1], by rows."""
    scale = x.float().abs().amax(-1, keepdim=True) / 448.0
    return (x.float() / scale).to(FP8), scale


class Weights:
    """Copies of one weight [N, K] that together exceed the cache, and one fp32 reference."""

    def __init__(self, dtype: str, n: int, k: int) -> None:
        torch.manual_seed(0)
        weight = torch.randn(n, k, device=DEVICE, dtype=BF16).mul_(k**-0.5)
        self.scale: Tensor | None = None
        if dtype == "fp8":
            weight, scale = quantized(weight)
            self.scale = scale[:, 0].contiguous()
        count = max(2, -(-int(CACHE_BYTES) // weight.nbytes)) if weight.nbytes < CACHE_BYTES else 1
        self.copies = [weight, *(weight.clone() for _ in range(count - 1))]
        self.dtype, self.n, self.k = dtype, n, k

    def rows(self, count: int) -> tuple[Tensor, Tensor | None]:
        """x [count, K] and its scales."""
        x = torch.randn(count, self.k, device=DEVICE, dtype=BF16)
        return quantized(x) if self.dtype == "fp8" else (x, None)

    def expected(self, x: Tensor, x_scale: Tensor | None) -> Tensor:
        """The product in fp32."""
        out = x.float() @ self.copies[0].float().t()
        return out if x_scale is None else out * x_scale * self.scale


def error_of(actual: Tensor, wanted: Tensor) -> float:
    """Relative, in the norm; infinite where any value is not finite."""
    if not bool(torch.isfinite(actual).all()):
        return float("inf")
    return float((actual.float() - wanted).norm() / wanted.norm())
