"""A plan becomes tensors: `BatchBuilder` packs the tokens of a step.

All index tensors travel in one transfer (packing.py). Tokens that the step in flight is about to sample never come to the host on
their way: they are taken from the sampler's tensor on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from .batch import Batch, GroupMetadata, Ints
from .early_rows import early_rows
from .packing import PackedTransfer, Spec, upload
from .plan import ScheduledRequest, StepPlan
from .repeated_batch import MOST_SEQUENCES, Key, RepeatedBatch, key_of
from .request import Request

if TYPE_CHECKING:
    from .speculative.verification import StepDrafts

_MOST_REPEATED = 16
"""Batches that are kept to be filled in again."""


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
        tables: Sequence[int] | None = None,
    ) -> None:
        """tables: which of a request's block tables each group uses; None: its own."""
        self.block_size = block_size
        self.device = device
        self._sources = range(num_groups) if tables is None else list(tables)
        width = -(-max_seq_len // block_size)
        self._tables = [np.zeros((max_sequences, width), dtype=np.int32) for _ in range(num_groups)]
        self._known = np.zeros((num_groups, max_sequences), dtype=np.int64)
        self._rows: dict[str, int] = {}
        self._free_rows = list(range(max_sequences - 1, -1, -1))
        self._sampled_at = np.zeros(max_sequences, dtype=np.int64)
        """By row of the tables: which of the last batch's samples is the request's."""
        self._decodes: tuple[Request, ...] | None = None
        self._decode_rows: Ints = np.zeros(0, dtype=np.int64)
        self._transfer = PackedTransfer(device)
        self._repeated: dict[Key, RepeatedBatch] = {}
        """Batches of few requests on the CPU, to be filled in again."""

    @property
    def num_free_rows(self) -> int:
        """Requests that there is room for besides those known."""
        return len(self._free_rows)

    def release(self, request_id: str) -> None:
        """Forgets the request's block table: it ended, or its blocks were taken away."""
        row = self._rows.pop(request_id, None)
        if row is not None:
            for table, known in zip(self._tables, self._known):
                table[row, : known[row]] = 0
                known[row] = 0
            self._free_rows.append(row)
            self._decodes = None
            self._repeated.clear()

    def build(
        self,
        plan: StepPlan,
        in_flight: torch.Tensor | None = None,
        drafts: StepDrafts | None = None,
        *,
        in_order: bool = False,
    ) -> Batch:
        """The batch of a plan.

        Rows of the plan keep their order; `sample_rows` lists each request's last `num_logit_rows` rows.

        Args:
            in_flight: [R'] int64 on the device, what the last batch's rows sampled, for a plan on top of its step;
                values below 0 are taken for 0.
            drafts: of a plan with drafts; needed where their values are on the device alone.
            in_order: `in_flight` [D] belongs to the plan's decodes, in their order.
        """
        for request_id in (*plan.preempted, *plan.left):
            self.release(request_id)
        key = None
        if self.device.type == "cpu" and (in_flight is None or in_order) and (drafts is None or drafts.is_simple):
            key = key_of(plan)
        if key is not None and (again := self._repeat(key, plan, in_flight)) is not None:
            return again
        table_rows = np.concatenate((self._rows_of_decodes(plan), self._rows_of_others(plan.others)))
        layout = _Layout(plan)
        num_groups, num_decodes, max_seq_len = len(self._tables), len(plan.decodes), int(layout.seq_lens.max())
        width = -(-max_seq_len // self.block_size)
        tokens, seqs = plan.num_tokens, len(layout.seq_lens)
        long, short = torch.int64, torch.int32
        sources = num_decodes if in_flight is not None else 0
        specs: list[Spec] = [((tokens,), long), ((tokens,), long), ((len(layout.sample_rows),), long)]
        specs += [((tokens,), long)] * num_groups + [((sources,), long), ((seqs + 1,), short), ((seqs,), short)]
        specs += [((seqs, width), short)] * num_groups
        trees = drafts is not None and drafts.drafts.parents is not None
        specs += [((tokens,), long)] * trees
        arrays = self._transfer.open(specs)
        token_ids, positions, sample_rows, *slots = arrays[: 3 + num_groups]
        source, query_start, seq_lens, *tables = arrays[3 + num_groups : 6 + 2 * num_groups]
        self._write_tokens(plan, token_ids, known=in_flight is None)
        positions[:], sample_rows[:], query_start[:] = layout.positions, layout.sample_rows, layout.query_start
        seq_lens[:] = layout.seq_lens
        if trees and drafts is not None:
            arrays[-1][:] = 0
            _write_trees(plan, drafts, positions, arrays[-1])
        source[:] = np.arange(sources) if in_order else self._sampled_at[table_rows[:sources]]
        block, offset = np.divmod(layout.positions, self.block_size)
        token_rows = table_rows[layout.sequence]
        for table, slot, blocks in zip(self._tables, slots, tables):
            np.multiply(table[token_rows, block], self.block_size, out=slot)
            slot += offset
            blocks[:] = table[table_rows, :width]
        sampling = table_rows[layout.samples]
        self._sampled_at[sampling] = np.arange(len(sampling))
        identity = bool((source == np.arange(sources)).all())
        sent = self._transfer.send()
        if in_flight is not None and sources:
            _feed(sent[0][:sources], in_flight, None if identity else sent[3 + num_groups])
        if drafts is not None and drafts.on_device:
            self._write_drafts(plan, sent[0], drafts)
        groups = tuple(map(GroupMetadata, sent[3 : 3 + num_groups], sent[6 + num_groups : 6 + 2 * num_groups]))
        batch = Batch(sent[0], sent[1], groups, sent[4 + num_groups], sent[5 + num_groups], sent[2],
                      layout.max_query_len, max_seq_len, layout.num_decodes, sent[-1] if trees else None)  # fmt: skip
        if drafts is not None and drafts.drafts.hidden is not None:
            batch.early = early_rows(plan, batch, drafts)
        if key is not None:
            if len(self._repeated) >= _MOST_REPEATED:
                self._repeated.clear()
            self._repeated[key] = RepeatedBatch(plan, batch, self.block_size, self._sources, table_rows)
        return batch

    def _repeat(self, key: Key, plan: StepPlan, in_flight: torch.Tensor | None) -> Batch | None:
        """The batch of a plan, filled in again; None for one that has to be built. in_flight: in the order of the decodes."""
        repeated = self._repeated.get(key)
        batch = None if repeated is None else repeated.fill(plan, known=in_flight is None)
        if batch is None or repeated is None:
            return None
        self._sampled_at[repeated.rows] = repeated.order
        if in_flight is not None and plan.decodes:
            _feed(batch.token_ids[: len(plan.decodes)], in_flight, None)
        return batch

    def _write_tokens(self, plan: StepPlan, token_ids: Ints, *, known: bool) -> None:
        num_decodes = len(plan.decodes)
        if not known:
            token_ids[:num_decodes] = 0
        elif num_decodes:
            token_ids[:num_decodes] = [request.all_token_ids[-1] for request in plan.decodes]
        at = num_decodes
        for request, start, num_tokens, num_drafts, _, _ in plan.others:
            end = at + num_tokens
            first_draft = end - num_drafts
            token_ids[at:first_draft] = request.all_token_ids[start : start + num_tokens - num_drafts]
            token_ids[first_draft:end] = request.draft_token_ids[:num_drafts]
            at = end

    def _write_drafts(self, plan: StepPlan, token_ids: torch.Tensor, drafts: StepDrafts) -> None:
        """Puts drafts that the host does not know into [T] token_ids."""
        rows = [row for row in plan.others if row.num_draft_tokens]
        if not rows:
            return
        ends = len(plan.decodes) + np.cumsum([row.num_tokens for row in plan.others])
        places = [
            np.arange(end - row.num_draft_tokens, end)
            for row, end in zip(plan.others, ends.tolist())
            if row.num_draft_tokens
        ]
        into, source = upload(np.stack([np.concatenate(places), drafts.sources(rows)]), self.device)
        assert isinstance(drafts.drafts.token_ids, torch.Tensor)
        token_ids.index_copy_(0, into, drafts.drafts.token_ids.flatten().index_select(0, source))

    def _rows_of_decodes(self, plan: StepPlan) -> Ints:
        """[D] each request's row in the tables, which then hold the block that its token is written to."""
        if plan.decodes is not self._decodes:
            known_rows = self._rows
            rows = [known_rows[request.request_id] for request in plan.decodes]
            self._decodes, self._decode_rows = plan.decodes, np.array(rows, dtype=np.int64)
        rows_D = self._decode_rows
        if (
            len(rows_D) <= MOST_SEQUENCES
        ):  # all blocks, those taken ahead for drafts, too: the batch may be filled in again
            for group, source in enumerate(self._sources):
                for request, row in zip(plan.decodes, rows_D.tolist()):
                    if len(request.block_ids[source]) > self._known[group, row]:
                        self._learn(group, request, row)
            return rows_D
        for group, known in enumerate(self._known):
            for i in np.flatnonzero(known[rows_D] * self.block_size <= plan.starts).tolist():
                self._learn(group, plan.decodes[i], int(rows_D[i]))
        return rows_D

    def _rows_of_others(self, others: Sequence[ScheduledRequest]) -> Ints:
        """[O] each request's row in the tables, which then hold all of its blocks."""
        rows: list[int] = []
        for request, *_ in others:
            row = self._rows.get(request.request_id)
            if row is None:
                row = self._rows[request.request_id] = self._free_rows.pop()
            rows.append(row)
        rows_O = np.array(rows, dtype=np.int64)
        if not rows:
            return rows_O
        for group, source in enumerate(self._sources):
            counts = np.array([len(request.block_ids[source]) for request, *_ in others], dtype=np.int64)
            for i in np.flatnonzero(counts != self._known[group, rows_O]).tolist():
                self._learn(group, others[i].request, rows[i])
        return rows_O

    def _learn(self, group: int, request: Request, row: int) -> None:
        """Writes the blocks that are new; those that a window has left stay in the table, where nobody reads them."""
        blocks, first = request.block_ids[self._sources[group]], int(self._known[group, row])
        assert len(blocks) >= first, f"request {request.request_id!r} lost blocks without being preempted"
        if len(blocks) > first:
            self._tables[group][row, first : len(blocks)] = np.maximum(blocks[first:], 0)
            self._known[group, row] = len(blocks)


class _Layout:
    """Where everything of a plan is in its batch, as arrays.

    positions, sequence: [T] each row's position, and the sequence it belongs to. query_start [S + 1], seq_lens [S],
    sample_rows [R]: as in Batch. samples: indices of the sequences that sample.
    """

    __slots__ = (
        "max_query_len", "num_decodes", "positions", "query_start", "sample_rows", "samples", "seq_lens", "sequence"
    )  # fmt: skip

    def __init__(self, plan: StepPlan) -> None:
        num_decodes = len(plan.decodes)
        if not plan.others:
            self.query_start = np.arange(num_decodes + 1)
            self.sequence = self.sample_rows = self.samples = self.query_start[:-1]
            self.positions = plan.starts
            self.seq_lens = plan.starts + 1
            self.max_query_len, self.num_decodes = 1, num_decodes
            return
        _, starts_, nums_, _, logit_rows_, samples_ = zip(*plan.others)
        starts = np.concatenate((plan.starts, np.array(starts_, dtype=np.int64)))
        nums = np.ones(len(starts), dtype=np.int64)
        nums[num_decodes:] = nums_
        self.seq_lens = starts + nums
        self.query_start = np.zeros(len(starts) + 1, dtype=np.int64)
        np.cumsum(nums, out=self.query_start[1:])
        self.sequence = np.repeat(np.arange(len(starts)), nums)
        self.positions = np.arange(plan.num_tokens) + (starts - self.query_start[:-1])[self.sequence]
        logit_rows = np.ones(len(starts), dtype=np.int64)
        logit_rows[num_decodes:] = logit_rows_
        self.sample_rows = _sample_rows(self.query_start, logit_rows)
        others = np.flatnonzero(samples_) + num_decodes
        self.samples = np.concatenate((np.arange(num_decodes), others))
        self.max_query_len = int(nums.max())
        longer = np.flatnonzero(nums != 1)
        self.num_decodes = int(longer[0]) if len(longer) else len(nums)


def _write_trees(plan: StepPlan, drafts: StepDrafts, positions: Ints, mask: Ints) -> None:
    """Writes the depths of trees into [T] positions, and what their rows attend into [T] mask."""
    end = len(plan.decodes)
    for row in plan.others:
        end += row.num_tokens
        if not row.num_draft_tokens:
            continue
        parents = drafts.parents(row)
        assert parents is not None
        first = end - row.num_tokens
        root = end - row.num_draft_tokens - 1
        for index in range(first, root + 1):  # tokens that are only caught up on, and the last known one
            mask[index] = (2 << (index - first)) - 1
        for node, parent in enumerate(parents):
            index, above = root + 1 + node, root + 1 + parent
            positions[index] = positions[above] + 1
            mask[index] = mask[above] | (1 << (index - first))


def _feed(token_ids: torch.Tensor, in_flight: torch.Tensor, source: torch.Tensor | None) -> None:
    """Writes the tokens in flight into [D] token_ids: those at `source`, None for the first D. (-1 is no token.)"""
    chosen = in_flight[: token_ids.shape[0]] if source is None else in_flight.index_select(0, source)
    torch.clamp(chosen, min=0, out=token_ids)


def _sample_rows(query_start: npt.NDArray[np.int64], num_logit_rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """[R] the last `num_logit_rows[i]` rows of every sequence i."""
    if num_logit_rows.max() <= 1:
        return query_start[1:][num_logit_rows > 0] - 1
    ends = np.cumsum(num_logit_rows)
    return np.arange(ends[-1]) + np.repeat(query_start[1:] - ends, num_logit_rows)
