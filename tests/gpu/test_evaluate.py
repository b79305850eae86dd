"""Evaluation on a GPU: teacher forcing and log-likelihoods agree with the CPU's in float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from camshaft.runtime.evaluate.divergence import compare_engines, score_text
from camshaft.runtime.evaluate.likelihood import TokenPair, likelihoods
from families import random_model, tiny_config

import camshaft
from camshaft import LLM

TEXT = np.random.default_rng(0).integers(0, 128, 300).tolist()
CONTEXT = tuple(TEXT[:40])


def build(device: str, **options: Any) -> Any:
    model = random_model(tiny_config("llama"))
    limits = {"max_seq_len": 128, "max_batch_tokens": 128, "max_sequences": 8, "cache": False}
    return camshaft.compile(model, device=device, **{**limits, **options})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("target", ["eager", "inductor"])
def test_text_and_continuations(target: str) -> None:
    on_cpu = build("cpu", target="eager", dtype="float32")
    engines = [build("cuda", target=target, dtype="bfloat16") for _ in range(2)]
    expected = score_text(on_cpu, TEXT, context=100)
    found = compare_engines(*engines, TEXT, context=100)
    assert found.score.num_tokens == 299
    assert found.score.nats_per_token == pytest.approx(expected.nats_per_token, rel=0.01)  # bfloat16 has 8 bits
    assert found.divergence.kl_max < 1e-6 and found.divergence.top1_agreement == 1
    pairs = [TokenPair(CONTEXT, tuple(TEXT[begin : begin + 3])) for begin in (40, 50, 60)]
    with LLM(engines[0], kv_cache_bytes=1 << 20) as llm, LLM(on_cpu, kv_cache_bytes=1 << 20) as reference:
        ours, theirs = likelihoods(llm, pairs), likelihoods(reference, pairs)
        assert llm.stats().scheduler.prefix_hit_tokens >= 2 * 32
    for one, two in zip(ours, theirs, strict=True):
        assert one.logprob == pytest.approx(two.logprob, rel=0.03, abs=0.1)  # bfloat16
