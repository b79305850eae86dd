"""FlashAttention 4 for prompts without cached tokens, where it is installed: `pip install 'camshaft[flash-attention]'`.

Such prompts attend to rows of their own step, so no paged cache and no fp8 is in the way of a library's kernel. Decode steps and
sequences with cached tokens stay with our own kernels. Shah et al. 2024, "FlashAttention-3"; the package is `flash-attn-4` of
https://github.com/Dao-AILab/flash-attention, in CuTe DSL, which compiles at the first call and keeps its kernels on disk.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .state import AttentionState

logger = logging.getLogger(__name__)

SWITCH = "CAMSHAFT_FLASH_ATTENTION"
"""Environment variable: 0 leaves the package alone."""
FEWEST_ROWS = 128
"""Longest sequence of a step, in new rows, from which it is taken."""
_ARGUMENTS = {
    "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale",
    "causal", "window_size_left", "out",
}  # fmt: skip
"""Of the package's forward function that are used here."""
_MAX_HEAD_DIM = 256
_HEAD_DIM_STEP = 8


@functools.cache
def forward() -> Callable[..., Any] | None:
    """The package's forward function; None where it is not installed, switched off, or not as expected (then the log says why)."""
    if os.environ.get(SWITCH) == "0" or importlib.util.find_spec("flash_attn") is None:
        return None
    from ..cache import cache_root

    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(cache_root() / "flash-attention"))
    try:
        # the public function has no `out`, and copying the results would cost more than it gains
        from flash_attn.cute.interface import _flash_attn_fwd as function
    except ImportError as error:
        logger.warning("FlashAttention is left alone: %s (camshaft[flash-attention] installs the right package)", error)
        return None
    missing = _ARGUMENTS - set(inspect.signature(function).parameters)
    if missing:
        logger.warning("FlashAttention is left alone: this release has no arguments %s", ", ".join(sorted(missing)))
        return None
    found: Callable[..., Any] = function
    return found


def why_not_flash(
    q: Tensor, k: Tensor, v: Tensor, *, softcap: float, sinks: Tensor | None, alibi: Tensor | None
) -> str:
    """Why prompts q [T, H, D] over k [T, KV, D] and v [T, KV, Dv] cannot go to the package; "" if they can."""
    if forward() is None:
        return "FlashAttention is not installed"
    if q.dtype not in (torch.float16, torch.bfloat16) or k.dtype != q.dtype or v.dtype != q.dtype:
        return f"dtypes {q.dtype}, {k.dtype}, {v.dtype}; they must be equal and have 16 bits"
    if any(size > _MAX_HEAD_DIM or size % _HEAD_DIM_STEP for size in (q.shape[2], v.shape[2])):
        return f"head sizes {q.shape[2]} and {v.shape[2]}; multiples of {_HEAD_DIM_STEP} to {_MAX_HEAD_DIM} are taken"
    if softcap or sinks is not None or alibi is not None:
        return "soft caps, sinks and ALiBi have kernels of our own only"
    if not q.is_cuda or torch.cuda.get_device_capability(q.device)[0] not in (9, 10):
        return "it runs on compute capabilities 9.x and 10.x"
    return ""


def attend_fresh(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    window: int,
    max_query_len: int,
    state: AttentionState,
) -> None:
    """Causal attention of the sequences with two rows or more and no cached token, into their rows of `out` [T, H, Dv].

    q, k: turned. query_start [S + 1] and seq_lens [S], int32, may change between replays of a CUDA graph; max_query_len and
    the shapes may not. window: most keys a row sees, 0 for all.
    """
    call = forward()
    assert call is not None
    if state.fresh_lens is None:
        rows = query_start[1:] - query_start[:-1]
        state.fresh_lens = rows * ((rows == seq_lens) & (rows > 1))
    call(
        q, k, v, cu_seqlens_q=query_start, cu_seqlens_k=query_start, seqused_q=state.fresh_lens, seqused_k=state.fresh_lens,
        max_seqlen_q=max_query_len, max_seqlen_k=max_query_len, softmax_scale=scale, causal=True,
        window_size_left=window - 1 if window else None, out=out,
    )  # fmt: skip
