"""Statistics of scores. Imports no torch."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt


def standard_error(values: npt.NDArray[np.float64]) -> float:
    """Of the mean: the sample's standard deviation over the root of its size; NaN for fewer than two values."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
