"""Rounding on the grid of a format: what error compensation needs of a format.

A weight [N, K] and the scales of its rows, groups or blocks make a grid. `Grid.round` rounds single columns to it, so that an
algorithm can answer each column's error with the columns that follow; `Grid.choose` finds a group's scales anew, from what
compensation has made of its columns; `Grid.improve` finds scales and values of a group anew when all others are known; and
`Grid.encode` stores the result as `quantize_weight` would.
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
from ...graph.small_floats import E4M3_MAX

CANDIDATES = 16
"""Scales that are tried for each row, group or block (see `quantize_weight`)."""
_MOST = 2.0
"""Largest factor by which a scale is fitted to values."""


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
        candidates = _Scales.of(columns, self.format, self.parts.global_scale)
        loss, _ = _compensated(columns, factor, candidates, self.format)
        best = loss.argmin(0, keepdim=True)
        self._take(index // self.width, candidates.at(best))

    def improve(self, current: Tensor, target: Tensor, index: int, hessian: Tensor, factor: Tensor) -> Tensor:
        """The group that begins at column `index`, nearer to `target`: float32 values on the grid, whose scales follow, [N, width].

        current, target [N, width]: its values on the grid as it is, and what would be best, by the loss (v - t) H (v - t)^T of each
        row. hessian, factor [width, width]: H and the upper Cholesky factor of its inverse. The scales of `choose`, the one in use
        and the one that fits the values best are tried with error compensation; rows that gain nothing stay as they are.
        """
        group = index // self.width
        zero_points = None if self.zero_point is None else self.zero_point[None, :, group].clone()
        present = _Scales(_bits(self.parts.scale[:, group])[None], self.scale[None, :, group].clone(), zero_points)
        candidates = _Scales.of(target, self.format, self.parts.global_scale)
        candidates = candidates.joined(present.fitted(current, target, hessian, self.parts)).joined(present)
        loss, rounded = _compensated(target, factor, candidates, self.format)
        least, best = loss.min(0, keepdim=True)
        missing = current - target
        stays = ((missing @ hessian) * missing).sum(1) <= least[0]
        self._take(group, candidates.at(best.masked_fill(stays, len(loss) - 1)))
        found = rounded.gather(0, best[:, :, None].expand(1, *target.shape))[0]
        return torch.where(stays[:, None], current, found)

    def _take(self, group: int, chosen: _Scales) -> None:
        """Gives the rows' groups their scales, [1, N]."""
        self.scale[:, group] = chosen.decoded[0]
        self.parts.scale[:, group] = chosen.stored[0].view(self.parts.scale.dtype)
        if chosen.zero_points is not None and self.zero_point is not None and self.parts.zero_point is not None:
            self.zero_point[:, group] = chosen.zero_points[0]
            self.parts.zero_point[:, group] = chosen.zero_points[0].to(torch.uint8)

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


@dataclass(frozen=True)
class _Scales:
    """Candidates for the scales of one group's rows, [C, N] each: as stored (`_bits`), in float32, and zero points."""

    stored: Tensor
    decoded: Tensor
    zero_points: Tensor | None

    @classmethod
    def of(cls, columns_NG: Tensor, format: LinearFormat, global_scale: Tensor | None) -> _Scales:
        """What `quant_formats.scale_candidates` tries for float32 columns."""
        found = scale_candidates(columns_NG[:, None], format, CANDIDATES, global_scale)
        zero_points = [zero_point[:, 0, 0] for _, zero_point in found if zero_point is not None]
        return cls(
            torch.stack([_bits(scale[:, 0, 0]) for scale, _ in found]),
            torch.stack([decoded_scale(scale, global_scale)[:, 0, 0] for scale, _ in found]),
            torch.stack(zero_points) if zero_points else None,
        )

    def at(self, index: Tensor) -> _Scales:
        """The candidate `index` [1, N] of each row."""
        zero_points = None if self.zero_points is None else self.zero_points.gather(0, index)
        return _Scales(self.stored.gather(0, index), self.decoded.gather(0, index), zero_points)

    def joined(self, other: _Scales) -> _Scales:
        """These, then the other ones."""
        zero_points = None
        if self.zero_points is not None and other.zero_points is not None:
            zero_points = torch.cat([self.zero_points, other.zero_points])
        return _Scales(torch.cat([self.stored, other.stored]), torch.cat([self.decoded, other.decoded]), zero_points)

    def fitted(self, current: Tensor, target: Tensor, hessian: Tensor, parts: QuantizedWeight) -> _Scales:
        """The scales that bring `current` [N, g], made with these [1, N], nearest to `target` by least squares under H."""
        weighted = current @ hessian
        energy = (weighted * current).sum(1)
        factor = (weighted * target).sum(1) / energy.clamp(min=torch.finfo(torch.float32).tiny)
        scale = self.decoded * torch.where((factor > 1 / _MOST) & (factor < _MOST), factor, 1.0)
        if parts.scale.dtype == torch.float8_e4m3fn:
            assert parts.global_scale is not None
            stored = (scale / parts.global_scale).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
            return _Scales(_bits(stored), decoded_scale(stored, parts.global_scale), self.zero_points)
        if parts.scale.dtype == torch.uint8:  # powers of two: the candidates have the neighbours
            return self
        return _Scales(scale, scale, self.zero_points)


def _compensated(columns: Tensor, factor: Tensor, scales: _Scales, format: LinearFormat) -> tuple[Tensor, Tensor]:
    """Rounds columns [N, g] one by one, errors answered by those behind, with each scale: (loss [C, N], values [C, N, g])."""
    zero_points = scales.zero_points
    work = columns.expand(scales.decoded.shape[0], *columns.shape).clone()
    loss = torch.zeros_like(scales.decoded)
    for column in range(columns.shape[1]):
        value = work[:, :, column].clone()
        rounded = round_scaled(value / scales.decoded, zero_points, format)
        work[:, :, column] = (rounded if zero_points is None else rounded - zero_points) * scales.decoded
        error = (value - work[:, :, column]) / factor[column, column]
        loss += error.square()
        work[:, :, column + 1 :] -= error[:, :, None] * factor[column, column + 1 :]
    return loss, work


def _bits(scale: Tensor) -> Tensor:
    """Stored scales as a dtype that can be indexed."""
    return scale.view(torch.uint8) if scale.dtype == torch.float8_e4m3fn else scale
