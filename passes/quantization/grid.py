"""Rounding on the grid of a format: what error compensation needs of a format.

A weight [N, K] and the scales of its rows, groups or blocks make a grid. `Grid.round` rounds single columns to it, so that an
algorithm can answer each column's error with the columns that follow; `Grid.choose` finds a group's scales anew, from what
compensation has made of its columns; and `Grid.encode` stores the result as `quantize_weight` would.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...graph.linear_format import BLOCK, LinearFormat
from ...graph.quant_formats import (
    QuantizedWeight,
    decoded_scale,
    quantize_weight,
    quantize_with_scale,
    round_scaled,
    scale_candidates,
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

    def choose(self, columns: Tensor, index: int, factor: Tensor) -> None:
        """Finds the scales of the group that begins at column `index` anew, for its float32 columns [N, width].

        Every candidate is tried with error compensation: `factor` [width, width] are the group's rows and columns of the upper
        Cholesky factor of the Hessian's inverse, and the scale that loses least by the group's end is taken.
        """
        group, outer = index // self.width, self.parts.global_scale
        candidates = scale_candidates(columns[:, None], self.format, CANDIDATES, outer)
        scales = torch.stack([decoded_scale(scale, outer)[:, 0, 0] for scale, _ in candidates])
        zero_points = [zero_point[:, 0, 0] for _, zero_point in candidates if zero_point is not None]
        offsets = torch.stack(zero_points) if zero_points else None
        best = _compensated_loss(columns, factor, scales, offsets, self.format).argmin(0, keepdim=True)
        self.scale[:, group] = scales.gather(0, best)[0]
        stored = torch.stack([_bits(scale[:, 0, 0]) for scale, _ in candidates]).gather(0, best)[0]
        self.parts.scale[:, group] = stored.view(self.parts.scale.dtype)
        if offsets is not None and self.zero_point is not None and self.parts.zero_point is not None:
            self.zero_point[:, group] = offsets.gather(0, best)[0]
            self.parts.zero_point[:, group] = self.zero_point[:, group].to(torch.uint8)

    def with_scale(self, scale: Tensor) -> Grid:
        """The grid with other float32 scales, of the shape of `scale`; for formats whose stored scales are float32."""
        assert self.parts.scale.dtype == torch.float32
        parts = replace(self.parts, scale=scale.reshape(self.parts.scale.shape).contiguous())
        return replace(self, parts=parts, scale=scale)

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


def _compensated_loss(
    columns: Tensor, factor: Tensor, scales: Tensor, zero_points: Tensor | None, format: LinearFormat
) -> Tensor:
    """What rounding columns [N, g] one by one, errors answered by those behind, costs each row with each scale [C, N]: [C, N]."""
    work = columns.expand(scales.shape[0], *columns.shape).clone()
    loss = torch.zeros_like(scales)
    for column in range(columns.shape[1]):
        value = work[:, :, column].clone()
        rounded = round_scaled(value / scales, zero_points, format)
        rounded = (rounded if zero_points is None else rounded - zero_points) * scales
        error = (value - rounded) / factor[column, column]
        loss += error.square()
        work[:, :, column + 1 :] -= error[:, :, None] * factor[column, column + 1 :]
    return loss


def _bits(scale: Tensor) -> Tensor:
    """Stored scales as a dtype that can be indexed."""
    return scale.view(torch.uint8) if scale.dtype == torch.float8_e4m3fn else scale
