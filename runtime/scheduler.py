"""Which tokens of which requests run in each step: the scheduler, alone with its requests and blocks. No torch.

One step of a budget of 16 tokens, with three decoding requests and two prompts:

    | a | b b b | c | d d d d d d | e e e e e |      a, c: one token    b: one token and two drafts
      1     3     1        6            5            d: the rest of a prompt    e: the first chunk of another

Requests are served first come, first served (FCFS). Every decoding request gets its next token in every step; the
rest of the budget goes by arrival to drafts, started prompts and then waiting requests. The head of the queue is
never overtaken: while it does not fit, smaller ones behind it wait too (head-of-line blocking is the price of never
starving a large request), and so they do while it waits for a sibling.
Two invariants carry this: the running list and the waiting queue are each in order of arrival, and every waiting
request arrived after every running one. So the latest arrived running request, the victim of a preemption, is the
last of the list, and goes to the front of the queue.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence

from .kv_cache import KVCacheManager
from .plan import GroupStats, RequestUpdate, ScheduledRequest, SchedulerConfig, SchedulerStats, StepPlan
from .policies import make_policy
from .request import FinishReason, Request, RequestStatus

__all__ = [
    "GroupStats",
    "RequestUpdate",
    "ScheduledRequest",
    "Scheduler",
    "SchedulerConfig",
    "SchedulerStats",
    "StepPlan",
]

logger = logging.getLogger(__name__)

_RUNNING = RequestStatus.RUNNING


class _Step:
    """A plan in the making."""

    __slots__ = ("decodes", "prefills", "preempted", "spare")

    def __init__(self, spare: int) -> None:
        self.decodes: list[ScheduledRequest] = []
        self.prefills: list[ScheduledRequest] = []
        self.preempted: list[str] = []
        # Budget left when each decoding request still to come takes one token.
        self.spare = spare


class Scheduler:
    """Plans steps over requests that come and go: add_request, then schedule and update in turns.

    schedule() and update() alternate; add_request, abort and finish may come at any time between them. Not
    thread-safe: one thread, or the caller's lock.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        """Makes empty pools and queues for `config`."""
        self.config = config
        self.kv = KVCacheManager(config.groups, enable_prefix_cache=config.enable_prefix_cache)
        self._chunk_limit = config.chunk_limit
        self._policy = make_policy(config.policy, self.kv, self._chunk_limit, config.max_sequences)
        self._requests: dict[str, Request] = {}
        self._waiting: OrderedDict[str, Request] = OrderedDict()
        self._running: list[Request] = []
        self._num_prefilling = 0
        self._num_arrived = 0
        self._num_steps = 0
        self._num_preemptions = 0
        self._num_queried_tokens = 0
        self._num_hit_tokens = 0
        self._outstanding: StepPlan | None = None

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
        if request.status is _RUNNING:
            self._running.remove(request)
            self._end_run(request)
        else:
            del self._waiting[request_id]
        self._retire(request)
        return True

    def _retire(self, request: Request) -> None:
        request.status = RequestStatus.FINISHED
        request.draft_token_ids = []
        del self._requests[request.request_id]

    def _end_run(self, request: Request) -> None:
        """Take blocks and reservation from a request that leaves the running list."""
        self._num_prefilling -= request.prefilling
        request.prefilling = False
        self.kv.free(request)
        self._policy.released(request)

    # --- planning -----------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """Plan the next step; None when no request is left. Raises RuntimeError before the last plan's update()."""
        if self._outstanding is not None:
            raise RuntimeError(
                f"step {self._outstanding.step_id} has no update() yet; allowed: schedule() and update() in turns"
            )
        if not self._requests:
            return None
        step = _Step(self.config.max_batch_tokens - len(self._running) + self._num_prefilling)
        self._plan_running(step)
        if not step.preempted:
            self._plan_waiting(step)
        scheduled = tuple(step.decodes + step.prefills)
        assert scheduled, f"{len(self._running)} running and {len(self._waiting)} waiting requests, and an empty plan"
        num_tokens = self.config.max_batch_tokens - step.spare
        plan = StepPlan(self._num_steps, scheduled, num_tokens, tuple(step.preempted))
        self._num_steps += 1
        self._outstanding = plan
        return plan

    def _plan_running(self, step: _Step) -> None:
        """Give every decoding request its token, and spare tokens by arrival to drafts and started prompts."""
        running, decodes, index = self._running, step.decodes, 0
        make, row_fields = ScheduledRequest._make, (1, 0, 1, True)
        while index < len(running):  # preemption shortens the list from its end
            request = running[index]
            index += 1
            start = request.num_computed_tokens
            end = start + 1
            if (
                len(request.all_token_ids) == end
                and end <= request.kv_capacity
                and not request.prefilling
                and not request.draft_token_ids
            ):
                decodes.append(make((request, start, *row_fields)))  # the common case, and a quick one
            elif request.prefilling:
                self._plan_prefill(step, request)
            else:
                self._plan_decode(step, request)

    def _plan_decode(self, step: _Step, request: Request) -> None:
        """One token, and as spare tokens and blocks allow the rest up to the last one and its drafts."""
        start = request.num_computed_tokens
        remaining = request.num_tokens - start
        num_drafts = min(len(request.draft_token_ids), request.max_total_tokens - request.num_tokens - 1)
        most = min(self._chunk_limit, 1 + step.spare)
        num_new = min(remaining, most)
        num_drafts = max(0, min(num_drafts, most - remaining))
        if num_drafts and not self.kv.allocate(request, start + num_new + num_drafts):
            # Drafts are a bet: nobody loses blocks for them, only those that fit the blocks at hand stay.
            num_drafts = max(0, min(num_drafts, request.kv_capacity - start - num_new))
        if not self._make_room(step, request, start + num_new):
            return
        self._append(step, step.decodes, request, num_new, num_drafts)
        step.spare += 1  # the token that was kept back for it

    def _plan_prefill(self, step: _Step, request: Request) -> None:
        """The next chunk of a prompt (or recomputation) that has started."""
        start = request.num_computed_tokens
        num_new = min(request.num_tokens - start, self._chunk_limit, step.spare)
        if num_new > 0 and self._make_room(step, request, start + num_new):
            self._append(step, step.prefills, request, num_new, 0)

    def _append(
        self, step: _Step, rows: list[ScheduledRequest], request: Request, num_new: int, num_drafts: int
    ) -> None:
        start, num_tokens = request.num_computed_tokens, num_new + num_drafts
        samples = start + num_new == request.num_tokens
        num_logit_rows = 1 + num_drafts if samples else 0
        if request.needs_prompt_logits:
            num_logit_rows = num_tokens
        rows.append(ScheduledRequest(request, start, num_tokens, num_drafts, num_logit_rows, samples))
        step.spare -= num_tokens

    def _make_room(self, step: _Step, request: Request, num_tokens: int) -> bool:
        """Allocate for num_tokens, preempting the latest arrived until it works; False if that is `request`."""
        while not self.kv.allocate(request, num_tokens):
            assert self._policy.preempts, f"{self.config.policy} ran out of blocks for {request.request_id!r}"
            victim = self._running[-1]
            if not victim.prefilling:
                step.spare += 1  # the token that was kept back for it
            self._preempt(victim)
            step.preempted.append(victim.request_id)
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        """Free the blocks of the last running request and put it, with its output, at the front of the queue."""
        popped = self._running.pop()
        assert popped is request, "the victim of a preemption is the last running request"
        logger.debug("preempt %s at %d computed tokens", request.request_id, request.num_computed_tokens)
        self._end_run(request)
        request.status = RequestStatus.WAITING
        request.num_computed_tokens = 0
        request.draft_token_ids = []
        request.num_preemptions += 1
        self._num_preemptions += 1
        self._waiting[request.request_id] = request
        self._waiting.move_to_end(request.request_id, last=False)

    def _plan_waiting(self, step: _Step) -> None:
        """Start waiting requests from the head of the queue while budget, policy and blocks allow."""
        self._policy.begin_step(self._waiting.values(), len(self._running))
        while self._waiting and step.spare > 0 and len(self._running) < self.config.max_sequences:
            request = next(iter(self._waiting.values()))
            if self._waits_for_sibling(request) or not self._policy.may_admit(request):
                return
            match = self.kv.match_prefix(request)
            remaining = request.num_tokens - match.num_tokens
            num_new = min(remaining, self._chunk_limit, step.spare)
            if not self.config.chunked_prefill and num_new < remaining <= self.config.max_batch_tokens:
                return
            if not self.kv.admit(request, match, match.num_tokens + num_new, self._chunk_limit):
                assert self._policy.preempts, f"{self.config.policy} reserved blocks that are not there"
                return
            self._start(request, match.num_tokens)
            self._append(step, step.prefills, request, num_new, 0)

    def _start(self, request: Request, num_cached_tokens: int) -> None:
        del self._waiting[request.request_id]
        self._running.append(request)
        self._policy.admitted(request)
        request.status = _RUNNING
        request.num_computed_tokens = num_cached_tokens
        request.prefill_end = request.num_tokens
        request.prefilling = True
        request.draft_token_ids = []
        self._num_prefilling += 1
        if request.num_preemptions == 0:
            request.num_cached_tokens = num_cached_tokens
        if self.config.enable_prefix_cache and request.uses_prefix_cache and not request.needs_prompt_logits:
            self._num_queried_tokens += request.num_tokens
            self._num_hit_tokens += num_cached_tokens

    def _waits_for_sibling(self, request: Request) -> bool:
        """Whether the request's sibling is still computing its prompt; only an earlier arrival is waited for,
        since a later one waits behind this request."""
        if request.wait_for is None:
            return False
        sibling = self._requests.get(request.wait_for)
        if sibling is None or sibling.arrival >= request.arrival:
            return False
        return sibling.num_computed_tokens < sibling.num_prompt_tokens

    # --- results ------------------------------------------------------------------------------------------------

    def update(self, plan: StepPlan, sampled: Sequence[Sequence[int]]) -> list[RequestUpdate]:
        """Take in a step's result: sampled[i] are the tokens of plan.scheduled[i], [] where it does not sample.

        Several tokens are legal: with drafts d0 d1 .. the row's tokens are the accepted drafts and one more,
        without drafts the further ones are computed in later steps. Tokens behind the one that ends a request are
        dropped, as are the results of requests ended since schedule(). Raises ValueError for a plan that is not the
        last one made, and for tokens that do not go with it.
        """
        self._check_result(plan, sampled)
        self._outstanding = None
        updates: list[RequestUpdate] = []
        make = RequestUpdate._make
        any_finished = False
        for (request, start, num_tokens, num_drafts, _, samples), tokens in zip(plan.scheduled, sampled):
            if request.status is not _RUNNING:
                continue
            if num_tokens == 1 and len(tokens) == 1 and not request.prefilling:
                # The common case, and a quick one: a decoded token that ends nothing.
                token, all_tokens = tokens[0], request.all_token_ids
                if token not in request.stop_ids and len(all_tokens) + 1 < request.max_total_tokens:
                    request.output_token_ids.append(token)
                    all_tokens.append(token)
                    updates.append(make((request, [token], False)))
                    request.num_computed_tokens = num_computed = start + 1
                    if num_computed >= request.kv_next_event:
                        self.kv.advance(request)
                    continue
            num_computed = start + num_tokens - num_drafts
            if samples:
                new_tokens = request.append_output(tokens)
                if num_drafts:
                    num_computed += _num_accepted(new_tokens, request.draft_token_ids, num_drafts)
                updates.append(RequestUpdate(request, new_tokens, request.finish_reason is not None))
            if request.draft_token_ids:
                request.draft_token_ids = []
            request.num_computed_tokens = num_computed
            if request.prefilling and num_computed >= request.prefill_end:
                request.prefilling = False
                self._num_prefilling -= 1
            if num_computed >= request.kv_next_event:
                self.kv.advance(request)
            if request.finish_reason is not None:
                any_finished = True
                self._end_run(request)
                self._retire(request)
        if any_finished:
            self._running = [request for request in self._running if request.status is _RUNNING]
        return updates

    def _check_result(self, plan: StepPlan, sampled: Sequence[Sequence[int]]) -> None:
        if plan is not self._outstanding:
            last = "none" if self._outstanding is None else self._outstanding.step_id
            raise ValueError(f"update() with the plan of step {plan.step_id}; the plan without a result is {last}")
        if len(sampled) != len(plan.scheduled):
            raise ValueError(
                f"sampled has {len(sampled)} entries for {len(plan.scheduled)} scheduled requests; allowed: one each"
            )
        for row, tokens in zip(plan.scheduled, sampled):
            if (len(tokens) == 0) is row[5] and row[0].status is _RUNNING:
                raise ValueError(
                    f"request {row.request.request_id!r} got {len(tokens)} sampled tokens in step {plan.step_id} and "
                    f"its plan says samples={row.samples}; allowed: at least one if it samples, else none"
                )

    # --- inspection ---------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether any request is running or waiting."""
        return bool(self._requests)

    @property
    def running(self) -> tuple[Request, ...]:
        """The running requests by arrival."""
        return tuple(self._running)

    @property
    def waiting(self) -> tuple[Request, ...]:
        """The waiting requests by arrival."""
        return tuple(self._waiting.values())

    @property
    def stats(self) -> SchedulerStats:
        """Present load and counts since the start."""
        return SchedulerStats(
            running=len(self._running),
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
        live = {id(request) for request in (*self._running, *self._waiting.values())}
        assert live == {id(request) for request in self._requests.values()}, "a live request is in no queue"
        assert len(self._running) <= self.config.max_sequences, f"{len(self._running)} requests are running"
        assert {id(request) for request in self._running} == {id(r) for r in self.kv.admitted_requests}, "tables"
        for request in self._running:
            name = f"request {request.request_id!r}"
            assert request.status is _RUNNING, f"{name} is in the running list with status {request.status}"
            assert request.prefilling == (request.num_computed_tokens < request.prefill_end), f"{name}: prefilling"
            assert request.num_computed_tokens < request.num_tokens < request.max_total_tokens, f"{name}: lengths"
        for request in self._waiting.values():
            assert request.status is RequestStatus.WAITING, f"{request.request_id!r} waits as {request.status}"
            assert request.num_computed_tokens == 0 and not any(request.block_ids), f"{request.request_id!r} waits"
        assert self._num_prefilling == sum(request.prefilling for request in self._running), "prefilling count"


def _num_accepted(new_tokens: Sequence[int], drafts: Sequence[int], num_drafts: int) -> int:
    """How many drafts have valid keys and values: those equal to the tokens that came out, before the last token."""
    num_accepted = 0
    for token, draft in zip(new_tokens[:-1], drafts[:num_drafts]):
        if token != draft:
            break
        num_accepted += 1
    return num_accepted
