"""Percentiles of one run, and median and spread over repeats. Imports no torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence


def percentile(values: Sequence[float], share: float, weights: Sequence[float] | None = None) -> float:
    """The smallest value that at least `share` (in [0, 1]) of the weight does not exceed; NaN of nothing."""
    pairs = sorted(zip(values, weights if weights is not None else [1.0] * len(values)))
    needed = share * sum(weight for _, weight in pairs)
    seen = 0.0
    for value, weight in pairs:
        seen += weight
        if weight and seen >= needed - 1e-9:
            return value
    return math.nan


def distribution(name: str, values: Sequence[float], weights: Sequence[float] | None = None) -> dict[str, float]:
    """{name_mean, name_p50, name_p90, name_p99} of values; empty where there are none."""
    weight = list(weights) if weights is not None else [1.0] * len(values)
    total = sum(weight)
    if not total:
        return {}
    mean = sum(value * w for value, w in zip(values, weight)) / total
    shares = {f"{name}_p{share}": percentile(values, share / 100, weight) for share in (50, 90, 99)}
    return {f"{name}_mean": mean, **shares}


def summarize(repeats: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Metric -> {median, min, max} over the repeats that have it."""
    names = dict.fromkeys(name for repeat in repeats for name in repeat)
    summary = {}
    for name in names:
        values = [repeat[name] for repeat in repeats if name in repeat]
        summary[name] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return summary
