"""The requests that a scheduler holds, with their blocks, and the steps that it has planned and not heard of. No torch.

add_request -> waiting -> running -> ending -> finished         ending: the last token is in flight
                  ^---------'  preempted
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque

import numpy as np

from .kv_cache import KVCacheManager
from .plan import GroupStats, SchedulerConfig, SchedulerStats, StepPlan
from .policies import make_policy
from .request import FinishReason, Request, RequestStatus
from .running import Ints, RunningSet

_RUNNING = RequestStatus.RUNNING
_FINISHED = RequestStatus.FINISHED


class Flight:
    """A plan without a result.

    num_retired: requests that had ended when it was made. advanced: whether what it computes is counted as computed.
    """

    __slots__ = ("advanced", "num_retired", "plan")

    def __init__(self, plan: StepPlan, num_retired: int) -> None:
        self.plan = plan
        self.num_retired = num_retired
        self.advanced = False


class Queues:
    """Requests that come and go, waiting, running or ending; `Scheduler` plans their steps."""

    def __init__(self, config: SchedulerConfig) -> None:
        """Makes empty pools and queues for `config`."""
        self.config = config
        self.kv = KVCacheManager(config.groups, enable_prefix_cache=config.enable_prefix_cache)
        self._chunk_limit = config.chunk_limit
        self._policy = make_policy(config.policy, self.kv, self._chunk_limit, config.max_sequences)
        self._requests: dict[str, Request] = {}
        self._waiting: OrderedDict[str, Request] = OrderedDict()
        self._ending: dict[str, Request] = {}
        self._running = RunningSet(config.max_sequences)
        self._num_prefilling = 0
        self._num_arrived = 0
        self._num_steps = 0
        self._num_preemptions = 0
        self._num_queried_tokens = 0
        self._num_hit_tokens = 0
        self._num_retired = 0
        self._left_running = False  # whether the running list holds requests that have ended
        self._flights: deque[Flight] = deque()
        self._unreported: list[str] = []  # preempted or gone while nothing could be planned
        self._left: list[str] = []
        self._stop_sets: Counter[frozenset[int]] = Counter()
        self._stop_ids: Ints | None = None

    # --- requests in and out ------------------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        """Queue a new request; raises ValueError, with the numbers, for one that could never run to its end."""
        if request.request_id in self._requests:
            raise ValueError(f"request id {request.request_id!r} is in use; allowed: an id no live request has")
        if request.arrival != -1:
            raise ValueError(f"request {request.request_id!r} was added before; make a new Request of it")
        max_total_tokens = self.check_fits(request)
        request.max_total_tokens = max_total_tokens
        request.arrival = self._num_arrived
        self._num_arrived += 1
        self._requests[request.request_id] = request
        self._waiting[request.request_id] = request
        self._stop_sets[request.stop_ids] += 1
        self._stop_ids = None

    def check_fits(self, request: Request) -> int:
        """The most tokens the request can reach; raises ValueError when it cannot get there."""
        config, name, num_prompt = self.config, f"request {request.request_id!r}", request.num_prompt_tokens
        if num_prompt == 0:
            raise ValueError(f"{name}: the prompt is empty; allowed: at least one token, such as the bos token")
        if num_prompt >= config.max_seq_len:
            raise ValueError(
                f"{name}: the prompt has {num_prompt} tokens and max_seq_len is {config.max_seq_len}; allowed: at "
                f"most {config.max_seq_len - 1}; shorten the prompt or raise max_seq_len"
            )
        if not config.chunked_prefill and num_prompt > config.max_batch_tokens:
            raise ValueError(
                f"{name}: the prompt has {num_prompt} tokens and max_batch_tokens is {config.max_batch_tokens} with "
                f"chunked_prefill=False; shorten the prompt, raise max_batch_tokens or allow chunked_prefill"
            )
        max_tokens = request.params.max_tokens
        limit = config.max_seq_len if max_tokens is None else min(num_prompt + max_tokens, config.max_seq_len)
        for i, (group, need) in enumerate(zip(config.groups, self.kv.blocks_needed(limit - 1, self._chunk_limit))):
            if need > group.num_blocks:
                window = f", window {group.window}, chunks of {self._chunk_limit}" if group.window else ""
                raise ValueError(
                    f"{name}: prompt {num_prompt} + max_tokens {max_tokens} (max_seq_len {config.max_seq_len}) is "
                    f"{limit} tokens, which needs {need} blocks of cache group {i} (block size {group.block_size}"
                    f"{window}); it has {group.num_blocks}; lower max_tokens"
                    f"{' or max_chunk_tokens' if window else ''} or give the KV cache more blocks"
                )
        return limit

    def abort(self, request_id: str) -> bool:
        """End a request at once; False when no live request has the id. A step in flight drops its result."""
        return self.finish(request_id, FinishReason.ABORT)

    def finish(self, request_id: str, reason: FinishReason, stop_reason: int | str | None = None) -> bool:
        """End a request for a reason found outside, such as a stop string; False when the id is not live.

        Its blocks are free at once; what is computed of it stays in the prefix cache.
        """
        request = self._requests.get(request_id)
        if request is None:
            return False
        request.finish_reason, request.stop_reason = reason, stop_reason
        was_running = request.status is _RUNNING
        self._retire(request)
        if was_running:
            self._running.keep_running()
            self._left_running = False
        return True

    def _retire(self, request: Request) -> None:
        """End a request, except for its place in the running list."""
        if request.status is _RUNNING:
            self._end_run(request)
            self._left_running = True
        elif request.status is RequestStatus.ENDING:
            del self._ending[request.request_id]
        else:
            del self._waiting[request.request_id]
        request.status = _FINISHED
        request.draft_token_ids = []
        del self._requests[request.request_id]
        self._num_retired += 1
        self._stop_sets[request.stop_ids] -= 1
        if not self._stop_sets[request.stop_ids]:
            del self._stop_sets[request.stop_ids]
            self._stop_ids = None

    def _all_stop_ids(self) -> Ints:
        """Every token that stops some live request."""
        if self._stop_ids is None:
            self._stop_ids = np.array(sorted(frozenset[int]().union(*self._stop_sets)), dtype=np.int64)
        return self._stop_ids

    def _end_run(self, request: Request) -> None:
        """Take blocks and reservation from a request that leaves the running list."""
        self._num_prefilling -= request.prefilling
        request.prefilling = False
        self.kv.free(request)
        self._policy.released(request)

    # --- blocks -------------------------------------------------------------------------------------------------

    @staticmethod
    def _due(request: Request) -> int:
        """The position at which a decoding request next needs a block, has one to name or give back, or ends."""
        return min(request.kv_capacity, request.kv_next_event, request.max_total_tokens - 1)

    def _advance(self, flight: Flight) -> None:
        """Count in what a launched step computes: prompts end, blocks get names or go back."""
        if flight.advanced:
            return
        flight.advanced = True
        running = self._running
        running.advance()
        for index in running.wanting_a_look():
            request = running.requests[index]
            computed = request.num_computed_tokens
            if request.prefilling and computed >= request.prefill_end:
                request.prefilling = False
                running.decoding[index] = True
                self._num_prefilling -= 1
            if computed >= request.kv_next_event:
                self.kv.advance(request)
            if not request.prefilling and request.num_tokens == computed:
                running.due[index] = self._due(request)

    # --- inspection ---------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether any request is running or waiting."""
        return bool(self._requests)

    @property
    def running(self) -> tuple[Request, ...]:
        """The running requests by arrival."""
        return tuple(self._running.requests)

    @property
    def waiting(self) -> tuple[Request, ...]:
        """The waiting requests by arrival."""
        return tuple(self._waiting.values())

    @property
    def stats(self) -> SchedulerStats:
        """Present load and counts since the start."""
        return SchedulerStats(
            running=len(self._running) + len(self._ending),
            waiting=len(self._waiting),
            groups=tuple(
                GroupStats(total=pool.num_blocks, used=pool.num_used, cached=pool.num_cached) for pool in self.kv.pools
            ),
            prefix_queried_tokens=self._num_queried_tokens,
            prefix_hit_tokens=self._num_hit_tokens,
            preemptions=self._num_preemptions,
            steps=self._num_steps,
        )

    def check_integrity(self) -> None:
        """Prove that queues, statuses, counters and blocks agree; raises AssertionError. For tests and idle times."""
        self.kv.check_integrity()
        arrivals = [request.arrival for request in (*self._running, *self._waiting.values())]
        assert arrivals == sorted(set(arrivals)), f"not in order of arrival, running before waiting: {arrivals}"
        live = {id(request) for request in (*self._running, *self._ending.values(), *self._waiting.values())}
        assert live == {id(request) for request in self._requests.values()}, "a live request is in no queue"
        assert len(self._running) <= self.config.max_sequences, f"{len(self._running)} requests are running"
        assert {id(request) for request in self._running} == {id(r) for r in self.kv.admitted_requests}, "tables"
        on_top = len(self._flights) == 2 or (len(self._flights) == 1 and self._flights[0].advanced)
        assert on_top or not self._ending, "a request waits for a token that is not in flight"
        for index, request in enumerate(self._running):
            name = f"request {request.request_id!r}"
            assert request.status is _RUNNING, f"{name} is in the running list with status {request.status}"
            assert request.prefilling == (request.num_computed_tokens < request.prefill_end), f"{name}: prefilling"
            assert request.prefilling != self._running.decoding[index], f"{name}: decoding"
            assert request.num_computed_tokens == self._running.next[index], f"{name}: next"
            assert request.num_computed_tokens < request.num_tokens + on_top, f"{name}: computed"
            assert request.num_tokens < request.max_total_tokens == self._running.limit[index], f"{name}: lengths"
        for request in self._ending.values():
            assert request.status is RequestStatus.ENDING and not any(request.block_ids), f"{request.request_id!r} ends"
        for request in self._waiting.values():
            assert request.status is RequestStatus.WAITING, f"{request.request_id!r} waits as {request.status}"
            assert request.num_computed_tokens == 0 and not any(request.block_ids), f"{request.request_id!r} waits"
        assert self._num_prefilling == sum(request.prefilling for request in self._running), "prefilling count"
