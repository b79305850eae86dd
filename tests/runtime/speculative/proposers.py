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


class BranchingProposer:
    """Drafts trees in which one branch, at random places among its siblings, follows a known text, and at times none does."""

    hidden_layers: tuple[int, ...] = ()

    def __init__(self, context: ProposerContext, texts: Sequence[Sequence[int]]) -> None:
        assert context.config.tree is not None
        self._texts = [list(text) for text in texts]
        self._vocab_size, self._rng = context.engine.vocab_size, random.Random(0)
        index = {path: node for node, path in enumerate(context.config.tree)}
        self._parents = [index.get(path[:-1], -1) for path in context.config.tree]
        self._ranks = [path[-1] for path in context.config.tree]

    def add(self, request, state) -> None:
        pass

    def release(self, request_id) -> None:
        pass

    def observe(self, verified: Sequence[Verified]) -> None:
        pass

    def propose(self, targets: Sequence[Target]) -> Drafts:
        drafts = [self._draft(target.request.all_token_ids, target.num_drafts) for target in targets]
        lengths = [len(tokens) for tokens in drafts]
        return Drafts(lengths, drafts, parents=[self._parents[:length] for length in lengths])

    def _draft(self, tokens: list[int], count: int) -> list[int]:
        known = next((text for text in self._texts if text[: len(tokens)] == tokens), tokens)[len(tokens) :]
        depths, drafts, follows = [], [], []
        chosen = {parent: self._rng.choice([0, 0, 1, 1, 9]) for parent in range(-1, count)}
        for parent, rank in list(zip(self._parents, self._ranks))[:count]:
            depth = 0 if parent < 0 else depths[parent] + 1
            right = (parent < 0 or follows[parent]) and rank == chosen[parent] and depth < len(known)
            depths.append(depth)
            follows.append(right)
            drafts.append(known[depth] if right else self._rng.randrange(self._vocab_size))
        return drafts


def branching(texts: Sequence[Sequence[int]]):
    """What SpeculativeConfig takes as a proposer: trees around texts (prompt and output) that plain decoding gave."""

    def make(context: ProposerContext) -> Proposer:
        return BranchingProposer(context, texts)

    return make


def oracle(rate: float, on_device: bool = False):
    """What SpeculativeConfig takes as a proposer."""

    def make(context: ProposerContext) -> Proposer:
        return OracleProposer(context, rate, on_device)

    return make
