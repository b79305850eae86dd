"""For which fresh sequences keys and values are read from the step's own rows (prefill_fresh), and with which tiles.

Everywhere else, and for every head size that has no row in the table, `prefill` reads the paged cache. The table is edited after
a measurement: `python3 bench/gpu_attention.py --only fresh`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..rope import Rope

FEWEST_ROWS = 16
"""Longest sequence of a step, in new rows, below which another launch costs more than it saves."""
_COPY_ALIGN_BYTES = 16
"""Of the tensor memory accelerator: first element and rows."""


@dataclass(frozen=True, kw_only=True)
class FreshConfig:
    """Tiles of `prefill_fresh_kernel`: BLOCK_M query vectors (rows times the heads of a kv head) by BLOCK_N keys."""

    block_m: int
    block_n: int
    """Keys a step."""
    num_warps: int
    num_stages: int
    programs_per_processor: int = 1
    """Programs a streaming multiprocessor; each takes one tile after the other."""
    max_registers: int | None = None
    """Of a thread; fewer let two programs of 8 warps share a processor, one computing weights while the other multiplies."""


Fresh = FreshConfig | Literal["paged", "flash"] | None
"""Tiles for fresh sequences, or that they are read from the cache like all others, or go to FlashAttention (`kernels/flash.py`);
None: FlashAttention where it serves them, otherwise what `fresh_config` says."""

_FRESH_CONFIGS: dict[int, FreshConfig] = {}  # wider head size -> config; none has been measured yet


def fresh_config(q: Tensor, k: Tensor, v: Tensor, rope: Rope | None) -> FreshConfig | None:
    """The tiles for fresh sequences among q [T, H, D], k [T, KV, D], v [T, KV, Dv]; None where `prefill` serves them."""
    config = _FRESH_CONFIGS.get(max(q.shape[2], v.shape[2]))
    if config is None or why_not_fresh(q, k, v, rope) or q.shape[1] // k.shape[1] > config.block_m:
        return None
    return config


def why_not_fresh(q: Tensor, k: Tensor, v: Tensor, rope: Rope | None) -> str:
    """Why `prefill_fresh_kernel` cannot read these tensors; "" if it can.

    rope: with it, keys are read from a contiguous copy that the write kernel makes.
    """
    if q.dtype not in (torch.float16, torch.bfloat16) or k.dtype != q.dtype or v.dtype != q.dtype:
        return f"dtypes {q.dtype}, {k.dtype}, {v.dtype}; they must be equal and have 16 bits"
    if any(size < 16 or size > 256 or size & (size - 1) for size in (q.shape[2], v.shape[2])):
        return f"head sizes {q.shape[2]} and {v.shape[2]}; they must be powers of two from 16 to 256"
    for name, rows in (("k", k), ("v", v)):
        if name == "k" and rope is not None:
            continue
        aligned = rows.stride(0) * rows.element_size() % _COPY_ALIGN_BYTES == rows.data_ptr() % _COPY_ALIGN_BYTES == 0
        if rows.stride(1) != rows.shape[2] or not aligned:
            return (
                f"{name} has strides {rows.stride()}; its heads must lie side by side and its rows begin at multiples of "
                f"{_COPY_ALIGN_BYTES} bytes"
            )
    if q.is_cuda and _capability(q.device) < (9, 0):
        return f"compute capability {_capability(q.device)}; the tensor memory accelerator comes with 9.0"
    return ""


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
