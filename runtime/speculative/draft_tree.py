"""Token trees from a draft model: the likeliest tokens after each node, as many as the tree has children there.

    tree ((0,), (1,), (0, 0), (0, 1), (1, 0)):      last --+-- 0: a --+-- 2: c      step 1 (catching up): a, b = its two likeliest
                                                          |          `-- 3: d      step 2, rows last, a, b: c, d after a; e after b
                                                          `-- 1: b ----- 4: e

Every step computes the last known token and all nodes but those that it drafts: a row sees its ancestors by the mask of its step's
rows, and rows that are computed again cost next to nothing, since a step of so few tokens takes as long as reading the weights.
Drafts of trees are certain (Miao et al. 2024, "SpecInfer", section 4): requests with temperature accept what the target draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..packing import upload
from ..plan import ScheduledRequest, StepPlan
from .draft_model import DraftModelProposer
from .moves import SlotMoves
from .proposer import Drafts, ProposerContext, Target, Verified
from .verification import StepDrafts


class TreeLevels:
    """A tree of `SpeculativeConfig.tree` level by level, its nodes numbered by depth.

    parents: [N] each node's parent, -1 for the last known token. ranks: [N] which of its parent's likeliest tokens a node is.
    ends: [depth + 1] number of nodes down to each depth, ends[0] = 0.
    """

    def __init__(self, paths: Sequence[Sequence[int]]) -> None:
        index = {tuple(path): node for node, path in enumerate(paths)}
        self.parents = [index.get(tuple(path[:-1]), -1) for path in paths]
        self.ranks = [path[-1] for path in paths]
        depth = max(map(len, paths))
        self.ends = [sum(len(path) <= level for path in paths) for level in range(depth + 1)]

    def num_computed(self, num_nodes: int) -> int:
        """How many of the first `num_nodes` nodes are rows of the draft model's last step: all above the deepest."""
        return max(end for end in self.ends if end == 0 or end < num_nodes)

    def children(self, level: int) -> tuple[list[int], list[int]]:
        """([n] rows, [n] ranks) of the nodes at depth level + 1: whose children they are among those at `level`, and which."""
        nodes = range(self.ends[level], self.ends[level + 1])
        first = self.ends[level - 1] if level else -1
        return [self.parents[node] - first for node in nodes], [self.ranks[node] for node in nodes]


class TreeDraftProposer(DraftModelProposer):
    """Drafts the config's tree, one step of the draft model for each level."""

    def __init__(self, context: ProposerContext) -> None:
        super().__init__(context)
        assert context.config.tree is not None
        self._levels = TreeLevels(context.config.tree)
        self._children = [
            upload(np.array(self._levels.children(level), dtype=np.int64), self._device)
            for level in range(len(self._levels.ends) - 1)
        ]
        """[2, n] rows and ranks of each level's children."""
        self._widths = [max(self._levels.children(level)[1]) + 1 for level in range(len(self._children))]

    @torch.inference_mode()
    def propose(self, targets: Sequence[Target]) -> Drafts:
        """The first nodes of the tree, as many as each target has room for."""
        levels, lengths = self._levels, [target.num_drafts for target in targets]
        tokens_SN = torch.zeros(len(targets), levels.ends[-1], dtype=torch.int64, device=self._device)
        drafts = Drafts(
            lengths, tokens_SN, drawn=[False] * len(targets), parents=[levels.parents[:length] for length in lengths]
        )
        step = StepDrafts(drafts, {target.request.request_id: place for place, target in enumerate(targets)})
        self._make_rows(len(targets))
        self._choose_children(tokens_SN, list(range(len(targets))), 0, self._catch_up(targets))
        for level in range(1, len(self._children)):
            places = [place for place, length in enumerate(lengths) if length > levels.ends[level]]
            for group in self._groups(places, level):
                logits = self._compute_level([targets[place] for place in group], level, step)
                self._choose_children(tokens_SN, group, level, logits)
        for target, length in zip(targets, lengths):
            progress = self._requests[target.request.request_id]
            progress.computed = progress.drafted_at = target.request.num_tokens
            progress.num_drafted = length
        return drafts

    def _groups(self, places: list[int], level: int) -> list[list[int]]:
        """Targets that fit one step of the draft engine each."""
        size = max(1, self._engine.max_batch_tokens // (1 + self._levels.ends[level]))
        return [places[begin : begin + size] for begin in range(0, len(places), size)]

    def _compute_level(self, targets: Sequence[Target], level: int, step: StepDrafts) -> torch.Tensor:
        """[S * n, V] logits after the n nodes of a level of each target."""
        levels, rows = self._levels, []
        count = levels.ends[level]
        for target in targets:
            request = target.request
            request.draft_token_ids = [0] * count  # their values are on the device
            wanted = count - levels.ends[level - 1]
            rows.append(ScheduledRequest(request, request.num_tokens - 1, 1 + count, count, wanted, True))
        plan = StepPlan(self._next_id(), tuple(rows), sum(row.num_tokens for row in rows))
        return self._fit(self._engine.step(self._builder.build(plan, drafts=step)))

    def _choose_children(self, tokens_SN: torch.Tensor, places: list[int], level: int, logits_RV: torch.Tensor) -> None:
        """Writes the nodes below a level, the likeliest tokens after their parents, for the targets at `places`."""
        begin, end = self._levels.ends[level : level + 2]
        top_SnK = logits_RV.topk(self._widths[level], dim=-1).indices.view(len(places), -1, self._widths[level])
        parents, ranks = self._children[level]
        chosen_SN = top_SnK[:, parents, ranks]
        if len(places) == len(tokens_SN):
            tokens_SN[:, begin:end] = chosen_SN
        else:
            tokens_SN[upload(np.array(places, dtype=np.int64), self._device), begin:end] = chosen_SN

    def observe(self, verified: Sequence[Verified]) -> None:
        """The nodes of an accepted branch are computed already, except for the deepest; they move to where the text goes on."""
        moves = SlotMoves(self._engine)
        for item in verified:
            progress = self._requests.get(item.request.request_id)
            if progress is None or item.request.is_finished:
                continue
            computed = self._levels.num_computed(progress.num_drafted)
            kept = [node for node in item.nodes if node < computed]
            progress.computed = progress.drafted_at + len(kept)
            blocks = item.request.block_ids[self._table]
            moves.add([blocks] * len(self._engine.cache_groups), progress.drafted_at, kept)
        moves.launch()
