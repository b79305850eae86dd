"""Rotary embedding as an argument of paged attention, which then turns queries and keys itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...graph import ops as _ops  # noqa: F401  registers camshaft::rope

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Rope:
    """The angles of a step's rows: cos and sin [T, R], R <= D, each angle twice, as `camshaft::rope` has them.

    interleaved: pairs are dimensions (2i, 2i + 1) instead of (i, i + R/2).
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool

    def turn(self, x_THD: Tensor) -> Tensor:
        """x [T, heads, D] turned, in its dtype."""
        turned: Tensor = torch.ops.camshaft.rope(x_THD[None], self.cos[None], self.sin[None], self.interleaved)
        return turned[0]

    def check(self, q_THD: Tensor) -> None:
        """Raises ValueError where shapes, dtypes, strides or devices do not fit queries [T, H, D]."""
        num_tokens, _, head_dim = q_THD.shape
        for name, angles in (("cos", self.cos), ("sin", self.sin)):
            if angles.dim() != 2 or angles.shape[0] != num_tokens or angles.shape[1] % 2 or angles.shape[1] > head_dim:
                raise ValueError(
                    f"paged_attention: {name} has shape {tuple(angles.shape)}; it must be [{num_tokens}, R] with an even R "
                    f"of at most {head_dim}"
                )
            if angles.stride(1) != 1:
                raise ValueError(
                    f"paged_attention: {name} has strides {angles.stride()}; its last dimension must be contiguous"
                )
            if angles.device != q_THD.device:
                raise ValueError(
                    f"paged_attention: {name} is on {angles.device} but q is on {q_THD.device}; move it there"
                )
            if angles.dtype not in _DTYPES:
                raise ValueError(
                    f"paged_attention: {name} is {angles.dtype}, expected a floating dtype of 16 bits or more"
                )
        if self.cos.shape != self.sin.shape or self.cos.dtype != self.sin.dtype:
            raise ValueError(
                f"paged_attention: cos is {self.cos.dtype} {tuple(self.cos.shape)} and sin {self.sin.dtype} "
                f"{tuple(self.sin.shape)}; they must be alike"
            )
