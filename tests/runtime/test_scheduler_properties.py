"""Random histories of the scheduler against a model of what a step does to the KV cache.

`FakeModel` stands for engine and sampler. It keeps, per group and slot, which prefix was written there; each step
asserts that every position a row attends to holds the request's own prefix, so a block shared, freed or reused
wrongly is seen at once. Its tokens depend on the whole prefix alone, so each output must equal the one a lone request
would get, whatever the policy, the chunks, the preemptions, the prefix hits and the drafts were, and whether steps were
planned and launched one ahead of their results.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import pytest
from camshaft.runtime.kv_cache import CacheGroup
from camshaft.runtime.request import NULL_BLOCK, FinishReason, Request, RequestStatus
from camshaft.runtime.sampling_params import SamplingParams
from camshaft.runtime.scheduler import RequestUpdate, ScheduledRequest, SchedulerConfig, StepPlan
from camshaft.runtime.trace import TracedScheduler, replay
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

EOS = 0
NUM_TOKENS = 7
PREFIXES = ([1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6, 1], [1, 2, 3, 4, 6, 6, 6, 6, 6], [2, 2], [])


def next_token(tokens: Sequence[int]) -> int:
    """What the model says after these tokens."""
    return hash(tuple(tokens)) % 1009 % NUM_TOKENS


def identities(request: Request, tokens: Sequence[int]) -> list[int]:
    """Per position, a number for the prefix that ends there (and for what else changes keys and values)."""
    result, last = [], hash((request.lora_id is None, request.cache_salt or "none"))
    for token in tokens:
        last = hash((last, token))
        result.append(last)
    return result


def lone_output(request: Request) -> list[int]:
    """The output of a request that runs alone."""
    tokens, params = list(request.prompt_token_ids), request.params
    while len(tokens) < request.max_total_tokens:
        tokens.append(next_token(tokens))
        num_before = len(tokens) - request.num_prompt_tokens - 1
        stops = {EOS, *(params.stop_token_ids or ())} if not params.ignore_eos else set(params.stop_token_ids or ())
        if tokens[-1] in stops and num_before >= params.min_tokens:
            break
    return tokens[request.num_prompt_tokens :]


class FakeModel:
    """Slots of every group, and the steps that write and read them, in the order of their launch.

    Tokens that the host does not know yet are taken from the step before, as on a device.
    """

    def __init__(self, groups: Sequence[CacheGroup]) -> None:
        self.groups = groups
        self.slots: list[dict[int, int]] = [{} for _ in groups]
        self.last: dict[str, int] = {}

    def launch(self, plan: StepPlan) -> list[list[int]]:
        """Write and check all rows, then sample."""
        tokens = [self._tokens(row) for row in plan.scheduled]
        for row, known in zip(plan.scheduled, tokens):
            self._write(row, identities(row.request, known))
        for row, known in zip(plan.scheduled, tokens):
            self._attend(row, identities(row.request, known))
        sampled = [self._sample(row, known) for row, known in zip(plan.scheduled, tokens)]
        self.last = {row.request.request_id: found[-1] for row, found in zip(plan.scheduled, sampled) if found}
        return sampled

    def _tokens(self, row: ScheduledRequest) -> list[int]:
        """The tokens up to the row's end, one in flight and drafts included."""
        request = row.request
        num_tokens = row.start + row.num_tokens - row.num_draft_tokens
        known = request.all_token_ids[:num_tokens]
        if len(known) < num_tokens:
            known.append(self.last[request.request_id])
        known += request.draft_token_ids[: row.num_draft_tokens]
        assert len(known) == row.start + row.num_tokens
        return known

    def _slot(self, group: int, request: Request, position: int) -> int:
        block_size = self.groups[group].block_size
        block = request.block_ids[group][position // block_size]
        assert block != NULL_BLOCK, f"position {position} of {request.request_id} lies behind the window"
        return block * block_size + position % block_size

    def _write(self, row: ScheduledRequest, known: list[int]) -> None:
        for group in range(len(self.groups)):
            for position in range(row.start, row.start + row.num_tokens):
                self.slots[group][self._slot(group, row.request, position)] = known[position]

    def _attend(self, row: ScheduledRequest, known: list[int]) -> None:
        for index, group in enumerate(self.groups):
            first = max(0, row.start - group.window + 1) if group.window else 0
            for position in range(first, row.start + row.num_tokens):
                held = self.slots[index].get(self._slot(index, row.request, position))
                assert held == known[position], f"{row.request.request_id}, group {index}, position {position}"

    def _sample(self, row: ScheduledRequest, known: list[int]) -> list[int]:
        if not row.samples:
            return []
        tokens = known[: len(known) - row.num_draft_tokens]
        result = [next_token(tokens)]
        for draft in known[len(tokens) :]:
            if draft != result[-1]:
                return result
            result.append(next_token([*tokens, *result]))
        return result


def prolonged(plan: StepPlan, sampled: list[list[int]], extra: int) -> list[list[int]]:
    """The result of a step whose rows without drafts yield `extra` tokens more."""
    result = []
    for row, tokens in zip(plan.scheduled, sampled):
        longer = list(tokens)
        for _ in range(extra if tokens and not row.num_draft_tokens else 0):
            longer.append(next_token([*row.request.all_token_ids, *longer]))
        result.append(longer)
    return result


group_sizes = st.sampled_from([1, 2, 3, 4])


@st.composite
def configs(draw: st.DrawFn) -> SchedulerConfig:
    """Small pools, sometimes with window groups of other block sizes."""
    groups = [CacheGroup(num_blocks=draw(st.integers(4, 24)), block_size=draw(group_sizes))]
    for _ in range(draw(st.integers(0, 2))):
        window, block_size = draw(st.integers(1, 9)), draw(group_sizes)
        groups.append(CacheGroup(num_blocks=draw(st.integers(4, 20)), block_size=block_size, window=window))
    if draw(st.booleans()):
        groups = groups[::-1]
    chunked = draw(st.booleans())
    max_sequences = draw(st.integers(1, 6))
    return SchedulerConfig(
        groups=tuple(groups),
        max_batch_tokens=max(max_sequences, draw(st.sampled_from([2, 5, 16, 40]))),
        max_sequences=max_sequences,
        max_seq_len=draw(st.sampled_from([12, 32])),
        policy=draw(st.sampled_from(["max_utilization", "max_utilization", "guaranteed_no_evict", "static_batch"])),
        chunked_prefill=chunked,
        max_chunk_tokens=draw(st.sampled_from([None, 1, 4])) if chunked else None,
        enable_prefix_cache=draw(st.integers(0, 4)) > 0,
    )


class SchedulerMachine(RuleBasedStateMachine):
    """Arrivals, drafts, steps, ends from outside; everything is checked after each."""

    @initialize(config=configs())
    def start(self, config: SchedulerConfig) -> None:
        self.config = config
        self.stream = io.StringIO()
        self.scheduler = TracedScheduler(config, self.stream)
        self.model = FakeModel(config.groups)
        self.requests: list[Request] = []
        self.flights: list[tuple[StepPlan, list[list[int]]]] = []
        self.num_before_batch = 0

    @rule(
        prefix=st.sampled_from(PREFIXES),
        rest=st.lists(st.integers(1, NUM_TOKENS - 1), max_size=6),
        max_tokens=st.sampled_from([1, 3, 8, 16, None]),
        min_tokens=st.integers(0, 2),
        ignore_eos=st.sampled_from([True, True, False]),
        stop_token_ids=st.sampled_from([(), (3,)]),
        prompt_logprobs=st.sampled_from([None, None, None, 1]),
        cache_salt=st.sampled_from([None, None, None, "tenant"]),
        waits=st.booleans(),
    )
    def add(
        self,
        prefix: list[int],
        rest: list[int],
        max_tokens: int | None,
        min_tokens: int,
        ignore_eos: bool,
        stop_token_ids: tuple[int, ...],
        prompt_logprobs: int | None,
        cache_salt: str | None,
        waits: bool,
    ) -> None:
        params = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min(min_tokens, max_tokens or 99),
            ignore_eos=ignore_eos,
            stop_token_ids=stop_token_ids,
            prompt_logprobs=prompt_logprobs,
        )
        wait_for = self.requests[-1].request_id if waits and self.requests else None
        request = Request(
            f"r{len(self.requests)}", prefix + rest, params, frozenset({EOS}), cache_salt=cache_salt, wait_for=wait_for
        )
        try:
            self.scheduler.add_request(request)
        except ValueError:
            assert request.request_id not in {r.request_id for r in self.scheduler.waiting}
        else:
            self.requests.append(request)

    def may_schedule(self) -> bool:
        """Whether at most one step is in flight, and none with drafts."""
        return len(self.flights) < 2 and not any(plan.has_drafts for plan, _ in self.flights)

    @precondition(may_schedule)
    @rule(drafts=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), max_size=4))
    def schedule(self, drafts: list[tuple[int, int]]) -> None:
        """Plan a step, with right and then wrong drafts for the first running requests, and launch it."""
        for request, (right, wrong) in zip(self.scheduler.running, drafts if not self.flights else ()):
            tokens = list(request.all_token_ids)
            for _ in range(right):
                tokens.append(next_token(tokens))
            request.draft_token_ids = tokens[request.num_tokens :] + [NUM_TOKENS] * wrong
        had_work = self.scheduler.has_work
        ahead = bool(self.flights)
        before = {request.request_id: request for request in self.scheduler.running}
        decoding = {name for name, request in before.items() if not request.prefilling}
        left = {name for name, r in before.items() if r.request_id in self.in_flight() and self.ends_by_length(r)}
        if not set(before) - left:
            self.num_before_batch = len(self.requests)
        plan = self.scheduler.schedule()
        assert had_work if plan is not None else not had_work or ahead
        if plan is not None:
            self.check_plan(plan, before, decoding - left, ahead)
            self.flights.append((plan, self.model.launch(plan)))

    def in_flight(self) -> set[str]:
        """Ids of the requests that the newest step in flight samples."""
        return (
            {row.request.request_id for row in self.flights[-1][0].scheduled if row.samples} if self.flights else set()
        )

    def ends_by_length(self, request: Request) -> bool:
        """Whether the next token is the last by length."""
        return request.num_tokens + 1 >= request.max_total_tokens

    @precondition(lambda self: len(self.flights) < 2)
    @rule(
        drafts=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), max_size=4),
        count=st.integers(1, 8),
        ahead=st.booleans(),
    )
    def steps(self, drafts: list[tuple[int, int]], count: int, ahead: bool) -> None:
        """Several steps in a row, so that requests grow old enough to run out of blocks."""
        for _ in range(count):
            if self.may_schedule():
                self.schedule([] if ahead else drafts)
            if self.flights and not (
                ahead and len(self.flights) == 1 and self.may_schedule() and self.scheduler.running
            ):
                self.update(0)
            self.agrees()

    def check_plan(self, plan: StepPlan, before: dict[str, Request], decoding: set[str], ahead: bool) -> None:
        config = self.config
        assert plan.num_tokens == sum(row.num_tokens for row in plan.scheduled) <= config.max_batch_tokens
        ids = [row.request.request_id for row in plan.scheduled]
        assert len(set(ids)) == len(ids)
        assert decoding <= {*ids, *plan.preempted}, "a decoding request was left out"
        assert not set(ids) & set(plan.preempted)
        if config.policy != "max_utilization":
            assert not plan.preempted
        for row in plan.scheduled:
            if row.request.request_id not in before:
                self.check_start(row.request)
        single = [row.num_tokens == 1 and not row.request.prefilling for row in plan.scheduled]
        assert single == sorted(single, reverse=True), "single tokens come first"
        for row in plan.scheduled:
            assert row.start == row.request.num_computed_tokens
            assert 0 <= row.num_draft_tokens < row.num_tokens <= config.chunk_limit
            end = row.start + row.num_tokens - row.num_draft_tokens
            pending = ahead and not row.request.prefilling and row.request.request_id in self.in_flight()
            assert row.samples == (end == row.request.num_tokens + pending)
            assert row.num_draft_tokens == 0 or row.samples
            wanted = (
                row.num_tokens
                if row.request.needs_prompt_logits and not pending
                else row.samples * (1 + row.num_draft_tokens)
            )
            assert row.num_logit_rows == wanted
            assert row.start + row.num_tokens < row.request.max_total_tokens
            if row.request.needs_prompt_logits and not pending:
                assert row.request.num_cached_tokens == 0

    def check_start(self, request: Request) -> None:
        if self.config.policy == "static_batch":
            assert request in self.requests[: self.num_before_batch], "joined a running batch"
        sibling = next((other for other in self.requests if other.request_id == request.wait_for), None)
        if sibling is not None and not sibling.is_finished:
            assert sibling.num_computed_tokens >= sibling.num_prompt_tokens, "started before its sibling's prompt"
        assert all(request.arrival < other.arrival for other in self.scheduler.waiting), "overtook the queue"

    @precondition(lambda self: self.flights)
    @rule(extra=st.sampled_from([0, 0, 0, 2]))
    def update(self, extra: int) -> None:
        plan, sampled = self.flights.pop(0)
        live = [row for row in plan.scheduled if row.request.status is not RequestStatus.FINISHED]
        if plan.has_drafts or (extra and not self.flights):
            updates = self.scheduler.update(plan, prolonged(plan, sampled, 0 if self.flights else extra))
        else:
            updates = self.scheduler.update(plan, np.array([t for row in sampled for t in row], dtype=np.int64))
        assert [u.request for u in updates] == [row.request for row in live if row.samples]
        for update in updates:
            self.check_update(update)

    def check_update(self, update: RequestUpdate) -> None:
        request = update.request
        assert update.new_token_ids == request.output_token_ids[-len(update.new_token_ids) :]
        assert update.finished == request.is_finished
        expected = lone_output(request)
        assert request.output_token_ids == expected[: request.num_output_tokens]
        if update.finished:
            assert request.output_token_ids == expected
            by_length = request.num_tokens == request.max_total_tokens and request.finish_reason is FinishReason.LENGTH
            assert by_length or request.finish_reason is FinishReason.STOP

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), reason=st.sampled_from([FinishReason.ABORT, FinishReason.STOP]))
    def end(self, data: st.DataObject, reason: FinishReason) -> None:
        request = data.draw(st.sampled_from(self.requests))
        was_finished = request.is_finished
        assert self.scheduler.finish(request.request_id, reason) == (not was_finished)
        assert request.is_finished and not any(request.block_ids)
        # (its rows in flight are not looked at any more)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check_integrity()
        stats = self.scheduler.stats
        assert stats.running + stats.waiting == sum(not request.is_finished for request in self.requests)
        assert stats.prefix_hit_tokens <= stats.prefix_queried_tokens
        assert stats.preemptions == sum(request.num_preemptions for request in self.requests)

    def teardown(self) -> None:
        """Everything that is left runs to its end, in a bounded number of steps; then nothing is in use."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(2000):
            if self.may_schedule():
                self.schedule([])
            if not self.flights:
                break
            self.update(0)
            self.agrees()
        assert not self.scheduler.has_work, "requests were left when the steps ran out"
        assert all(request.is_finished for request in self.requests)
        assert all(group.used == 0 for group in self.scheduler.stats.groups)
        result = replay(self.stream.getvalue().splitlines(), check_integrity=False)
        assert result.stats == self.scheduler.stats


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=150, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)


@pytest.mark.parametrize("ahead", [0, 1], ids=["in turns", "one ahead"])
@pytest.mark.parametrize("policy", ["max_utilization", "guaranteed_no_evict", "static_batch"])
def test_a_crowd_in_tiny_pools_gets_its_lone_outputs(policy: str, ahead: int) -> None:
    """Forty requests of shared prefixes over pools that hold about three of them."""
    groups = (CacheGroup(num_blocks=12, block_size=4), CacheGroup(num_blocks=12, block_size=2, window=6))
    config = SchedulerConfig(
        groups=groups,
        max_batch_tokens=12,
        max_sequences=8,
        max_seq_len=40,
        policy=policy,  # type: ignore[arg-type]
        max_chunk_tokens=8,
    )
    scheduler, model = TracedScheduler(config, io.StringIO()), FakeModel(groups)
    requests = []
    for number in range(40):
        prompt = [*PREFIXES[number % 3], 1 + number % 5, 1 + number % 3]
        params = SamplingParams(max_tokens=4 + number % 20, ignore_eos=True)
        requests.append(Request(f"r{number}", prompt, params, frozenset({EOS})))
        scheduler.add_request(requests[-1])
    flights: list[tuple[StepPlan, list[list[int]]]] = []
    while True:
        plan = scheduler.schedule()
        if plan is not None:
            assert plan.num_tokens == sum(row.num_tokens for row in plan.scheduled) <= 12
            flights.append((plan, model.launch(plan)))
            scheduler.check_integrity()
        if not flights:
            break
        if len(flights) > ahead or plan is None:
            scheduler.update(*flights.pop(0))
            scheduler.check_integrity()
    assert [request.output_token_ids for request in requests] == [lone_output(request) for request in requests]
    stats = scheduler.stats
    assert [group.used for group in stats.groups] == [0, 0]
    assert (stats.preemptions > 0) == (policy == "max_utilization")
    assert stats.prefix_hit_tokens > 0
