"""Picks the attention kernel by device and dtype: Triton on CUDA, C for float32 queries on the CPU, else the reference."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from . import cpu, reference
from .rope import Rope
from .state import AttentionState

_log = logging.getLogger(__name__)


@functools.cache
def _warn_once(message: str) -> None:
    _log.warning(message)


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    max_query_len: int,
    max_seq_len: int,
    rope: Rope | None = None,
    tree_mask: Tensor | None = None,
    batch_invariant: bool = False,
    state: AttentionState | None = None,
) -> Tensor:
    """Write k and v into the paged cache, then attend over it, with the kernel for this device and dtype.

    See `reference.paged_attention` for the arguments and the result. Where the C kernel cannot be compiled, the
    reference is used and one warning names the cause.

    Args:
        rope: turns q and k first; keys are cached as they are turned.
        tree_mask: what the rows of token trees see of their own sequence's rows.
        batch_invariant: on CUDA, a row's result does not depend, to the last bit, on what else is in the step.
        state: what the calls of one stream share on CUDA.

    Raises:
        ValueError: arguments that do not fit each other; `batch_invariant` on the CPU.
        RuntimeError: CUDA tensors without Triton.
    """
    if q.device.type == "cuda":
        from . import triton

        return triton.paged_attention(
            q, k, v, k_cache, v_cache, slot_mapping, block_tables, query_start, seq_lens, scale=scale, window=window,
            softcap=softcap, sinks=sinks, alibi_slopes=alibi_slopes, max_query_len=max_query_len,
            max_seq_len=max_seq_len, rope=rope, tree_mask=tree_mask, batch_invariant=batch_invariant, state=state,
        )  # fmt: skip
    if batch_invariant:
        raise ValueError(f"batch-invariant attention runs on CUDA; q is on {q.device}: build without batch_invariant")
    if rope is not None:
        rope.check(q)
        q, k = rope.turn(q), rope.turn(k)
    kernel: Callable[..., Tensor] = reference.paged_attention
    if cpu.supports(q, k_cache):
        available = cpu.is_available()
        if available:
            kernel = cpu.paged_attention
        else:
            _warn_once(f"attention runs on the slow torch reference: no CPU kernel, because {available.reason}")
    return kernel(
        q, k, v, k_cache, v_cache, slot_mapping, block_tables, query_start, seq_lens, scale=scale, window=window,
        softcap=softcap, sinks=sinks, alibi_slopes=alibi_slopes, max_query_len=max_query_len, max_seq_len=max_seq_len,
        tree_mask=tree_mask,
    )  # fmt: skip


def compiling(device: torch.device) -> AbstractContextManager[None]:
    """Inside, attention on CUDA compiles its kernels on several threads and computes nothing; at the end all are compiled.

    Elsewhere nothing changes.
    """
    if device.type != "cuda":
        return nullcontext()
    from . import triton

    return triton.compiling()


def describe() -> dict[str, Any]:
    """Facts for `camshaft doctor`: which kernel serves which device, and for one that cannot run, why."""
    facts: dict[str, Any] = {"cpu float32": cpu.describe(), "other": "torch reference (correct, slow)"}
    if not torch.cuda.is_available():
        facts["cuda"] = {"available": False, "reason": "torch sees no CUDA device"}
        return facts
    try:
        import triton
    except ImportError as error:
        facts["cuda"] = {"available": False, "reason": f"Triton does not import: {error}; install torch's CUDA build"}
    else:
        facts["cuda"] = {
            "available": True,
            "reason": "",
            "triton": triton.__version__,
            "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        }
    return facts
