"""Decode steps as CUDA graphs: one capture per bucket, replayed with new contents of the same input buffers.

A graph launches a whole step in one call, so a decode step costs the device's time instead of the host's. A step of S
sequences runs in the smallest bucket B >= S; sequences beyond S have no rows and write nothing:

    query_start  [0, 1, ..., S, S, ..., S]      seq_lens  [l0, ..., l(S-1), 0, ..., 0]      slot_mapping  [..., -1, -1]
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .buckets import bucket_of
from .executor import StepContext

if TYPE_CHECKING:
    from .execution import StepSizes

logger = logging.getLogger(__name__)

Launch = Callable[[Mapping[str, Tensor], StepContext], Tensor]
"""Launches a step on the current stream: (plan inputs by name, metadata) -> logits [R, V] float32."""


class DecodeGraphs:
    """Captured decode steps.

    launch: the step; buckets: numbers of sequences, ascending; table_width: blocks of the longest sequence; max_seq_len: for which
    attention is laid out, in tokens. num_bytes, seconds: what the captures took on the device and of time.

    The logits of a replay belong to the graph: the next replay of the same bucket overwrites them.
    """

    def __init__(
        self,
        launch: Launch,
        buckets: Sequence[int],
        sizes: StepSizes,
        *,
        num_groups: int,
        table_width: int,
        max_seq_len: int,
        device: torch.device,
        stream: torch.cuda.Stream,
    ) -> None:
        self.buckets = tuple(buckets)
        self._launch, self._sizes, self._device, self._stream = launch, sizes, device, stream
        self._max_seq_len = max_seq_len
        largest = self.buckets[-1]
        rows = max(sizes.padded("T", largest), sizes.padded("R", largest))

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._tokens, self._positions = (zeros(rows, dtype=torch.int64) for _ in range(2))
        self._slots = [zeros(rows, dtype=torch.int64) for _ in range(num_groups)]
        self._tables = [zeros(largest, table_width, dtype=torch.int32) for _ in range(num_groups)]
        self._lens = zeros(largest, dtype=torch.int32)
        self._starts = zeros(largest + 1, dtype=torch.int32)
        self._rows = torch.arange(rows, device=device)
        self._kept: list[Tensor] = []  # what graphs read besides the buffers above
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        before, start = torch.cuda.mem_get_info(device)[0], time.perf_counter()
        pool = torch.cuda.graph_pool_handle()
        for bucket in reversed(self.buckets):  # the largest first: the others find room in its memory
            self._graphs[bucket] = self._capture(bucket, pool)
        torch.cuda.synchronize(device)
        self.num_bytes = max(0, before - torch.cuda.mem_get_info(device)[0])
        self.seconds = time.perf_counter() - start
        logger.info("%d decode steps captured in %.1f s, %.0f MB", len(buckets), self.seconds, self.num_bytes / 1e6)

    @torch.inference_mode()
    def _capture(self, bucket: int, pool: Any) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        tokens, rows = self._sizes.padded("T", bucket), self._sizes.padded("R", bucket)
        for slots in self._slots:
            slots.fill_(-1)
        self._lens.zero_()
        self._starts.zero_()  # no sequence has rows: the trial run writes nothing
        sample_rows = self._rows[:rows].clamp(max=tokens - 1)
        self._kept.append(sample_rows)
        values = {
            "token_ids": self._tokens[None, :tokens],
            "positions": self._positions[None, :tokens],
            "sample_rows": sample_rows,
        }
        context = StepContext(
            [(slots[:tokens], tables[:bucket]) for slots, tables in zip(self._slots, self._tables)],
            self._starts[: bucket + 1], self._lens[:bucket], 1, self._max_seq_len,
        )  # fmt: skip
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._launch(values, context)  # compiles kernels and opens engines, which a capture cannot
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=self._stream):
            logits = self._launch(values, context)
        return graph, logits

    def takes(self, batch: Any) -> bool:
        """Whether a batch is a decode step: one token of every sequence, each sampled, no more than were captured."""
        count = batch.seq_lens.shape[0]
        return (
            batch.max_query_len == 1
            and batch.token_ids.shape[0] == batch.sample_rows.shape[0] == count
            and count <= self.buckets[-1]
        )

    def replay(self, batch: Any) -> Tensor:
        """Logits [S, V] float32 of a decode step."""
        count = batch.seq_lens.shape[0]
        bucket = bucket_of(self.buckets, count)
        graph, logits = self._graphs[bucket]
        into = [self._tokens[:count], self._positions[:count], *(slots[:count] for slots in self._slots)]
        torch._foreach_copy_(into, [batch.token_ids, batch.positions, *(group.slot_mapping for group in batch.groups)])
        short = [self._lens[:count], self._starts[: count + 1]]
        torch._foreach_copy_(short, [batch.seq_lens, batch.query_start])
        for tables, group in zip(self._tables, batch.groups):
            tables[:count, : group.block_tables.shape[1]].copy_(group.block_tables)
        if count < bucket:
            self._lens[count:bucket].zero_()
            self._starts[count + 1 : bucket + 1].fill_(count)
        tokens = self._sizes.padded("T", bucket)
        if count < tokens:
            for slots in self._slots:
                slots[count:tokens].fill_(-1)
        graph.replay()
        return logits[:count]
