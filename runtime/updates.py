"""The half of the scheduler that takes results in: the tokens of a launched step go to its requests. No torch.

    plan      | a | b | c c c | d d d d |      a, b: decodes; c: a last token and two drafts; d: a chunk of a prompt
    tokens    | 7 | 2 | 5 9   |         |      of c one draft came true, and one token more is known
    updates   | a: 7   b: 2   c: 5 9    |      b ends with its token: its blocks and its place are free

Decodes are taken in together, as arrays and lists, since there may be thousands; whoever may end is looked at alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .plan import RequestUpdate, ScheduledRequest, StepPlan
from .queues import Flight, Queues
from .request import Request, RequestStatus
from .running import ALWAYS

_FINISHED = RequestStatus.FINISHED

Tokens = Sequence[Sequence[int]] | npt.NDArray[np.int64]
"""Result of a step: the tokens of each row ([] where it does not sample), or one token for each row that samples."""


class Updates(Queues):
    """The queues, and what the results of steps change in them."""

    def update(self, plan: StepPlan, sampled: Tokens) -> list[RequestUpdate]:
        """Take in a step's result: sampled[i] are the tokens of plan.scheduled[i], [] where it does not sample.

        An array has one token for each row that samples instead, in their order. Several tokens of a row are legal
        unless the next step is planned: with drafts d0 d1 .. they are the accepted drafts and one more, without
        drafts the further ones are computed in later steps. Tokens behind the one that ends a request are dropped,
        as are the results of requests ended since schedule(). Decodes of requests whose `reports_tokens` is False are
        taken in without a word unless they end.

        Raises ValueError for a plan that is not the oldest one without a result, and for tokens that do not go with it.
        """
        flight = self._check_plan(plan)
        num_decodes = len(plan.decodes)
        updates: list[RequestUpdate] = []
        if isinstance(sampled, np.ndarray):
            rest: Sequence[Sequence[int]] = self._spread(plan, sampled)
            self._advance(flight)
            self._take_decodes(flight, sampled[:num_decodes], updates)
        else:
            self._check_rows(plan, sampled)
            rest = sampled[num_decodes:]
            self._advance(flight)
            for request, tokens in zip(plan.decodes, sampled):
                self._take(request, tokens, updates)
        for row, tokens in zip(plan.others, rest):
            if row.samples:
                self._take(row.request, tokens, updates, row)
            row.request.draft_token_ids = []
        self._flights.popleft()
        if self._left_running:
            self._running.keep_running()
            self._left_running = False
        return updates

    def _take_decodes(self, flight: Flight, tokens: npt.NDArray[np.int64], updates: list[RequestUpdate]) -> None:
        """One new token of every decode; those that may end something are looked at one by one."""
        decodes, may_end = flight.plan.decodes, flight.plan.last
        stop_ids = self._all_stop_ids()
        if len(stop_ids):
            may_end = may_end | np.isin(tokens, stop_ids)
        if self._num_retired != flight.num_retired:
            may_end = may_end | np.array([request.status is _FINISHED for request in decodes], dtype=np.bool_)
        values, begin = tokens.tolist(), 0
        outputs = [request.output_token_ids for request in decodes]
        everything = [request.all_token_ids for request in decodes]
        anyone_listens = any([request.reports_tokens for request in decodes])
        for index in (*np.flatnonzero(may_end).tolist(), len(decodes)):
            part = slice(begin, index)
            _append_each(outputs[part], values[part])
            _append_each(everything[part], values[part])
            if anyone_listens:
                pairs = zip(decodes[part], values[part])
                updates += [
                    RequestUpdate(request, [token], False) for request, token in pairs if request.reports_tokens
                ]
            if index < len(decodes):
                self._take(decodes[index], [values[index]], updates)
            begin = index + 1

    def _take(
        self,
        request: Request,
        tokens: Sequence[int],
        updates: list[RequestUpdate],
        row: ScheduledRequest | None = None,
    ) -> None:
        """New tokens of a request, up to the one that ends it."""
        if request.status is _FINISHED:
            return
        new_tokens = request.append_output(tokens)
        if row is not None and row.num_draft_tokens:
            self._count_drafts(row, new_tokens)
        elif len(tokens) > 1:
            self._running.due[self._running.index(request)] = ALWAYS  # until it has caught up
        finished = request.finish_reason is not None
        if finished or row is not None or request.reports_tokens:
            updates.append(RequestUpdate(request, new_tokens, finished))
        if finished:
            self._retire(request)

    def _count_drafts(self, row: ScheduledRequest, new_tokens: Sequence[int]) -> None:
        """Counts what verification leaves as computed: the last known token and the accepted drafts."""
        request, running = row.request, self._running
        index = running.index(request)
        computed = row.start + row.num_tokens - row.num_draft_tokens
        computed += _num_accepted(new_tokens, request.draft_token_ids, row.num_draft_tokens)
        running.next[index] = request.num_computed_tokens = computed
        running.due[index] = ALWAYS
        if computed >= request.kv_next_event:
            self.kv.advance(request)

    def _check_plan(self, plan: StepPlan) -> Flight:
        if not self._flights or self._flights[0].plan is not plan:
            oldest = "none" if not self._flights else self._flights[0].plan.step_id
            raise ValueError(
                f"update() with the plan of step {plan.step_id}; the oldest plan without a result is {oldest}"
            )
        return self._flights[0]

    @staticmethod
    def _spread(plan: StepPlan, tokens: npt.NDArray[np.int64]) -> list[list[int]]:
        """The tokens of `plan.others`."""
        num_decodes = len(plan.decodes)
        num_sampling = num_decodes + sum(row.samples for row in plan.others)
        if tokens.shape != (num_sampling,):
            raise ValueError(f"tokens have shape {tokens.shape}; step {plan.step_id} samples {num_sampling} rows")
        rest = iter(tokens[num_decodes:].tolist())
        return [[next(rest)] if row.samples else [] for row in plan.others]

    def _check_rows(self, plan: StepPlan, sampled: Sequence[Sequence[int]]) -> None:
        if len(sampled) != plan.num_sequences:
            raise ValueError(
                f"sampled has {len(sampled)} entries for {plan.num_sequences} scheduled requests; allowed: one each"
            )
        most = 1 if len(self._flights) == 2 else None
        for row, tokens in zip(plan.scheduled, sampled):
            if row.request.status is _FINISHED:
                continue
            if (len(tokens) == 0) is row.samples:
                raise ValueError(
                    f"request {row.request.request_id!r} got {len(tokens)} sampled tokens in step {plan.step_id} and "
                    f"its plan says samples={row.samples}; allowed: at least one if it samples, else none"
                )
            if most is not None and len(tokens) > most:
                raise ValueError(
                    f"request {row.request.request_id!r} got {len(tokens)} sampled tokens in step {plan.step_id}, after "
                    "the next step was planned; allowed: one"
                )


def _append_each(lists: Sequence[list[int]], values: Sequence[int]) -> None:
    """Appends values[i] to lists[i], for thousands, without a loop of Python's own."""
    deque(map(list.append, lists, values), maxlen=0)


def _num_accepted(new_tokens: Sequence[int], drafts: Sequence[int], num_drafts: int) -> int:
    """How many drafts have valid keys and values: those equal to the tokens that came out, before the last token."""
    num_accepted = 0
    for token, draft in zip(new_tokens[:-1], drafts[:num_drafts]):
        if token != draft:
            break
        num_accepted += 1
    return num_accepted
