"""Heavy random loads with steps planned one ahead: many requests over few blocks, ends of all kinds, aborts in flight.

The model of `test_scheduler_properties` sees every wrong block; outputs must be those of requests that run alone.
"""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
from camshaft.runtime.kv_cache import CacheGroup
from camshaft.runtime.plan import SchedulerConfig, StepPlan
from camshaft.runtime.request import Request, RequestStatus
from camshaft.runtime.sampling_params import SamplingParams
from camshaft.runtime.scheduler import Scheduler

from .test_scheduler_properties import EOS, PREFIXES, FakeModel, lone_output


def config_of(rng: random.Random) -> SchedulerConfig:
    """Pools for about three requests, with and without windows."""
    groups = [CacheGroup(num_blocks=rng.randrange(14, 22), block_size=rng.choice([2, 3, 4]))]
    if rng.random() < 0.5:
        groups.append(CacheGroup(num_blocks=20, block_size=2, window=rng.choice([2, 5])))
    return SchedulerConfig(
        groups=tuple(groups),
        max_batch_tokens=rng.choice([6, 12, 30]),
        max_sequences=rng.choice([3, 6]),
        max_seq_len=28,
        policy=rng.choice(["max_utilization", "max_utilization", "guaranteed_no_evict", "static_batch"]),
        max_chunk_tokens=rng.choice([None, 4]),
        enable_prefix_cache=rng.random() < 0.7,
    )


def add(scheduler: Scheduler, requests: list[Request], rng: random.Random) -> None:
    """One more request, sometimes a sibling that waits for the one before."""
    number = len(requests)
    prompt = [*rng.choice(PREFIXES), *(rng.randrange(1, 7) for _ in range(rng.randrange(1, 6)))]
    params = SamplingParams(max_tokens=rng.randrange(1, 15), ignore_eos=rng.random() < 0.5,
                            prompt_logprobs=1 if rng.random() < 0.1 else None)  # fmt: skip
    wait_for = requests[-1].request_id if requests and rng.random() < 0.2 else None
    request = Request(f"r{number}", prompt, params, frozenset({EOS}), wait_for=wait_for)
    request.reports_tokens = rng.random() < 0.5
    try:
        scheduler.add_request(request)
    except ValueError:
        return
    requests.append(request)


def run(seed: int, seen: Counter[str]) -> None:
    """One load from its first request to its last."""
    rng = random.Random(seed)
    config = config_of(rng)
    scheduler, model = Scheduler(config), FakeModel(config.groups)
    requests: list[Request] = []
    flights: list[tuple[StepPlan, list[list[int]]]] = []
    strict = rng.random() < 0.1
    for turn in range(3000):
        while turn < 60 and rng.random() < 0.4:
            add(scheduler, requests, rng)
        if requests and rng.random() < 0.05:
            victim = rng.choice(requests)
            seen["aborted in flight"] += scheduler.abort(victim.request_id) and bool(flights)
        plan = scheduler.schedule()
        if plan is not None:
            single = [row.num_tokens == 1 and not row.request.prefilling for row in plan.scheduled]
            assert single == sorted(single, reverse=True) and plan.on_top == bool(flights)
            seen["ahead"] += bool(flights)
            seen["left"] += len(plan.left)
            flights.append((plan, model.launch(plan)))
        scheduler.check_integrity()
        if flights and (plan is None or strict or len(flights) == 2 or rng.random() < 0.1):
            update(scheduler, *flights.pop(0), seen)
        if turn >= 60 and not flights and not scheduler.has_work:
            break
    assert not scheduler.has_work and all(request.is_finished for request in requests)
    assert all(group.used == 0 for group in scheduler.stats.groups)
    seen["hits"] += scheduler.stats.prefix_hit_tokens


def update(scheduler: Scheduler, plan: StepPlan, sampled: list[list[int]], seen: Counter[str]) -> None:
    """Takes a step's result in, and checks every token and end that it brought."""
    statuses = [row.request.status for row in plan.scheduled]
    before = [row.request.num_output_tokens for row in plan.scheduled]
    tokens = np.array([token for row in sampled for token in row], dtype=np.int64)
    updates = scheduler.update(plan, tokens)
    scheduler.check_integrity()
    for row, status, num_before in zip(plan.scheduled, statuses, before):
        request = row.request
        live = status is not RequestStatus.FINISHED
        assert request.num_output_tokens - num_before == (live and row.samples), "a token was lost or came twice"
        seen["preempted in flight"] += status is RequestStatus.WAITING
        seen["dropped"] += not live
        if live and row.samples:
            expected = lone_output(request)
            assert request.output_token_ids == expected[: request.num_output_tokens]
            assert request.is_finished == (request.output_token_ids == expected)
    told = {update.request.request_id for update in updates}
    for row, status in zip(plan.scheduled, statuses):
        request = row.request
        if row.samples and status is not RequestStatus.FINISHED and (request.reports_tokens or request.is_finished):
            assert request.request_id in told


def test_random_loads_one_step_ahead() -> None:
    seen: Counter[str] = Counter()
    for seed in range(60):
        run(seed, seen)
    for event in ("aborted in flight", "preempted in flight", "dropped", "left", "hits", "ahead"):
        assert seen[event] > 20, seen
