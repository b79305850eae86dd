"""The rows of a step that verifies drafts: which hang together, what each sees, and what became of them.

    rows of logits    | a0 | b0 b1 b2 | c0 |      b: the last known token and two drafts; a and c have no drafts
    parent            | -  | -  1  2  | -  |      the row before in its chain, or in its tree
    token             | .. | .. d0 d1 | .. |      at the row: drafts from the second on

Row b2 is sampled with the history output + d0 + d1: penalties and bad words count the drafts that a row sees.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..packing import upload
from ..plan import ScheduledRequest, StepPlan
from .acceptance import follow_chains, follow_trees, rejection_tokens, typical_tokens
from .config import SpeculativeConfig
from .proposer import Drafts

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepDrafts:
    """A proposer's drafts with the requests that they are for."""

    drafts: Drafts
    index: dict[str, int]
    """Request id -> its place in `drafts`."""

    @property
    def on_device(self) -> bool:
        """Whether their values are known on the device alone."""
        return isinstance(self.drafts.token_ids, torch.Tensor)

    @property
    def is_simple(self) -> bool:
        """Whether they are chains that the host knows, and nothing goes with them."""
        return not self.on_device and self.drafts.parents is None and self.drafts.hidden is None

    def parents(self, row: ScheduledRequest) -> tuple[int, ...] | None:
        """Each draft's parent of those that a row of a plan verifies; None for a chain."""
        if self.drafts.parents is None:
            return None
        return tuple(self.drafts.parents[self.index[row.request.request_id]][: row.num_draft_tokens])

    def depths(self, row: ScheduledRequest) -> Sequence[int]:
        """Depth of each row of logits of a row of a plan: 0 of the last known token, and those of the drafts."""
        parents = self.parents(row)
        if parents is None:
            return range(1 + row.num_draft_tokens)
        depths = [0]
        for parent in parents:
            depths.append(1 + depths[parent + 1])
        return depths

    def sources(self, rows: Sequence[ScheduledRequest]) -> Ints:
        """Where the drafts that these rows verify are in the flattened [S, K] tensor of tokens."""
        assert isinstance(self.drafts.token_ids, torch.Tensor)
        width = self.drafts.token_ids.shape[1]
        parts = [self.index[row.request.request_id] * width + np.arange(row.num_draft_tokens) for row in rows]
        return np.concatenate(parts).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request's drafts."""

    index: int
    """Row of the plan."""
    path: tuple[int, ...]
    """Rows of logits whose tokens came out: the last known token's and those of the accepted drafts."""
    nodes: tuple[int, ...]
    """Numbers of the accepted drafts, from 0."""
    depth: int
    """Most drafts that could have been accepted: all of a chain, the depth of a tree."""


class _Verified:
    """One request with drafts: its row in the plan, its first row of logits, and its drafts' parents."""

    __slots__ = ("drafts", "first", "index", "parents", "row")

    def __init__(
        self, index: int, first: int, row: ScheduledRequest, parents: tuple[int, ...] | None, drafts: int
    ) -> None:
        self.index, self.first, self.row, self.parents = index, first, row, parents
        self.drafts = drafts
        """Its place in the proposer's drafts."""


class VerificationRows:
    """The rows of logits of a plan with drafts.

    Args:
        plan: its rows without drafts have one row of logits here (those that sample), the others one more than drafts.
        step: the drafts.
        at_R: [R] int64 token at each of these rows, on the device.
    """

    def __init__(self, plan: StepPlan, step: StepDrafts, config: SpeculativeConfig, at_R: torch.Tensor) -> None:
        self.config = config
        self.at_R = at_R
        self._step = step
        self._requests: list[_Verified] = []
        self._known_drafts: dict[int, int] | None = None
        first = len(plan.decodes)
        for index, row in enumerate(plan.others, first):
            if not row.samples:
                continue
            count = row.num_draft_tokens
            if count:
                parents = step.parents(row)
                self._requests.append(_Verified(index, first, row, parents, step.index[row.request.request_id]))
            first += 1 + count
        assert first == at_R.shape[0], f"{at_R.shape[0]} rows of logits; the plan has {first}"
        self._device = at_R.device

    @functools.cached_property
    def _counts(self) -> Ints:
        """[Q] drafts of each request."""
        return np.array([item.row.num_draft_tokens for item in self._requests], dtype=np.int64)

    @functools.cached_property
    def _firsts(self) -> Ints:
        """[Q] first row of each request."""
        return np.array([item.first for item in self._requests], dtype=np.int64)

    @functools.cached_property
    def parents_R(self) -> Ints:
        """[R] the row that each row's token was drafted behind, -1 for those of no draft."""
        parents = np.full(self.at_R.shape[0], -1, dtype=np.int64)
        above: list[int] = []
        for item in self._requests:
            first, count = item.first, item.row.num_draft_tokens
            if item.parents is None:
                above += range(first, first + count)
            else:
                above += [first + 1 + parent for parent in item.parents]
        parents[_ranges(self._firsts + 1, self._counts)] = above
        return parents

    # --- what rows see ------------------------------------------------------------------------------------------

    def drafts_seen(self, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(places in `rows`, tokens), [E] int64 on the device: one pair for every draft that a row has in its history."""
        current = np.array(rows, dtype=np.int64)
        place = np.arange(len(current))
        places, seen = [], []
        while True:
            inside = self.parents_R[current] >= 0
            current, place = current[inside], place[inside]
            if not len(current):
                break
            places.append(place)
            seen.append(current)
            current = self.parents_R[current]
        if not places:
            return self.at_R[:0], self.at_R[:0]
        index = upload(np.concatenate(seen), self._device)
        return upload(np.concatenate(places), self._device), self.at_R.index_select(0, index)

    def _known(self) -> dict[int, int]:
        """Row -> draft, of the host's copy of the drafts."""
        if self._known_drafts is None:
            self._known_drafts = {
                item.first + number: token
                for item in self._requests
                for number, token in enumerate(item.row.request.draft_token_ids[: item.row.num_draft_tokens], 1)
            }
        return self._known_drafts

    def history(self, row: int) -> tuple[int, ...]:
        """The drafts that a row has in its history, in order, from the host's copy of the drafts."""
        found: list[int] = []
        while self.parents_R[row] >= 0:
            assert not self._step.on_device, "the values of these drafts are on the device"
            found.append(self._known()[row])
            row = int(self.parents_R[row])
        return tuple(reversed(found))

    # --- how tokens are chosen ----------------------------------------------------------------------------------

    def choose(
        self,
        x_NV: torch.Tensor,
        random: Sequence[int],
        tokens_N: torch.Tensor,
        accept: npt.NDArray[np.float64],
        draw_N: torch.Tensor,
    ) -> torch.Tensor:
        """[N] the tokens of random rows, given those drawn without regard to drafts.

        Args:
            x_NV: [N, V] logits that the tokens were drawn from. random: [N] the rows they belong to.
            accept: [N] uniform numbers besides those of the draws, `draw_N`.
        """
        if self.config.acceptance == "exact":
            return tokens_N
        if self.config.acceptance == "typical":
            return self._typical(x_NV, random, tokens_N)
        return self._rejection(x_NV, random, tokens_N, accept, draw_N)

    def _rejection(
        self,
        x_NV: torch.Tensor,
        random: Sequence[int],
        tokens_N: torch.Tensor,
        accept: npt.NDArray[np.float64],
        draw_N: torch.Tensor,
    ) -> torch.Tensor:
        drafts = self._step.drafts
        if drafts.logits is None:
            return tokens_N
        place = {row: n for n, row in enumerate(random)}
        width = drafts.logits.shape[1]
        rows, sources, children = [], [], []
        for item in self._requests:
            if drafts.drawn[item.drafts]:
                assert item.parents is None, "drafts of trees are certain"
                for number in range(item.row.num_draft_tokens):
                    rows.append(place[item.first + number])
                    children.append(item.first + number + 1)
                    sources.append(item.drafts * width + number)
        if not rows:
            return tokens_N
        rows_D, sources_D, children_D = upload(np.array([rows, sources, children], dtype=np.int64), self._device)
        chosen = rejection_tokens(
            x_NV.index_select(0, rows_D),
            drafts.logits.flatten(0, 1).index_select(0, sources_D),
            self.at_R.index_select(0, children_D),
            upload(accept[rows], self._device),
            draw_N.index_select(0, rows_D),
        )
        return tokens_N.index_copy(0, rows_D, chosen)

    def _typical(self, x_NV: torch.Tensor, random: Sequence[int], tokens_N: torch.Tensor) -> torch.Tensor:
        children: dict[int, list[int]] = {}
        for row, parent in enumerate(self.parents_R.tolist()):
            if parent >= 0:
                children.setdefault(parent, []).append(row)
        rows = [n for n, row in enumerate(random) if row in children]
        if not rows:
            return tokens_N
        width = max(len(children[random[n]]) for n in rows)
        table = np.full((len(rows), width), -1, dtype=np.int64)
        for line, n in zip(table, rows):
            line[: len(children[random[n]])] = children[random[n]]
        table_DC, rows_D = upload(table, self._device), upload(np.array(rows, dtype=np.int64), self._device)
        drafts_DC = torch.where(table_DC >= 0, self.at_R[table_DC.clamp(min=0)], -1)
        chosen = typical_tokens(
            x_NV.index_select(0, rows_D), drafts_DC, tokens_N.index_select(0, rows_D),
            self.config.typical_epsilon, self.config.typical_delta,
        )  # fmt: skip
        return tokens_N.index_copy(0, rows_D, chosen)

    # --- what came out ------------------------------------------------------------------------------------------

    def follow(self, tokens_R: torch.Tensor) -> torch.Tensor:
        """[Q] int64 the last accepted draft of each request with drafts, counted from 1, 0 for none; on the device."""
        chains = all([item.parents is None for item in self._requests])
        if chains and self._device.type == "cpu":  # where a few comparisons take a tenth of the time
            at, tokens = self.at_R.tolist(), tokens_R.tolist()
            counts = [_num_followed(at, tokens, item.first, item.row) for item in self._requests]
            return torch.from_numpy(np.array(counts, dtype=np.int64))
        width = int(self._counts.max())
        inside = np.arange(width) < self._counts[:, None]
        rows = np.where(inside, self._firsts[:, None] + np.arange(1, width + 1), 0)
        above = np.where(inside, self.parents_R[rows], 0)
        numbers = np.zeros_like(rows)
        if not chains:
            numbers = np.where(inside, above - self._firsts[:, None], 0)
        parts = upload(np.stack([rows, above, inside.astype(np.int64), numbers]), self._device)
        hits = (self.at_R[parts[0]] == tokens_R[parts[1]]) & (parts[2] > 0)
        return follow_chains(hits) if chains else follow_trees(hits, parts[3], width)

    def device_values(self) -> list[torch.Tensor]:
        """What the host needs besides: the drafts, where it does not know them."""
        return [self.at_R] if self._step.on_device else []

    def learn(self, values: Sequence[npt.NDArray[Any]]) -> None:
        """Takes `device_values` on the host: requests get to know their drafts."""
        if not values:
            return
        for item in self._requests:
            begin = item.first + 1
            item.row.request.draft_token_ids = values[0][begin : begin + item.row.num_draft_tokens].tolist()

    def outcomes(self, last_Q: npt.NDArray[np.int64]) -> list[Outcome]:
        """What became of each request's drafts, from `follow` on the host."""
        found = []
        for item, last in zip(self._requests, last_Q.tolist()):
            if item.parents is None:
                path = tuple(range(item.first, item.first + last + 1))
                found.append(Outcome(item.index, path, tuple(range(last)), item.row.num_draft_tokens))
                continue
            nodes: list[int] = []
            node = last - 1
            while node >= 0:
                nodes.append(node)
                node = item.parents[node]
            nodes.reverse()
            # For the scheduler, a tree's drafts are those of the accepted path.
            drafts = item.row.request.draft_token_ids
            item.row.request.draft_token_ids = [drafts[node] for node in nodes]
            path = (item.first, *(item.first + 1 + node for node in nodes))
            found.append(Outcome(item.index, path, tuple(nodes), max(self._step.depths(item.row))))
        return found


def _num_followed(at: Sequence[int], tokens: Sequence[int], first: int, row: ScheduledRequest) -> int:
    """Drafts of a chain that are the tokens of the rows before them. at, tokens: [R] at, and from, each row; first: its first."""
    end = first + row.num_draft_tokens
    here = first
    while here < end and at[here + 1] == tokens[here]:
        here += 1
    return here - first


def _ranges(firsts: Ints, counts: Ints) -> Ints:
    """The numbers firsts[i] .. firsts[i] + counts[i] - 1 of all i, one after another."""
    ends = np.cumsum(counts)
    return np.arange(int(counts.sum())) + np.repeat(firsts - (ends - counts), counts)
