"""A long, random, reproducible load on a real engine: nothing leaks and every finished request has the right tokens."""

from __future__ import annotations

import random
import time

import pytest
from families import random_model, tiny_config

import camshaft
from camshaft import SamplingParams


@pytest.mark.parametrize("asynchronous", [False, True], ids=["in turns", "asynchronous"])
def test_two_thousand_requests_with_aborts_leave_no_block_in_use(asynchronous: bool) -> None:
    model = random_model(tiny_config("mistral"))
    engine = camshaft.compile(
        model, target="eager", device="cpu", max_seq_len=64, max_batch_tokens=256, max_sequences=48, block_size=4
    )
    rng = random.Random(0)
    heads = [[rng.randrange(3, 128) for _ in range(12)] for _ in range(6)]
    cache_bytes = sum(group.bytes_per_block for group in engine.cache_groups) * 110
    with camshaft.LLM(
        engine, kv_cache_bytes=cache_bytes, policy="max_utilization", async_scheduling=asynchronous
    ) as llm:
        handles = []
        for _ in range(2000):
            tail = [rng.randrange(3, 128) for _ in range(rng.randrange(1, 10))]
            prompt = (rng.choice(heads) if rng.random() < 0.5 else []) + tail
            params = SamplingParams(
                temperature=rng.choice((0.0, 1.0)),
                max_tokens=rng.randrange(1, 12),
                seed=rng.randrange(1 << 30),
                ignore_eos=True,
            )
            handles.append((prompt, params, llm.generate_async(prompt, params)))
            if rng.random() < 0.1:
                handles[rng.randrange(len(handles))][2].abort()
        results = [handle.result(timeout_s=300) for _, _, handle in handles]
        while llm._core.has_work:
            time.sleep(0.001)  # a step whose requests were all aborted may be in flight
        stats = llm.stats().scheduler
        llm._core.scheduler.check_integrity()
    assert stats.running == stats.waiting == 0
    assert all(group.used == 0 for group in stats.groups)
    assert stats.preemptions > 0 and stats.prefix_hit_tokens > 0
    finished = [(p, s, r) for (p, s, _), r in zip(handles, results) if r.finish_reason == "length"]
    assert len(finished) > 1500
    assert sum(r.finish_reason == "abort" for r in results) > 20
    alone = [(p, s, r) for p, s, r in finished if s.temperature == 0][:20]
    with camshaft.LLM(engine, enable_prefix_cache=False) as llm:
        for prompt, params, result in alone:
            assert llm.generate([prompt], params)[0].token_ids == result.token_ids
