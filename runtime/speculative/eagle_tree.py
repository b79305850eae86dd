"""Token trees from an EAGLE-3 layer: level by level as from a draft model, every row with the hidden state of its parent.

step of a level | last known token |  a  |  b  |  c   |      rows of the step: the nodes so far
hidden          | f(n-2)           | g   | g   | g(a) |      g: what the step before gave to the last known token
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..packing import upload
from ..plan import ScheduledRequest, StepPlan
from .draft_tree import TreeDraftProposer
from .eagle import EagleProposer
from .proposer import Drafts, ProposerContext, Target
from .verification import StepDrafts


class TreeEagleProposer(EagleProposer, TreeDraftProposer):
    """Drafts the config's tree, one step of the layer for each level."""

    def __init__(self, context: ProposerContext) -> None:
        super().__init__(context)
        self._parent_rows = upload(np.array(self._levels.parents, dtype=np.int64) + 1, self._device)
        self._given: dict[str, torch.Tensor] = {}
        """Request id -> [rows, H] hidden states that the last step gave to its last known token and the nodes in it."""

    def propose(self, targets: Sequence[Target]) -> Drafts:
        """The first nodes of the tree, as many as each target has room for."""
        drafts = super().propose(targets)
        self._given = {}
        return drafts

    def _catch_up(self, targets: Sequence[Target]) -> torch.Tensor:
        logits = super()._catch_up(targets)
        self._given = {target.request.request_id: row for target, row in zip(targets, self._own.split(1))}
        return logits

    def _compute_level(self, targets: Sequence[Target], level: int, step: StepDrafts) -> torch.Tensor:
        count = self._levels.ends[level]
        rows, hidden = [], []
        for target in targets:
            request = target.request
            request.draft_token_ids = [0] * count  # their values are on the device
            wanted = count - self._levels.ends[level - 1]
            rows.append(ScheduledRequest(request, request.num_tokens - 1, 1 + count, count, wanted, True))
            hidden.append(self._store.gather([(request.request_id, request.num_tokens - 2, 1)]))
            hidden.append(self._given[request.request_id].index_select(0, self._parent_rows[:count]))
        plan = StepPlan(self._next_id(), tuple(rows), sum(row.num_tokens for row in rows))
        batch = self._builder.build(plan, drafts=step)
        batch.hidden = torch.cat(hidden)
        engine: Any = self._engine
        logits, states = engine.step_outputs(batch)
        for target, part in zip(targets, states[:, 0].split(1 + count)):
            self._given[target.request.request_id] = part
        return self._fit(logits)
