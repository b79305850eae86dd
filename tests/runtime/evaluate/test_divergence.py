"""Teacher forcing through engines: perplexity, KL divergence and top-1 agreement against Transformers' logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from camshaft.runtime.bench.perplexity import perplexity
from camshaft.runtime.evaluate.divergence import compare_engines, divergence_rows, score_text
from camshaft.runtime.evaluate.teacher_forcing import forced_steps
from families import random_model, tiny_config

import camshaft
from camshaft import LLM

from ..fake_engine import FakeEngine

TEXT = np.random.default_rng(0).integers(0, 128, 150).tolist()


def build(model: Any, **options: Any) -> Any:
    limits = {"max_seq_len": 64, "max_batch_tokens": 48, "max_sequences": 4, "block_size": 8, "cache": False}
    return camshaft.compile(model, target="eager", device="cpu", **{**limits, **options})


@pytest.fixture(scope="module")
def models() -> list[Any]:
    made = [random_model(tiny_config("mistral")) for _ in range(2)]  # its window of 16 tokens lets blocks go
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made[1].parameters():
            parameter.add_(0.1 * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator))
    return made


def log_probs(model: Any, tokens: Sequence[int], context: int) -> torch.Tensor:
    """[N - 1, V] of every token but the first, window by window."""
    rows = []
    with torch.no_grad():
        for begin in range(0, len(tokens) - 1, context):
            window = torch.tensor([tokens[begin : min(begin + context, len(tokens) - 1)]])
            rows.append(model(window).logits[0].double().log_softmax(-1))
    return torch.cat(rows)


@pytest.mark.parametrize("context", [20, 60])  # several windows in a step; a window in several steps
def test_engines_are_compared_as_their_models_are(models: list[Any], context: int) -> None:
    found = compare_engines(build(models[0]), build(models[1]), TEXT, context=context)
    log_p, log_q = (log_probs(model, TEXT, context) for model in models)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).numpy()
    targets = torch.tensor(TEXT[1:])[:, None]
    nll_p, nll_q = (-x.gather(1, targets)[:, 0].numpy() for x in (log_p, log_q))
    assert found.score.num_tokens == 149 and kl.mean() > 1e-3
    assert found.reference.nats_per_token == pytest.approx(nll_p.mean(), rel=1e-5)  # float32 against float64
    assert found.score.nats_per_token == pytest.approx(nll_q.mean(), rel=1e-5)
    divergence = found.divergence
    assert divergence.kl_mean == pytest.approx(kl.mean(), rel=1e-3)
    assert divergence.kl_stderr == pytest.approx(kl.std(ddof=1) / math.sqrt(149), rel=1e-3)
    assert divergence.kl_median == pytest.approx(np.median(kl), rel=1e-3)
    assert divergence.kl_p99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-3)
    assert divergence.top1_agreement == pytest.approx(float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean()))
    assert divergence.perplexity_ratio == pytest.approx(math.exp((nll_q - nll_p).mean()), rel=1e-5)
    error = divergence.perplexity_ratio * (nll_q - nll_p).std(ddof=1) / math.sqrt(149)
    assert divergence.perplexity_ratio_stderr == pytest.approx(error, rel=1e-3)


def test_an_engine_is_not_apart_from_its_equal(models: list[Any]) -> None:
    found = compare_engines(build(models[0]), build(models[0]), TEXT, context=30)
    assert found.reference == found.score
    assert (
        found.divergence.kl_max == 0 and found.divergence.top1_agreement == 1 and found.divergence.perplexity_ratio == 1
    )


def test_the_serving_engine_gives_the_same_perplexity(models: list[Any]) -> None:
    engine = build(models[0])
    score = score_text(engine, TEXT, context=40)
    with LLM(engine, kv_cache_bytes=1 << 20) as llm:  # teacher forcing let it go
        served = perplexity(llm, TEXT, context=40)
        with pytest.raises(ValueError, match="the engine serves another LLM"):
            score_text(engine, TEXT, context=40)
    assert (score.num_tokens, score.nats_per_token) == (
        served.num_tokens,
        pytest.approx(served.nats_per_token, rel=1e-6),
    )
    assert score.perplexity == pytest.approx(math.exp(score.nats_per_token))


def test_every_token_is_a_target_once() -> None:
    engine = FakeEngine(vocab_size=31, max_batch_tokens=16, windows=(0, 6))
    text = [(7 * i) % 31 for i in range(60)]
    indices: list[int] = []
    for step in forced_steps([engine], text, context=9):
        assert step.logits[0].shape == (len(step.indices), 31)
        assert step.targets.tolist() == [text[i] for i in step.indices]
        indices += step.indices.tolist()
    assert sorted(indices) == list(range(1, 60)) and engine.caches == []


def test_masked_tokens_do_not_count() -> None:
    p, q = torch.tensor([[0.0, 1.0, -math.inf]]), torch.tensor([[1.0, 1.0, -math.inf]])
    kl, same = divergence_rows(p, q)
    first = 1 / (1 + math.e)
    assert kl[0].item() == pytest.approx(
        first * math.log(first / 0.5) + (1 - first) * math.log((1 - first) / 0.5), rel=1e-6
    )
    assert same.dtype == torch.bool


@pytest.mark.parametrize(
    ("tokens", "context", "message"),
    [
        ([], 8, "the text is empty"),
        ([1] * 8, 8, "the text has 8 tokens and context is 8; allowed: more tokens than the context"),
        ([1] * 500, 256, "context is 256 tokens; allowed: 1 to 255"),
        ([1] * 500, 0, "context is 0 tokens; allowed: 1 to 255"),
        ([1] * 20 + [101], 8, "reach from 1 to 101; allowed: 0 to 100"),
    ],
)
def test_texts_that_do_not_fit(tokens: list[int], context: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_text(FakeEngine(), tokens, context=context)


def test_engines_that_are_not_alike() -> None:
    with pytest.raises(ValueError, match="the engines' vocabularies are 101 and 50"):
        compare_engines(FakeEngine(), FakeEngine(vocab_size=50), [1] * 20, context=8)
    with pytest.raises(ValueError, match=r"windows of cache groups are \[0\] and \[4\]"):
        compare_engines(FakeEngine(), FakeEngine(windows=(4,)), [1] * 20, context=8)


def test_logits_without_numbers_are_an_error() -> None:
    class Broken(FakeEngine):
        def step(self, batch: Any) -> torch.Tensor:
            return super().step(batch).index_fill(0, torch.tensor([3]), math.nan)

    with pytest.raises(RuntimeError, match="token 4 of the text is not finite under engine 2 of 2"):
        compare_engines(FakeEngine(), Broken(), [1] * 20, context=8)
