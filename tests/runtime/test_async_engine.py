"""Asynchronous scheduling on real engines on the CPU: the same tokens as in turns."""

from __future__ import annotations

import random

import pytest
from families import random_model, tiny_config

import camshaft
from camshaft import SamplingParams


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # full attention; full and window groups
def test_tokens_are_those_of_strict_turns(family: str) -> None:
    model = random_model(tiny_config(family))
    engine = camshaft.compile(
        model, target="eager", device="cpu", max_seq_len=96, max_batch_tokens=48, max_sequences=8, block_size=4
    )
    rng = random.Random(1)
    head = [rng.randrange(3, 128) for _ in range(20)]
    prompts, params = [], []
    for number in range(30):
        tail = [rng.randrange(3, 128) for _ in range(rng.randrange(1, 30))]
        prompts.append((head if number % 3 == 0 else []) + tail)
        params.append(
            SamplingParams(
                n=1 + number % 2,
                temperature=(0.0, 0.9)[number % 4 > 1],
                top_k=(0, 20)[number % 5 == 0],
                seed=number,
                max_tokens=rng.randrange(8, 40),
                stop_token_ids=[rng.randrange(3, 128) for _ in range(5)],
                repetition_penalty=1.2 if number % 10 == 9 else 1.0,
                logprobs=1 if number % 7 == 0 else None,
            )
        )
    cache_bytes = sum(group.bytes_per_block for group in engine.cache_groups) * 32
    runs = []
    for asynchronous in (False, True):
        with camshaft.LLM(
            engine, kv_cache_bytes=cache_bytes, policy="max_utilization", async_scheduling=asynchronous
        ) as llm:
            outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, progress=False)
            times, stats = llm.stats().times, llm.stats().scheduler
            assert (times.ahead > 0) == asynchronous
            assert stats.preemptions > 0 and stats.prefix_hit_tokens > 0
        runs.append([(o.token_ids, o.finish_reason, o.stop_reason) for output in outputs for o in output.outputs])
    assert runs[0] == runs[1]
    assert {reason for _, reason, _ in runs[0]} == {"stop", "length"}
