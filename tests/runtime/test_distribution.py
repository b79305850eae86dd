"""The sampler's arithmetic: against plain definitions, and bit for bit the same whatever rows stand beside a row."""

import math

import numpy as np
import pytest
import torch
from camshaft.runtime.distribution import (
    cut_threshold,
    draw_tokens,
    fixed_point_weights,
    invert_cumulative,
    token_logprobs,
    weight_bits,
)
from camshaft.runtime.logits import SamplingState
from camshaft.runtime.sampler import PREFIX, Sampler
from camshaft.runtime.sampling_params import SamplingParams

ROWS = (1, 2, 7, 64, 300)


def random_logits(num_rows: int, vocab_size: int) -> torch.Tensor:
    """Rounded to bfloat16, as models give them, so that many are equal; steep rows and flat ones."""
    generator = torch.Generator().manual_seed(7)
    scale = torch.linspace(0.02, 9, num_rows)[torch.randperm(num_rows, generator=generator), None]
    return (torch.randn(num_rows, vocab_size, generator=generator) * scale).bfloat16().float()


def some_state(row: int) -> SamplingState:
    choices = [
        dict(), dict(top_p=0.9), dict(top_k=40), dict(temperature=0.7, top_p=0.5, min_p=0.01), dict(temperature=0),
        dict(top_k=1500, top_p=0.8), dict(min_p=0.2), dict(top_p=0.97, temperature=1.3),
    ]  # fmt: skip
    return SamplingState(SamplingParams(logprobs=3, **choices[row % len(choices)]), [1], [], row)


def equal_bits(first: np.ndarray, second: np.ndarray) -> bool:
    return first.shape == second.shape and first.tobytes() == second.tobytes()


@pytest.mark.parametrize("vocab_size", [130, 2999])
def test_rows_do_not_depend_on_their_number(vocab_size, monkeypatch):
    monkeypatch.setattr("camshaft.runtime.distribution._CHUNK_ELEMENTS", 100 * vocab_size)
    logits, states = random_logits(max(ROWS), vocab_size), [some_state(row) for row in range(max(ROWS))]
    whole = Sampler(vocab_size, "cpu").sample(logits.clone(), states)
    for num_rows in ROWS:
        for first in {0, 3, max(ROWS) - num_rows}:
            part = slice(first, first + num_rows)
            if first + num_rows > max(ROWS):
                continue
            output = Sampler(vocab_size, "cpu").sample(logits[part].clone(), states[part])
            assert output.tokens.tolist() == whole.tokens[part].tolist()
            for name in ("top_ids", "top_logprobs", "logprobs", "ranks"):
                assert equal_bits(getattr(output.logprobs, name), getattr(whole.logprobs, name)[part]), (num_rows, name)


def test_log_probabilities_are_those_of_double_precision():
    logits = random_logits(40, 5003)
    tokens = torch.randint(0, 5003, (40,), generator=torch.Generator().manual_seed(1))
    ids, tops, chosen, ranks = token_logprobs(logits, tokens, 6)
    expected = logits.double().log_softmax(-1)
    of_tokens = expected.gather(1, tokens[:, None])[:, 0]
    assert (chosen - of_tokens).abs().max() < 1e-5 and (tops - expected.gather(1, ids)).abs().max() < 1e-5
    assert ranks.tolist() == ((expected > of_tokens[:, None]).sum(-1) + 1).tolist()
    order = np.lexsort(
        (np.tile(np.arange(5003), (40, 1)), -logits.numpy())
    )  # by logit, the lower id first among equals
    assert ids.tolist() == order[:, :6].tolist()
    assert [part.dtype for part in (ids, tops, chosen, ranks)] == [
        torch.int64,
        torch.float32,
        torch.float32,
        torch.int64,
    ]


def test_equal_logits_signs_and_few_tokens():
    logits = torch.tensor([[-0.0, 0.0, -1.0, 0.0], [-5.0, -2.0, -2.0, -3.0]])
    ids, _, _, _ = token_logprobs(logits, torch.tensor([0, 1]), 9)
    assert ids.tolist() == [[0, 1, 3, 2], [1, 2, 3, 0]]
    assert token_logprobs(logits.bfloat16(), torch.tensor([0, 1]), 0)[0].shape == (2, 0)


def test_undefined_rows_have_nan_log_probabilities_and_no_token():
    logits = torch.zeros(4, 300)
    logits[0, 5], logits[1, 5], logits[2] = math.nan, math.inf, -math.inf
    assert token_logprobs(logits, torch.zeros(4, dtype=torch.int64), 2)[2].isnan().tolist() == [True] * 3 + [False]
    assert draw_tokens(logits, torch.full((4,), 0.5, dtype=torch.float64)).tolist() == [-1, -1, -1, 150]


def test_weights_fill_the_range_without_overflow():
    for vocab_size in (2, 257, 128_256, 262_144):
        bits = weight_bits(vocab_size)
        weights = fixed_point_weights(torch.zeros(1, vocab_size), torch.zeros(1, 1), bits)
        assert int(weights.sum()) == vocab_size << bits and 2**61 <= vocab_size << bits <= 2**62


def test_inversion_is_exact_at_the_edges():
    weights = torch.zeros(3, 700, dtype=torch.int64)
    weights[0, 699] = 1
    weights[1, [0, 300]] = 1 << 61
    weights[2, [5, 6]] = torch.tensor([1, (1 << 62) - 1])
    for uniform, expected in ((0.0, [699, 0, 5]), (0.5, [699, 300, 6]), (1 - 2.0**-40, [699, 300, 6])):
        assert invert_cumulative(weights, torch.full((3,), uniform, dtype=torch.float64)).tolist() == expected
    assert invert_cumulative(torch.zeros(1, 700, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)).tolist() == [
        -1
    ]


@pytest.mark.parametrize("with_low", [False, True])
def test_the_prefix_gives_the_threshold_of_a_full_sort(with_low):
    """Of rows that it covers, and of those that are sorted after all."""
    vocab_size = 2 * PREFIX
    x = random_logits(60, vocab_size)
    low = x.amax(-1, keepdim=True) - 3 if with_low else None
    k = torch.full((60, 1), vocab_size)
    k[::5] = 50
    p = torch.linspace(0.05, 0.999, 60, dtype=torch.float64)[torch.randperm(60), None]
    k[::7], p[::7] = 20, math.inf
    full = cut_threshold(x, low, k, p, vocab_size, True)
    assert torch.equal(cut_threshold(x, low, k, p, PREFIX, True), full)
    assert torch.equal(torch.cat([cut_threshold(x[i:i + 1], None if low is None else low[i:i + 1], k[i:i + 1],
                                                p[i:i + 1], PREFIX, True) for i in range(60)]), full)  # fmt: skip
