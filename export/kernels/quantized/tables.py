"""Which configuration takes which product: by number of rows of x and of columns of y, for each kind of stored weight.

The first line that fits is taken; its configuration is then fitted to the weight's groups (`fitted`). None: the weight is
dequantized and multiplied by the library. `bench/gpu_quant.py` measures these tables and prints them; they were chosen for an H200,
and on other GPUs they are right, and may not be the fastest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..gemm_tiled import TiledConfig
from .few_rows import FewRowsConfig, takes
from .packed_fp8 import PackedFp8Config
from .stored import Stored
from .weight_tile import WeightTileConfig

Tile = WeightTileConfig
Few = FewRowsConfig
_ANY = 1 << 62


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A line of a table: products of at most `rows` rows and `columns` columns (N) run in `config`; None: the library.

    Lines of `few_rows` are passed over for weights that it does not take.
    """

    rows: int
    columns: int
    config: FewRowsConfig | WeightTileConfig | None


INT4_TABLE = (
    Choice(rows=1, columns=8192, config=Few(block_n=8, block_k=2048, warps=2)),
    Choice(rows=1, columns=_ANY, config=Few(block_n=16, block_k=4096)),
    Choice(rows=2, columns=4096, config=Few(block_n=8, block_k=2048, warps=2)),
    Choice(rows=2, columns=_ANY, config=Few(block_n=4, block_k=1024, warps=1)),
    Choice(rows=16, columns=4096, config=Tile(block_n=64, block_k=256, splits=4, weight_left=True)),
    Choice(rows=32, columns=8192, config=Tile(block_n=64, block_k=128, splits=4, weight_left=True, scale_sums=True)),
    Choice(rows=16, columns=_ANY, config=Tile(block_n=128, block_k=128, scale_sums=True)),
    Choice(rows=32, columns=_ANY, config=Tile(block_n=64, block_k=128, splits=2, weight_left=True, scale_sums=True)),
    Choice(rows=64, columns=4096, config=Tile(block_n=64, block_k=128, splits=2, weight_left=True, scale_sums=True)),
    Choice(rows=64, columns=8192, config=Tile(block_n=64, block_k=128, weight_left=True, scale_sums=True)),
    Choice(rows=64, columns=_ANY, config=Tile(block_n=128, block_k=64, weight_left=True, scale_sums=True)),
    Choice(rows=128, columns=4096, config=Tile(block_n=64, block_k=128, weight_left=True, scale_sums=True)),
    Choice(rows=128, columns=8192, config=None),
    Choice(rows=128, columns=_ANY, config=Tile(block_n=128, block_k=128, weight_left=True, scale_sums=True)),
    Choice(rows=_ANY, columns=_ANY, config=None),
)
"""int4."""
FP4_TABLE = (
    Choice(rows=1, columns=4096, config=Few(block_n=4, block_k=2048, warps=2)),
    Choice(rows=1, columns=_ANY, config=Few(block_n=8, block_k=4096)),
    Choice(rows=2, columns=4096, config=Few(block_n=4, block_k=2048, warps=2)),
    Choice(rows=2, columns=_ANY, config=Few(block_n=8, block_k=4096)),
    Choice(rows=16, columns=8192, config=Tile(block_n=64, block_k=256, splits=4)),
    Choice(rows=16, columns=_ANY, config=Tile(block_n=64, block_k=256)),
    Choice(rows=64, columns=8192, config=Tile(block_n=64, block_k=128, splits=4, weight_left=True)),
    Choice(rows=256, columns=_ANY, config=Tile(block_n=128, block_k=128, warps=8, weight_left=True)),
    Choice(rows=_ANY, columns=_ANY, config=None),
)
"""e2m1: nvfp4 and mxfp4."""
BYTE_TABLE = (
    Choice(rows=1, columns=8192, config=Few(block_n=4, block_k=2048)),
    Choice(rows=1, columns=_ANY, config=Few(block_n=4, block_k=4096)),
    Choice(rows=2, columns=4096, config=Few(block_n=8, block_k=2048)),
    Choice(rows=64, columns=4096, config=Tile(block_n=64, block_k=128, splits=4, weight_left=True)),
    Choice(rows=32, columns=8192, config=Tile(block_n=64, block_k=128, splits=4, weight_left=True)),
    Choice(rows=16, columns=_ANY, config=Tile(block_n=64, block_k=128, weight_left=True)),
    Choice(rows=32, columns=_ANY, config=Tile(block_n=128, block_k=128, warps=8, weight_left=True)),
    Choice(rows=64, columns=8192, config=Tile(block_n=128, block_k=128, splits=4, weight_left=True)),
    Choice(rows=128, columns=4096, config=Tile(block_n=64, block_k=128, weight_left=True)),
    Choice(rows=128, columns=8192, config=Tile(block_n=128, block_k=128, warps=8, weight_left=True)),
    Choice(rows=128, columns=_ANY, config=Tile(block_n=128, block_k=64, weight_left=True, scale_sums=True)),
    Choice(rows=_ANY, columns=_ANY, config=None),
)
"""int8 and fp8."""
_TABLES = {"int4": INT4_TABLE, "fp4": FP4_TABLE, "int8": BYTE_TABLE, "fp8": BYTE_TABLE}

FEW_ROWS = 64
"""Up to so many rows of 8 bits are multiplied as numbers of 16 bits: the time is that of reading the weight."""
INT8_FEW = TiledConfig(block_m=64, block_n=128, block_k=128, warps=4, stages=4, persistent=False)
INT8_MANY = TiledConfig(block_m=128, block_n=256, block_k=128, warps=8, stages=3)
INT8_MANY_ROWS = 512
"""int8 by int8: above so many rows, the larger tiles."""
BLOCK_FP8 = TiledConfig(block_m=64, block_n=128, block_k=128, warps=4, stages=4)
PACKED_FP8 = PackedFp8Config(block_m=64, block_n=128, warps=4, stages=4)
PACKED_FP8_MOST = 512
"""int4 by fp8: above so many rows, the weight is dequantized and multiplied in 16 bits."""


def choose(weight: Stored, num_rows: int) -> FewRowsConfig | WeightTileConfig | None:
    """The configuration for T rows of 16 bits; None: the library's product."""
    for line in _TABLES[weight.kind]:
        config = line.config
        if num_rows <= line.rows and weight.rows <= line.columns and (takes(weight) or not isinstance(config, Few)):
            return fitted(config, weight) if isinstance(config, Tile) else config
    raise AssertionError(f"the last line of {weight.kind}'s table takes everything")


def fitted(config: WeightTileConfig, weight: Stored, *, on_sums: bool = False) -> WeightTileConfig:
    """The configuration with scales where the weight's groups let them be. on_sums: they must be there."""
    group = weight.group
    if group <= 0:
        return config
    if on_sums or (config.scale_sums and group >= config.block_k):
        return replace(config, scale_sums=True, block_k=min(config.block_k, group))
    return replace(config, scale_sums=False)


def int8_tile(num_rows: int) -> TiledConfig:
    """The configuration of int8 by int8 for T rows."""
    return INT8_FEW if num_rows <= INT8_MANY_ROWS else INT8_MANY
