"""Acceptance: tokens distributed as the target says, whatever the drafts; chains and trees followed to the right place."""

import math

import numpy as np
import pytest
import torch
from camshaft.runtime.speculative.acceptance import (
    expected_accepted,
    follow_chains,
    follow_trees,
    rejection_tokens,
    typical_tokens,
)

NUM_SAMPLES = 20_000


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> tuple[float, float]:
    """(statistic, bound that it exceeds once in a hundred thousand times); tokens expected less than five times are joined."""
    expected = probabilities * counts.sum()
    assert counts[probabilities == 0].sum() == 0, "a token that cannot be drawn was"
    large = expected >= 5
    observed = np.append(counts[large], counts[~large].sum())
    expected = np.append(expected[large], expected[~large].sum())
    keep = expected > 0
    statistic = float((((observed - expected) ** 2)[keep] / expected[keep]).sum())
    freedom = keep.sum() - 1
    return statistic, freedom * (1 - 2 / (9 * freedom) + 4.265 * math.sqrt(2 / (9 * freedom))) ** 3  # Wilson, Hilferty


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("distance", [0.0, 0.5, 3.0])
def test_rejection_sampling_draws_from_the_target(distance):
    """Drafts from q, accepted or replaced, are distributed as p; the more alike q and p, the more are accepted."""
    vocab_size = 40
    x = torch.randn(vocab_size, generator=generator(1)) * 2
    q = x + distance * torch.randn(vocab_size, generator=generator(2))
    x[[3, 9]] = q[[5, 9]] = float("-inf")
    drafts = torch.multinomial(q.softmax(-1), NUM_SAMPLES, replacement=True, generator=generator(3))
    accept, draw = torch.rand(2, NUM_SAMPLES, generator=generator(4), dtype=torch.float64)
    rows = x.expand(NUM_SAMPLES, -1), q.expand(NUM_SAMPLES, -1)
    tokens = rejection_tokens(*rows, drafts, accept, draw)
    p = x.double().softmax(-1)
    statistic, bound = chi_square(np.bincount(tokens, minlength=vocab_size), p.numpy())
    assert statistic < bound
    overlap = torch.minimum(p, q.double().softmax(-1)).sum()
    assert float((tokens == drafts).double().mean()) == pytest.approx(float(overlap), abs=0.015)


def test_rejection_sampling_of_disjoint_and_undefined_rows():
    x = torch.tensor([[0.0, 0.0, -math.inf], [1.0, 2.0, 3.0], [math.nan, 0.0, 0.0]])
    q = torch.tensor([[-math.inf, -math.inf, 0.0], [1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    drafts = torch.tensor([2, 1, 0])
    tokens = rejection_tokens(x, q, drafts, torch.tensor([0.0, 0.999, 0.5]).double(), torch.tensor([0.9] * 3).double())
    assert tokens.tolist() == [1, 1, -1]


def test_rejection_does_not_depend_on_the_batch():
    x, q = torch.randn(2, 300, 500, generator=generator(5)) * 3
    drafts = torch.randint(500, (300,), generator=generator(6))
    accept, draw = torch.rand(2, 300, generator=generator(7), dtype=torch.float64)
    together = rejection_tokens(x, q, drafts, accept, draw)
    alone = [rejection_tokens(*(t[i : i + 1] for t in (x, q, drafts, accept, draw))) for i in range(300)]
    assert torch.equal(together, torch.cat(alone))


def test_typical_acceptance():
    sure, unsure = torch.tensor([9.0, 0.0, 0.0, 0.0]), torch.zeros(4)
    x = torch.stack([sure, sure, unsure, unsure, unsure])
    drafts = torch.tensor([[0, -1], [1, -1], [2, -1], [2, 3], [-1, -1]])
    drawn = torch.tensor([1, 0, 1, 1, 1])
    # entropy of the sure row 0: its least probability is epsilon; of the unsure one log 4: 0.3 / 4 = 0.075 < 0.09
    assert typical_tokens(x, drafts, drawn, 0.09, 0.3).tolist() == [0, 0, 2, 2, 1]
    assert typical_tokens(x[2:3], drafts[2:3], drawn[2:3], 1.0, 1.0).tolist() == [1], "0.25 is not more than 1 / 4"


def test_chains_are_followed_to_the_first_miss():
    hits = torch.tensor([[True, True, False, True], [False, True, True, True], [True, True, True, True]])
    assert follow_chains(hits).tolist() == [2, 0, 4]


def test_trees_are_followed_by_their_branches():
    #  1 -- 3 -- 5
    #  2 -- 4            numbered from 1; the last known token is 0
    parents = torch.tensor([[0, 0, 1, 2, 3]] * 5)
    hits = torch.tensor(
        [
            [True, False, True, True, True],  # 1, 3, 5; 4's parent is not accepted
            [False, True, True, True, True],  # 2, 4
            [False, False, True, True, True],
            [True, False, False, False, True],
            [False, True, False, False, False],
        ]
    )
    assert follow_trees(hits, parents, 3).tolist() == [5, 4, 0, 1, 2]


def test_expected_accepted():
    assert expected_accepted(0.8, 5) == pytest.approx(sum(0.8**i for i in range(1, 6)))
    assert expected_accepted(1.0, 3) == 3 and expected_accepted(0.0, 3) == 0
