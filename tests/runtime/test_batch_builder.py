"""Plans become exact tensors, and the tables stay right over preemption, windows and prompt rows."""

import random

import numpy as np
import pytest
import torch
from camshaft.runtime.batch_builder import BatchBuilder
from camshaft.runtime.kv_cache import CacheGroup
from camshaft.runtime.plan import ScheduledRequest, SchedulerConfig, StepPlan
from camshaft.runtime.request import Request
from camshaft.runtime.runner import Runner
from camshaft.runtime.sampling_params import SamplingParams
from camshaft.runtime.scheduler import Scheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from .fake_engine import FakeEngine, expected_tokens


def request(name, prompt, blocks, output=(), **params):
    made = Request(name, list(prompt), SamplingParams(temperature=0, **params))
    made.output_token_ids.extend(output)
    made.all_token_ids.extend(output)
    made.block_ids = [list(b) for b in blocks]
    return made


def plan(*rows, preempted=()):
    return StepPlan(0, tuple(rows), sum(r.num_tokens for r in rows), preempted)


def builder(num_groups=1, max_sequences=4, max_seq_len=32):
    return BatchBuilder(
        num_groups=num_groups,
        block_size=4,
        max_seq_len=max_seq_len,
        max_sequences=max_sequences,
        device=torch.device("cpu"),
    )


def test_packing_of_a_mixed_step():
    a = request("a", [1, 2, 3], [[5, 6]], output=[7, 8])
    b = request("b", [10, 11, 12, 13, 14, 15], [[2, 9]])
    c = request("c", [20, 21, 22], [[1]])
    made = builder().build(
        plan(ScheduledRequest(a, 4, 1), ScheduledRequest(b, 2, 4), ScheduledRequest(c, 0, 2, 0, 0, False))
    )
    assert made.token_ids.tolist() == [8, 12, 13, 14, 15, 20, 21]
    assert made.positions.tolist() == [4, 2, 3, 4, 5, 0, 1]
    assert made.groups[0].slot_mapping.tolist() == [24, 10, 11, 36, 37, 4, 5]
    assert made.groups[0].block_tables.tolist() == [[5, 6], [2, 9], [1, 0]]
    assert made.query_start.tolist() == [0, 1, 5, 7] and made.seq_lens.tolist() == [5, 6, 2]
    assert made.sample_rows.tolist() == [0, 4]
    assert (made.max_query_len, made.max_seq_len) == (4, 6)
    assert made.token_ids.dtype == made.positions.dtype == made.sample_rows.dtype == torch.int64
    assert made.groups[0].block_tables.dtype == made.query_start.dtype == made.seq_lens.dtype == torch.int32


def test_tokens_in_flight_come_from_the_samples_of_the_step_before():
    """First step: a and b decode, c is under way, d ends its prompt. Second: a has left, b and d decode; b's failed."""
    build = builder()
    a, b, d = (request(name, [1, 2, 3], [[n]], output=[n]) for n, name in enumerate("abd"))
    c = request("c", range(8), [[5, 6]])
    build.build(plan(ScheduledRequest(a, 0, 3), ScheduledRequest(b, 0, 3)))
    first = StepPlan(
        0,
        (ScheduledRequest(c, 0, 2, 0, 0, False), ScheduledRequest(d, 0, 4)),
        8,
        decodes=(a, b),
        starts=np.array([3, 3]),
    )
    made = build.build(first)
    assert made.token_ids.tolist() == [0, 1, 0, 1, 1, 2, 3, 2] and made.num_decodes == 2
    assert made.sample_rows.tolist() == [0, 1, 7]
    for r in (b, d):
        r.block_ids[0].append(8)
    second = StepPlan(
        1,
        (ScheduledRequest(c, 2, 3, 0, 0, False),),
        5,
        left=("a",),
        decodes=(b, d),
        starts=np.array([4, 4]),
        on_top=True,
    )
    made = build.build(second, torch.tensor([70, -1, 90]))
    assert made.token_ids.tolist() == [0, 90, 2, 3, 4] and made.num_decodes == 2
    assert made.positions.tolist() == [4, 4, 2, 3, 4] and made.seq_lens.tolist() == [5, 5, 5]
    third = StepPlan(2, (), 2, decodes=second.decodes, starts=np.array([5, 5]), on_top=True)
    assert build.build(third, torch.tensor([7, 8])).token_ids.tolist() == [7, 8]


def test_drafts_and_prompt_rows():
    a = request("a", [1, 2, 3], [[5, 6]], output=[7])
    a.draft_token_ids = [30, 31, 32]
    b = request("b", [10, 11, 12], [[2]])
    made = builder().build(plan(ScheduledRequest(a, 3, 3, 2, 3), ScheduledRequest(b, 0, 3, 0, 3)))
    assert made.token_ids.tolist() == [7, 30, 31, 10, 11, 12]
    assert made.sample_rows.tolist() == [0, 1, 2, 3, 4, 5]


def test_tables_follow_growth_windows_preemption_and_release():
    build = builder(num_groups=2, max_sequences=2)
    a = request("a", range(9), [[3, 4, 5], [-1, 7, 8]])
    made = build.build(plan(ScheduledRequest(a, 8, 1)))
    assert made.groups[1].block_tables.tolist() == [[0, 7, 8]]
    assert [g.slot_mapping.tolist() for g in made.groups] == [[20], [32]]
    a.block_ids[0].append(6)
    a.block_ids[1].append(9)
    made = build.build(plan(ScheduledRequest(a, 7, 2)))
    assert made.groups[0].block_tables.tolist() == [[3, 4, 5]], "no wider than the longest sequence"
    a.block_ids = [[1, 2, 0], [4, 3, 2]]
    b = request("b", range(3), [[6], [6]])
    build.build(plan(ScheduledRequest(b, 0, 3), preempted=("a",)))
    made = build.build(plan(ScheduledRequest(b, 2, 1), ScheduledRequest(a, 0, 9)))
    assert made.groups[0].block_tables.tolist() == [[6, 0, 0], [1, 2, 0]]
    build.release("a")
    build.release("b")
    c = request("c", range(3), [[0], [1]])
    assert build.build(plan(ScheduledRequest(c, 0, 3))).groups[1].block_tables.tolist() == [[1]]


def test_batches_that_are_filled_in_again_are_those_built_anew():
    rng = random.Random(0)
    build = builder(num_groups=2, max_sequences=4, max_seq_len=400)
    requests = [request(name, range(5), [[i], [10 + i]]) for i, name in enumerate("abcd")]
    for one in requests:
        one.max_total_tokens = 400
    free, again = iter(range(20, 10_000)), 0
    prompts = plan(*(ScheduledRequest(one, 0, 4, 0, 0, False) for one in requests))
    build.build(prompts)
    for step in range(120):
        lengths = [rng.choice([0, 0, 0, 2, 3]) for _ in requests]
        starts = [one.num_tokens - 1 for one in requests]
        for one, length in zip(requests, lengths):
            one.draft_token_ids = [rng.randrange(100) for _ in range(length)]
            for blocks in one.block_ids:
                while len(blocks) * build.block_size < one.num_tokens + length:
                    blocks.append(next(free))
        drafted = [i for i, length in enumerate(lengths) if length]
        decoding = [i for i, length in enumerate(lengths) if not length]
        made_of = StepPlan(
            step,
            tuple(
                ScheduledRequest(requests[i], starts[i], 1 + lengths[i], lengths[i], 1 + lengths[i]) for i in drafted
            ),
            4 + sum(lengths),
            decodes=tuple(requests[i] for i in decoding),
            starts=np.array([starts[i] for i in decoding], dtype=np.int64),
        )
        kept = list(build._repeated.values())
        anew = builder(num_groups=2, max_sequences=4, max_seq_len=400)
        anew.build(prompts)
        made, fresh = build.build(made_of), anew.build(made_of)
        again += kept == list(build._repeated.values())
        for name in ("token_ids", "positions", "query_start", "seq_lens", "sample_rows"):
            assert getattr(made, name).tolist() == getattr(fresh, name).tolist(), name
        for mine, theirs in zip(made.groups, fresh.groups):
            assert mine.slot_mapping.tolist() == theirs.slot_mapping.tolist()
            for sequence, seq_len in enumerate(made.seq_lens.tolist()):
                blocks = -(-seq_len // build.block_size)
                tables = mine.block_tables[sequence, :blocks], theirs.block_tables[sequence, :blocks]
                assert tables[0].tolist() == tables[1].tolist()
        for name in ("max_query_len", "max_seq_len", "num_decodes"):
            assert getattr(made, name) == getattr(fresh, name), name
        for one, length in zip(requests, lengths):
            one.append_output([rng.randrange(100) for _ in range(1 + rng.randrange(length + 1))])
    assert again > 20
    build.release("a")
    assert not build._repeated


def test_a_batch_outlives_the_next_one():
    build = builder()
    first = build.build(plan(ScheduledRequest(request("a", [1, 2], [[0]]), 0, 2)))
    build.build(plan(ScheduledRequest(request("b", [3, 4, 5], [[1]]), 0, 3)))
    assert first.token_ids.tolist() == [1, 2]


def run(engine, requests, num_blocks, ahead=False, **config):
    """Runs requests to their end through scheduler, runner and engine, in turns or with one step ahead."""
    groups = tuple(
        CacheGroup(num_blocks=n, block_size=engine.block_size, window=g.window)
        for n, g in zip(num_blocks, engine.cache_groups)
    )
    engine.bind_cache(num_blocks)
    scheduler = Scheduler(
        SchedulerConfig(
            groups=groups,
            max_batch_tokens=engine.max_batch_tokens,
            max_sequences=engine.max_sequences,
            max_seq_len=engine.max_seq_len,
            **config,
        )  # fmt: skip
    )
    runner = Runner(engine)
    for r in requests:
        scheduler.add_request(r)
        runner.add(r, 0)
    results = []
    flights = []
    while True:
        plan = scheduler.schedule()
        if plan is not None:
            flights.append(runner.launch(plan))
        if not flights:
            break
        if len(flights) > ahead or plan is None:
            launched = flights.pop(0)
            result = runner.collect(launched)
            results.append((launched.plan, result))
            for update in scheduler.update(launched.plan, result.tokens):
                if update.finished:
                    runner.release(update.request.request_id)
            scheduler.check_integrity()
    scheduler.check_integrity()
    return scheduler, results


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12)), min_size=1, max_size=6),
    num_blocks=st.integers(14, 40),
    windows=st.sampled_from([(0,), (0, 6), (5,)]),
    policy=st.sampled_from(["guaranteed_no_evict", "max_utilization"]),
    shared=st.booleans(),
    ahead=st.booleans(),
)
def test_tokens_are_those_of_the_definition(lengths, num_blocks, windows, policy, shared, ahead):
    """Chunked prefill, prefix hits, windows, preemption and steps ahead leave every token as it must be."""
    rng = np.random.default_rng(0)
    engine = FakeEngine(max_batch_tokens=16, max_sequences=4, windows=windows, max_seq_len=56)
    base = rng.integers(0, 101, 40).tolist()
    prompts = [base[:n] if shared else rng.integers(0, 101, n).tolist() for n, _ in lengths]
    requests = [request(str(i), p, [], max_tokens=m) for i, (p, (_, m)) in enumerate(zip(prompts, lengths))]
    run(engine, requests, [num_blocks] * len(windows), ahead, policy=policy)
    for r, prompt, (_, num_tokens) in zip(requests, prompts, lengths):
        assert r.output_token_ids == expected_tokens(prompt, num_tokens, 101, windows)


@pytest.mark.parametrize("ahead", [False, True])
def test_preemption_really_happens(ahead):
    engine = FakeEngine(max_batch_tokens=16, max_sequences=4, max_seq_len=56)
    prompts = [[i, i + 1, i + 2, 50] * 4 for i in range(4)]
    requests = [request(str(i), p, [], max_tokens=30) for i, p in enumerate(prompts)]
    scheduler, _ = run(engine, requests, [20], ahead, policy="max_utilization")
    assert scheduler.stats.preemptions > 0
    for r, prompt in zip(requests, prompts):
        assert r.output_token_ids == expected_tokens(prompt, 30, 101)


@pytest.mark.parametrize("ahead", [False, True])
def test_prompt_logprobs_of_a_chunked_prompt(ahead):
    engine = FakeEngine(max_batch_tokens=8, max_sequences=4)
    prompt = list(range(3, 23))
    wanted = request("a", prompt, [], max_tokens=2, prompt_logprobs=2)
    other = request("b", [9, 9, 9], [], max_tokens=9)
    _, results = run(engine, [other, wanted], [40], ahead)
    found = {}
    for step, result in results:
        for index, logprobs in result.prompt_logprobs.items():
            row = step.scheduled[index]
            for n, value in enumerate(logprobs.logprobs):
                found[row.start + n + 1] = (float(value), int(logprobs.ranks[n]))
    assert sorted(found) == list(range(1, 20))
    assert wanted.output_token_ids == expected_tokens(prompt, 2, 101)
    from .fake_engine import context_hash, logits_of

    for position in (1, 8, 19):
        expected = torch.from_numpy(logits_of(context_hash(prompt[:position]), 101)).log_softmax(-1)
        assert abs(found[position][0] - float(expected[prompt[position]])) < 1e-4


def test_decode_batches_are_filled_in_again():
    """Step by step the same as from a builder that begins anew, over new blocks, a freed window and a new request."""
    kept = builder(num_groups=2)
    a = request("a", [1, 2, 3], [[5], [6]], output=[7])
    b = request("b", [4, 5], [[2], [3]], output=[8])
    rows = [a, b]
    for step in range(14):
        for r in rows:
            if r.num_tokens > 4 * len(r.block_ids[0]):
                for group, blocks in enumerate(r.block_ids):
                    blocks.append(10 + 2 * step + group)
            if r.num_tokens == 10:
                r.block_ids[1][0] = -1
        if step == 9:
            rows.append(request("c", [9], [[30], [31]], output=[11]))
        scheduled = plan(*(ScheduledRequest(r, r.num_tokens - 1, 1, 0, 1) for r in rows))
        got, expected = kept.build(scheduled), builder(num_groups=2).build(scheduled)
        for name in ("token_ids", "positions", "query_start", "seq_lens", "sample_rows"):
            assert getattr(got, name).tolist() == getattr(expected, name).tolist(), name
        for mine, other in zip(got.groups, expected.groups):
            assert mine.slot_mapping.tolist() == other.slot_mapping.tolist()
            held = other.block_tables > 0  # what a window has left stays in the table
            assert mine.block_tables[:, : held.shape[1]][held].tolist() == other.block_tables[held].tolist()
        assert (got.max_query_len, got.max_seq_len) == (expected.max_query_len, expected.max_seq_len)
        for r in rows:
            r.output_token_ids.append(20 + step)
            r.all_token_ids.append(20 + step)
    kept.release("b")
    rows.remove(b)
    made = kept.build(plan(*(ScheduledRequest(r, r.num_tokens - 1, 1, 0, 1) for r in rows)))
    assert made.token_ids.tolist() == [33, 33] and made.seq_lens.shape == (2,)
