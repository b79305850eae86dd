"""Weights to the formats of `linear_format` and back: round to nearest, and the search for the scale that errs least.

Memory: a weight is quantized some rows at a time, so that float32 copies are of those rows alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .linear_format import BLOCK, PACKED_KINDS, LinearFormat, Part, part_shapes
from .quant_ops import unpack
from .small_floats import (
    E2M1_MAX,
    E4M3_MAX,
    ceil_e8m0,
    decode_e8m0,
    e2m1_codes,
    floor_e8m0,
    pack_halves,
    quotient,
    round_to_e2m1,
)

__all__ = [
    "LinearFormat",
    "QuantizedWeight",
    "decoded_scale",
    "dequantize_weight",
    "effective_scale",
    "quantize_weight",
    "quantize_with_scale",
    "round_scaled",
    "scale_candidates",
]

_CHUNK_ELEMENTS = 1 << 22
"""Of a weight that are quantized at a time."""
_TINY = torch.finfo(torch.float32).tiny
_INT_LIMITS = {"int8": 127.0, "int4": 7.5}
"""What max-abs is mapped to. int4 is asymmetric, -8 to 7: half a step is lost on one side, which costs less than a coarser step."""


@dataclass(frozen=True)
class QuantizedWeight:
    """The tensors of a stored weight; shapes and dtypes as in `linear_format`."""

    values: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    global_scale: Tensor | None = None


def quantize_weight(
    weight_NK: Tensor,
    format: LinearFormat,
    *,
    candidates: int = 1,
    importance: Tensor | None = None,
    global_scale: Tensor | None = None,
) -> QuantizedWeight:
    """A float matrix [N, K] rounded to nearest, where it is.

    candidates: scales that are tried for each row, group or block, and the one with the least squared error is taken; 1: the scale
    that max-abs gives, as the format's reference has it. importance: weight of the columns' squared errors [K], or for groups
    along K the matrices B [K / g, g, g] of errors e B e^T; None: all alike. global_scale []: of nvfp4, where it is known; None:
    from max-abs. Raises ValueError where groups do not divide K.
    """
    parts = _empty_parts(weight_NK, format)
    if "global_scale" in parts:
        found = (
            quotient(_amax(weight_NK), E2M1_MAX * E4M3_MAX).clamp(min=_TINY) if global_scale is None else global_scale
        )
        parts["global_scale"].copy_(found)
    if format.group == -1:
        parts["scale"].copy_(quotient(_amax(weight_NK), E4M3_MAX).clamp(min=_TINY))
    for rows in _row_chunks(weight_NK, format):
        wide = weight_NK[rows].float()
        weights = _group_importance(importance, wide, format)
        groups = _to_groups(wide, format)
        if format.group == -1:
            _store_codes(groups, parts["scale"].expand(1, 1, 1), None, wide, format, parts, rows)
            continue
        scale, zero_point = _search(groups, format, candidates, parts.get("global_scale"), weights)
        _store_codes(groups, decoded_scale(scale, parts.get("global_scale")), zero_point, wide, format, parts, rows)
        at = slice(rows.start // BLOCK, (rows.start + wide.shape[0] + BLOCK - 1) // BLOCK) if format.block else rows
        parts["scale"][at] = scale.reshape(parts["scale"][at].shape)
        if zero_point is not None:
            parts["zero_point"][at] = zero_point.reshape(parts["zero_point"][at].shape).to(torch.uint8)
    return _weight_of(parts)


def quantize_with_scale(weight_NK: Tensor, format: LinearFormat, given: QuantizedWeight) -> QuantizedWeight:
    """A float matrix [N, K] rounded to nearest with the scales and zero points of `given`, whose values are not read."""
    parts = _empty_parts(weight_NK, format, only_values=True)
    for rows in _row_chunks(weight_NK, format):
        wide = weight_NK[rows].float()
        scale, zero_point = given.scale, given.zero_point
        if format.block:
            scale = scale[rows.start // BLOCK : (rows.start + wide.shape[0] + BLOCK - 1) // BLOCK]
        elif format.group >= 0:
            scale, zero_point = scale[rows], None if zero_point is None else zero_point[rows]
        groups = _to_groups(wide, format)
        shape = (1, 1, 1) if format.group == -1 else (*groups.shape[:-1], 1)
        decoded = decoded_scale(scale, given.global_scale).reshape(shape)
        offset = None if zero_point is None else zero_point.float().reshape(shape)
        _store_codes(groups, decoded, offset, wide, format, parts, rows)
    return QuantizedWeight(parts["values"], given.scale, given.zero_point, given.global_scale)


def _empty_parts(weight_NK: Tensor, format: LinearFormat, *, only_values: bool = False) -> dict[Part, Tensor]:
    shapes = part_shapes(format, tuple(weight_NK.shape))
    return {
        name: torch.empty(shape, dtype=dtype, device=weight_NK.device)
        for name, (shape, dtype) in shapes.items()
        if not only_values or name == "values"
    }


def _row_chunks(weight_NK: Tensor, format: LinearFormat) -> list[slice]:
    """The rows, some at a time; whole blocks where the format has them."""
    step = max(1, _CHUNK_ELEMENTS // max(weight_NK.shape[1], 1))
    step = max(BLOCK, step // BLOCK * BLOCK) if format.block else step
    return [slice(begin, begin + step) for begin in range(0, weight_NK.shape[0], step)]


def _weight_of(parts: dict[Part, Tensor]) -> QuantizedWeight:
    return QuantizedWeight(parts["values"], parts["scale"], parts.get("zero_point"), parts.get("global_scale"))


def dequantize_weight(parts: QuantizedWeight, format: LinearFormat, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix [N, K] that stored tensors mean: computed in float32, rounded once to `dtype`."""
    values = _stored_values(parts.values, format)
    if parts.zero_point is not None:
        values = values - _spread(parts.zero_point.float(), values, format)
    return (values * effective_scale(parts.scale, parts.global_scale, values, format)).to(dtype)


def effective_scale(scale: Tensor, global_scale: Tensor | None, values_NK: Tensor, format: LinearFormat) -> Tensor:
    """Scales in float32, of a shape that broadcasts over values [N, K]."""
    wide = decode_e8m0(scale) if scale.dtype == torch.uint8 else scale.float()
    if global_scale is not None:
        wide = wide * global_scale.float()
    return _spread(wide, values_NK, format)


def _stored_values(values: Tensor, format: LinearFormat) -> Tensor:
    if format.weights not in PACKED_KINDS:
        return values.float() + 128.0 if format.weights == "int8" and format.zero_point else values.float()
    if format.weights != "int4":
        return unpack(values, "fp4")
    signed = unpack(values, "int4")
    return torch.where(signed < 0, signed + 16, signed) if format.zero_point else signed


def _spread(scale: Tensor, values_NK: Tensor, format: LinearFormat) -> Tensor:
    if format.block:
        rows, dim = values_NK.shape
        return scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :dim]
    if format.group > 0:
        return scale.repeat_interleave(format.group, 1)
    return scale[:, None] if format.group == 0 else scale


def _amax(weight_NK: Tensor) -> Tensor:
    low, high = torch.aminmax(weight_NK)
    return torch.maximum(-low, high).float()


# ------------------------------------------------------------------------------------------------------------ one chunk
def _store_codes(
    groups: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    wide_NK: Tensor,
    format: LinearFormat,
    parts: dict[Part, Tensor],
    rows: slice,
) -> None:
    """Rounds groups of some rows with their decoded scales, and writes them to the values."""
    codes = _from_groups(_codes(groups, scale, zero_point, format), wide_NK, format)
    parts["values"][rows] = pack_halves(codes) if format.weights in PACKED_KINDS else codes


def _to_groups(wide_NK: Tensor, format: LinearFormat) -> Tensor:
    """[N, K] as [A, B, elements that share a scale]; blocks at the edges are filled with zeros."""
    rows, dim = wide_NK.shape
    if format.block:
        padded = torch.nn.functional.pad(wide_NK, (0, -dim % BLOCK, 0, -rows % BLOCK))
        tiles = padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
        return tiles.transpose(1, 2).flatten(2)
    if format.group > 0:
        return wide_NK.unflatten(1, (-1, format.group))
    return wide_NK[:, None] if format.group == 0 else wide_NK[None]


def _from_groups(groups: Tensor, wide_NK: Tensor, format: LinearFormat) -> Tensor:
    rows, dim = wide_NK.shape
    if format.block:
        tiles = groups.unflatten(2, (BLOCK, BLOCK)).transpose(1, 2)
        return tiles.flatten(0, 1).flatten(1, 2)[:rows, :dim]
    return groups.reshape(rows, dim)


def _search(
    groups: Tensor, format: LinearFormat, candidates: int, global_scale: Tensor | None, importance: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The stored scale [A, B, 1] and zero point of each group with the least squared error among `candidates`.

    importance: see `_group_importance`.
    """
    best: tuple[Tensor, Tensor | None] | None = None
    least = torch.empty(0)
    for factor in _factors(format, candidates):
        scale, zero_point = _scale_of(groups, format, factor, global_scale)
        if candidates == 1:
            return scale, zero_point
        decoded = decoded_scale(scale, global_scale)
        error = _squared(_restored(groups, decoded, zero_point, format) - groups, importance)
        if best is None:
            best, least = (scale, zero_point), error
            continue
        better = error < least
        zero_point = None if zero_point is None or best[1] is None else torch.where(better, zero_point, best[1])
        best = _where(better, scale, best[0]), zero_point
        least = torch.minimum(error, least)
    assert best is not None
    return best


def scale_candidates(
    groups: Tensor, format: LinearFormat, candidates: int, global_scale: Tensor | None = None
) -> list[tuple[Tensor, Tensor | None]]:
    """The (stored scale, zero point), [A, B, 1] each, that are tried for groups [A, B, elements] of float32 weights."""
    return [_scale_of(groups, format, factor, global_scale) for factor in _factors(format, candidates)]


def _where(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    if yes.dtype != torch.float8_e4m3fn:
        return torch.where(condition, yes, no)
    return torch.where(condition, yes.view(torch.uint8), no.view(torch.uint8)).view(yes.dtype)  # float8 has no where


def _group_importance(importance: Tensor | None, wide_NK: Tensor, format: LinearFormat) -> Tensor | None:
    """Weights of squared errors: of the groups' shape [A, B, g], or a matrix for each group along K [1, B, g, g]."""
    if importance is None:
        return None
    if importance.dim() == 3:
        assert format.group > 0 and not format.block, format
        return importance.float()[None]
    return _to_groups(importance.float().expand(wide_NK.shape), format)


def _squared(difference: Tensor, importance: Tensor | None) -> Tensor:
    """Weighted squared errors [A, B, 1] of groups [A, B, g]."""
    if importance is None:
        return difference.square_().sum(-1, keepdim=True)
    if importance.dim() == 4:
        product = torch.matmul(difference.transpose(0, 1), importance[0]).transpose(0, 1)
        return product.mul_(difference).sum(-1, keepdim=True)
    return difference.square_().mul_(importance).sum(-1, keepdim=True)


def _factors(format: LinearFormat, candidates: int) -> list[float]:
    """What max-abs is multiplied by in each candidate; the first is 1.

    Integers gain from cutting the largest off; of small floats every power of two has the same steps, and where max-abs falls on
    them is chance: from 1 to 2 (fp8), or the six steps of e2m1. Powers of two alone (MX) have two candidates.
    """
    if format.weights in ("mxfp4", "mxfp8"):
        other = 2.0 if format.weights == "mxfp4" else 0.5
        return [1.0, other][: max(1, candidates)]
    if format.weights == "fp8":
        return [2 ** (step / candidates) for step in range(candidates)]
    if format.weights == "nvfp4":
        return [1.0, *(0.8 + 0.8 * step / max(candidates - 2, 1) for step in range(candidates - 1))]
    low = 0.5 if format.weights == "int4" else 0.8
    return [1 - (1 - low) * step / max(candidates, 1) for step in range(candidates)]


def _scale_of(
    groups: Tensor, format: LinearFormat, factor: float, global_scale: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The stored scale [A, B, 1] (float32, or what the format stores) and zero point for max-abs times `factor`."""
    if format.zero_point:
        low = groups.amin(-1, keepdim=True).clamp(max=0) * factor
        high = groups.amax(-1, keepdim=True).clamp(min=0) * factor
        top = 15.0 if format.weights == "int4" else 255.0
        scale = quotient(high - low, top).clamp(min=_TINY)
        return scale, (-low / scale).round().clamp(0, top)
    amax = groups.abs().amax(-1, keepdim=True) * factor
    if format.weights == "mxfp4":
        return floor_e8m0(amax, 2), None
    if format.weights == "mxfp8":
        return ceil_e8m0(amax, E4M3_MAX), None
    if global_scale is not None:
        return (amax / (E2M1_MAX * global_scale)).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn), None
    limit = E4M3_MAX if format.weights == "fp8" else _INT_LIMITS[format.weights]
    return quotient(amax, limit).clamp(min=_TINY), None


def decoded_scale(scale: Tensor, global_scale: Tensor | None) -> Tensor:
    """A stored scale in float32, at least the smallest normal number, to divide by."""
    wide = decode_e8m0(scale) if scale.dtype == torch.uint8 else scale.float()
    return (wide if global_scale is None else wide * global_scale).clamp(min=_TINY)


def round_scaled(scaled: Tensor, zero_point: Tensor | None, format: LinearFormat) -> Tensor:
    """Values before they are packed: weights / scale, rounded and saturated, float32; of fp8 and e2m1 as they round."""
    if format.weights in ("fp8", "mxfp8"):
        return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()
    if format.weights in ("nvfp4", "mxfp4"):
        return round_to_e2m1(scaled)
    if zero_point is not None:
        return (scaled.round() + zero_point).clamp(0, 15 if format.weights == "int4" else 255)
    return scaled.round().clamp(-8, 7) if format.weights == "int4" else scaled.round().clamp(-127, 127)


def _restored(groups: Tensor, scale: Tensor, zero_point: Tensor | None, format: LinearFormat) -> Tensor:
    values = round_scaled(groups / scale, zero_point, format)
    return (values if zero_point is None else values - zero_point) * scale


def _codes(groups: Tensor, scale: Tensor, zero_point: Tensor | None, format: LinearFormat) -> Tensor:
    """What is stored of each value, one element each: float8_e4m3fn, int8, or four bits in uint8."""
    values = round_scaled(groups / scale, zero_point, format)
    if format.weights in ("fp8", "mxfp8"):
        return values.to(torch.float8_e4m3fn)
    if format.weights in ("nvfp4", "mxfp4"):
        return e2m1_codes(values)
    if format.weights == "int8":
        return (values if zero_point is None else values - 128).to(torch.int8)
    return values.to(torch.int8).view(torch.uint8) & 15
