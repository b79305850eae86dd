"""What goes into and comes out of the scheduler: its limits, a step's plan, its results and counts. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .kv_cache import CacheGroup
from .policies import POLICY_NAMES, PolicyName
from .request import Request


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Limits of a scheduler; raises ValueError when they contradict each other."""

    groups: tuple[CacheGroup, ...]
    """The KV blocks, one pool per cache group, at least one."""
    max_batch_tokens: int
    """Token budget of a step, >= max_sequences, so that every running request can decode in every step."""
    max_sequences: int
    """Most running requests, >= 1."""
    max_seq_len: int
    """Most tokens of prompt and output of one request, >= 2; longer outputs end with finish reason length."""
    policy: PolicyName = "guaranteed_no_evict"
    """When waiting requests start, see policies.py."""
    chunked_prefill: bool = True
    """Whether a prompt may be computed over several steps. If not, it must fit the budget of one step; only a
    preempted request that has outgrown the budget is still recomputed in chunks."""
    max_chunk_tokens: int | None = None
    """Most tokens of one request in a step, >= 1, bounds the latency others see and the blocks of window groups;
    None: max_batch_tokens. Needs chunked_prefill."""
    enable_prefix_cache: bool = True
    """Whether requests share the blocks of equal prefixes."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(self.groups))
        if not self.groups:
            raise ValueError("groups is empty; allowed: at least one CacheGroup")
        for name, least in (("max_sequences", 1), ("max_seq_len", 2), ("max_chunk_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; allowed: integers >= {least}")
        if self.max_batch_tokens < self.max_sequences:
            raise ValueError(
                f"max_batch_tokens is {self.max_batch_tokens} and max_sequences is {self.max_sequences}; allowed: "
                f"max_batch_tokens >= max_sequences, since each running request decodes a token per step"
            )
        if self.max_chunk_tokens is not None and not self.chunked_prefill:
            raise ValueError(
                f"max_chunk_tokens is {self.max_chunk_tokens} and chunked_prefill is False; set one of the two"
            )
        if self.policy not in POLICY_NAMES:
            raise ValueError(f"policy is {self.policy!r}; allowed: {', '.join(POLICY_NAMES)}")

    @property
    def chunk_limit(self) -> int:
        """Most tokens of one request in a step."""
        return min(self.max_chunk_tokens or self.max_batch_tokens, self.max_batch_tokens)


class ScheduledRequest(NamedTuple):
    """One request's part of a step: positions start .. start + num_tokens - 1, immutable.

    (A named tuple rather than a frozen dataclass: a thousand are made per step, in a quarter of the time.)
    """

    request: Request
    start: int
    """First position computed in this step."""
    num_tokens: int
    """Positions computed, the drafts at their end included."""
    num_draft_tokens: int = 0
    """How many of request.draft_token_ids are among them, from the first."""
    num_logit_rows: int = 1
    """Rows of logits wanted, counted from the last: 0 none, 1 the last, 1 + drafts when verifying, those from the
    request's `first_logit_row` on when prompt_logprobs are asked for. A preempted prompt is delivered again from there."""
    samples: bool = True
    """Whether tokens are sampled: the step reaches the request's last token."""

    @property
    def first_logit_row(self) -> int:
        """The position of the first row whose logits are wanted."""
        return self.start + self.num_tokens - self.num_logit_rows


_row = partial(tuple.__new__, ScheduledRequest)
_NO_STARTS: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)


class StepPlan:
    """What one step computes; not changed after it is made.

    The rows of a step, in this order:

        decodes          one token each, sampled; by arrival, kept as arrays since there may be thousands
        others           what has more tokens, or its prompt under way: decoding with drafts, then prompts, by arrival

    Args:
        scheduled: rows that are not in `decodes`.
        decodes, starts: requests that compute the one position `starts[i]` and sample a token.
        last: [D] whether that token is the request's last by length.
    """

    __slots__ = (
        "_scheduled",
        "decodes",
        "last",
        "left",
        "num_tokens",
        "on_top",
        "others",
        "preempted",
        "starts",
        "step_id",
    )

    def __init__(
        self,
        step_id: int,
        scheduled: tuple[ScheduledRequest, ...],
        num_tokens: int,
        preempted: tuple[str, ...] = (),
        left: tuple[str, ...] = (),
        decodes: tuple[Request, ...] = (),
        starts: npt.NDArray[np.int64] = _NO_STARTS,
        last: npt.NDArray[np.bool_] | None = None,
        on_top: bool = False,
    ) -> None:
        self.step_id = step_id
        """Counts the plans of a scheduler from 0."""
        self.decodes = decodes
        self.starts = starts
        self.last = np.zeros(len(decodes), dtype=np.bool_) if last is None else last
        self.others = scheduled
        self.num_tokens = num_tokens
        """Sum over all rows, at most max_batch_tokens."""
        self.preempted = preempted
        """Ids of the requests that lost their blocks while planning, in that order."""
        self.left = left
        """Ids of the requests that gave their blocks back because the step in flight brings their last token."""
        self.on_top = on_top
        """Whether the step before had no result yet: the tokens that `decodes` compute are those that it samples."""
        self._scheduled = None if decodes else scheduled

    @property
    def scheduled(self) -> tuple[ScheduledRequest, ...]:
        """All rows, never none; made when first asked for."""
        if self._scheduled is None:
            fields: Any = zip(self.decodes, self.starts.tolist(), repeat(1), repeat(0), repeat(1), repeat(True))
            self._scheduled = (*map(_row, fields), *self.others)
        return self._scheduled

    @property
    def num_sequences(self) -> int:
        """Number of rows."""
        return len(self.decodes) + len(self.others)

    def request(self, index: int) -> Request:
        """The request of row `index`."""
        num_decodes = len(self.decodes)
        return self.decodes[index] if index < num_decodes else self.others[index - num_decodes].request

    def sampling_rows(self) -> list[int]:
        """Indices of the rows that sample, ascending."""
        num_decodes = len(self.decodes)
        return [*range(num_decodes), *(i for i, row in enumerate(self.others, num_decodes) if row.samples)]

    @property
    def has_drafts(self) -> bool:
        """Whether a row verifies drafts, so that the step's result decides where the next one begins."""
        return any(row.num_draft_tokens for row in self.others)


class RequestUpdate(NamedTuple):
    """What a step brought a request."""

    request: Request
    new_token_ids: list[int]
    """Tokens appended to the output, up to the one that ended it; at least one."""
    finished: bool
    """Whether it ended with them; request.finish_reason tells why."""


@dataclass(frozen=True, kw_only=True)
class GroupStats:
    """Blocks of one cache group: total, held by requests, and findable by prefix (held or free)."""

    total: int
    used: int
    cached: int


@dataclass(frozen=True, kw_only=True)
class SchedulerStats:
    """A scheduler's present load and its counts since the start."""

    running: int
    """Requests that have started and not ended."""
    waiting: int
    """Requests in the queue."""
    groups: tuple[GroupStats, ...]
    """Block use per cache group."""
    prefix_queried_tokens: int
    """Tokens of the requests that started and could have used the prefix cache, recomputations included."""
    prefix_hit_tokens: int
    """How many of these were found there."""
    preemptions: int
    """Times a running request lost its blocks."""
    steps: int
    """Plans made."""
