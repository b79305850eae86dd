"""Drafts from Medusa's heads (Cai et al. 2024): each guesses one more token off the hidden state in front of the last known token.

    hidden state h_(n-2) -> the model's head: t_(n-1)   head 0: d0   head 1: d1 ...

The heads do not see each other's drafts, so all are made in one go: a chain takes the likeliest token of each (or, with
temperature, one drawn from it), a tree the likeliest few, by the ranks of the config's paths (section 2.3.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...models.speculative.heads import HeadsConfig, read_heads
from ..logits import SamplingState
from ..packing import upload
from ..request import Request
from .draft_tree import TreeLevels
from .draws import Draws
from .proposer import Drafts, ProposerContext, Target, Verified

HEAD_INPUT = -1
"""The hidden state that the heads read: behind the final norm."""


class HeadsProposer:
    """Drafts by heads on the target's last hidden state."""

    hidden_layers: tuple[int, ...] = (HEAD_INPUT,)

    def __init__(self, context: ProposerContext) -> None:
        config, engine = context.config, context.engine
        directory = Path(str(config.model))
        heads = read_heads(directory)
        check_heads(heads.config, engine, directory, config.num_draft_tokens)
        self._device = engine.device
        self._dtype = _dtype_of(engine)
        self._heads = heads.to(self._device, self._dtype)
        self._vocab_size = engine.vocab_size
        self._draws = Draws(config, engine.vocab_size, engine.device)
        self._tree = None if config.tree is None else TreeLevels(config.tree)
        self._requests: set[str] = set()
        self._hidden: dict[str, tuple[int, torch.Tensor, int]] = {}
        """Request id -> position, tensor [T, 1, H] of its step, and row of the last known hidden state."""

    def add(self, request: Request, state: SamplingState) -> None:
        """Prepares the request's own draws."""
        self._draws.add(request.request_id, state)
        self._requests.add(request.request_id)

    def release(self, request_id: str) -> None:
        """Forgets a request."""
        self._draws.release(request_id)
        self._requests.discard(request_id)
        self._hidden.pop(request_id, None)

    def observe(self, verified: Sequence[Verified]) -> None:
        """Keeps the last hidden state of each text."""
        for item in verified:
            name = item.request.request_id
            if item.states is not None and name in self._requests and item.rows:
                self._hidden[name] = (item.start + len(item.rows) - 1, item.states, item.rows[-1])

    @torch.inference_mode()
    def propose(self, targets: Sequence[Target]) -> Drafts:
        """Drafts for all targets whose last hidden state is known, in one pass of the heads."""
        known = [number for number, target in enumerate(targets) if self._is_known(target.request)]
        lengths = [0] * len(targets)
        if not known:
            return Drafts(lengths, [[] for _ in targets])
        most = self._heads.config.num_heads
        for number in known:
            lengths[number] = targets[number].num_drafts if self._tree else min(targets[number].num_drafts, most)
        logits = self._logits([targets[number].request for number in known])
        if self._tree is not None:
            return self._plant(targets, known, lengths, logits)
        return self._chain(targets, known, lengths, logits)

    def _is_known(self, request: Request) -> bool:
        held = self._hidden.get(request.request_id)
        return held is not None and held[0] == request.num_tokens - 2

    def _logits(self, requests: Sequence[Request]) -> torch.Tensor:
        """[N, heads, V] float32"""
        held = [self._hidden[request.request_id] for request in requests]
        states = held[0][1]
        if all(entry[1] is states for entry in held):
            rows = states[:, 0].index_select(0, upload(np.array([row for _, _, row in held]), self._device))
        else:
            rows = torch.stack([tensor[row, 0] for _, tensor, row in held])
        logits = self._heads(rows.to(self._dtype)).float()
        missing = self._vocab_size - logits.shape[-1]
        return torch.nn.functional.pad(logits, (0, missing), value=float("-inf")) if missing else logits

    def _chain(
        self, targets: Sequence[Target], known: Sequence[int], lengths: Sequence[int], logits_NKV: torch.Tensor
    ) -> Drafts:
        width, places = max(lengths), np.array(known)
        chains = self._draws.begin(targets, width)
        for number in range(width):
            chains.choose(logits_NKV[:, number], number, places)
        drafts = chains.drafts()
        drafts.lengths = lengths
        return drafts

    def _plant(
        self, targets: Sequence[Target], known: Sequence[int], lengths: Sequence[int], logits_NKV: torch.Tensor
    ) -> Drafts:
        """The nodes of the config's tree, each the likeliest token of its rank."""
        tree = self._tree
        assert tree is not None
        depths = np.repeat(np.arange(len(tree.ends) - 1), np.diff(tree.ends))
        ranked = logits_NKV[:, : len(tree.ends) - 1].topk(1 + max(tree.ranks), dim=-1).indices
        heads, ranks = upload(np.stack([depths, np.array(tree.ranks)]), self._device)
        tokens_SK = torch.zeros(len(targets), len(tree.ranks), dtype=torch.int64, device=self._device)
        tokens_SK[upload(np.array(known), self._device)] = ranked[:, heads, ranks]
        return Drafts(lengths, tokens_SK, parents=[tree.parents[:length] for length in lengths])


def _dtype_of(engine: Any) -> torch.dtype:
    """The compute dtype of an engine."""
    dtype: torch.dtype = getattr(torch, engine.config.dtype)
    return dtype


def check_heads(heads: HeadsConfig, engine: Any, directory: Path, num_drafts: int) -> None:
    """Raises ValueError where heads do not go with a target, or are too few."""
    hidden_size = engine.manifest.model.hidden_size
    if heads.hidden_size != hidden_size:
        raise ValueError(
            f"the heads of {directory} read hidden states of {heads.hidden_size} numbers, and the target's have {hidden_size}; "
            "give heads that were trained for this target"
        )
    if heads.vocab_size > engine.vocab_size:
        raise ValueError(
            f"the heads of {directory} are for a vocabulary of {heads.vocab_size} tokens, and the target has {engine.vocab_size}; "
            "give heads that were trained for this target"
        )
    if num_drafts > heads.num_heads:
        raise ValueError(
            f"num_draft_tokens is {num_drafts} and {directory} has {heads.num_heads} heads, one for each draft; allowed: at most "
            f"{heads.num_heads}"
        )
