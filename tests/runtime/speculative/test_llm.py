"""Speculation from end to end over the fake engine: the tokens of plain decoding, in every kind of load."""

from __future__ import annotations

import random

import numpy as np
import pytest
from camshaft.runtime import LLM, GenerationError, SamplingParams, SpeculativeConfig
from camshaft.runtime.trace import replay_file

from ..fake_engine import FakeEngine, context_hash, expected_tokens, logits_of
from ..small_tokenizers import byte_level, save
from .proposers import oracle
from .test_acceptance import chi_square

METHODS = {
    "ngram": lambda: SpeculativeConfig(method="ngram", adaptive=False, ngram_min=1),
    "draft": lambda: SpeculativeConfig(method="draft", model=FakeEngine(vocab_size=5), adaptive=False),
    "oracle": lambda: SpeculativeConfig(method="custom", proposer=oracle(0.7), adaptive=False),
    "on device": lambda: SpeculativeConfig(method="custom", proposer=oracle(0.7, on_device=True), adaptive=False),
    "adaptive": lambda: SpeculativeConfig(method="custom", proposer=oracle(0.7)),
}


@pytest.fixture
def on_device(monkeypatch):
    """Keeps drafts on the device although it is the CPU."""
    from camshaft.runtime.speculative.speculation import Speculation

    made = Speculation.__init__

    def keep(self, *args, **kwargs):
        made(self, *args, **kwargs)
        self._on_host = kwargs.get("drafts_on_host", False)

    monkeypatch.setattr(Speculation, "__init__", keep)


def run(engine, config, prompts, params, **kwargs):
    """(outputs, stats), after proof that nothing is left behind."""
    with LLM(engine, speculative=config, **kwargs) as llm:
        outputs = llm.generate(prompts, params, progress=False)
        while llm._core.has_work:
            pass
        llm._core.scheduler.check_integrity()
        assert all(group.used == 0 for group in llm.stats().scheduler.groups)
        assert not llm._core._samples and not llm._core.runner._states
        assert len(llm._core.runner._builder._free_rows) == engine.max_sequences
        if llm._core.speculation is not None:
            assert not llm._core.speculation._metrics
        return outputs, llm.stats()


def everything(vocab_size: int, seed: int = 0):
    """Prompts and parameters of all kinds, most of them greedy."""
    rng = random.Random(seed)
    head = [rng.randrange(vocab_size) for _ in range(11)]
    prompts, params = [], []
    for number in range(40):
        prompts.append((head if number % 3 else []) + [rng.randrange(vocab_size) for _ in range(rng.randrange(1, 20))])
        greedy = number % 4 < 2
        params.append(
            SamplingParams(
                n=1 + (number % 9 == 0),
                temperature=0.0 if greedy else 0.8,
                top_k=3 if number % 4 == 3 else 0,
                top_p=0.9 if number % 5 == 0 else 1.0,
                min_p=0.05 if number % 6 == 0 else 0.0,
                seed=number,
                max_tokens=rng.randrange(1, 40),
                min_tokens=1 if number % 7 == 0 else 0,
                stop_token_ids=[0] if number % 3 == 0 else [],
                repetition_penalty=1.3 if number % 5 == 1 else 1.0,
                frequency_penalty=0.3 if number % 5 == 2 else 0.0,
                presence_penalty=0.5 if number % 8 == 2 else 0.0,
                bad_token_ids=[[1, 2], [3]] if number % 10 == 3 else None,
                logit_bias={2: 1.5} if number % 11 == 3 else None,
                allowed_token_ids=[0, 1, 2, 4] if number % 13 == 4 else None,
                logprobs=2 if number % 6 == 1 else None,
                prompt_logprobs=1 if number % 12 == 5 else None,
                speculative=False if number % 14 == 3 else None,
            )
        )
    return prompts, params


@pytest.mark.parametrize("asynchronous", [False, True], ids=["in turns", "asynchronous"])
@pytest.mark.parametrize("method", METHODS)
def test_exact_acceptance_gives_the_tokens_of_plain_decoding(method, asynchronous, on_device):
    """Greedy and random rows, with penalties, bad words, masks, stops and log-probabilities, under preemption."""
    prompts, params = everything(5)
    kwargs = dict(
        kv_cache_bytes=11000 if method == "draft" else 6000,
        max_chunk_tokens=16,
        policy="max_utilization",
        async_scheduling=asynchronous,
    )
    plain, _ = run(FakeEngine(vocab_size=5, windows=(0, 7)), None, prompts, params, **kwargs)
    config = METHODS[method]()
    config = SpeculativeConfig(
        **{name: getattr(config, name) for name in ("method", "model", "proposer", "adaptive", "ngram_min")},
        acceptance="exact",
    )
    engine = FakeEngine(vocab_size=5, windows=(0, 7))
    found, stats = run(engine, config, prompts, params, **kwargs)
    for before, after in zip(plain, found):
        assert [s.token_ids for s in after.outputs] == [s.token_ids for s in before.outputs]
        assert [(s.finish_reason, s.stop_reason) for s in after.outputs] == [
            (s.finish_reason, s.stop_reason) for s in before.outputs
        ]
        assert after.logprobs == before.logprobs and after.prompt_logprobs == before.prompt_logprobs
        assert after.outputs[0].cumulative_logprob == pytest.approx(before.outputs[0].cumulative_logprob)
    assert stats.scheduler.preemptions > 0 and stats.speculative.num_verifications > 20
    assert sum(stats.speculative.accepted) > 0 or method == "adaptive"
    total = sum(len(s.token_ids) for o in found for s in o.outputs if o.metrics.speculative is not None)
    assert stats.speculative.num_tokens == total


@pytest.mark.parametrize("acceptance", ["rejection", "typical"])
@pytest.mark.parametrize("method", METHODS)
def test_greedy_requests_get_plain_tokens_beside_random_ones(method, acceptance, on_device):
    prompts, params = everything(5, seed=1)
    config = METHODS[method]()
    fields = {name: getattr(config, name) for name in ("method", "model", "proposer", "adaptive", "ngram_min")}
    plain, _ = run(FakeEngine(vocab_size=5), None, prompts, params)
    found, _ = run(FakeEngine(vocab_size=5), SpeculativeConfig(**fields, acceptance=acceptance), prompts, params)
    for before, after, p in zip(plain, found, params):
        if p.temperature == 0:
            assert [s.token_ids for s in after.outputs] == [s.token_ids for s in before.outputs]
            assert after.logprobs == before.logprobs
        if p.allowed_token_ids:
            assert set(after.token_ids) <= set(p.allowed_token_ids)
        if p.bad_token_ids:
            assert 3 not in after.token_ids and (1, 2) not in zip(after.token_ids, after.token_ids[1:])


def test_a_perfect_draft_model_is_always_accepted():
    target = FakeEngine()
    config = SpeculativeConfig(method="draft", model=FakeEngine(), adaptive=False, num_draft_tokens=3)
    prompts = [[1, 2, i] * 9 for i in range(6)]
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    with LLM(target, speculative=config) as llm:
        for _ in range(2):  # the second time the prompts are in the prefix cache, and in the draft model's blocks
            outputs = llm.generate(prompts, params, progress=False)
            for prompt, output in zip(prompts, outputs):
                assert output.token_ids == expected_tokens(prompt, 20, 101)
                metrics = output.metrics.speculative
                assert metrics.acceptance_per_position == [1.0, 1.0, 1.0] and metrics.mean_accepted_length > 3
                assert metrics.num_tokens == 20 and metrics.tokens_per_step == 20 / 6  # 1, 4 x 4, and 3
        assert outputs[0].metrics.num_cached_tokens > 0
        computed = llm.draft_engine.num_steps
        assert llm.memory.draft_bytes == 1000 and ("draft model", 1000) in llm.memory.rows()
        assert llm.stats().times.propose_s > 0 and computed > 0
    for engine in (target, config.model):
        assert engine.serving_claim is None and not engine.caches


def test_the_draft_model_shares_the_memory_of_the_cache():
    with LLM(FakeEngine(), kv_cache_bytes=64 * 100) as llm:
        assert llm.stats().scheduler.groups[0].total == 100
    config = SpeculativeConfig(method="draft", model=FakeEngine())
    with LLM(FakeEngine(), kv_cache_bytes=64 * 100, speculative=config) as llm:
        assert llm.stats().scheduler.groups[0].total == 50 and llm.memory.kv_bytes == 64 * 100
        assert len(llm.draft_engine.caches[0]) == 50 * 4


def test_stop_strings_inside_drafts(tmp_path):
    path = save(byte_level(), tmp_path)
    prompt, greedy = "abc", SamplingParams(temperature=0, max_tokens=40)
    engine = FakeEngine(vocab_size=340, tokenizer_path=path)
    with LLM(engine) as llm:
        full = llm.generate(prompt, greedy)[0].text
    stop = full[10:13]
    config = SpeculativeConfig(method="custom", proposer=oracle(0.9), adaptive=False, num_draft_tokens=8)
    with LLM(engine, speculative=config) as llm:
        params = SamplingParams(temperature=0, max_tokens=40, stop=[stop], logprobs=0)
        output = llm.generate(prompt, params)[0]
        assert output.text == full[: full.index(stop)] and output.stop_reason == stop
        assert len(output.logprobs) == len(output.token_ids)
        streamed = list(llm.generate_async(prompt, params))
        assert "".join(part.text for part in streamed) == output.text
        assert [t for part in streamed for t in part.token_ids] == output.token_ids
        assert len({len(part.token_ids) for part in streamed}) > 1, "several tokens at once"


def test_stop_tokens_lengths_and_minimum_inside_drafts():
    prompt = [5, 6, 7]
    full = expected_tokens(prompt, 30, 101)
    config = SpeculativeConfig(method="custom", proposer=oracle(1.0), adaptive=False, num_draft_tokens=8)
    with LLM(FakeEngine(), speculative=config) as llm:
        for count in range(1, 12):
            output = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=count))[0]
            assert output.token_ids == full[:count] and output.finish_reason == "length"
        stop = full[6]
        first = full.index(stop) + 1
        output = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=30, stop_token_ids=[stop]))[0]
        assert output.token_ids == full[:first] and (output.finish_reason, output.stop_reason) == ("stop", stop)
        params = SamplingParams(temperature=0, max_tokens=30, stop_token_ids=[stop], min_tokens=first)
        plain_like = llm.generate(prompt, params)[0].token_ids
    with LLM(FakeEngine()) as llm:
        assert plain_like == llm.generate(prompt, params)[0].token_ids


def test_small_budgets_and_chunks():
    prompts = [[i, 3, 4] * 10 for i in range(12)]
    params = SamplingParams(temperature=0, max_tokens=25)
    for budget in (11, 16):
        engine = FakeEngine(max_batch_tokens=budget, max_sequences=8)
        config = SpeculativeConfig(method="custom", proposer=oracle(0.8), adaptive=False, num_draft_tokens=3)
        outputs, _ = run(engine, config, prompts, params, max_chunk_tokens=7)
        assert [o.token_ids for o in outputs] == [expected_tokens(p, 25, 101) for p in prompts]


def test_a_trace_replays(tmp_path):
    config = SpeculativeConfig(method="draft", model=FakeEngine(vocab_size=5), adaptive=False)
    prompts, params = everything(5)
    with LLM(FakeEngine(vocab_size=5), speculative=config, trace=tmp_path / "trace.jsonl") as llm:
        outputs = llm.generate(prompts, params, progress=False)
    replayed = replay_file(tmp_path / "trace.jsonl")
    assert sorted(map(tuple, replayed.outputs.values())) == sorted(
        tuple(s.token_ids) for o in outputs for s in o.outputs
    )


class Broken:
    hidden_layers = ()

    def __init__(self, drafts):
        self.drafts = drafts

    def add(self, request, state):
        pass

    def release(self, request_id):
        pass

    def observe(self, verified):
        pass

    def propose(self, targets):
        return self.drafts(targets)


def test_proposers_that_break_fail_the_requests_and_not_the_llm():
    from camshaft.runtime.speculative import Drafts

    def explode(targets):
        raise ArithmeticError("no drafts today")

    for drafts, message in [
        (explode, "drafting raised ArithmeticError: no drafts today"),
        (lambda t: Drafts([], []), "gave drafts for 0 requests; allowed: 1, one each"),
        (lambda t: Drafts([9], [[1] * 9]), "gave 9 drafts for request .* at most 4"),
        (lambda t: Drafts([1], [[101]]), r"gave the drafts \[101\] .* from 0 to 100"),
    ]:
        config = SpeculativeConfig(method="custom", proposer=lambda c, d=drafts: Broken(d), adaptive=False)
        with LLM(FakeEngine(), speculative=config) as llm:
            with pytest.raises(GenerationError, match=message):
                llm.generate([1, 2], SamplingParams(temperature=0, max_tokens=8))
            plain = SamplingParams(temperature=0, max_tokens=8, speculative=False)
            assert llm.generate([1, 2], plain)[0].token_ids == expected_tokens([1, 2], 8, 101)
            llm._core.scheduler.check_integrity()


def distribution_of_pairs(prompt, vocab_size, temperature):
    """[V * V] probability of the second and third token after a prompt, the first being greedy's."""

    def p(tokens):
        x = logits_of(context_hash(tokens), vocab_size).astype(np.float64) / temperature
        e = np.exp(x - x.max())
        return e / e.sum()

    total = np.zeros((vocab_size,) * 3)
    for a in range(vocab_size):
        for b in range(vocab_size):
            total[a, b] = p(prompt)[a] * p([*prompt, a])[b] * p([*prompt, a, b])
    return total.ravel()


def draws(config, num_samples, vocab_size, temperature):
    """Counts of the first three tokens."""
    engine = FakeEngine(vocab_size=vocab_size, max_sequences=64, max_batch_tokens=640, max_seq_len=16)
    params = SamplingParams(n=num_samples // 20, temperature=temperature, max_tokens=4, ignore_eos=True)
    counts = np.zeros(vocab_size**3)
    with LLM(engine, speculative=config, seed=3) as llm:
        for output in llm.generate([[1, 2, 3]] * 20, params, progress=False):
            for sample in output.outputs:
                a, b, c, _ = sample.token_ids
                counts[(a * vocab_size + b) * vocab_size + c] += 1
        return counts, llm.stats().speculative


class NoisyEngine(FakeEngine):
    """Agrees with the fake engine about the order of the logits and not about their values."""

    def step(self, batch):
        return super().step(batch) * 0.6 + 0.5


@pytest.mark.long
@pytest.mark.parametrize("method", ["ngram", "draft", "draft, exact", "oracle"])
def test_samples_have_the_target_distribution(method):
    """20,000 samples of three tokens each, end to end; chi-square cannot tell them from plain sampling."""
    check_samples(method, 20_000)


@pytest.mark.parametrize("method", ["draft"])
def test_fewer_samples_have_the_target_distribution(method):
    check_samples(method, 3_000)


def check_samples(method: str, num_samples: int) -> None:
    vocab_size, temperature = 4, 4.0
    fields = dict(adaptive=False, num_draft_tokens=2)
    if method == "ngram":
        config = SpeculativeConfig(method="ngram", ngram_min=1, **fields)
    elif method == "oracle":
        config = SpeculativeConfig(method="custom", proposer=oracle(0.8), **fields)
    else:
        draft = NoisyEngine(vocab_size=vocab_size, max_sequences=64, max_batch_tokens=640, max_seq_len=16)
        acceptance = "exact" if "exact" in method else "rejection"
        config = SpeculativeConfig(method="draft", model=draft, acceptance=acceptance, **fields)
    counts, metrics = draws(config, num_samples, vocab_size, temperature)
    assert counts.sum() == num_samples and sum(metrics.accepted) > num_samples / 20
    statistic, bound = chi_square(counts, distribution_of_pairs([1, 2, 3], vocab_size, temperature))
    assert statistic < bound
