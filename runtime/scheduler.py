"""Which tokens of which requests run in each step: the scheduler, alone with its requests and blocks. No torch.

One step of a budget of 16 tokens, with three decoding requests and two prompts:

    | a | c | b b b | d d d d d d | e e e e e |      a, c: one token    b: one token and two drafts
      1   1     3          6            5            d: the rest of a prompt    e: the first chunk of another

Requests are served first come, first served (FCFS). Every decoding request gets its next token in every step; the
rest of the budget goes by arrival to drafts, started prompts and then waiting requests. The head of the queue is
never overtaken: while it does not fit, smaller ones behind it wait too (head-of-line blocking is the price of never
starving a large request), and so they do while it waits for a sibling.
Two invariants carry this: the running list and the waiting queue are each in order of arrival, and every waiting
request arrived after every running one. So the latest arrived running request, the victim of a preemption, is the
last of the list, and goes to the front of the queue.

A step may be planned while the one before it computes, before its tokens are known:

    schedule(n)  launch n            schedule(n + 1)  launch n + 1  update(n)        schedule(n + 2) ...

What n computes then counts as computed, and the tokens it samples as there: only their values are missing. Steps run in
order on one stream, so blocks that a request gives back may be given away at once, to a step that writes later, and a
full block may be found by others as soon as the step that fills it is launched (its tokens are known by then: the only
unknown one is not computed yet). Requests whose last token by length is in flight leave at once. One that turns out to
have ended otherwise has a row in step n + 1 that nobody looks at. A preempted one still gets the token it waits for.
"""

from __future__ import annotations

import logging

from .plan import GroupStats, RequestUpdate, ScheduledRequest, SchedulerConfig, SchedulerStats, StepPlan
from .queues import Flight
from .request import Request, RequestStatus
from .running import ALWAYS, Flags
from .updates import Updates

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

    __slots__ = ("chosen", "decodes", "on_top", "prefills", "preempted", "spare")

    def __init__(self, spare: int, chosen: Flags, on_top: bool) -> None:
        self.chosen = chosen
        """[running] who takes one token, quickly."""
        self.decodes: list[ScheduledRequest] = []
        self.prefills: list[ScheduledRequest] = []
        self.preempted: list[str] = []
        # Budget left when each decoding request still to come takes one token.
        self.spare = spare
        self.on_top = on_top
        """Whether the step before is in flight, with a token of every decoding request."""


class Scheduler(Updates):
    """Plans steps over requests that come and go: add_request, then schedule and update in turns.

    schedule() may be one step ahead of update(); add_request, abort and finish may come at any time between them. Not
    thread-safe: one thread, or the caller's lock.
    """

    def schedule(self) -> StepPlan | None:
        """Plan the next step, on top of the one in flight if there is one.

        None when no request is left, or none that can go on before the step in flight has its update(). Raises
        RuntimeError when two steps are in flight, or one whose drafts decide where the next step begins.
        """
        flight = self._flights[-1] if self._flights else None
        if flight is not None:
            self._check_ahead(flight)
            self._advance(flight)
            self._leave_early()
        if not self._requests:
            return None
        running = self._running
        num_decoding = len(running) - self._num_prefilling
        chosen = running.decoding[: len(running)].copy()
        step = _Step(self.config.max_batch_tokens - num_decoding, chosen, flight is not None)
        self._plan_running(step)
        if not step.preempted:
            self._plan_waiting(step)
        self._unreported += step.preempted
        decodes, starts, last = running.plan_decodes(chosen[: len(running)])
        others = tuple(step.decodes + step.prefills)
        if not decodes and not others:
            assert flight is not None, f"{len(running)} running and {len(self._waiting)} waiting, and an empty plan"
            return None
        num_tokens = self.config.max_batch_tokens - step.spare
        preempted, left = tuple(self._unreported), tuple(self._left)
        self._unreported, self._left = [], []
        plan = StepPlan(self._num_steps, others, num_tokens, preempted, left, decodes, starts, last, step.on_top)
        self._num_steps += 1
        self._flights.append(Flight(plan, self._num_retired))
        return plan

    def reserve_drafts(self, request: Request, num_drafts: int) -> int:
        """Takes blocks for drafts of a request whose last token alone is not computed; how many of them have room.

        Fewer than asked for where the request may not become so long, or blocks lack: nobody loses blocks for drafts.
        """
        num_drafts = min(num_drafts, request.max_total_tokens - request.num_tokens - 1)
        if num_drafts > 0 and not self.kv.allocate(request, request.num_tokens + num_drafts):
            num_drafts = request.kv_capacity - request.num_tokens
        return max(0, num_drafts)

    def _check_ahead(self, flight: Flight) -> None:
        step_id = flight.plan.step_id
        if len(self._flights) == 2:
            raise RuntimeError(
                f"steps {step_id - 1} and {step_id} have no update() yet; allowed: schedule() one step ahead of update()"
            )
        if flight.plan.has_drafts:
            raise RuntimeError(
                f"step {step_id} verifies drafts and has no update() yet; allowed: update() before the next schedule()"
            )

    def _leave_early(self) -> None:
        """Requests whose last token by length is in flight give their blocks and places back."""
        running = self._running
        ending = [
            running.requests[index]
            for index in running.wanting_a_look()
            if running.decoding[index] and running.next[index] + 1 >= running.limit[index]
        ]
        for request in ending:
            self._end_run(request)
            request.status = RequestStatus.ENDING
            self._ending[request.request_id] = request
            self._left.append(request.request_id)
        if ending:
            running.keep_running()

    def _plan_running(self, step: _Step) -> None:
        """Give every decoding request its token, and spare tokens by arrival to drafts and started prompts."""
        running = self._running
        if not step.on_top and any([request.draft_token_ids for request in running.requests]):
            running.due[: len(running)][[bool(request.draft_token_ids) for request in running.requests]] = ALWAYS
        for index in running.wanting_a_look():
            if index >= len(running):  # preempted
                break
            request = running.requests[index]
            if request.prefilling:
                self._plan_prefill(step, request, index)
            elif request.num_tokens + step.on_top == request.num_computed_tokens + 1 and (
                step.on_top or not request.draft_token_ids
            ):
                if self._make_room(step, request, request.num_computed_tokens + 1):
                    running.due[index] = self._due(request)
            else:
                step.chosen[index] = False
                self._plan_decode(step, request, index)

    def _plan_decode(self, step: _Step, request: Request, index: int) -> None:
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
        self._append(step, step.decodes, request, index, num_new, num_drafts)
        step.spare += 1  # the token that was kept back for it

    def _plan_prefill(self, step: _Step, request: Request, index: int) -> None:
        """The next chunk of a prompt (or recomputation) that has started."""
        start = request.num_computed_tokens
        num_new = min(request.num_tokens - start, self._chunk_limit, step.spare)
        if num_new > 0 and self._make_room(step, request, start + num_new):
            self._append(step, step.prefills, request, index, num_new, 0)

    def _append(
        self, step: _Step, rows: list[ScheduledRequest], request: Request, index: int, num_new: int, num_drafts: int
    ) -> None:
        start, num_tokens = request.num_computed_tokens, num_new + num_drafts
        samples = start + num_new == request.num_tokens
        num_logit_rows = 1 + num_drafts if samples else 0
        if request.needs_prompt_logits:
            num_logit_rows = max(num_logit_rows, min(num_tokens, start + num_tokens - request.first_logit_row))
        rows.append(ScheduledRequest(request, start, num_tokens, num_drafts, num_logit_rows, samples))
        self._running.planned[index] = 0 if num_drafts else num_tokens
        step.spare -= num_tokens

    def _make_room(self, step: _Step, request: Request, num_tokens: int) -> bool:
        """Allocate for num_tokens, preempting the latest arrived until it works; False if that is `request`."""
        while not self.kv.allocate(request, num_tokens):
            assert self._policy.preempts, f"{self.config.policy} ran out of blocks for {request.request_id!r}"
            victim = self._running.requests[-1]
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
            index = self._start(request, match.num_tokens)
            self._append(step, step.prefills, request, index, num_new, 0)

    def _start(self, request: Request, num_cached_tokens: int) -> int:
        del self._waiting[request.request_id]
        request.num_computed_tokens = num_cached_tokens
        index = self._running.append(request)
        self._policy.admitted(request)
        request.status = _RUNNING
        request.prefill_end = request.num_tokens
        request.prefilling = True
        request.draft_token_ids = []
        self._num_prefilling += 1
        if request.num_preemptions == 0:
            request.num_cached_tokens = num_cached_tokens
        all_rows = request.needs_prompt_logits and request.first_logit_row == 0
        if self.config.enable_prefix_cache and request.uses_prefix_cache and not all_rows:
            self._num_queried_tokens += request.num_tokens
            self._num_hit_tokens += num_cached_tokens
        return index

    def _waits_for_sibling(self, request: Request) -> bool:
        """Whether the request's sibling is still computing its prompt; only an earlier arrival is waited for,
        since a later one waits behind this request."""
        if request.wait_for is None:
            return False
        sibling = self._requests.get(request.wait_for)
        if sibling is None or sibling.arrival >= request.arrival:
            return False
        return sibling.num_computed_tokens < sibling.num_prompt_tokens
