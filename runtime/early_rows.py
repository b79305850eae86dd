"""A batch whose drafts come from the model's own first layers: which rows those layers have computed, and which not.

rows of T      | p | a  d0 d1 d2 | q  q  q  q |      p decodes, a is a last known token with three drafts, q is a prompt's chunk
drafted        |   | x  x  x     |            |      hidden states of a, d0 and d1 are there: they made d0, d1 and d2
rest           | p |          d2 | q  q  q  q |      goes through the first layers in a batch of its own
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .batch import Batch, EarlyRows, GroupMetadata, Ints
from .packing import upload
from .plan import StepPlan

if TYPE_CHECKING:
    from .speculative.verification import StepDrafts


def early_rows(plan: StepPlan, batch: Batch, step: StepDrafts) -> EarlyRows | None:
    """What goes into `Batch.early`; None for a plan that verifies none of the drafts."""
    hidden = step.drafts.hidden
    assert hidden is not None, "only drafts of an early exit come with hidden states"
    counts, known, sources = _known_rows(plan, step, hidden.shape[1])
    if not known.any():
        return None
    starts = np.cumsum(counts) - counts
    sequence = np.repeat(np.arange(len(counts)), counts)
    is_known = np.arange(len(sequence)) - starts[sequence] < known[sequence]
    rows, rest_rows = np.flatnonzero(is_known), np.flatnonzero(~is_known)
    left = (counts - known)[counts > known]
    parts = [rows, sources, rest_rows, np.flatnonzero(counts > known), np.concatenate(([0], np.cumsum(left)))]
    sent = upload(np.concatenate(parts).astype(np.int64), batch.token_ids.device).split([len(part) for part in parts])
    rest = None
    if len(rest_rows):
        places, owners, bounds = sent[2:]
        longer = np.flatnonzero(left != 1)
        rest = Batch(
            token_ids=batch.token_ids.index_select(0, places),
            positions=batch.positions.index_select(0, places),
            groups=tuple(
                GroupMetadata(group.slot_mapping.index_select(0, places), group.block_tables.index_select(0, owners))
                for group in batch.groups
            ),
            query_start=bounds.int(),
            seq_lens=batch.seq_lens.index_select(0, owners),
            sample_rows=bounds[1:] - 1,
            max_query_len=int(left.max()),
            max_seq_len=batch.max_seq_len,
            num_decodes=int(longer[0]) if len(longer) else len(left),
        )
    return EarlyRows(hidden.flatten(0, 1).index_select(0, sent[1]), sent[0], rest, sent[2])


def _known_rows(plan: StepPlan, step: StepDrafts, width: int) -> tuple[Ints, Ints, Ints]:
    """[S] rows of each sequence, [S] how many of them, from the first, drafting has computed, and [K] where their hidden states
    are in the flattened [S, width]."""
    num_decodes = len(plan.decodes)
    counts = np.ones(plan.num_sequences, dtype=np.int64)
    known = np.zeros(plan.num_sequences, dtype=np.int64)
    sources = []
    for index, row in enumerate(plan.others, num_decodes):
        counts[index] = row.num_tokens
        if row.num_draft_tokens and row.num_tokens == 1 + row.num_draft_tokens:
            place = step.index[row.request.request_id]
            known[index] = min(row.num_tokens, step.drafts.lengths[place])
            sources.append(place * width + np.arange(known[index]))
    return counts, known, np.concatenate(sources) if sources else np.zeros(0, dtype=np.int64)
