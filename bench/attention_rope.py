"""Rope inside the attention kernels against rope before them; sections of `gpu_attention.py`.

Rope before them is what a compiled layer does: one pointwise kernel that turns queries and keys, written by Inductor.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from attention_steps import CACHES, DEVICE, DIM, Step
from camshaft.export.kernels.rope import Rope
from camshaft.export.kernels.triton import paged_attention
from camshaft.graph import ops
from torch import Tensor

STEPS = {
    "1 x 1500": [(1, 1500)],
    "64 x 1500": [(1, 1500)] * 64,
    "1024 x 600": [(1, 600)] * 1024,
    "T=2048: 1024 x 600 + 2 x 512": [(1, 600)] * 1024 + [(512, 512)] * 2,
    "T=2048: 1 x 2048": [(2048, 2048)],
}


def angles(step: Step, dtype: torch.dtype = torch.bfloat16, *, interleaved: bool = False) -> Rope:
    """The angles of a step's rows at their positions (base 500,000)."""
    positions = torch.cat([torch.arange(length - n, length, device=DEVICE) for n, length in step.lengths])
    frequencies = 500_000.0 ** (-torch.arange(0, DIM, 2, device=DEVICE) / DIM)
    half = positions[:, None] * frequencies
    whole = half.repeat_interleave(2, dim=1) if interleaved else torch.cat((half, half), dim=1)
    return Rope(whole.cos().to(dtype), whole.sin().to(dtype), interleaved)


def _before(turn: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    """Attention as a kernel of `Step.call`, behind a rope of its own."""

    def kernel(q: Tensor, k: Tensor, *rest: Any, **more: Any) -> Tensor:
        return paged_attention(*turn(q, k), *rest, **more)

    return kernel


def numerics() -> list[dict[str, Any]]:
    """Caches equal to the last bit, and results, with rope inside and before; float32 angles too, and pairs side by side."""
    results = []
    lengths = {
        "decode": [(1, n) for n in (1, 17, 256, 3000)],
        "mixed": [(1, 600), (128, 128), (300, 1000), (1, 1), (2, 2)],
    }
    for (name, pairs), cache, dtype, interleaved in itertools.product(
        lengths.items(), CACHES, (torch.bfloat16, torch.float32), (False, True)
    ):
        step = Step(pairs, cache, layers=1)
        rope = angles(step, dtype, interleaved=interleaved)
        for more in ({}, {"batch_invariant": True}):
            labels = {"step": name, "cache": cache, "angles": str(dtype), "interleaved": interleaved}
            results.append({**labels, "options": str(more), **compare(step, rope, **more)})
    return results


def compare(step: Step, rope: Rope, **more: Any) -> dict[str, Any]:
    """One layer with rope inside and with the definition's rope before it, each on a copy of the caches."""
    first, outs, caches = step.caches, [], []
    kernels = ({"rope": rope}, {"kernel": _before(lambda q, k: (rope.turn(q), rope.turn(k)))})
    for arguments in kernels:
        k_cache, v_cache = (cache.clone() for cache in first[0])
        step.caches = [(k_cache, v_cache)]
        outs.append(step.call(**arguments, **more).float())
        caches.append([cache.view(torch.uint8) for cache in (k_cache, v_cache)])
    step.caches = first
    differing = sum(int((a != b).sum()) for a, b in zip(*caches))
    error = (outs[0] - outs[1]).abs().max().item()
    # float32 products may be added without being rounded first: then a few elements fall to the other side
    allowed = 0 if rope.cos.dtype == step.q.dtype else step.q.numel() // 1000
    return {"max_error": error, "cache_bytes_that_differ": differing, "ok": error < 1.6e-2 and differing <= allowed}


def rows() -> list[dict[str, Any]]:
    """Microseconds a layer: attention without rope, with rope inside, and behind Inductor's kernel."""
    definition = ops.DEFINITIONS[torch.ops.camshaft.rope.default]
    table = []
    for (name, lengths), cache in itertools.product(STEPS.items(), CACHES):
        step = Step(lengths, cache)
        rope = angles(step)

        def turn(q: Tensor, k: Tensor, rope: Rope = rope) -> tuple[Tensor, Tensor]:
            cos, sin = rope.cos[None], rope.sin[None]
            return definition(q[None], cos, sin, False)[0], definition(k[None], cos, sin, False)[0]

        before = step.time_us(kernel=_before(torch.compile(turn, dynamic=False)))
        inside = step.time_us(rope=rope)
        entry = {"none": step.time_us(), "inside": inside, "before": before}
        table.append({"step": name, "cache": cache, **{f"{key} us": round(us, 2) for key, us in entry.items()}})
        table[-1]["saved us"] = round(before - inside, 2)
    return table
