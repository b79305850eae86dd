"""AWQ: input channels that matter get finer steps, by a scale for each channel that is searched; then clipping, group by group.

Lin, Tang, Tang, Yang, Chen, Wang, Dang, Gan, Han 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and
Acceleration". Section 3.2: y = (x / s) Q(W s)^T with s_j = (mean |x_j|)^a, and a in [0, 1) by grid search for the least squared
error of the output; a second family of candidates also divides by the weights' own size, as the authors' code does:
s_j = (mean |x_j|)^a / (mean |W_j| / max of its group)^(1 - a). Clipping (same code): a group's range is cut to the share of its
max-abs that gives the least error of the group's part of the output.

Errors are exact over all calibration tokens: with M = mean of x x^T the squared error of a matrix D is tr(D M D^T), so no token
is kept, and a candidate costs one product [N, K] x [K, K].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...graph.linear_format import LinearFormat
from ...graph.quant_formats import QuantizedWeight, dequantize_weight, quantize_weight
from .channels import Heads, tied
from .grid import CANDIDATES
from .smoothquant import centered
from .statistics import InputStatistics

_PART_ELEMENTS = 1 << 24
"""Of a weight whose error is found at a time: what is in memory besides the weights and the moments."""
STEPS = 20
"""Exponents that are tried in each family, as in the paper."""


@dataclass(frozen=True)
class ScaleSearch:
    """Result of the search: s [K] float32, or None where no scale beats none; the errors with it and without, relative to |y|^2."""

    scale: Tensor | None
    error: float
    plain_error: float


def search_scale(
    weights_NK: Sequence[Tensor],
    statistics: InputStatistics,
    format: LinearFormat,
    *,
    steps: int = STEPS,
    heads: Heads | None = None,
    name: str = "the layer",
) -> ScaleSearch:
    """The channel scale of the matrices that read one x.

    heads: where x is attention's output, see `channels.tied`. Raises ValueError without second moments.
    """
    moment = statistics.require_moment(name)
    wide = [weight.float() for weight in weights_NK]
    energy = sum(_energy(weight, moment) for weight in wide)
    if energy <= 0:
        return ScaleSearch(None, 0.0, 0.0)
    plain = best = _error(wide, None, moment, format) / energy
    chosen: Tensor | None = None
    for candidate in _candidates(wide, statistics, format, steps):
        scale = tied(candidate, heads)
        error = _error(wide, scale, moment, format) / energy
        if error < best:
            chosen, best = scale, error
    return ScaleSearch(chosen, best, plain)


def clip(
    weight_NK: Tensor, moment_KK: Tensor, format: LinearFormat, *, candidates: int = CANDIDATES
) -> QuantizedWeight:
    """A matrix rounded to nearest, the range of each group (row, block) cut for the least error of its part of the output."""
    return quantize_weight(
        weight_NK, format, candidates=candidates, importance=group_moments(moment_KK, format, weight_NK.shape[1])
    )


def group_moments(moment_KK: Tensor, format: LinearFormat, dim: int) -> Tensor:
    """What weighs errors inside of a group: the diagonal blocks [K / g, g, g] of the moments; their diagonal [K] without groups."""
    if format.group <= 0 or format.block:
        return moment_KK.diagonal().clamp(min=0)
    group = format.group
    blocks = moment_KK.unflatten(0, (dim // group, group)).unflatten(2, (dim // group, group))
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def _candidates(weights: list[Tensor], statistics: InputStatistics, format: LinearFormat, steps: int) -> list[Tensor]:
    x = statistics.mean_abs.float().clamp(min=1e-4)
    w = _relative_size(torch.cat(weights), format).clamp(min=1e-4)
    found = []
    for step in range(1, steps):
        exponent = step / steps
        found.append(centered(x**exponent))
        found.append(centered(x**exponent / w ** (1 - exponent)))
    return found


def _relative_size(weight_NK: Tensor, format: LinearFormat) -> Tensor:
    """Mean over rows of |w| as a share of its group's max-abs: [K]."""
    dim = weight_NK.shape[1]
    groups = weight_NK.abs().unflatten(1, (-1, format.group if 0 < format.group < dim else dim))
    return (groups / groups.amax(-1, keepdim=True).clamp(min=1e-12)).flatten(1).mean(0)


def _error(weights: list[Tensor], scale_K: Tensor | None, moment: Tensor, format: LinearFormat) -> float:
    total = torch.zeros((), device=moment.device)
    for weight in weights:
        for part in weight.split(_rows_at_a_time(weight, format)):
            scaled = part if scale_K is None else part * scale_K
            restored = dequantize_weight(quantize_weight(scaled, format), format)
            difference = (restored if scale_K is None else restored / scale_K) - part
            total += ((difference @ moment) * difference).sum()
    return float(total)


def _rows_at_a_time(weight_NK: Tensor, format: LinearFormat) -> int:
    """How many rows of a matrix are rounded at a time: all of them where others have a say in a row's scale."""
    if format.block or format.group == -1 or format.weights == "nvfp4":
        return weight_NK.shape[0]
    return max(1, _PART_ELEMENTS // weight_NK.shape[1])


def _energy(matrix_NK: Tensor, moment_KK: Tensor) -> float:
    """tr(D M D^T)."""
    parts = matrix_NK.split(max(1, _PART_ELEMENTS // matrix_NK.shape[1]))
    return float(torch.stack([((part @ moment_KK) * part).sum() for part in parts]).sum())
