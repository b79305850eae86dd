"""Prefill of fresh prompts on a GPU: our kernel, FlashAttention 4 and torch's own, checked against float32 and timed; for
`gpu_attention.py`.

A candidate takes q [T, H, D], k, v [T, KV, D] and the rows where sequences start. Ours writes the cache as well: "attention us"
is its time less that of the write. Times are sustained: the mean of the second half of `SUSTAINED_S` seconds without a pause.
cuDNN's attention over ragged rows is not among the candidates: torch 2.11 cannot capture it in a CUDA graph.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import triton
from attention_steps import BLOCK, CACHES, DEVICE, Step
from attention_sweep import SUSTAINED_S, compile_all
from camshaft.export.kernels import flash
from camshaft.export.kernels.triton import paged_attention
from camshaft.export.kernels.triton.attention import Fresh

HEADS, KV = 32, 8
SHAPES = {"64 x 128": [128] * 64, "8 x 1024": [1024] * 8, "4 x 2048": [2048] * 4, "1 x 8192": [8192]}
RAGGED = [137, 512, 1, 300, 64, 1025, 9]
CHANGED = [64, 1, 900, 3, 511, 9, 560]
"""As many sequences and rows as RAGGED."""
HEAD_DIMS = (128, 64, 256)
FAILURES = (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError, triton.TritonError)
"""What a candidate may end with; it is noted and the next one is tried."""


class Prompts:
    """Random rows of fresh prompts, one behind the other as slices of one projection, and an empty cache."""

    def __init__(self, lengths: list[int], dim: int) -> None:
        torch.manual_seed(0)
        self.dim, total = dim, sum(lengths)
        qkv = torch.randn(total, (HEADS + 2 * KV) * dim, dtype=torch.bfloat16, device=DEVICE)
        parts = qkv.split([HEADS * dim, KV * dim, KV * dim], dim=1)
        self.q, self.k, self.v = (part.unflatten(1, (-1, dim)) for part in parts)
        self.scale, self.max_len = dim**-0.5, max(lengths)
        blocks = -(-total // BLOCK) + len(lengths) + 1
        self.caches = [torch.zeros(blocks, BLOCK, KV, dim, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
        self.tables = torch.zeros(len(lengths), -(-total // BLOCK), dtype=torch.int32, device=DEVICE)
        self.starts = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=DEVICE)
        self.seq_lens = torch.zeros(len(lengths), dtype=torch.int32, device=DEVICE)
        self.slots = torch.zeros(total, dtype=torch.int64, device=DEVICE)
        self.set_lengths(lengths)

    def set_lengths(self, lengths: list[int]) -> None:
        """Other lengths of as many sequences and rows, in place."""
        self.lengths = lengths
        block = 1
        tables, slots = torch.zeros_like(self.tables, device="cpu"), []
        for s, length in enumerate(lengths):
            count = -(-length // BLOCK)
            tables[s, :count] = torch.arange(block, block + count)
            slots.append(block * BLOCK + torch.arange(length))
            block += count
        self.tables.copy_(tables)
        self.slots.copy_(torch.cat(slots))
        self.seq_lens.copy_(torch.tensor(lengths))
        self.starts.copy_(torch.tensor([0, *itertools.accumulate(lengths)]))

    @property
    def flops(self) -> int:
        """Of the products of visible pairs."""
        return 4 * HEADS * self.dim * sum(n * (n + 1) // 2 for n in self.lengths)

    def paged(self, fresh: Fresh, max_query_len: int | None = None) -> torch.Tensor:
        """The op of the runtime."""
        return paged_attention(
            self.q, self.k, self.v, *self.caches, self.slots, self.tables, self.starts, self.seq_lens, scale=self.scale,
            max_query_len=self.max_len if max_query_len is None else max_query_len, max_seq_len=self.max_len, fresh=fresh,
        )  # fmt: skip

    def flash(self) -> torch.Tensor:
        """FlashAttention 2, as it is built into torch."""
        return torch.ops.aten._flash_attention_forward(
            self.q, self.k, self.v, self.starts, self.starts, self.max_len, self.max_len, 0.0, True, False,
            scale=self.scale,
        )[0]  # fmt: skip

    def cudnn_dense(self) -> torch.Tensor:
        """cuDNN over prompts of one length, as a batch: what a ragged kernel could reach."""
        if len(set(self.lengths)) > 1:
            raise ValueError("prompts of several lengths")
        batch = [t.unflatten(0, (len(self.lengths), -1)).transpose(1, 2) for t in (self.q, self.k, self.v)]
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
            out = torch.nn.functional.scaled_dot_product_attention(*batch, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    def expected(self) -> torch.Tensor:
        """The same in float32, sequence by sequence."""
        parts = []
        for q, k, v in zip(*(t.float().split(self.lengths) for t in (self.q, self.k, self.v))):
            k, v = (t.repeat_interleave(HEADS // KV, dim=1) for t in (k, v))
            scores = torch.einsum("ihd,jhd->hij", q, k) * self.scale
            hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=DEVICE).triu(1)
            parts.append(torch.einsum("hij,jhd->ihd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v))
        return torch.cat(parts)


def candidates(prompts: Prompts) -> list[tuple[str, Fresh, Callable[[], torch.Tensor]]]:
    """Name, the choice of the op where it is one, and the call."""
    return [
        ("paged", "paged", lambda: prompts.paged("paged")),
        ("flash-attention 4", "flash", lambda: prompts.paged("flash")),
        ("flash-attention 2", None, prompts.flash),
        ("cudnn dense", None, prompts.cudnn_dense),
    ]


def numerics(threads: int) -> list[dict[str, Any]]:
    """Largest error of every candidate, called and replayed from a CUDA graph with other lengths than it was captured with."""
    results = []
    for dim in HEAD_DIMS:
        prompts = Prompts(RAGGED, dim)
        compile_all([call for name, _, call in candidates(prompts) if name == "paged"], threads)
        for name, fresh, call in candidates(prompts):
            if name == "cudnn dense":
                continue
            entry: dict[str, Any] = {
                "head size": dim,
                "kernel": name,
                "ours": fresh == "paged" or fresh == "flash" and flash.forward() is not None,
            }
            try:
                entry |= _error("called", call(), prompts)
                prompts.max_len = sum(RAGGED)  # what a captured step knows of its lengths
                graph, out = _captured(call)
                prompts.set_lengths(CHANGED)
                graph.replay()
                entry |= _error("replayed", out, prompts)
                entry["ok"] = entry["called ok"] and entry["replayed ok"]
            except FAILURES as error:
                entry |= {"ok": False, "error": str(error)[:300]}
            prompts.set_lengths(RAGGED)
            prompts.max_len = max(RAGGED)
            results.append(entry)
            print("ok  " if entry["ok"] else "FAIL", entry, flush=True)
    return results


def _error(label: str, out: torch.Tensor, prompts: Prompts) -> dict[str, Any]:
    expected = prompts.expected()
    difference = (out.float() - expected).abs()
    excess = (difference - 1.6e-2 * expected.abs()).max().item()  # bfloat16 rounds the weights and the result
    return {f"{label} max error": round(difference.max().item(), 5), f"{label} ok": excess < 1.6e-2}


def _captured(call: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


def sustained_us(call: Callable[[], torch.Tensor]) -> float:
    """Microseconds of one call in replays without a pause."""
    graph, _ = _captured(call)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def replays(count: int) -> float:
        start.record()
        for _ in range(count):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / count

    count = max(3, round(SUSTAINED_S / 2 * 1e6 / replays(3)))
    replays(count)
    return replays(count)


def rows() -> list[dict[str, Any]]:
    """All candidates: every shape at head size 128, 4 x 2048 at the others; then whole mixed steps."""
    results = []
    for dim in HEAD_DIMS:
        for shape, lengths in SHAPES.items() if dim == 128 else [("4 x 2048", SHAPES["4 x 2048"])]:
            prompts = Prompts(lengths, dim)
            write_us = sustained_us(lambda p=prompts: p.paged("paged", max_query_len=0))
            for name, fresh, call in candidates(prompts):
                entry: dict[str, Any] = {"head size": dim, "prompts": shape, "kernel": name}
                try:
                    us = sustained_us(call)
                except FAILURES as error:
                    entry["error"] = str(error)[:300]
                else:
                    entry["us"] = round(us, 1)
                    if fresh is not None:
                        us = max(us - write_us, 0.1)
                        entry["attention us"] = round(us, 1)
                    entry["TFLOP/s"] = round(prompts.flops / us / 1e6, 1)
                results.append(entry)
                print("  ".join(f"{key}={value}" for key, value in entry.items()), flush=True)
    return results + _mixed()


def _mixed() -> list[dict[str, Any]]:
    """Steps with decodes and continued prompts among the fresh ones, with the bounds of a captured graph."""
    results = []
    steps = {
        "256 x 1100 + 3 x 2048 + 1 x 800 over 1248": [(1, 1100)] * 256 + [(800, 2048)] + [(2048, 2048)] * 3,
        "1000 x 200 + 8 x 128": [(1, 200)] * 1000 + [(128, 128)] * 8,
    }
    for (name, lengths), cache in itertools.product(steps.items(), CACHES):
        step = Step(lengths, cache, layers=4)
        bounds = {"max_query_len": sum(n for n, _ in lengths), "max_seq_len": 4096}
        entry: dict[str, Any] = {"step": name, "cache": cache}
        for fresh in ("paged", "flash"):
            try:
                entry[f"{fresh} us"] = round(step.time_us(fresh=fresh, **bounds), 1)
            except FAILURES as error:
                entry[f"{fresh} error"] = str(error)[:300]
        results.append(entry)
    return results
