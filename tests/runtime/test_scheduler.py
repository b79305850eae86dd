"""Scheduler: exact plans and block ids in small drawn scenarios.

Plans are compared as rows (id, start, num_tokens), or with drafts, logit rows and samples where these matter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from camshaft.runtime.kv_cache import CacheGroup
from camshaft.runtime.request import NULL_BLOCK, FinishReason, Request, RequestStatus
from camshaft.runtime.sampling_params import SamplingParams
from camshaft.runtime.scheduler import RequestUpdate, Scheduler, SchedulerConfig, StepPlan

N = NULL_BLOCK
EOS = 99


def make(num_blocks: int = 16, block_size: int = 4, window: int = 0, **fields: Any) -> Scheduler:
    group = CacheGroup(num_blocks=num_blocks, block_size=block_size, window=window)
    defaults: dict[str, Any] = {
        "groups": (group,),
        "max_batch_tokens": 16,
        "max_sequences": 4,
        "max_seq_len": 64,
        "policy": "max_utilization",
    }
    return Scheduler(SchedulerConfig(**{**defaults, **fields}))


def add(scheduler: Scheduler, name: str, num_prompt: int, max_tokens: int | None = 8, **fields: Any) -> Request:
    """A request whose prompt no other name shares, unless `prompt` is given."""
    prompt = fields.pop("prompt", [ord(name[0]) * 100 + i for i in range(num_prompt)])
    names = ("lora_id", "cache_salt", "wait_for")
    others = {key: fields.pop(key) for key in names if key in fields}
    request = Request(name, prompt, SamplingParams(max_tokens=max_tokens, **fields), frozenset({EOS}), **others)
    scheduler.add_request(request)
    return request


def rows(plan: StepPlan | None) -> list[tuple[str, int, int]]:
    assert plan is not None
    return [(row.request.request_id, row.start, row.num_tokens) for row in plan.scheduled]


def step(
    scheduler: Scheduler, tokens: Mapping[str, Sequence[int]] | None = None
) -> tuple[list[tuple[str, int, int]], list[RequestUpdate]]:
    """One schedule and update; each sampling row yields token 5 unless `tokens` has its id."""
    plan = scheduler.schedule()
    assert plan is not None
    sampled = [(tokens or {}).get(row.request.request_id, [5]) if row.samples else [] for row in plan.scheduled]
    updates = scheduler.update(plan, sampled)
    scheduler.check_integrity()
    return rows(plan), updates


def drain(scheduler: Scheduler) -> list[list[tuple[str, int, int]]]:
    plans = []
    while scheduler.has_work:
        plans.append(step(scheduler)[0])
    return plans


# --- one request, and several ---------------------------------------------------------------------------------------


def test_one_request_from_prompt_to_end() -> None:
    scheduler = make()
    a = add(scheduler, "a", 5, max_tokens=3)
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.scheduled == ((a, 0, 5, 0, 1, True),)
    assert (plan.step_id, plan.num_tokens, plan.preempted) == (0, 5, ())
    assert a.block_ids == [[0, 1]]
    assert scheduler.update(plan, [[7]]) == [(a, [7], False)]
    assert step(scheduler)[0] == [("a", 5, 1)]
    _, updates = step(scheduler)
    assert updates == [(a, [5], True)]
    assert (a.output_token_ids, a.finish_reason, a.stop_reason) == ([7, 5, 5], FinishReason.LENGTH, None)
    assert a.status is RequestStatus.FINISHED
    assert not scheduler.has_work
    assert scheduler.schedule() is None
    assert scheduler.stats.groups[0].used == 0


def test_decodes_first_then_chunks_within_one_budget() -> None:
    """
    budget 8     step 0    | a a a | b b b b b |         b: 5 of 12 tokens
                 step 1    | a | b b b b b b b |
                 step 2    | a | b |                     c arrived, its prompt takes the other 6
    """
    scheduler = make(max_batch_tokens=8)
    add(scheduler, "a", 3)
    b = add(scheduler, "b", 13)
    plan = scheduler.schedule()
    assert rows(plan) == [("a", 0, 3), ("b", 0, 5)]
    assert plan is not None
    assert plan.scheduled[1][2:] == (5, 0, 0, False)
    assert [update.request.request_id for update in scheduler.update(plan, [[5], []])] == ["a"]
    assert b.num_computed_tokens == 5
    assert step(scheduler)[0] == [("a", 3, 1), ("b", 5, 7)]
    add(scheduler, "c", 9)
    assert step(scheduler)[0] == [("a", 4, 1), ("b", 12, 1), ("c", 0, 6)]
    assert step(scheduler)[0] == [("a", 5, 1), ("b", 13, 1), ("c", 6, 3)]


def test_a_prompt_in_chunks_does_not_starve_what_decodes_behind_it() -> None:
    """b decodes while a, which arrived first, still computes its prompt."""
    scheduler = make(max_batch_tokens=6, max_chunk_tokens=4)
    add(scheduler, "a", 20)
    add(scheduler, "b", 2)
    assert step(scheduler)[0] == [("a", 0, 4), ("b", 0, 2)]
    assert step(scheduler)[0] == [("b", 2, 1), ("a", 4, 4)]
    assert step(scheduler)[0] == [("b", 3, 1), ("a", 8, 4)]


def test_requests_join_and_leave_in_every_step() -> None:
    scheduler = make(max_sequences=2)
    add(scheduler, "a", 2, max_tokens=1)
    add(scheduler, "b", 2, max_tokens=3)
    add(scheduler, "c", 2, max_tokens=1)
    add(scheduler, "d", 2, max_tokens=1)
    assert drain(scheduler) == [
        [("a", 0, 2), ("b", 0, 2)],
        [("b", 2, 1), ("c", 0, 2)],
        [("b", 3, 1), ("d", 0, 2)],
    ]


def test_the_head_of_the_queue_is_never_overtaken() -> None:
    """b needs 3 blocks and 2 are free: c, which would fit, waits behind it."""
    scheduler = make(num_blocks=4)
    add(scheduler, "a", 7, max_tokens=2)
    add(scheduler, "b", 9)
    add(scheduler, "c", 1)
    assert step(scheduler)[0] == [("a", 0, 7)]
    assert step(scheduler)[0] == [("a", 7, 1)]
    assert step(scheduler)[0] == [("b", 0, 9), ("c", 0, 1)]


def test_max_sequences_bounds_the_running() -> None:
    scheduler = make(max_sequences=1)
    add(scheduler, "a", 2)
    add(scheduler, "b", 2)
    assert step(scheduler)[0] == [("a", 0, 2)]
    assert (scheduler.stats.running, scheduler.stats.waiting) == (1, 1)


def test_without_chunks_a_prompt_waits_for_a_step_that_holds_it() -> None:
    scheduler = make(max_batch_tokens=8, chunked_prefill=False)
    add(scheduler, "a", 5, max_tokens=2)
    add(scheduler, "b", 8)
    assert step(scheduler)[0] == [("a", 0, 5)]
    assert step(scheduler)[0] == [("a", 5, 1)]
    assert step(scheduler)[0] == [("b", 0, 8)]


def test_without_chunks_an_outgrown_request_is_recomputed_in_chunks() -> None:
    """
    blocks of 2, 9 of them: a takes the last one for position 8, and b, with 9 tokens, lacks one for its own. That
    is more than the budget of 5 can recompute in one step.
    """
    scheduler = make(9, 2, max_batch_tokens=5, chunked_prefill=False, enable_prefix_cache=False)
    a, b = add(scheduler, "a", 4, max_tokens=8), add(scheduler, "b", 4, max_tokens=6)
    while b.num_preemptions == 0:
        step(scheduler)
    assert b.num_tokens == 9
    while not a.is_finished:
        assert step(scheduler)[0] == [("a", a.num_computed_tokens - 1, 1)]
    assert step(scheduler)[0] == [("b", 0, 5)]
    assert step(scheduler)[0] == [("b", 5, 4)]
    drain(scheduler)
    assert b.num_output_tokens == 6


# --- preemption -----------------------------------------------------------------------------------------------------


def test_the_latest_arrived_is_preempted_and_recomputed() -> None:
    """
    4 blocks of 4            a            b
    step 0    prompts    [0 1]  7     [2 3]  7
    step 1    decode     [0 1]  8     [2 3]  8
    step 2    a needs a block: b loses its own, 3 (its end) before 2, and both were full, so they stay cached
              decode     [0 1 3]      waiting, 9 tokens
    step 3..  a decodes to 12 tokens; b's 9 tokens need 3 blocks, and one is free
    step 5    a has ended: b finds its first block, 2, again
    """
    scheduler = make(num_blocks=4)
    a, b = add(scheduler, "a", 7, max_tokens=5), add(scheduler, "b", 7, max_tokens=5)
    assert step(scheduler)[0] == [("a", 0, 7), ("b", 0, 7)]
    assert (a.block_ids, b.block_ids) == ([[0, 1]], [[2, 3]])
    assert step(scheduler)[0] == [("a", 7, 1), ("b", 7, 1)]
    plan = scheduler.schedule()
    assert plan is not None
    assert (rows(plan), plan.preempted) == ([("a", 8, 1)], ("b",))
    assert a.block_ids == [[0, 1, 3]]
    assert (b.status, b.num_computed_tokens, b.block_ids) == (RequestStatus.WAITING, 0, [[]])
    assert (b.output_token_ids, b.num_preemptions, b.num_cached_tokens) == ([5, 5], 1, 0)
    scheduler.update(plan, [[5]])
    assert step(scheduler)[0] == [("a", 9, 1)]
    assert step(scheduler)[0] == [("a", 10, 1)]
    assert a.is_finished
    assert step(scheduler)[0] == [("b", 4, 5)]
    assert b.block_ids[0][0] == 2
    drain(scheduler)
    assert b.output_token_ids == [5] * 5
    stats = scheduler.stats
    assert (stats.preemptions, stats.prefix_hit_tokens, stats.prefix_queried_tokens) == (1, 4, 7 + 7 + 9)
    assert b.num_cached_tokens == 0


def test_a_preempted_request_goes_before_those_that_never_ran() -> None:
    scheduler = make(num_blocks=4)
    add(scheduler, "a", 8, max_tokens=8)
    b = add(scheduler, "b", 7, max_tokens=8)
    c = add(scheduler, "c", 1, max_tokens=8)
    step(scheduler)
    step(scheduler)
    assert b.num_preemptions == 1
    assert scheduler.waiting == (b, c)


def test_a_request_that_needs_a_block_may_be_its_own_victim() -> None:
    """b's two blocks are full and stay cached, so that nothing but its last token is computed when it comes back."""
    scheduler = make(num_blocks=4)
    a = add(scheduler, "a", 6, max_tokens=2)
    add(scheduler, "b", 8, max_tokens=4)
    assert step(scheduler)[0] == [("a", 0, 6), ("b", 0, 8)]
    plan = scheduler.schedule()
    assert plan is not None
    assert (rows(plan), plan.preempted) == ([("a", 6, 1)], ("b",))
    scheduler.update(plan, [[5]])
    assert a.is_finished
    assert step(scheduler)[0] == [("b", 8, 1)]


def test_nothing_is_admitted_in_a_step_that_preempts() -> None:
    scheduler = make(num_blocks=5)
    add(scheduler, "a", 8)
    add(scheduler, "b", 11)
    add(scheduler, "c", 1)
    assert step(scheduler)[0] == [("a", 0, 8), ("b", 0, 8)]
    plan = scheduler.schedule()
    assert plan is not None
    assert (rows(plan), plan.preempted) == ([("a", 8, 1)], ("b",))


# --- policies -------------------------------------------------------------------------------------------------------


def test_guaranteed_no_evict_reserves_the_longest_run() -> None:
    """
    8 blocks of 4; a and b may write 7 + 8 - 1 = 14 positions, 4 blocks each; c, with one block, waits
    """
    scheduler = make(num_blocks=8, policy="guaranteed_no_evict")
    a, b = add(scheduler, "a", 7), add(scheduler, "b", 7)
    add(scheduler, "c", 1, max_tokens=1)
    assert step(scheduler)[0] == [("a", 0, 7), ("b", 0, 7)]
    plans = drain(scheduler)
    assert plans[-1] == [("c", 0, 1)]
    assert plans[:-1] == [[("a", n, 1), ("b", n, 1)] for n in range(7, 14)]
    assert scheduler.stats.preemptions == 0
    assert a.num_output_tokens == b.num_output_tokens == 8


def test_guaranteed_no_evict_fills_the_pool_to_the_last_block() -> None:
    scheduler = make(num_blocks=4, policy="guaranteed_no_evict")
    add(scheduler, "a", 9, max_tokens=8)
    drain(scheduler)
    with pytest.raises(ValueError, match="needs 5 blocks"):
        add(scheduler, "b", 9, max_tokens=9)


def test_guaranteed_no_evict_bounds_a_window_group_by_window_and_chunk() -> None:
    """window 5 and chunks of 4, blocks of 4: (4 + 4 + 6) // 4 = 3 blocks, however long the request"""
    scheduler = make(6, 4, window=5, policy="guaranteed_no_evict", max_batch_tokens=8, max_chunk_tokens=4)
    a = add(scheduler, "a", 30, max_tokens=20)
    add(scheduler, "b", 30, max_tokens=20)
    add(scheduler, "c", 30, max_tokens=20)
    assert step(scheduler)[0] == [("a", 0, 4), ("b", 0, 4)]
    assert a.block_ids == [[0]]
    step(scheduler)
    assert step(scheduler)[0] == [("a", 8, 4), ("b", 8, 4)]
    assert a.block_ids[0][:2] == [N, N]
    drain(scheduler)
    assert scheduler.stats.preemptions == 0


def test_static_batch_waits_for_the_whole_batch() -> None:
    scheduler = make(max_sequences=2, policy="static_batch")
    add(scheduler, "a", 2, max_tokens=1)
    add(scheduler, "b", 2, max_tokens=3)
    add(scheduler, "c", 2, max_tokens=1)
    assert drain(scheduler) == [
        [("a", 0, 2), ("b", 0, 2)],
        [("b", 2, 1)],
        [("b", 3, 1)],
        [("c", 0, 2)],
    ]


def test_a_static_batch_may_start_over_several_steps_but_takes_no_late_arrivals() -> None:
    scheduler = make(max_batch_tokens=4, policy="static_batch")
    add(scheduler, "a", 4, max_tokens=3)
    add(scheduler, "b", 4, max_tokens=1)
    assert step(scheduler)[0] == [("a", 0, 4)]
    add(scheduler, "c", 1, max_tokens=1)
    assert step(scheduler)[0] == [("a", 4, 1), ("b", 0, 3)]
    assert step(scheduler)[0] == [("a", 5, 1), ("b", 3, 1)]
    assert step(scheduler)[0] == [("c", 0, 1)]


# --- prefix cache, siblings, windows --------------------------------------------------------------------------------


def test_a_prefix_is_shared_and_counted() -> None:
    scheduler = make()
    prompt = list(range(10))
    a = add(scheduler, "a", 0, prompt=prompt)
    step(scheduler)
    b = add(scheduler, "b", 0, prompt=[*prompt, 50])
    assert step(scheduler)[0] == [("a", 10, 1), ("b", 8, 3)]
    assert (a.block_ids, b.block_ids) == ([[0, 1, 2]], [[0, 1, 3]])
    assert (a.num_cached_tokens, b.num_cached_tokens) == (0, 8)
    stats = scheduler.stats
    assert (stats.prefix_queried_tokens, stats.prefix_hit_tokens) == (21, 8)
    assert (stats.groups[0].total, stats.groups[0].used, stats.groups[0].cached) == (16, 4, 2)


def test_blocks_of_a_finished_request_are_found_again() -> None:
    scheduler = make()
    prompt = list(range(9))
    add(scheduler, "a", 0, prompt=prompt, max_tokens=1)
    step(scheduler)
    add(scheduler, "b", 0, prompt=prompt)
    assert step(scheduler)[0] == [("b", 8, 1)]


def test_siblings_wait_for_the_prompt_and_then_share_it() -> None:
    scheduler = make(max_batch_tokens=8)
    prompt = list(range(14))
    add(scheduler, "a", 0, prompt=prompt)
    add(scheduler, "b", 0, prompt=prompt, wait_for="a")
    add(scheduler, "c", 0, prompt=prompt, wait_for="a")
    assert step(scheduler)[0] == [("a", 0, 8)]
    assert step(scheduler)[0] == [("a", 8, 6)]
    assert step(scheduler)[0] == [("a", 14, 1), ("b", 12, 2), ("c", 12, 2)]


@pytest.mark.parametrize("sibling", ["finished", "unknown", "later", "itself"])
def test_nobody_waits_for_a_sibling_that_does_not_come_before(sibling: str) -> None:
    scheduler = make()
    if sibling == "finished":
        add(scheduler, "a", 4)
        scheduler.abort("a")
    add(scheduler, "b", 2, wait_for="b" if sibling == "itself" else "a")
    if sibling == "later":
        add(scheduler, "a", 2)
    assert step(scheduler)[0][0] == ("b", 0, 2)


def test_prompt_logprobs_want_all_rows_and_no_cached_prefix() -> None:
    scheduler = make(max_batch_tokens=6)
    prompt = list(range(9))
    add(scheduler, "a", 0, prompt=prompt, max_tokens=1)
    drain(scheduler)
    b = add(scheduler, "b", 0, prompt=prompt, prompt_logprobs=0)
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.scheduled == ((b, 0, 6, 0, 6, False),)
    scheduler.update(plan, [[]])
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.scheduled == ((b, 6, 3, 0, 3, True),)
    scheduler.update(plan, [[5]])
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.scheduled == ((b, 9, 1, 0, 1, True),)


def test_prompt_logprobs_of_a_later_start_take_what_precedes_it_from_the_cache() -> None:
    scheduler = make(max_batch_tokens=6)
    prompt = list(range(16))
    add(scheduler, "a", 0, prompt=prompt, max_tokens=1)
    drain(scheduler)
    b = add(scheduler, "b", 0, prompt=prompt, prompt_logprobs=0, prompt_logprobs_start=7)
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.scheduled == ((b, 4, 6, 0, 4, False),)  # blocks of 4 tokens; row 6 predicts token 7
    assert plan.scheduled[0].first_logit_row == 6
    scheduler.update(plan, [[]])
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.scheduled == ((b, 10, 6, 0, 6, True),)


def test_prompt_rows_are_delivered_once_a_token_was_sampled() -> None:
    """b is preempted after its prompt was delivered: it comes back on its cached blocks, with one row of logits."""
    scheduler = make(num_blocks=4)
    add(scheduler, "a", 7, max_tokens=3)
    b = add(scheduler, "b", 6, max_tokens=4, prompt_logprobs=1)
    step(scheduler)
    step(scheduler)
    assert step(scheduler)[0] == [("a", 8, 1)]
    assert b.num_preemptions == 1
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.scheduled == ((b, 4, 4, 0, 1, True),)


def test_a_window_group_beside_a_full_one() -> None:
    """
    prompt of 10 in one chunk, blocks of 2        full  [0 1 2 3 4]       window 3  [-1 -1 -1 -1 4]
    """
    groups = (CacheGroup(num_blocks=16, block_size=2), CacheGroup(num_blocks=16, block_size=2, window=3))
    scheduler = make(groups=groups)
    a = add(scheduler, "a", 10)
    step(scheduler)
    assert a.block_ids == [[0, 1, 2, 3, 4], [N, N, N, N, 4]]
    step(scheduler)
    assert a.block_ids == [[0, 1, 2, 3, 4, 5], [N, N, N, N, 4, 5]]
    assert [group.used for group in scheduler.stats.groups] == [6, 2]


# --- drafts ---------------------------------------------------------------------------------------------------------


def ready(scheduler: Scheduler, name: str = "a", num_prompt: int = 5, **fields: Any) -> Request:
    """A request that has computed its prompt and has one output token."""
    request = add(scheduler, name, num_prompt, **fields)
    step(scheduler)
    return request


@pytest.mark.parametrize(
    ("sampled", "num_computed"),
    [([1], 6), ([11, 1], 7), ([11, 12, 1], 8), ([11, 12, 13, 1], 9)],
    ids=["none accepted", "one", "two", "all"],
)
def test_computed_tokens_after_verification(sampled: list[int], num_computed: int) -> None:
    """
    positions   0 .. 4 | 5 | 6  7  8        5: the last token, 6 7 8: drafts; rejected ones are overwritten later
    """
    scheduler = make()
    a = ready(scheduler)
    a.draft_token_ids = [11, 12, 13]
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.scheduled == ((a, 5, 4, 3, 4, True),)
    assert a.block_ids == [[0, 1, 2]]
    assert scheduler.update(plan, [sampled]) == [(a, sampled, False)]
    assert (a.num_computed_tokens, a.num_tokens) == (num_computed, num_computed + 1)
    assert a.draft_token_ids == []
    assert a.block_ids == [[0, 1, 2]]
    assert step(scheduler)[0] == [("a", num_computed, 1)]


def test_several_tokens_without_drafts_are_computed_later() -> None:
    scheduler = make()
    a = ready(scheduler)
    step(scheduler, {"a": [1, 2, 3]})
    assert (a.num_computed_tokens, a.num_tokens) == (6, 9)
    assert step(scheduler)[0] == [("a", 6, 3)]


def test_a_draft_that_was_not_sampled_is_not_counted_as_computed() -> None:
    """An engine that accepts a token other than the draft would leave wrong keys and values in the cache."""
    scheduler = make()
    a = ready(scheduler)
    a.draft_token_ids = [11, 12]
    step(scheduler, {"a": [11, 77, 1]})
    assert (a.num_computed_tokens, a.num_tokens) == (7, 9)


def test_drafts_use_only_spare_budget() -> None:
    """budget 6: three decodes keep a token each, a's five drafts get the other three; single tokens come first"""
    scheduler = make(max_batch_tokens=6, max_sequences=3)
    a = add(scheduler, "a", 2)
    add(scheduler, "b", 2)
    add(scheduler, "c", 2)
    step(scheduler)
    a.draft_token_ids = [1, 2, 3, 4, 5]
    assert step(scheduler)[0] == [("b", 2, 1), ("c", 2, 1), ("a", 2, 4)]


def test_drafts_that_lack_blocks_are_dropped_and_nobody_is_preempted() -> None:
    """
    3 blocks of 4: a [0 1] with 5 tokens computed, b [2]; a's drafts reach position 8, which needs a third block:
    the two that fit block 1 stay
    """
    scheduler = make(num_blocks=3)
    a = add(scheduler, "a", 5)
    b = add(scheduler, "b", 2, max_tokens=2)
    step(scheduler)
    a.draft_token_ids = [1, 2, 3]
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.scheduled == ((b, 2, 1, 0, 1, True), (a, 5, 3, 2, 3, True))
    assert plan.preempted == ()


def test_drafts_stop_at_the_length_limit() -> None:
    scheduler = make()
    a = ready(scheduler, max_tokens=3)
    a.draft_token_ids = [1, 2, 3, 4]
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.scheduled == ((a, 5, 2, 1, 2, True),)
    scheduler.update(plan, [[1, 9]])
    assert (a.output_token_ids, a.finish_reason) == ([5, 1, 9], FinishReason.LENGTH)


# --- ends -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "sampled", "output", "reason", "stop_reason"),
    [
        ({}, [1, EOS, 2], [1, EOS], FinishReason.STOP, None),
        ({"ignore_eos": True}, [1, EOS, 2], [1, EOS, 2], None, None),
        ({"stop_token_ids": [7]}, [1, 7, 2], [1, 7], FinishReason.STOP, 7),
        ({"stop_token_ids": [EOS]}, [EOS], [EOS], FinishReason.STOP, None),
        ({"stop_token_ids": [EOS], "ignore_eos": True}, [EOS], [EOS], FinishReason.STOP, EOS),
        ({"min_tokens": 2}, [EOS, EOS, EOS, 1], [EOS, EOS, EOS], FinishReason.STOP, None),
        ({"min_tokens": 2, "stop_token_ids": [7]}, [7, 1, 7], [7, 1, 7], FinishReason.STOP, 7),
        ({"max_tokens": 2}, [1, 2, 3], [1, 2], FinishReason.LENGTH, None),
        ({"max_tokens": 2}, [1, EOS], [1, EOS], FinishReason.STOP, None),
        ({"max_tokens": None}, [1] * 80, [1] * 60, FinishReason.LENGTH, None),
        ({"max_tokens": 100}, [1] * 80, [1] * 60, FinishReason.LENGTH, None),
    ],
)
def test_where_an_output_is_cut(
    params: dict[str, Any], sampled: list[int], output: list[int], reason: FinishReason | None, stop_reason: int | None
) -> None:
    scheduler = make()
    a = add(scheduler, "a", 4, **{"max_tokens": 8, **params})
    _, updates = step(scheduler, {"a": sampled})
    assert updates == [(a, output, reason is not None)]
    assert (a.output_token_ids, a.finish_reason, a.stop_reason) == (output, reason, stop_reason)
    assert a.is_finished == (reason is not None)


def test_abort_of_running_and_waiting() -> None:
    scheduler = make(max_sequences=1)
    a, b = add(scheduler, "a", 5), add(scheduler, "b", 5)
    step(scheduler)
    assert scheduler.abort("b")
    assert scheduler.abort("a")
    assert not scheduler.abort("a")
    assert not scheduler.abort("nobody")
    assert (a.finish_reason, b.finish_reason) == (FinishReason.ABORT, FinishReason.ABORT)
    scheduler.check_integrity()
    assert not scheduler.has_work
    assert scheduler.stats.groups[0].used == 0


def test_abort_between_schedule_and_update_drops_the_result() -> None:
    scheduler = make()
    a, b = add(scheduler, "a", 5), add(scheduler, "b", 5)
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.abort("a")
    again = add(scheduler, "a", 3)
    assert scheduler.update(plan, [[1], [2]]) == [(b, [2], False)]
    assert (a.output_token_ids, again.output_token_ids) == ([], [])
    scheduler.check_integrity()
    assert step(scheduler)[0] == [("b", 5, 1), ("a", 0, 3)]


def test_an_aborted_row_may_come_back_empty() -> None:
    scheduler = make()
    add(scheduler, "a", 5)
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.abort("a")
    assert scheduler.update(plan, [[]]) == []


def test_finish_for_a_stop_string() -> None:
    scheduler = make()
    a = ready(scheduler)
    assert scheduler.finish("a", FinishReason.STOP, "END")
    assert (a.finish_reason, a.stop_reason, a.output_token_ids) == (FinishReason.STOP, "END", [5])
    assert not scheduler.has_work


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "num_prompt", "max_tokens", "message"),
    [
        ({}, 0, 1, "the prompt is empty"),
        ({}, 64, 1, "the prompt has 64 tokens and max_seq_len is 64; allowed: at most 63"),
        ({"max_batch_tokens": 8, "chunked_prefill": False}, 9, 1, "9 tokens and max_batch_tokens is 8"),
        (
            {"num_blocks": 3},
            9,
            5,
            "prompt 9 + max_tokens 5 (max_seq_len 64) is 14 tokens, which needs 4 blocks of cache group 0 "
            "(block size 4); it has 3; lower max_tokens or give",
        ),
        ({"num_blocks": 3}, 9, None, "is 64 tokens, which needs 16 blocks"),
        ({"num_blocks": 3, "window": 5}, 30, 5, "6 blocks of cache group 0 (block size 4, window 5, chunks of 16)"),
    ],
)
def test_what_can_never_run_is_refused(config: dict[str, Any], num_prompt: int, max_tokens: int, message: str) -> None:
    scheduler = make(**config)
    with pytest.raises(ValueError, match=re.escape(message)):
        add(scheduler, "a", num_prompt, max_tokens)
    assert not scheduler.has_work
    add(scheduler, "a", 1, 1)


def test_ids_are_unique_among_the_living() -> None:
    scheduler = make()
    a = add(scheduler, "a", 1, 1)
    with pytest.raises(ValueError, match="request id 'a' is in use"):
        add(scheduler, "a", 1)
    drain(scheduler)
    with pytest.raises(ValueError, match="was added before"):
        scheduler.add_request(a)
    add(scheduler, "a", 1)
    with pytest.raises(ValueError, match="request_id is empty"):
        Request("", [1], SamplingParams())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"groups": ()}, "groups is empty"),
        ({"max_sequences": 0}, "max_sequences is 0"),
        ({"max_seq_len": 1}, "max_seq_len is 1; allowed: integers >= 2"),
        ({"max_chunk_tokens": 0}, "max_chunk_tokens is 0"),
        ({"max_batch_tokens": 3}, "max_batch_tokens is 3 and max_sequences is 4"),
        ({"max_chunk_tokens": 4, "chunked_prefill": False}, "set one of the two"),
        ({"policy": "fair"}, "policy is 'fair'; allowed: guaranteed_no_evict, max_utilization, static_batch"),
    ],
)
def test_bad_configs_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make(**fields)


def test_schedule_is_at_most_one_step_ahead_of_update() -> None:
    scheduler = make()
    add(scheduler, "a", 4)
    plan = scheduler.schedule()
    assert plan is not None
    with pytest.raises(ValueError, match="sampled has 2 entries for 1"):
        scheduler.update(plan, [[1], [2]])
    with pytest.raises(ValueError, match="'a' got 0 sampled tokens in step 0 and its plan says samples=True"):
        scheduler.update(plan, [[]])
    ahead = scheduler.schedule()
    assert ahead is not None
    with pytest.raises(RuntimeError, match="steps 0 and 1 have no update"):
        scheduler.schedule()
    with pytest.raises(ValueError, match="step 1; the oldest plan without a result is 0"):
        scheduler.update(ahead, [[1]])
    with pytest.raises(ValueError, match="'a' got 2 sampled tokens in step 0, after the next step was planned"):
        scheduler.update(plan, [[1, 2]])
    with pytest.raises(ValueError, match=r"tokens have shape \(2,\); step 0 samples 1 rows"):
        scheduler.update(plan, np.array([1, 2]))
    scheduler.update(plan, [[1]])
    with pytest.raises(ValueError, match="the oldest plan without a result is 1"):
        scheduler.update(plan, [[1]])
    scheduler.update(ahead, [[2]])
    with pytest.raises(ValueError, match="the oldest plan without a result is none"):
        scheduler.update(plan, [[1]])


def test_nothing_is_planned_on_top_of_drafts() -> None:
    scheduler = make()
    a = ready(scheduler)
    a.draft_token_ids = [1]
    assert scheduler.schedule() is not None
    with pytest.raises(RuntimeError, match="step 1 verifies drafts"):
        scheduler.schedule()


def test_a_step_ahead_counts_the_token_in_flight() -> None:
    """
    block size 4: a's prompt fills block 0; its first token, still unknown, goes to position 4, in block 1. b comes and
    shares block 0, which the step in flight fills.
    """
    scheduler = make()
    a = add(scheduler, "a", 4)
    first = scheduler.schedule()
    b = add(scheduler, "b", 8, prompt=[*a.prompt_token_ids, 1, 2, 3, 4])
    second = scheduler.schedule()
    assert first is not None and second is not None
    assert second.scheduled == ((a, 4, 1, 0, 1, True), (b, 4, 4, 0, 1, True))
    assert (a.block_ids, b.block_ids) == ([[0, 1]], [[0, 2]])
    assert a.num_computed_tokens == a.num_tokens == 4
    assert [update.request for update in scheduler.update(first, np.array([7]))] == [a]
    third = scheduler.schedule()
    assert third is not None and third.decodes == (a, b) and third.starts.tolist() == [5, 8]
    scheduler.update(second, np.array([8, 9]))
    scheduler.check_integrity()
    assert (a.output_token_ids, b.output_token_ids) == ([7, 8], [9])


def test_a_last_token_in_flight_frees_blocks_and_place() -> None:
    """max_sequences 1: b starts in the step after the one that brings a's last token, before that token is known"""
    scheduler = make(max_sequences=1)
    a = add(scheduler, "a", 4, max_tokens=1)
    b = add(scheduler, "b", 3, max_tokens=2)
    first = scheduler.schedule()
    second = scheduler.schedule()
    assert first is not None and second is not None
    assert second.scheduled == ((b, 0, 3, 0, 1, True),) and second.left == ("a",)
    assert a.status is RequestStatus.ENDING and not a.block_ids[0]
    scheduler.check_integrity()
    assert scheduler.stats.running == 2
    updates = scheduler.update(first, np.array([5]))
    assert updates == [(a, [5], True)] and a.finish_reason is FinishReason.LENGTH
    third = scheduler.schedule()
    assert third is not None
    assert scheduler.update(second, np.array([6])) == [(b, [6], False)]
    assert scheduler.schedule() is None, "b's last token is in flight"
    assert scheduler.update(third, np.array([7])) == [(b, [7], True)]
    assert not scheduler.has_work


def test_an_ending_request_may_be_aborted() -> None:
    scheduler = make()
    a = add(scheduler, "a", 4, max_tokens=1)
    first = scheduler.schedule()
    assert first is not None and scheduler.schedule() is None
    assert scheduler.abort("a")
    assert scheduler.update(first, np.array([5])) == [] and a.output_token_ids == []
    scheduler.check_integrity()


def test_an_end_that_was_not_foreseen_drops_the_step_ahead() -> None:
    scheduler = make()
    a, b = add(scheduler, "a", 2), add(scheduler, "b", 2)
    first = scheduler.schedule()
    second = scheduler.schedule()
    assert first is not None and second is not None and second.decodes == (a, b)
    assert [u.finished for u in scheduler.update(first, np.array([EOS, 4]))] == [True, False]
    assert not any(a.block_ids), "steps run in order: whoever writes these blocks next comes later"
    third = scheduler.schedule()
    assert third is not None and third.decodes == (b,)
    assert scheduler.update(second, np.array([1, 2])) == [(b, [2], False)]
    assert (a.output_token_ids, a.finish_reason) == ([EOS], FinishReason.STOP)
    scheduler.check_integrity()


def test_a_preempted_request_keeps_the_token_in_flight() -> None:
    """2 blocks of 4: a and b fill theirs; a's next token takes b's, whose own is still on its way"""
    scheduler = make(num_blocks=2, policy="max_utilization", enable_prefix_cache=False)
    a, b = add(scheduler, "a", 4, max_tokens=4), add(scheduler, "b", 4, max_tokens=4)
    first = scheduler.schedule()
    second = scheduler.schedule()
    assert first is not None and second is not None
    assert second.preempted == ("b",) and second.decodes == (a,)
    assert b.status is RequestStatus.WAITING
    scheduler.update(first, np.array([5, 6]))
    assert (a.output_token_ids, b.output_token_ids) == ([5], [6])
    scheduler.check_integrity()


def test_reports_can_be_left_out() -> None:
    scheduler = make()
    a, b = add(scheduler, "a", 2, max_tokens=3), add(scheduler, "b", 2)
    b.reports_tokens = a.reports_tokens = False
    plan = scheduler.schedule()
    assert plan is not None and len(scheduler.update(plan, np.array([1, 1]))) == 2, "the first tokens"
    plan = scheduler.schedule()
    assert plan is not None and scheduler.update(plan, np.array([2, 2])) == []
    plan = scheduler.schedule()
    assert plan is not None and scheduler.update(plan, np.array([3, 3])) == [(a, [3], True)]
    assert b.output_token_ids == [1, 2, 3]


def test_tokens_for_a_row_that_does_not_sample_are_refused() -> None:
    scheduler = make(max_batch_tokens=4)
    add(scheduler, "a", 8)
    plan = scheduler.schedule()
    assert plan is not None
    with pytest.raises(ValueError, match="got 1 sampled tokens in step 0 and its plan says samples=False"):
        scheduler.update(plan, [[1]])


def test_nothing_to_run() -> None:
    scheduler = make()
    assert scheduler.schedule() is None
    assert not scheduler.has_work
    assert scheduler.stats.steps == 0


@pytest.mark.parametrize("damage", ["order", "status", "count", "lost"])
def test_check_integrity_sees_damage(damage: str) -> None:
    scheduler = make(max_sequences=2)
    for name in "abc":
        add(scheduler, name, 3)
    step(scheduler)
    if damage == "order":
        scheduler._running.requests.reverse()
    elif damage == "status":
        scheduler._running.requests[0].status = RequestStatus.WAITING
    elif damage == "count":
        scheduler._num_prefilling = 1
    else:
        scheduler._waiting.clear()
    with pytest.raises(AssertionError):
        scheduler.check_integrity()


def test_the_scheduler_needs_no_torch() -> None:
    import ast
    from pathlib import Path

    import camshaft.runtime.scheduler as module

    folder = Path(module.__file__).parent
    names = (
        "sampling_params",
        "request",
        "block_pool",
        "kv_cache",
        "policies",
        "plan",
        "queues",
        "running",
        "scheduler",
        "trace",
        "updates",
    )
    for name in names:
        tree = ast.parse((folder / f"{name}.py").read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("torch") for alias in node.names), name
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0 or node.module in names, f"{name} imports {node.module}"
                assert not (node.module or "").startswith("torch"), name
