"""Batches on the CPU that are filled in again: few requests, each with as many tokens as in a step before.

Between such steps a few numbers per request change, and a block comes now and then. They are written one by one, where building all
arrays anew costs many calls:

                  decode            verification of two drafts
    token_ids     | 17 |            | 17  5  9 |          the last known token and the drafts
    positions     | 30 |            | 30 31 32 |          start, start + 1 ...
    slots         | 94 |            | 94 95 112 |         through the request's blocks
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .batch import Batch, GroupMetadata, Ints
from .plan import ScheduledRequest, StepPlan

MOST_SEQUENCES = 16
"""Of a batch that is filled in again; from about there on whole arrays are quicker."""
_MOST_TOKENS = 33
"""Of a request in it: the last known one and 32 drafts. More come with prompts."""
_MORE_BLOCKS = 8
"""Columns that block tables have more than they need at first."""

Key = tuple[tuple[int, ...], tuple[tuple[int, int, int], ...]]
"""Decodes, and all others with their numbers of tokens and of rows of logits."""


def key_of(plan: StepPlan) -> Key | None:
    """What steps have in common whose batch is filled in again; None for large steps, which are built anew.

    It names requests by their `id`, and so lives no longer than they do.
    """
    if plan.num_sequences > MOST_SEQUENCES:
        return None
    others = tuple([(id(row.request), row.num_tokens, row.num_logit_rows) for row in plan.others])
    if any([num_tokens > _MOST_TOKENS or not num_rows for _, num_tokens, num_rows in others]):
        return None
    return tuple(map(id, plan.decodes)), others


class RepeatedBatch:
    """The batch of steps with one key. Two sets of tensors take turns.

    Args:
        plan, batch: a step of that key, as it was built.
        sources: which of a request's block tables each group uses.
        rows: [S] the requests' rows in the builder's tables.
    """

    def __init__(self, plan: StepPlan, batch: Batch, block_size: int, sources: Sequence[int], rows: Ints) -> None:
        self.rows = rows
        self.order = np.arange(len(rows))
        self._block_size, self._sources = block_size, sources
        self._requests = [*plan.decodes, *(row.request for row in plan.others)]
        self._nums = [1] * len(plan.decodes) + [row.num_tokens for row in plan.others]
        self._steps = np.arange(max(self._nums))
        width = batch.groups[0].block_tables.shape[1] + _MORE_BLOCKS
        self._limit = width * block_size
        self._tables = [
            torch.nn.functional.pad(group.block_tables, (0, _MORE_BLOCKS)).contiguous() for group in batch.groups
        ]
        self._blocks = [table.numpy() for table in self._tables]
        self._known = [[0] * len(self._requests) for _ in self._tables]
        self._turn = 0
        self._sets = [self._copy(batch) for _ in range(2)]

    def _copy(self, batch: Batch) -> tuple[Batch, list[npt.NDArray[Any]]]:
        groups = tuple(
            GroupMetadata(group.slot_mapping.clone(), table) for group, table in zip(batch.groups, self._tables)
        )
        copy = dataclasses.replace(
            batch, token_ids=batch.token_ids.clone(), positions=batch.positions.clone(), seq_lens=batch.seq_lens.clone(),
            query_start=batch.query_start.clone(), sample_rows=batch.sample_rows.clone(), groups=groups,
        )  # fmt: skip
        tensors = (copy.token_ids, copy.positions, copy.seq_lens, *(group.slot_mapping for group in groups))
        return copy, [tensor.numpy() for tensor in tensors]

    def fill(self, plan: StepPlan, *, known: bool) -> Batch | None:
        """The batch of a plan of the same key; None where it has outgrown the block tables.

        known: whether the decodes' tokens are; if not, they are 0.
        """
        starts = plan.starts.tolist()
        starts += [row.start for row in plan.others]
        longest = max([start + num for start, num in zip(starts, self._nums)])
        if longest > self._limit or not self._write_blocks():
            return None
        self._turn = 1 - self._turn
        batch, (tokens, positions, seq_lens, *slots) = self._sets[self._turn]
        at = 0
        for sequence, (request, start, num) in enumerate(zip(self._requests, starts, self._nums)):
            seq_lens[sequence] = start + num
            if num == 1:
                is_known = known or sequence >= len(plan.decodes)
                tokens[at], positions[at] = request.all_token_ids[start] if is_known else 0, start
                for source, slot in zip(self._sources, slots):
                    slot[at] = self._slot(request.block_ids[source], start)
            else:
                row = plan.others[sequence - len(plan.decodes)]
                self._write_rows(row, slice(at, at + num), tokens, positions, slots)
            at += num
        batch.max_seq_len = longest
        return batch

    def _write_blocks(self) -> bool:
        """Writes the blocks that are new into the tables; False where they do not fit."""
        for source, table, known in zip(self._sources, self._blocks, self._known):
            for sequence, request in enumerate(self._requests):
                blocks, first = request.block_ids[source], known[sequence]
                if len(blocks) > first:
                    if len(blocks) > table.shape[1]:
                        return False
                    table[sequence, first : len(blocks)] = [max(block, 0) for block in blocks[first:]]
                    known[sequence] = len(blocks)
        return True

    def _write_rows(
        self, row: ScheduledRequest, rows: slice, tokens: Ints, positions: Ints, slots: Sequence[Ints]
    ) -> None:
        """Known tokens of a request, and its drafts."""
        request, start, num, num_drafts, *_ = row
        size = self._block_size
        first_draft = rows.stop - num_drafts
        tokens[rows.start : first_draft] = request.all_token_ids[start : start + num - num_drafts]
        tokens[first_draft : rows.stop] = request.draft_token_ids[:num_drafts]
        steps = self._steps[:num]
        np.add(steps, start, out=positions[rows])
        within = start % size + num <= size
        for source, slot in zip(self._sources, slots):
            blocks = request.block_ids[source]
            if within:
                np.add(steps, self._slot(blocks, start), out=slot[rows])
            else:
                slot[rows] = [self._slot(blocks, position) for position in range(start, start + num)]

    def _slot(self, blocks: Sequence[int], position: int) -> int:
        block, offset = divmod(position, self._block_size)
        assert blocks[block] >= 0, "a window has not left the blocks that a step writes to"
        return blocks[block] * self._block_size + offset
