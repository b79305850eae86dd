"""What `gpu_quant.py` measures: formats, configurations, weights of a Llama-3.1-8B layer in a format, and how a product is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from camshaft.export.kernels.gemm_tiled import TiledConfig, multiply_tiled
from camshaft.export.kernels.quantized import tables
from camshaft.export.kernels.quantized.activations import quantize_planes, round_rows
from camshaft.export.kernels.quantized.block_fp8 import multiply_block_fp8
from camshaft.export.kernels.quantized.dequantize import dequantize
from camshaft.export.kernels.quantized.few_rows import MAX_ROWS, FewRowsConfig, multiply_few_rows
from camshaft.export.kernels.quantized.packed_fp8 import PackedFp8Config, multiply_packed_fp8, step_of
from camshaft.export.kernels.quantized.stored import Stored, stored
from camshaft.export.kernels.quantized.weight_tile import WeightTileConfig, fits, multiply_weight_tile
from camshaft.graph.linear_format import LinearFormat
from camshaft.graph.quant_formats import QuantizedWeight, quantize_weight
from camshaft.graph.quantized_linear import quantized_linear as definition
from linear_cases import BF16, CACHE_BYTES, DEVICE, FP8
from torch import Tensor

FORMATS = (
    "int4/none", "int4:g128/none", "int4:g64/none", "int4:g32/none", "int4:g128:zp/none", "int4:g32:zp/none", "int8/none",
    "int8:g128/none", "int8:zp/none", "fp8/none", "fp8:tensor/none", "fp8:block128/none", "nvfp4/none", "mxfp4/none",
    "mxfp8/none", "fp8/fp8", "fp8:tensor/fp8_static", "fp8:block128/fp8_block", "int8/int8", "int8/int8_static",
    "int4:g128/fp8", "int4:g64:zp/fp8", "int4/fp8_static", "int4:g128/int8", "nvfp4/nvfp4", "mxfp4/mxfp4", "mxfp8/mxfp8",
    "int4:g128/fp8_block",
)  # fmt: skip
"""Of the check of numbers."""
SWEPT = ("int4:g128/none", "int8/none", "nvfp4/none", "int8/int8", "int4:g128/fp8", "fp8:block128/fp8_block")
"""Of the sweep, the most wanted first."""
MAX_ERROR = 6e-3
"""Relative, in the norm: the result and a scaled weight are rounded to 8 bits, fp8 sums on tensor cores keep about 14."""
Product = Callable[[Tensor, Stored], Tensor]


@dataclass(frozen=True)
class Small:
    """A configuration for rows of 8 bits."""

    config: TiledConfig | PackedFp8Config


Config = FewRowsConfig | WeightTileConfig | Small | None
"""None: dequantized, then the library."""


class QuantWeights:
    """Copies of one weight [N, K] in a format that together exceed the cache, and the definition of its products."""

    def __init__(self, text: str, n: int, k: int) -> None:
        torch.manual_seed(0)
        self.format, self.text, self.n, self.k = LinearFormat.parse(text), text, n, k
        dense = torch.randn(n, k, device=DEVICE).mul_(k**-0.5)
        self.parts: QuantizedWeight = quantize_weight(dense, self.format)
        size = self.parts.values.nbytes
        count = max(2, -(-int(CACHE_BYTES) // size)) if size < CACHE_BYTES and DEVICE == "cuda" else 1
        self.copies = [self._stored(self.parts.values.clone() if i else self.parts.values) for i in range(count)]
        self.x_scale = torch.tensor(0.03, device=DEVICE) if self.format.activations.endswith("_static") else None

    def _stored(self, values: Tensor) -> Stored:
        parts = self.parts
        return stored(values, parts.scale, parts.zero_point, parts.global_scale, self.format)

    def rows(self, count: int) -> Tensor:
        return torch.randn(count, self.k, device=DEVICE, dtype=BF16)

    def expected(self, x: Tensor) -> Tensor:
        """float32, by the definition."""
        parts = self.parts
        return definition(
            x.float(), parts.values, parts.scale, parts.zero_point, parts.global_scale, None, self.x_scale, self.text
        )

    def bytes(self, rows: int) -> int:
        """What a product has to move."""
        parts = (self.parts.values, self.parts.scale, self.parts.zero_point)
        return sum(part.nbytes for part in parts if part is not None) + rows * (self.k + self.n) * 2


def name_of(config: Config) -> str:
    """A short name of a configuration."""
    if config is None:
        return "library"
    if isinstance(config, FewRowsConfig):
        return f"few n{config.block_n} k{config.block_k} w{config.warps}"
    if isinstance(config, Small):
        inner = config.config
        size = f"{inner.block_m}x{inner.block_n}" + (f"x{inner.block_k}" if isinstance(inner, TiledConfig) else "")
        return f"8 bits {size} w{inner.warps} s{inner.stages}"
    side = "left" if config.weight_left else "right"
    where = " sums" if config.scale_sums else ""
    return f"{side} m{config.block_m} n{config.block_n} k{config.block_k} /{config.splits} w{config.warps} s{config.stages}{where}"


def product_of(weights: QuantWeights, config: Config) -> Product:
    """The product of x with a copy of the weight, quantization of x included."""
    kind, given = weights.format.activations, weights.x_scale

    def tile(x: Tensor, weight: Stored) -> Tensor:
        rounded = round_rows(x, kind, given, x.dtype)
        if isinstance(config, FewRowsConfig):
            return multiply_few_rows(
                rounded.values, weight, None, x.dtype, config, x_scale=rounded.scale, x_group_scale=rounded.group_scale
            )
        assert isinstance(config, WeightTileConfig)
        return multiply_weight_tile(
            rounded.values, weight, None, x.dtype, config, x_scale=rounded.scale, x_group_scale=rounded.group_scale
        )

    def library(x: Tensor, weight: Stored) -> Tensor:
        rounded = round_rows(x, kind, given, x.dtype)
        values = rounded.values if rounded.scale is None else (rounded.values * rounded.scale[:, None]).to(x.dtype)
        return F.linear(values, dequantize(weight, x.dtype))

    def small(x: Tensor, weight: Stored) -> Tensor:
        assert isinstance(config, Small)
        inner = config.config
        if isinstance(inner, PackedFp8Config):
            planes, scale, sums = quantize_planes(x, given, step_of(weight) or 0)
            return multiply_packed_fp8(planes, weight, sums, scale, None, x.dtype, inner)
        if kind == "fp8_block":
            rounded = round_rows(x, kind, None, FP8)
            assert rounded.group_scale is not None
            words = weight.words.view(FP8)
            return multiply_block_fp8(rounded.values, words, rounded.group_scale, weight.scale, None, x.dtype, inner)
        rounded = round_rows(x, kind, given, torch.int8)
        return multiply_tiled(
            rounded.values, weight.words.view(torch.int8), rounded.scale, weight.scale, None, x.dtype, inner
        )

    return library if config is None else small if isinstance(config, Small) else tile


# ------------------------------------------------------------------------------------------------------- configurations
# few_rows, by values in a word: block_n, block_k, warps
FEW_ROWS = {
    8: (
        (8, 4096, 4), (16, 4096, 4), (4, 4096, 4), (8, 2048, 2), (4, 2048, 2), (16, 2048, 2), (8, 2048, 4), (4, 2048, 4),
        (8, 4096, 8), (16, 2048, 4), (4, 1024, 1), (8, 1024, 1), (16, 1024, 1), (8, 1024, 2),
    ),
    4: (
        (4, 2048, 4), (8, 4096, 8), (8, 2048, 4), (4, 4096, 8), (4, 4096, 4), (8, 2048, 2), (4, 2048, 2), (16, 2048, 4),
        (8, 4096, 4), (16, 1024, 2), (8, 1024, 2), (8, 1024, 1), (4, 1024, 1),
    ),
}  # fmt: skip
# weight_tile: weight_left, block_n, block_k, warps, stages
BESIDE = ((True, 64, 128, 4, 4), (False, 128, 128, 4, 4))
"""With `few_rows`."""
FEW = (
    (False, 128, 128, 4, 4), (False, 64, 128, 4, 4), (True, 64, 128, 4, 4), (True, 64, 128, 4, 6), (True, 64, 256, 4, 4),
    (True, 128, 128, 4, 5),
)  # fmt: skip
"""Up to 16 rows."""
MORE = (
    (True, 64, 128, 4, 4), (True, 128, 128, 4, 4), (True, 128, 128, 8, 4), (True, 64, 64, 4, 5), (True, 128, 64, 4, 4),
    (True, 128, 64, 8, 4),
)  # fmt: skip
TILED_8 = (
    (64, 128, 128, 4, 4, False), (128, 128, 128, 8, 4, False), (128, 256, 128, 8, 3, True), (128, 128, 128, 8, 4, True),
    (64, 256, 128, 4, 3, True),
)  # fmt: skip
BLOCKS_8 = ((64, 128, 4, 4), (128, 128, 8, 4), (128, 128, 8, 3), (128, 64, 4, 4), (64, 64, 4, 4))
PACKED = ((64, 128, 4, 4), (128, 128, 8, 4), (128, 64, 4, 4), (64, 64, 4, 5), (64, 128, 8, 4), (128, 128, 8, 3))


def configs(weights: QuantWeights, rows: int) -> Iterator[Config]:
    """What is tried for T rows: only what can be fast there."""
    format = weights.format
    weight = weights.copies[0]
    if rows <= MAX_ROWS:
        for block_n, block_k, warps in FEW_ROWS[weight.values_per_word]:
            if block_k <= weight.columns or DEVICE == "cpu":
                yield FewRowsConfig(block_n=block_n, block_k=block_k, warps=warps)
    if rows <= 512 and (format.activations == "none" or rows <= tables.FEW_ROWS):
        yield from _tiles(weights, weight, rows)
    if rows > 32:
        yield from map(Small, _small(format, weight))
    if rows >= 128 and format.activations != "fp8_block":
        yield None


def _tiles(weights: QuantWeights, weight: Stored, rows: int) -> Iterator[WeightTileConfig]:
    programs_most = 1100
    for left, block_n, block_k, warps, stages in BESIDE if rows <= MAX_ROWS else FEW if rows <= 16 else MORE:
        for splits in (1, 2, 4, 8):
            programs = -(-weights.n // block_n) * splits
            if splits > 1 and (programs > programs_most or rows > 64) or DEVICE == "cpu" and splits > 2:
                continue
            if rows <= 64 and splits < 8 and programs < 60 and DEVICE == "cuda":
                continue
            for block_m in (64,) if rows <= 64 else (64, 128):
                config = WeightTileConfig(
                    block_n=block_n, block_k=block_k, splits=splits, warps=warps, stages=stages, weight_left=left,
                    scale_sums=weight.group >= block_k, block_m=block_m,
                )  # fmt: skip
                needs_sums = weights.format.activations == "fp8_block" and not config.scale_sums
                if fits(weight, config) and not needs_sums:
                    yield config


def _small(format: LinearFormat, weight: Stored) -> Iterator[TiledConfig | PackedFp8Config]:
    if format.activations == "fp8_block" and format.block:
        for block_m, block_n, warps, stages in BLOCKS_8:
            yield TiledConfig(block_m=block_m, block_n=block_n, block_k=128, warps=warps, stages=stages)
    elif format.activations == "int8" and format.weights == "int8":
        for block_m, block_n, block_k, warps, stages, persistent in TILED_8:
            yield TiledConfig(
                block_m=block_m, block_n=block_n, block_k=block_k, warps=warps, stages=stages, persistent=persistent
            )
    elif format.activations == "fp8" and step_of(weight):
        for block_m, block_n, warps, stages in PACKED:
            yield PackedFp8Config(block_m=block_m, block_n=block_n, warps=warps, stages=stages)


def literal(config: Config) -> str:
    """A configuration as it stands in `tables`."""
    if config is None or isinstance(config, Small):
        return "None" if config is None else repr(config.config)
    kind = type(config)
    plain = kind(block_n=0, block_k=0)
    given = {name: value for name, value in vars(config).items() if value != getattr(plain, name)}
    return f"{'Tile' if kind is WeightTileConfig else 'Few'}({', '.join(f'{name}={value}' for name, value in given.items())})"


def kernel_of(config: Config, rows: int, k: int) -> tuple[object, ...]:
    """What the kernel of a product of T rows is compiled for."""
    if isinstance(config, FewRowsConfig):
        return (config, min(rows, MAX_ROWS), k)
    if isinstance(config, WeightTileConfig):
        config = replace(config, block_m=min(max(16, 1 << (rows - 1).bit_length()), config.block_m))
    return (config, k % 256)


def tried(results: dict[str, Any]) -> str:
    """The next best variants of a product, for a line of the log."""
    return ", ".join(f"{name} {ms:.4f}" for name, ms in list(results.items())[1:4])
