"""The order in which programs take the tiles of a product [T, N]: in groups of rows of tiles, so that neighbours share weights.

    0  2  4  6        rows of tiles (T) down, columns (N) to the right, groups of 2 rows
    1  3  5  7
    8  9 10 11        the last group has the rows that are left

Programs that run at the same time then read few rows of x and few of the weight, and find them in the L2 cache. Import this module
only where Triton is installed.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def grouped_tile(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """(row, column) of the tile with a number, of `tiles_m` by `tiles_n`, in groups of GROUP rows."""
    per_group = GROUP * tiles_n
    first = tile // per_group * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    return first + tile % per_group % height, tile % per_group // height
