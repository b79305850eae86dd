"""Random steps of Llama-3.1-8B's attention on a GPU, and their time in a CUDA graph; for `gpu_attention.py`."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from camshaft.export.kernels.state import AttentionState
from camshaft.export.kernels.triton import paged_attention

HEADS, KV, DIM, BLOCK = 32, 8, 128, 16
READ_BYTES_PER_S = 4.0e12
COLD_BYTES = 256 << 20
DEVICE = torch.device("cuda")
CACHES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
LAYOUTS = ("token", "head")
"""Physical order of a block: [block_size, KV, D], or [KV, block_size, D] seen through a permutation."""


class Step:
    """The arguments of one step's attention calls, one per layer, for sequences given as (rows, tokens after the step)."""

    def __init__(
        self, lengths: list[tuple[int, int]], cache: str, layout: str = "token", layers: int | None = None
    ) -> None:
        torch.manual_seed(0)
        self.lengths = lengths
        rows, needed = sum(n for n, _ in lengths), [-(-length // BLOCK) for _, length in lengths]
        blocks, dtype = sum(needed) + 1, CACHES[cache]
        layer_bytes = 2 * blocks * BLOCK * KV * DIM * dtype.itemsize
        self.layers = layers or max(1, min(128, -(-COLD_BYTES // layer_bytes)))
        order = torch.randperm(blocks - 1) + 1
        tables = torch.zeros(len(lengths), max(needed), dtype=torch.int32)
        slots, starts, taken = [], [0], 0
        for s, (n, length) in enumerate(lengths):
            mine = order[taken : taken + needed[s]]
            taken += needed[s]
            tables[s, : needed[s]] = mine
            position = torch.arange(length - n, length)
            slots.append(mine[position // BLOCK] * BLOCK + position % BLOCK)
            starts.append(starts[-1] + n)
        self.metadata = {
            "slot_mapping": torch.cat(slots).to(DEVICE), "block_tables": tables.to(DEVICE),
            "query_start": torch.tensor(starts, dtype=torch.int32, device=DEVICE),
            "seq_lens": torch.tensor([length for _, length in lengths], dtype=torch.int32, device=DEVICE),
        }  # fmt: skip
        qkv = torch.randn(rows, (HEADS + 2 * KV) * DIM, dtype=torch.bfloat16, device=DEVICE)
        self.q, self.k, self.v = (
            part.unflatten(1, (-1, DIM)) for part in qkv.split([HEADS * DIM, KV * DIM, KV * DIM], dim=1)
        )
        self.caches = [(_cache(blocks, dtype, layout), _cache(blocks, dtype, layout)) for _ in range(self.layers)]
        self.bounds = {"max_query_len": max(n for n, _ in lengths), "max_seq_len": max(n for _, n in lengths)}
        self.state = AttentionState()

    @property
    def bytes_read(self) -> int:
        """Of keys and values, a layer."""
        return sum(length for _, length in self.lengths) * 2 * KV * DIM * self.caches[0][0].element_size()

    @property
    def flops(self) -> int:
        """Of the products of visible pairs, a layer."""
        pairs = sum(n * (length - n) + n * (n + 1) // 2 for n, length in self.lengths)
        return 4 * HEADS * DIM * pairs

    def call(self, layer: int = 0, kernel: Callable[..., torch.Tensor] = paged_attention, **more: Any) -> torch.Tensor:
        """One layer's attention."""
        k_cache, v_cache = self.caches[layer]
        return kernel(
            self.q, self.k, self.v, k_cache, v_cache, **self.metadata, scale=DIM**-0.5, **(self.bounds | more)
        )

    def run(self, **more: Any) -> None:
        """All layers."""
        self.state.begin_step()
        for layer in range(self.layers):
            self.call(layer, state=self.state, **more)

    def time_us(self, **more: Any) -> float:
        """Microseconds a layer: median of replays of a CUDA graph."""
        return graph_us(lambda: self.run(**more)) / self.layers


def _cache(blocks: int, dtype: torch.dtype, layout: str) -> torch.Tensor:
    shape = (blocks, BLOCK, KV, DIM) if layout == "token" else (blocks, KV, BLOCK, DIM)
    cache = torch.empty(shape, dtype=dtype, device=DEVICE)
    for part in cache.split(4096):
        part.copy_(torch.randn(part.shape, dtype=torch.float16, device=DEVICE))
    return cache if layout == "token" else cache.transpose(1, 2)


def graph_us(function: Callable[[], object], budget_s: float = 0.15) -> float:
    """Microseconds of one replay: the median of several, which together take about `budget_s`."""
    function()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()

    def replay_ms() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    replay_ms()
    count = max(5, min(50, int(budget_s * 1e3 / max(replay_ms(), 1e-3))))
    return statistics.median(replay_ms() for _ in range(count)) * 1e3
