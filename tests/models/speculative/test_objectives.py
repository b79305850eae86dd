"""Training: unrolled drafts are those of drafting step by step, losses fall, lengths are counted as verification does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from camshaft.models.speculative.estimate import mean_accepted_length
from camshaft.models.speculative.exit import ExitHead, read_exit, write_exit
from camshaft.models.speculative.objectives import (
    EagleObjective,
    ExitObjective,
    HeadsObjective,
    Target,
    UnrolledAttention,
)
from camshaft.models.speculative.text import TrainingText, continuations
from camshaft.models.speculative.train import SMALL, Optimizer
from small_drafts import CAPTURE, tiny_eagle, tiny_heads, tiny_target

VOCAB = 24


@pytest.fixture(scope="module")
def target():
    return Target(tiny_target(VOCAB))


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(VOCAB, (3, 14), generator=torch.Generator().manual_seed(2))


def drafted(draft, target, tokens, end, num_drafts):
    """Logits of drafts after tokens[:end], one whole pass for each, with the tokens that follow as drafts."""
    features = target.features(tokens[None, :end], CAPTURE)
    hidden = torch.cat([torch.zeros(1, 1, 64), draft.fc(features.captured)[:, : end - 1]], 1)
    found = []
    for number in range(num_drafts):
        row = tokens[None, : end + number]
        logits, own = draft(row, torch.arange(end + number)[None], hidden, UnrolledAttention())
        found.append(logits[0, -1])
        hidden = torch.cat([hidden, own[:, -1:]], 1)
    return torch.stack(found)


def test_unrolled_drafts_are_those_of_drafting(target, tokens):
    draft = tiny_eagle(target.model, 20)
    unrolled = EagleObjective(draft, CAPTURE).unroll(target.features(tokens, CAPTURE), 4)
    for end in (1, 2, 7, 10):
        expected = drafted(draft, target, tokens[1], end, 4)
        found = torch.stack([logits[1, end - 1] for logits in unrolled])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_hits_of_heads_are_read_one_row_in_front(target, tokens):
    heads = tiny_heads(target.model)
    features = target.features(tokens, (1,))
    hits = HeadsObjective(heads).hits(features, 3)
    guessed = heads(features.last.flatten(0, 1)).argmax(-1).view(3, 14, 3)
    for row, at, k in ((0, 5, 0), (1, 7, 1), (2, 9, 2), (0, 1, 2)):
        assert bool(hits[row, at, k]) == (int(guessed[row, at - 1, k]) == int(tokens[row, at + 1 + k]))
    assert not hits[:, 0].any() and not hits[:, -1].any()


@pytest.mark.parametrize("method", ["heads", "eagle", "exit"])
def test_losses_fall(target, tokens, method, tmp_path):
    torch.manual_seed(0)
    objective = {
        "heads": lambda: HeadsObjective(tiny_heads(target.model)),
        "eagle": lambda: EagleObjective(tiny_eagle(target.model, 20).requires_grad_(True), CAPTURE, num_steps=3),
        "exit": lambda: ExitObjective(ExitHead(2, 64, 8, 1e-5), target.model.lm_head),
    }[method]()
    features = target.features(tokens, objective.layers)
    optimizer = Optimizer(objective.module, replace(SMALL, adam_lr=0.01))
    losses = []
    for _ in range(12):
        loss = objective.loss(features)
        loss.backward()
        optimizer.step(1.0)
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05
    objective.save(tmp_path)
    assert (tmp_path / "config.json").is_file()


def test_exits_are_read_as_they_are_written(target, tmp_path):
    head = ExitHead(2, 64, 8, 1e-5)
    torch.nn.init.normal_(head.up.weight)
    write_exit(head, tmp_path)
    found = read_exit(tmp_path)
    x = torch.randn(3, 64).bfloat16()
    assert found.layer == 2
    torch.testing.assert_close(found(x), head.bfloat16()(x))
    (tmp_path / "config.json").write_text('{"exit_layer": 2}')
    with pytest.raises(ValueError, match="rms_norm_eps None"):
        read_exit(tmp_path)


def test_accepted_lengths_walk_as_verification_does():
    hits = torch.zeros(1, 12, 2, dtype=torch.bool)
    hits[0, 3] = True  # 3 tokens at 3, so the next is at 6
    hits[0, 4] = True  # never looked at
    hits[0, 6, 1] = True  # its first draft is wrong
    hits[0, 7, 0] = True  # 2 tokens, to 9
    assert mean_accepted_length(hits, 3) == (3 + 1 + 2 + 1) / 4


def test_text_of_the_target(target):
    prompts = torch.arange(6).view(2, 3)
    texts = continuations(target.model, prompts, 4, torch.tensor([0.0, 1.0]))
    assert texts.shape == (2, 7) and torch.equal(texts[:, :3], prompts)
    greedy = target.model(texts[:1]).logits[0].argmax(-1)
    assert texts[0, 3:].tolist() == greedy[2:-1].tolist()
    text = TrainingText(torch.arange(100) % VOCAB, texts, torch.device("cpu"))
    assert text.batch(40, 10).shape == (4, 10) and text.batch(40, 10).shape == (5, 7)
    assert text.frequent(5, VOCAB).tolist() == sorted(text.frequent(5, VOCAB).tolist())
