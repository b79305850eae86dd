"""Drafts from the text's own repetitions: prompt lookup (Saxena 2023), by a suffix automaton over prompt and output.

The longest end of the text that has occurred before is looked up, and what followed it then is the draft. Behind the end of the
text it goes on with itself, so that a period repeats:

    ... x = 1 ; y = 1 ; x =        longest repetition "x =", drafts: 1 ; y = 1

The longer the repetition, the further it is trusted: drafts are at most TRUST times as many as its tokens (cf. Oliaro et al. 2024,
SuffixDecoding). Of the demo model's held-out texts 0.9, 1.8, 3.5 and 6.9 of 8 drafts are accepted behind 1, 2, 3 to 7, and 10
repeated tokens or more.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..logits import SamplingState
from ..request import Request
from .proposer import Drafts, ProposerContext, Target, Verified
from .suffix_automaton import SuffixAutomaton

TRUST = 2
"""Most drafts for each token that is repeated."""


def repeat_draft(tokens: Sequence[int], end: int, num_drafts: int) -> list[int]:
    """What followed position `end` (> 0) of `tokens`, going on with itself where the text ends."""
    period = len(tokens) - end
    return [tokens[end + i % period] for i in range(num_drafts)]


class NgramProposer:
    """Prompt lookup; a request costs an automaton of its prompt, made when it is first drafted for."""

    hidden_layers: tuple[int, ...] = ()

    def __init__(self, context: ProposerContext) -> None:
        self._least = context.config.ngram_min
        self._automata: dict[str, SuffixAutomaton] = {}

    def add(self, request: Request, state: SamplingState) -> None:
        """Nothing to note before the first drafts."""

    def release(self, request_id: str) -> None:
        """Frees a request's automaton."""
        self._automata.pop(request_id, None)

    def propose(self, targets: Sequence[Target]) -> Drafts:
        """Drafts of the wanted lengths where the end of the text has occurred before, none elsewhere."""
        drafts = [self._propose(target.request, target.num_drafts) for target in targets]
        return Drafts([len(tokens) for tokens in drafts], drafts)

    def _propose(self, request: Request, num_drafts: int) -> list[int]:
        automaton = self._automata.get(request.request_id)
        if automaton is None:
            automaton = self._automata[request.request_id] = SuffixAutomaton()
        tokens = request.all_token_ids
        automaton.extend(tokens[len(automaton) :])
        length, end = automaton.repeated()
        return repeat_draft(tokens, end, min(num_drafts, TRUST * length)) if length >= self._least else []

    def observe(self, verified: Sequence[Verified]) -> None:
        """Accepted tokens are read from the request."""
