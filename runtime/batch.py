"""A plan becomes tensors: `BatchBuilder` packs the tokens of a step, and `Engine` is what takes them.

Sequences lie behind one another, without padding (S sequences, T tokens, R rows of logits):

    token_ids    | a | b b b | c c c c c |      query_start = [0, 1, 4, 9]
    positions    | 7 | 4 5 6 | 0 1 2 3 4 |      seq_lens    = [8, 7, 5]
    sample_rows  [0, 3, 8]                      the rows of T whose logits are wanted

All index tensors travel in two transfers (one of int64, one of int32), from pinned memory where there is a GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from ..export.engine import CacheGroupSpec
from .plan import StepPlan
from .request import Request

_REPEAT_SEQUENCES = 16
"""Most sequences of a batch of decodes that is filled in again; from about there on whole arrays are quicker."""
_ALIGN = 32
"""Elements between the beginnings of packed tensors, so that each is 128-byte aligned on the device."""


@dataclass(slots=True)
class GroupMetadata:
    """Where one cache group's keys and values are."""

    slot_mapping: torch.Tensor
    """[T] int64: block * block_size + offset for every token; -1 writes nothing."""
    block_tables: torch.Tensor
    """[S, W] int32, W the most blocks of any sequence in the batch; unused entries are 0."""


@dataclass(slots=True)
class Batch:
    """Input of one engine step, on the engine's device.

    The memory belongs to the builder and is used again two steps later.
    """

    token_ids: torch.Tensor
    """[T] int64"""
    positions: torch.Tensor
    """[T] int64"""
    groups: tuple[GroupMetadata, ...]
    query_start: torch.Tensor
    """[S + 1] int32: first row of each sequence, and T."""
    seq_lens: torch.Tensor
    """[S] int32: tokens in the cache after this step."""
    sample_rows: torch.Tensor
    """[R] int64: rows of T whose logits are wanted, ascending."""
    max_query_len: int
    max_seq_len: int

    @property
    def num_tokens(self) -> int:
        """T"""
        return self.token_ids.shape[0]

    @property
    def num_sequences(self) -> int:
        """S"""
        return self.seq_lens.shape[0]


class Engine(Protocol):
    """A compiled model, as the runtime sees it."""

    device: torch.device
    vocab_size: int
    """Width of the logits."""
    max_seq_len: int
    """Most tokens of one sequence, prompt and output."""
    max_batch_tokens: int
    """Most tokens in a step."""
    max_sequences: int
    """Most sequences in a step."""
    block_size: int
    """Tokens in a KV block."""
    eos_token_ids: tuple[int, ...]
    tokenizer_path: Path | None
    """Directory of tokenizer.json and its companions, None where the model came without."""
    cache_groups: tuple[CacheGroupSpec, ...]
    weights_bytes: int

    def activation_bytes(self) -> int:
        """Estimate of the memory that a full step needs besides weights and KV cache."""
        ...

    def prepare(self) -> object:
        """Puts the weights on the device, once, so that what is free there can be told."""
        ...

    def bind_cache(self, num_blocks: Sequence[int]) -> None:
        """Allocates the KV tensors, one number of blocks per cache group."""
        ...

    def release_cache(self) -> None:
        """Frees what `bind_cache` and `capture` made."""
        ...

    def graph_bytes(self) -> int:
        """Estimate of the memory that `capture` takes."""
        ...

    def capture(self) -> object | None:
        """Captures decode steps as CUDA graphs, where the engine can."""
        ...

    def step(self, batch: Batch) -> torch.Tensor:
        """Runs the model: writes the new tokens' keys and values and returns logits [R, V] float32 on `device`."""
        ...


class BatchBuilder:
    """Turns plans into batches, with block tables that are kept from step to step.

    Every live request has a row in each group's table; a step writes only the blocks that are new.
    """

    def __init__(
        self,
        *,
        num_groups: int,
        block_size: int,
        max_seq_len: int,
        max_sequences: int,
        device: torch.device,
    ) -> None:
        self.block_size = block_size
        self.device = device
        width = -(-max_seq_len // block_size)
        self._tables = [np.zeros((max_sequences, width), dtype=np.int32) for _ in range(num_groups)]
        self._known = np.zeros((num_groups, max_sequences), dtype=np.int64)
        self._rows: dict[str, int] = {}
        self._free_rows = list(range(max_sequences - 1, -1, -1))
        self._last_requests: tuple[Request, ...] = ()
        self._last_rows = np.zeros(0, dtype=np.int64)
        self._long = _PackedRing(torch.int64, device)
        self._short = _PackedRing(torch.int32, device)
        self._repeat: _Repeat | None = None

    def release(self, request_id: str) -> None:
        """Forgets the request's block table: it ended, or its blocks were taken away."""
        row = self._rows.pop(request_id, None)
        if row is not None:
            for table, known in zip(self._tables, self._known):
                table[row, : known[row]] = 0
                known[row] = 0
            self._free_rows.append(row)
            self._last_requests = ()
            self._repeat = None

    def build(self, plan: StepPlan) -> Batch:
        """The batch of a plan.

        Rows of `plan.scheduled` keep their order; `sample_rows` lists each request's last `num_logit_rows` rows.
        """
        for request_id in plan.preempted:
            self.release(request_id)
        requests, starts_, nums_, _, logit_rows_, _ = zip(*plan.scheduled)
        decodes = plan.num_tokens == len(requests) == sum(logit_rows_)
        if decodes and self._repeat is not None and self._repeat.fits(requests, starts_):
            return self._repeat.batch(starts_)
        starts = np.array(starts_, dtype=np.int64)
        nums = np.array(nums_, dtype=np.int64)
        seq_lens = starts + nums
        query_start = np.zeros(len(requests) + 1, dtype=np.int64)
        np.cumsum(nums, out=query_start[1:])
        rows = self._table_rows(requests)
        sequence = np.repeat(np.arange(len(requests)), nums)
        positions = np.arange(plan.num_tokens) + (starts - query_start[:-1])[sequence]
        token_ids = np.array(_tokens(requests, starts_, nums_), dtype=np.int64)
        sample_rows = _sample_rows(query_start, np.array(logit_rows_, dtype=np.int64))

        block = positions // self.block_size
        offset = positions - block * self.block_size
        max_seq_len = int(seq_lens.max())
        width = -(-max_seq_len // self.block_size)
        table_rows = rows[sequence]
        slots: list[npt.NDArray[Any]] = []
        tables: list[npt.NDArray[Any]] = []
        for table in self._tables:
            block_id = table[table_rows, block].astype(np.int64)
            slots.append(np.where(block_id >= 0, block_id * self.block_size + offset, -1))
            tables.append(np.maximum(table[rows, :width], 0))
        token_d, position_d, sample_d, *slot_d = self._long.pack([token_ids, positions, sample_rows, *slots])
        start_d, len_d, *table_d = self._short.pack([query_start, seq_lens, *tables])
        groups = tuple(GroupMetadata(slot, blocks) for slot, blocks in zip(slot_d, table_d, strict=True))
        batch = Batch(token_d, position_d, groups, start_d, len_d, sample_d, int(nums.max()), max_seq_len)
        small = decodes and len(requests) <= _REPEAT_SEQUENCES and self.device.type == "cpu"
        self._repeat = _Repeat(requests, batch, width, self.block_size) if small else None
        return batch

    def _table_rows(self, requests: tuple[Request, ...]) -> npt.NDArray[np.int64]:
        """[S] each request's row in the tables, which then hold all of its blocks."""
        if requests != self._last_requests:
            known = self._rows
            for request in requests:
                if request.request_id not in known:
                    known[request.request_id] = self._free_rows.pop()
            self._last_rows = np.array([known[request.request_id] for request in requests], dtype=np.int64)
            self._last_requests = requests
        rows = self._last_rows
        for group, table in enumerate(self._tables):
            lengths = np.array([len(request.block_ids[group]) for request in requests], dtype=np.int64)
            for i in np.nonzero(lengths != self._known[group, rows])[0].tolist():
                row, first, last = rows[i], self._known[group, rows[i]], lengths[i]
                assert last > first, f"request {requests[i].request_id!r} lost blocks without being preempted"
                table[row, first:last] = requests[i].block_ids[group][first:]
                self._known[group, row] = last
        return rows


class _Repeat:
    """A batch of decodes on the CPU, to be filled in again while the same requests need no further block.

    Between such steps only a token, a position, a length and a slot per request change: for few requests a handful of
    numbers, where building the arrays anew costs many calls. Two sets of tensors take turns.
    """

    def __init__(self, requests: tuple[Request, ...], batch: Batch, width: int, block_size: int) -> None:
        self._requests = requests
        self._block_size = block_size
        self._num_blocks = [tuple(map(len, request.block_ids)) for request in requests]
        self._limit = width * block_size
        self._turn = 0
        self._sets: list[tuple[Batch, list[npt.NDArray[Any]]]] = []
        for _ in range(2):
            groups = tuple(GroupMetadata(group.slot_mapping.clone(), group.block_tables) for group in batch.groups)
            copy = dataclasses.replace(
                batch, token_ids=batch.token_ids.clone(), positions=batch.positions.clone(),
                seq_lens=batch.seq_lens.clone(), groups=groups,
            )  # fmt: skip
            tensors = (copy.token_ids, copy.positions, copy.seq_lens, *(group.slot_mapping for group in groups))
            self._sets.append((copy, [tensor.numpy() for tensor in tensors]))

    def fits(self, requests: tuple[Request, ...], starts: Sequence[int]) -> bool:
        """Whether these are the same requests, with the same blocks and no draft tokens, within the table's width."""
        if requests != self._requests or max(starts) >= self._limit:
            return False
        counts = self._num_blocks
        return all(
            [counts[i] == tuple(map(len, r.block_ids)) and not r.draft_token_ids for i, r in enumerate(requests)]
        )

    def batch(self, starts: Sequence[int]) -> Batch:
        """The batch in which request i computes position `starts[i]`."""
        self._turn = 1 - self._turn
        batch, (tokens, positions, seq_lens, *slots) = self._sets[self._turn]
        for i, (request, start) in enumerate(zip(self._requests, starts)):
            block, offset = divmod(start, self._block_size)
            tokens[i] = request.all_token_ids[start]
            positions[i] = start
            seq_lens[i] = start + 1
            for group, slot in enumerate(slots):
                block_id = request.block_ids[group][block]
                slot[i] = block_id * self._block_size + offset if block_id >= 0 else -1
        batch.max_seq_len = max(starts) + 1
        return batch


def _tokens(requests: Sequence[Request], starts: Sequence[int], nums: Sequence[int]) -> list[int]:
    """The step's tokens; decodes, which come first, in one sweep, and longer rows piece by piece."""
    num_single = next((i for i, num in enumerate(nums) if num != 1), len(nums))
    tokens = [r.all_token_ids[s] if s < len(r.all_token_ids) else r.draft_token_ids[s - len(r.all_token_ids)]
              for r, s in zip(requests[:num_single], starts)]  # fmt: skip
    for request, start, num in zip(requests[num_single:], starts[num_single:], nums[num_single:]):
        part = request.all_token_ids[start : start + num]
        part += request.draft_token_ids[: num - len(part)]
        tokens += part
    return tokens


def _sample_rows(query_start: npt.NDArray[np.int64], num_logit_rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """[R] the last `num_logit_rows[i]` rows of every sequence i."""
    if num_logit_rows.max() <= 1:
        return query_start[1:][num_logit_rows > 0] - 1
    ends = np.cumsum(num_logit_rows)
    return np.arange(ends[-1]) + np.repeat(query_start[1:] - ends, num_logit_rows)


class _PackedRing:
    """Two host buffers in turn: several arrays are written into one and go to the device in one transfer.

    A buffer is written again only when its last transfer is over; steps that sample nothing do not wait for the device.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device = device
        self._buffers = [torch.empty(0, dtype=dtype), torch.empty(0, dtype=dtype)]
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def pack(self, arrays: Sequence[npt.NDArray[Any]]) -> list[torch.Tensor]:
        """The arrays on the device, converted to the ring's dtype."""
        offsets: list[int] = []
        end = 0
        for array in arrays:
            offsets.append(end)
            end += -(-array.size // _ALIGN) * _ALIGN
        self._turn = 1 - self._turn
        copied = self._copied[self._turn]
        if copied is not None:
            copied.synchronize()
        host = self._buffers[self._turn]
        if host.numel() < end:
            pin = self._device.type == "cuda"
            host = self._buffers[self._turn] = torch.empty(max(2 * end, 1024), dtype=self._dtype, pin_memory=pin)
        flat = host.numpy()
        for array, offset in zip(arrays, offsets):
            flat[offset : offset + array.size] = array.reshape(-1)
        packed = host[:end].to(self._device, non_blocking=True)
        if self._device.type == "cuda":
            copied = self._copied[self._turn] = copied or torch.cuda.Event()
            copied.record()
        return [packed[o : o + a.size].view(a.shape) for o, a in zip(offsets, arrays)]
