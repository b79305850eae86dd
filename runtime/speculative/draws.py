"""How the drafts of a step are chosen from its logits: the likeliest token, or a draw as the target would make it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from ..distribution import greedy_tokens
from ..logits import SamplingState
from ..packing import upload
from ..sampler import Sampler
from .config import SpeculativeConfig
from .draft_state import draft_state
from .proposer import Drafts, Target


class Draws:
    """The sampling states of requests as they are drafted for."""

    def __init__(self, config: SpeculativeConfig, vocab_size: int, device: torch.device) -> None:
        self.exact = config.acceptance == "exact"
        self._draws = config.acceptance != "typical"
        self._vocab_size, self._device = vocab_size, device
        self._sampler = Sampler(vocab_size, device)
        self._states: dict[str, SamplingState] = {}

    def add(self, request_id: str, state: SamplingState) -> None:
        """Prepares a request's own draws."""
        self._states[request_id] = draft_state(state, self._sampler, exact=self.exact)

    def release(self, request_id: str) -> None:
        """Forgets a request; harmless for an unknown one."""
        self._states.pop(request_id, None)

    def begin(self, targets: Sequence[Target], width: int) -> DrawnChains:
        """Chains of up to `width` drafts for these targets, empty yet."""
        drawn = [self._draws and not target.state.greedy for target in targets]
        return DrawnChains(self, targets, width, drawn)


class DrawnChains:
    """Chains of drafts under way, one for each target; tokens stay on the device."""

    def __init__(self, draws: Draws, targets: Sequence[Target], width: int, drawn: Sequence[bool]) -> None:
        self._draws, self._targets, self._drawn = draws, targets, drawn
        device = draws._device
        self._tokens_SK = torch.zeros(len(targets), width, dtype=torch.int64, device=device)
        self._q_SKV: torch.Tensor | None = None
        if any(drawn) and not draws.exact:
            self._q_SKV = torch.empty(len(targets), width, draws._vocab_size, device=device)

    def choose(self, logits_RV: torch.Tensor, number: int, places: npt.NDArray[np.int64]) -> torch.Tensor:
        """[R] draft `number` of the targets at `places`, from the logits in front of it."""
        chosen = self._chosen(logits_RV, number, places)
        if len(places) == len(self._targets):
            self._tokens_SK[:, number] = chosen
        else:
            self._tokens_SK[upload(places, chosen.device), number] = chosen
        return chosen

    def _chosen(self, logits_RV: torch.Tensor, number: int, places: npt.NDArray[np.int64]) -> torch.Tensor:
        random = [n for n, place in enumerate(places.tolist()) if self._drawn[place]]
        if not random:
            return greedy_tokens(logits_RV).clamp_(min=0)
        requests = [self._targets[places[n]].request for n in random]
        states = [self._draws._states[request.request_id] for request in requests]
        numbers = np.array([request.num_output_tokens + number for request in requests])
        rows = None if len(random) == len(places) else upload(np.array(random), logits_RV.device)
        tokens, x_NV = self._draws._sampler.draw(logits_RV if rows is None else logits_RV[rows], states, numbers)
        tokens.clamp_(min=0)
        if self._q_SKV is not None:
            self._q_SKV[upload(places[random], logits_RV.device), number] = x_NV
        if rows is None:
            return tokens
        return greedy_tokens(logits_RV).clamp_(min=0).index_copy_(0, rows, tokens)

    def drafts(self, hidden_SKH: torch.Tensor | None = None) -> Drafts:
        """The chains, each as long as its target asks."""
        lengths = [target.num_drafts for target in self._targets]
        certain = self._q_SKV is None
        drawn = [False] * len(lengths) if certain else list(self._drawn)
        return Drafts(lengths, self._tokens_SK, self._q_SKV, drawn, hidden=hidden_SKH)
