"""What goes into and comes out of the scheduler: its limits, a step's plan, its results and counts. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

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
    """Rows of logits wanted, counted from the last: 0 none, 1 the last, 1 + drafts when verifying, all num_tokens
    when prompt_logprobs are asked for. A preempted prompt is delivered again from its first row."""
    samples: bool = True
    """Whether tokens are sampled: the step reaches the request's last token."""


@dataclass(frozen=True)
class StepPlan:
    """What one step computes."""

    step_id: int
    """Counts the plans of a scheduler from 0."""
    scheduled: tuple[ScheduledRequest, ...]
    """Decoding requests first, then prompts, each by arrival; never empty."""
    num_tokens: int
    """Sum over scheduled, at most max_batch_tokens."""
    preempted: tuple[str, ...] = ()
    """Ids of the requests that lost their blocks while planning, in that order."""


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
    """Requests that hold blocks."""
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
