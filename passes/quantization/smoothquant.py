"""SmoothQuant: channels of large activations are divided, and the weights that read them multiplied, before both are rounded.

Xiao, Lin, Seznec, Wu, Demouth, Han 2022, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models", section 4, equation 4: s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), y = (x / s) (W s)^T. alpha 0.5 shares the difficulty
equally.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .channels import Heads, tied

_SMALLEST = 1e-5
_RANGE = 2.0**12
"""Largest factor between the smallest and the largest scale, so that neither side leaves the range of 16-bit floats."""


def smoothing_scale(
    amax_K: Tensor, weights_NK: Sequence[Tensor], alpha: float = 0.5, *, heads: Heads | None = None
) -> Tensor:
    """s [K], float32, with a geometric mean of about 1: x is divided by it, the columns of all `weights` are multiplied.

    amax_K: max-abs of each channel of x. weights: the matrices that read x. heads: where x is attention's output (`channels.tied`).
    Raises ValueError for an alpha outside 0 to 1.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(
            f"SmoothQuant's alpha is {alpha}; allowed: 0 (weights as they are) to 1 (activations all alike)"
        )
    weight_amax = torch.stack([weight.abs().amax(0).float() for weight in weights_NK]).amax(0)
    scale = amax_K.float().clamp(min=_SMALLEST) ** alpha / weight_amax.clamp(min=_SMALLEST) ** (1 - alpha)
    return centered(tied(scale, heads))


def centered(scale_K: Tensor) -> Tensor:
    """A positive scale over the square root of largest times smallest, within `_RANGE`."""
    scale = scale_K / (scale_K.amax() * scale_K.amin()).sqrt()
    return scale.clamp(_RANGE**-0.5, _RANGE**0.5)
