"""Rounding on the grid of a format: what error compensation needs of a format.

A weight [N, K] and the scales of its rows, groups or blocks make a grid. `Grid.round` rounds single columns to it, so that an
algorithm can answer each column's error with the columns that follow; `Grid.choose` finds a group's scales anew, from what
compensation has made of its columns; and `Grid.encode` stores the result as `quantize_weight` would.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...graph.linear_format import BLOCK, LinearFormat
from ...graph.quant_formats import (
    QuantizedWeight,
    decoded_scale,
    quantize_weight,
    quantize_with_scale,
    round_scaled,
)

CANDIDATES = 16
"""Scales that are tried for each row, group or block (see `quantize_weight`)."""


@dataclass
class Grid:
    """Stored scales of a weight [N, K], and the same in float32: scale and zero_point [N or 1, groups along K].

    width: columns of a group.
    """

    format: LinearFormat
    parts: QuantizedWeight
    scale: Tensor
    zero_point: Tensor | None
    width: int

    @classmethod
    def of(cls, weight_NK: Tensor, format: LinearFormat, importance_K: Tensor | None = None) -> Grid:
        """The scales with the least squared error, each column's counted `importance_K` times."""
        parts = quantize_weight(weight_NK, format, candidates=CANDIDATES, importance=importance_K)
        width = format.group if format.group > 0 else weight_NK.shape[1]
        return cls(format, parts, *_spread_rows(parts, format, weight_NK.shape[0]), width)

    @property
    def grouped(self) -> bool:
        """Whether scales differ along K."""
        return self.format.group > 0

    def choose(self, columns: Tensor, index: int, importance: Tensor) -> None:
        """Finds the scales of the group that begins at column `index` anew, for its float32 columns [N, width or fewer]."""
        group = index // self.width
        outer = self.parts.global_scale
        parts = quantize_weight(columns, self.format, candidates=CANDIDATES, importance=importance, global_scale=outer)
        scale, zero_point = _spread_rows(parts, self.format, columns.shape[0])
        self.parts.scale[:, group] = parts.scale[:, 0]
        self.scale[:, group] = scale[:, 0]
        if parts.zero_point is not None and self.parts.zero_point is not None and self.zero_point is not None:
            assert zero_point is not None
            self.parts.zero_point[:, group] = parts.zero_point[:, 0]
            self.zero_point[:, group] = zero_point[:, 0]

    def round(self, column_N: Tensor, index: int) -> Tensor:
        """Column `index`, float32 [N], at the nearest points of the grid."""
        group = index // self.width
        zero_point = None if self.zero_point is None else self.zero_point[:, group]
        scale = self.scale[:, group]
        values = round_scaled(column_N / scale, zero_point, self.format)
        return (values if zero_point is None else values - zero_point) * scale

    def encode(self, restored_NK: Tensor) -> QuantizedWeight:
        """A matrix whose every value is on the grid, as it is stored."""
        return quantize_with_scale(restored_NK, self.format, self.parts)


def _spread_rows(parts: QuantizedWeight, format: LinearFormat, rows: int) -> tuple[Tensor, Tensor | None]:
    """(scale, zero point) in float32 of stored ones: [N, groups]; [1, 1] where the matrix has one."""
    scale = decoded_scale(parts.scale, parts.global_scale)
    zero_point = None if parts.zero_point is None else parts.zero_point.float()
    if format.block:
        return scale.repeat_interleave(BLOCK, 0)[:rows], None
    if format.group > 0:
        return scale, zero_point
    return scale.reshape(-1, 1), None if zero_point is None else zero_point.reshape(-1, 1)
