"""Proposers for tests: drafts from the fake engine's definition, some of them spoilt, on the host or on the device."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from camshaft.runtime.speculative.proposer import Drafts, Proposer, ProposerContext, Target, Verified

from ..fake_engine import expected_tokens


class OracleProposer:
    """Knows the greedy continuation; each draft is right with probability `rate`, and fewer than asked for are given at times."""

    hidden_layers: tuple[int, ...] = ()

    def __init__(self, context: ProposerContext, rate: float, on_device: bool) -> None:
        self._engine, self._rate, self._on_device = context.engine, rate, on_device
        self._rng = random.Random(0)
        self.seen: list[Verified] = []
        self.live: set[str] = set()

    def add(self, request, state) -> None:
        self.live.add(request.request_id)

    def release(self, request_id) -> None:
        self.live.remove(request_id)

    def propose(self, targets: Sequence[Target]) -> Drafts:
        drafts = []
        for target in targets:
            assert target.request.num_computed_tokens == target.request.num_tokens - 1
            count = self._rng.choice([target.num_drafts, target.num_drafts, 0, 1])
            drafts.append(self._draft(target.request.all_token_ids, min(count, target.num_drafts)))
        lengths = [len(tokens) for tokens in drafts]
        if not self._on_device:
            return Drafts(lengths, drafts)
        width = max(1, *lengths)
        return Drafts(lengths, torch.tensor([tokens + [3] * (width - len(tokens)) for tokens in drafts]))

    def _draft(self, tokens: list[int], count: int) -> list[int]:
        windows = [group.window for group in self._engine.cache_groups]
        right = expected_tokens(tokens, count, self._engine.vocab_size, windows)
        return [t if self._rng.random() < self._rate else (t + 1) % self._engine.vocab_size for t in right]

    def observe(self, verified: Sequence[Verified]) -> None:
        self.seen += verified


def oracle(rate: float, on_device: bool = False):
    """What SpeculativeConfig takes as a proposer."""

    def make(context: ProposerContext) -> Proposer:
        return OracleProposer(context, rate, on_device)

    return make
