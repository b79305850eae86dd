"""The sampler against a slow reference of one row at a time, and its promises about seeds and batches."""

import math

import numpy as np
import pytest
import torch
from camshaft.runtime.distribution import greedy_tokens, token_logprobs
from camshaft.runtime.logits import SamplingState
from camshaft.runtime.sampler import PREFIX, Sampler, TokenLogprobs, counter_uniform, derive_seed
from camshaft.runtime.sampling_params import SamplingParams


def state(prompt=(1, 2, 3), output=(), seed=0, stop_ids=(), **params):
    made = SamplingParams(**params)
    return SamplingState(made, list(prompt), list(output), seed, tuple(stop_ids), tuple(made.bad_token_ids or ()))


def reference_support(logits, p: SamplingParams, prompt, output):
    """Distribution of one row, written down step by step."""
    x = logits.double().clone()
    for token in set(prompt) | set(output):
        if p.repetition_penalty != 1:
            x[token] = x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
    for token in set(output):
        x[token] -= p.frequency_penalty * list(output).count(token) + p.presence_penalty
    for token, bias in (p.logit_bias or {}).items():
        x[token] += bias
    x = x / p.temperature
    probs = x.softmax(-1)
    probs[probs < p.min_p * probs.max()] = 0
    if p.top_k:
        probs[probs < probs.sort(descending=True).values[p.top_k - 1]] = 0
    probs /= probs.sum()
    order = probs.argsort(descending=True)
    before = probs[order].cumsum(0) - probs[order]
    probs[order[before >= p.top_p]] = 0 if p.top_p < 1 else probs[order[before >= p.top_p]]
    return probs / probs.sum()


PARAMS = [
    dict(),
    dict(temperature=0.3),
    dict(top_k=5),
    dict(top_p=0.7),
    dict(min_p=0.1),
    dict(temperature=1.7, top_k=20, top_p=0.9, min_p=0.02),
    dict(repetition_penalty=1.4, top_p=0.95),
    dict(presence_penalty=0.9, frequency_penalty=0.4),
    dict(logit_bias={3: 4.0, 9: -5.0}, top_k=8),
]


@pytest.mark.parametrize("vocab_size", [50, 256, 1000])
def test_distribution_matches_the_reference(vocab_size, monkeypatch):
    """Rows that draw at evenly spaced numbers hit each token as often as its probability says, to one draw."""
    logits = torch.randn(len(PARAMS), vocab_size, generator=torch.Generator().manual_seed(0)) * 2
    prompt, output = [1, 2, 3], [4, 4, 9]
    num_draws = 500
    monkeypatch.setattr("camshaft.runtime.sampler.counter_uniform", lambda seeds, steps: (seeds + 0.5) / num_draws)
    rows = [state(prompt, output, seed=draw, **p) for p in PARAMS for draw in range(num_draws)]
    tokens = Sampler(vocab_size, "cpu").sample(logits.repeat_interleave(num_draws, 0), rows).tokens
    for n, p in enumerate(PARAMS):
        expected = reference_support(logits[n], SamplingParams(**p), prompt, output)
        counts = torch.from_numpy(tokens[n * num_draws : (n + 1) * num_draws]).bincount(minlength=vocab_size)
        assert ((counts - expected * num_draws).abs() < 1.01).all(), p
        assert (counts[expected == 0] == 0).all(), p


def test_results_do_not_depend_on_the_batch():
    torch.manual_seed(1)
    logits = torch.randn(32, 3000)
    choices = [dict(top_p=0.9), dict(top_k=50), dict(), dict(temperature=0), dict(min_p=0.05, top_p=0.5)]
    rows = [state(seed=n, **choices[n % len(choices)]) for n in range(32)]
    together = Sampler(3000, "cpu").sample(logits.clone(), rows).tokens
    alone = [int(Sampler(3000, "cpu").sample(logits[n : n + 1].clone(), [rows[n]]).tokens[0]) for n in range(32)]
    assert together.tolist() == alone
    order = torch.randperm(32).tolist()
    shuffled = Sampler(3000, "cpu").sample(logits[order].clone(), [rows[n] for n in order]).tokens
    assert shuffled.tolist() == [together[n] for n in order]


def test_seeds_and_steps_change_the_draw():
    uniform = counter_uniform(np.arange(10000, dtype=np.uint64), np.zeros(10000, dtype=np.uint64))
    steps = counter_uniform(np.full(10000, 7, dtype=np.uint64), np.arange(10000, dtype=np.uint64))
    for sample in (uniform, steps):
        assert sample.min() >= 0 and sample.max() < 1
        assert abs(sample.mean() - 0.5) < 0.02 and len(set(sample.tolist())) == 10000
        assert abs(np.corrcoef(sample[:-1], sample[1:])[0, 1]) < 0.05
    assert len({derive_seed(0, n) for n in range(1000)}) == 1000


def test_top_p_beyond_the_prefix_sorts_only_when_it_must():
    vocab_size = 4 * PREFIX
    flat = torch.linspace(0.1, 0, vocab_size)[torch.randperm(vocab_size, generator=torch.manual_seed(3))]
    logits = torch.stack([flat, flat * 500])
    rows = [state(top_p=0.9), state(top_p=0.9)]
    seen = [set(), set()]
    sampler = Sampler(vocab_size, "cpu")
    for seed in range(300):
        for row in rows:
            row.seed = seed
        sampler._plan = None
        for n, token in enumerate(sampler.sample(logits.clone(), rows).tokens):
            seen[n].add(int(token))
    for n in range(2):
        expected = reference_support(logits[n], rows[n].params, [], [])
        assert all(expected[token] > 0 for token in seen[n])
    assert max(flat.argsort(descending=True).argsort()[list(seen[0])]) > PREFIX and len(seen[1]) < 200


def test_which_rows_make_the_host_wait():
    large, small = Sampler(2 * PREFIX, "cpu"), Sampler(PREFIX, "cpu")
    waiting = [dict(top_p=0.9), dict(top_p=0.9, top_k=2 * PREFIX), dict(top_p=0.5, min_p=0.1)]
    others = [dict(), dict(top_k=5), dict(top_p=0.9, top_k=5), dict(top_p=0.9, temperature=0), dict(min_p=0.1)]
    assert all(large.reads_device(state(**p)) and not small.reads_device(state(**p)) for p in waiting)
    assert not any(large.reads_device(state(**p)) for p in others)


def test_greedy_fast_path_and_mixed_rows():
    logits = torch.zeros(2, 10)
    logits[0, [3, 7]] = 2.0
    logits[1, 5] = 9.0
    assert greedy_tokens(logits).tolist() == greedy_tokens(logits.bfloat16()).tolist() == [3, 5]
    rows = [state(temperature=0), state(top_k=1)]
    assert Sampler(10, "cpu").sample(logits.clone(), rows).tokens.tolist() == [3, 5]
    rows = [state(temperature=0), state(temperature=0.01)]
    assert Sampler(10, "cpu").sample(logits.clone(), rows).tokens.tolist() == [3, 5]


def test_penalties_count_incrementally_and_slots_are_reused():
    sampler = Sampler(6, "cpu")
    logits = torch.tensor([[0.0, 0.0, 1.0, 0.9, 0.0, 0.0]])
    row = state(prompt=[0], output=[], temperature=0, frequency_penalty=0.06)
    tokens = []
    for _ in range(5):
        token = int(sampler.sample(logits.clone(), [row]).tokens[0])
        tokens.append(token)
        row.output_token_ids.append(token)
    assert tokens == [2, 2, 3, 2, 3]
    sampler.release(row)
    assert sampler.penalties.num_slots_in_use == 0
    again = state(prompt=[0], temperature=0, frequency_penalty=0.06)
    assert sampler.sample(logits.clone(), [again]).tokens.tolist() == [2]
    many = [state(prompt=[n], temperature=0, repetition_penalty=3.0) for n in range(6)]
    logits = torch.tensor([[1.0, 0.9, 0.8, 0.7, 0.6, 0.5]]).repeat(6, 1)
    assert sampler.sample(logits.clone(), many).tokens.tolist() == [1, 0, 0, 0, 0, 0]
    assert sampler.penalties.num_slots_in_use == 7


def test_token_rules():
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]])
    sampler = Sampler(5, "cpu")

    def pick(**kwargs):
        return int(sampler.sample(logits.clone(), [state(temperature=0, **kwargs)]).tokens[0])

    assert pick(allowed_token_ids=[3, 4]) == 3
    assert pick(bad_token_ids=[[0]]) == 1
    assert pick(bad_token_ids=[[2, 0]], output=[1, 2]) == 1
    assert pick(bad_token_ids=[[2, 0]], output=[2, 1]) == 0
    assert pick(bad_token_ids=[[1, 2, 0]], output=[2]) == 0
    assert pick(min_tokens=2, stop_ids=[0, 1], output=[4]) == 2
    assert pick(min_tokens=2, stop_ids=[0, 1], output=[4, 4]) == 0
    assert pick(logit_bias={4: 10.0}) == 4
    assert pick(allowed_token_ids=[0], bad_token_ids=[[0]]) == -1


def test_nan_rows_are_reported_and_do_not_disturb_others():
    logits = torch.zeros(4, 300)
    logits[0] = math.nan
    logits[2, 7] = math.nan
    logits[3, 9] = 50.0
    rows = [state(temperature=0), state(temperature=0), state(), state(top_p=0.5, top_k=4)]
    assert Sampler(300, "cpu").sample(logits, rows).tokens.tolist() == [-1, 0, -1, 9]


def test_logprobs_are_raw_and_ranked():
    torch.manual_seed(2)
    logits = torch.randn(3, 40)
    rows = [
        state(temperature=0),
        state(temperature=0.7, logprobs=3, frequency_penalty=2.0, output=[1]),
        state(temperature=0, logprobs=0),
    ]
    output = Sampler(40, "cpu").sample(logits.clone(), rows)
    assert output.logprob_index == {1: 0, 2: 1}
    for row, n in output.logprob_index.items():
        expected = logits[row].log_softmax(-1)
        token = int(output.tokens[row])
        assert output.logprobs.logprobs[n] == pytest.approx(float(expected[token]), abs=1e-5)
        assert output.logprobs.ranks[n] == int((expected > expected[token]).sum()) + 1
        assert output.logprobs.top_ids[n].tolist() == expected.topk(3).indices.tolist()
        assert np.allclose(output.logprobs.top_logprobs[n], expected.topk(3).values, atol=1e-5)
    prompt = TokenLogprobs(*(part.numpy() for part in token_logprobs(logits, torch.tensor([3, 4, 5]), 2)))
    assert prompt.logprobs[1] == pytest.approx(float(logits[1].log_softmax(-1)[4]), abs=1e-5)


def test_wrong_shape_is_an_error():
    with pytest.raises(ValueError, match=r"shape \(2, 5\)"):
        Sampler(5, "cpu").sample(torch.zeros(2, 5), [state()])
