"""When a waiting request may start: the three admission policies. Imports no torch.

policy               starts a request when                              preempts   for
guaranteed_no_evict  the blocks of its longest possible run are free    never      steady latency (default)
                     beside those of all running ones
max_utilization      the blocks of its present tokens are free          yes        throughput
static_batch         the batch before has wholly finished               never      comparison only
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from .kv_cache import KVCacheManager
from .request import Request

PolicyName = Literal["guaranteed_no_evict", "max_utilization", "static_batch"]
POLICY_NAMES: tuple[PolicyName, ...] = ("guaranteed_no_evict", "max_utilization", "static_batch")


class MaxUtilization:
    """Starts whatever has blocks for its present tokens; running requests may later be preempted for lack of blocks.

    The base of the other policies, and their interface.
    """

    preempts = True
    """Whether running requests may lose their blocks."""

    def begin_step(self, waiting: Iterable[Request], num_running: int) -> None:
        """Called once per step before any may_admit(), with the queue in order; changes no request."""

    def may_admit(self, request: Request) -> bool:
        """Whether the head of the queue may start now, as far as the policy goes; changes nothing."""
        return True

    def admitted(self, request: Request) -> None:
        """Called after a request has started."""

    def released(self, request: Request) -> None:
        """Called when a request that had started has ended or was preempted."""


class GuaranteedNoEvict(MaxUtilization):
    """Starts a request only when its longest possible run fits beside those of all running ones.

    A request reserves `KVCacheManager.blocks_needed(max_total_tokens - 1)` blocks per group: all positions it can
    write (the last token is never fed back), in a window group no more than window and one chunk. A request never
    holds more than it reserves, so the sum of reservations bounds the blocks in use, sharing only lowers it, and
    no one is ever preempted.
    """

    preempts = False

    def __init__(self, kv: KVCacheManager, max_chunk_tokens: int) -> None:
        """Reserves in the pools of `kv`, for steps that compute at most max_chunk_tokens tokens of a request."""
        self._kv = kv
        self._max_chunk_tokens = max_chunk_tokens
        self._reservations: dict[str, tuple[int, ...]] = {}
        self.num_reserved = [0] * len(kv.groups)

    def _needs(self, request: Request) -> tuple[int, ...]:
        return self._kv.blocks_needed(request.max_total_tokens - 1, self._max_chunk_tokens)

    def may_admit(self, request: Request) -> bool:
        """Whether the longest run of the request fits beside all reservations."""
        needs = zip(self.num_reserved, self._needs(request), self._kv.groups)
        return all(reserved + need <= group.num_blocks for reserved, need, group in needs)

    def admitted(self, request: Request) -> None:
        """Adds the request's reservation."""
        self._reservations[request.request_id] = needs = self._needs(request)
        self.num_reserved = [reserved + need for reserved, need in zip(self.num_reserved, needs)]

    def released(self, request: Request) -> None:
        """Drops the request's reservation."""
        needs = self._reservations.pop(request.request_id)
        self.num_reserved = [reserved - need for reserved, need in zip(self.num_reserved, needs)]


class StaticBatch(GuaranteedNoEvict):
    """Starts a batch when nothing runs, and nothing else until all of it has finished.

    The batch is the head of the queue at that moment, as many requests as fit by number and by reservation. They
    may start over several steps when their prompts exceed one step's tokens.
    """

    def __init__(self, kv: KVCacheManager, max_chunk_tokens: int, max_sequences: int) -> None:
        """As GuaranteedNoEvict, with at most max_sequences requests in a batch."""
        super().__init__(kv, max_chunk_tokens)
        self._max_sequences = max_sequences
        self._last_arrival = -1

    def begin_step(self, waiting: Iterable[Request], num_running: int) -> None:
        """Draws the next batch when nothing runs."""
        if num_running:
            return
        sums = [0] * len(self._kv.groups)
        for position, request in enumerate(waiting):
            sums = [total + need for total, need in zip(sums, self._needs(request))]
            fits = all(total <= group.num_blocks for total, group in zip(sums, self._kv.groups))
            if position == self._max_sequences or not fits:
                break
            self._last_arrival = request.arrival

    def may_admit(self, request: Request) -> bool:
        """Whether the request belongs to the present batch."""
        return request.arrival <= self._last_arrival and super().may_admit(request)


def make_policy(name: PolicyName, kv: KVCacheManager, max_chunk_tokens: int, max_sequences: int) -> MaxUtilization:
    """The policy of that name; raises ValueError on an unknown one."""
    if name == "guaranteed_no_evict":
        return GuaranteedNoEvict(kv, max_chunk_tokens)
    if name == "max_utilization":
        return MaxUtilization()
    if name == "static_batch":
        return StaticBatch(kv, max_chunk_tokens, max_sequences)
    raise ValueError(f"policy is {name!r}; allowed: {', '.join(POLICY_NAMES)}")
