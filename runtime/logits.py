"""Changes to the logits before sampling: penalties, biases, allowed tokens, bad words, minimum lengths.

Dense state (which tokens a request has seen, and how often) lives on the device, one row per request that asks
for it, and is brought up to date with the few tokens that are new. Everything else is sparse: lists of
(row, token) pairs. A batch in which nobody asks for a rule pays nothing for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from .packing import upload

if TYPE_CHECKING:
    from .sampling_params import SamplingParams

NEGATIVE_INFINITY = float("-inf")


def _as_tuple(values: Sequence[int] | None) -> tuple[int, ...]:
    return () if values is None else tuple(int(v) for v in values)


@dataclass(eq=False, slots=True)
class SamplingState:
    """What the sampler remembers of one request, from its arrival to its end.

    `prompt_token_ids` and `output_token_ids` are the request's own lists: the sampler reads them. While tokens are in
    flight, `output_token_ids` lacks them; only states with `follows_tokens` need it whole.
    """

    params: SamplingParams
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    seed: int
    """64-bit seed of this request's random numbers."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that may not be sampled before `min_tokens` tokens exist (end of sequence and stop tokens)."""
    bad_token_ids: tuple[tuple[int, ...], ...] = ()
    """Forbidden token sequences; the last token of one is masked where its beginning has just been produced."""
    slot: int = -1
    """Row in `PenaltyPool`, -1 while the request has none."""
    num_counted: int = 0
    """Output tokens that the penalty pool has counted."""
    alive: bool = True
    """False once the request has ended."""
    late: bool = False
    """Whether the row is sampled when the step in flight has its result: it `follows_tokens`, or its sampling makes the host
    wait for the device. Set by the runner."""
    greedy: bool = field(init=False)
    penalised: bool = field(init=False)
    ruled: bool = field(init=False)
    follows_tokens: bool = field(init=False)
    """Whether the next token's distribution is changed by the value of the one before it: penalties, bad words."""
    follows_words: bool = field(init=False)
    """Whether tokens are forbidden because of the values of those before them: bad words of several tokens."""
    plain: bool = field(init=False)
    """Greedy, and nothing else."""

    def __post_init__(self) -> None:
        p = self.params
        self.greedy = p.temperature == 0 or p.top_k == 1
        self.penalised = p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0
        needs_minimum = p.min_tokens > 0 and bool(self.stop_ids)
        self.ruled = bool(p.logit_bias or p.allowed_token_ids or self.bad_token_ids or needs_minimum)
        self.follows_words = any(len(word) > 1 for word in self.bad_token_ids)
        self.follows_tokens = self.penalised or self.follows_words
        self.plain = self.greedy and not (self.penalised or self.ruled) and p.logprobs is None

    def masked_now(self, num_output: int, drafted: Sequence[int] = ()) -> list[int]:
        """Token ids that must not be token number `num_output`: stop tokens before `min_tokens`, bad words.

        drafted: tokens that follow the output, as far as the row is concerned.
        """
        masked: list[int] = []
        output = self.output_token_ids
        if drafted and self.bad_token_ids:
            longest = max(len(word) for word in self.bad_token_ids)
            output = [*output[-longest:], *drafted]
        if num_output < self.params.min_tokens:
            masked.extend(self.stop_ids)
        for word in self.bad_token_ids:
            prefix = word[:-1]
            if len(prefix) <= len(output) and tuple(output[len(output) - len(prefix) :]) == prefix:
                masked.append(word[-1])
        return masked


class PenaltyPool:
    """Per-request token counts on the device, for the repetition, presence and frequency penalties.

        slot   counts [slots, V] int32 (output tokens)      seen [slots, V] bool (prompt and output)
        0      request a
        1      free
        2      request c

    Either table exists only once a request needs it; both double when they are full.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self._capacity = 0
        self._free: list[int] = []
        self._counts: torch.Tensor | None = None
        self._seen: torch.Tensor | None = None

    @property
    def num_slots_in_use(self) -> int:
        """Rows that are held by requests."""
        return self._capacity - len(self._free)

    def release(self, state: SamplingState) -> None:
        """Gives the request's row back; harmless for a request that holds none."""
        if state.slot >= 0:
            self._free.append(state.slot)
            state.slot = -1
            state.num_counted = 0

    def update(self, states: Sequence[SamplingState]) -> None:
        """Counts the tokens that are new since the last call (all of them at a request's first)."""
        self._reserve(states)
        slots: list[int] = []
        tokens: list[int] = []
        prompt_slots: list[int] = []
        prompt_tokens: list[int] = []
        for state in states:
            if state.slot < 0:
                state.slot = self._free.pop()
                self._clear(state.slot)
                if state.params.repetition_penalty != 1.0:
                    prompt_slots.extend([state.slot] * len(state.prompt_token_ids))
                    prompt_tokens.extend(state.prompt_token_ids)
            new = state.output_token_ids[state.num_counted :]
            state.num_counted += len(new)
            slots.extend([state.slot] * len(new))
            tokens.extend(new)
        if self._seen is not None and (tokens or prompt_tokens):
            index = _index([slots + prompt_slots, tokens + prompt_tokens], self.device)
            self._seen[index[0], index[1]] = True
        if self._counts is not None and tokens:
            index = _index([slots, tokens], self.device)
            one = torch.ones((), dtype=torch.int32, device=self.device)
            self._counts.index_put_((index[0], index[1]), one, accumulate=True)

    def apply(
        self,
        logits_PV: torch.Tensor,
        states: Sequence[SamplingState],
        drafted: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Penalised copy of `logits_PV`, row i being `states[i]`'s.

        drafted: ([E] rows, [E] tokens) int64 on the device, what follows the output as far as single rows are concerned.

        Repetition (Keskar et al. 2019, section 4.1) divides a positive and multiplies a negative logit of every token
        of prompt and output; frequency subtracts once per occurrence in the output, presence once if there is any.
        """
        slots = _index([s.slot for s in states], self.device)
        if self._seen is not None:
            repetition = _column([s.params.repetition_penalty for s in states], self.device)
            factor = torch.where(logits_PV > 0, 1.0 / repetition, repetition)
            seen = self._seen[slots]
            if drafted is not None:
                seen[drafted[0], drafted[1]] = True
            logits_PV = torch.where(seen, logits_PV * factor, logits_PV)
        if self._counts is not None:
            frequency = _column([s.params.frequency_penalty for s in states], self.device)
            presence = _column([s.params.presence_penalty for s in states], self.device)
            counts = self._counts[slots]
            if drafted is not None:
                one = torch.ones((), dtype=torch.int32, device=self.device)
                counts.index_put_((drafted[0], drafted[1]), one, accumulate=True)
            logits_PV = logits_PV - counts * frequency - (counts > 0) * presence
        return logits_PV

    def _clear(self, slot: int) -> None:
        for table in (self._counts, self._seen):
            if table is not None:
                table[slot].zero_()

    def _reserve(self, states: Sequence[SamplingState]) -> None:
        """Makes room for the states that have no row yet, and creates the tables that they need."""
        missing = sum(s.slot < 0 for s in states) - len(self._free)
        if missing > 0:
            old = self._capacity
            self._capacity = max(4, 2 * old, old + missing)
            self._free.extend(range(self._capacity - 1, old - 1, -1))
            self._counts = self._grown(self._counts)
            self._seen = self._grown(self._seen)
        if self._counts is None and any(s.params.presence_penalty or s.params.frequency_penalty for s in states):
            self._counts = torch.zeros(self._capacity, self.vocab_size, dtype=torch.int32, device=self.device)
        if self._seen is None and any(s.params.repetition_penalty != 1.0 for s in states):
            self._seen = torch.zeros(self._capacity, self.vocab_size, dtype=torch.bool, device=self.device)

    def _grown(self, table: torch.Tensor | None) -> torch.Tensor | None:
        if table is None:
            return None
        grown = table.new_zeros(self._capacity, self.vocab_size)
        grown[: table.shape[0]] = table
        return grown


def apply_token_rules(
    logits_RV: torch.Tensor,
    rows: Sequence[int],
    states: Sequence[SamplingState],
    num_outputs: Sequence[int],
    drafted: Sequence[Sequence[int]] | None = None,
) -> None:
    """Adds biases, keeps only allowed tokens, then masks bad words and early stop tokens; in place.

    `rows[i]` is the row of `states[i]`, which is to get token number `num_outputs[i]`, with `drafted[i]` between it and the
    output. Masks come last, so a token both allowed and forbidden is forbidden.
    """
    device = logits_RV.device
    bias_rows: list[int] = []
    bias_tokens: list[int] = []
    bias_values: list[float] = []
    allowed_rows: list[int] = []
    kept_rows: list[int] = []
    kept_tokens: list[int] = []
    masked_rows: list[int] = []
    masked_tokens: list[int] = []
    histories = [()] * len(rows) if drafted is None else drafted
    for row, state, num_output, history in zip(rows, states, num_outputs, histories, strict=True):
        bias = state.params.logit_bias
        if bias:
            bias_rows.extend([row] * len(bias))
            bias_tokens.extend(bias.keys())
            bias_values.extend(bias.values())
        allowed = _as_tuple(state.params.allowed_token_ids)
        if allowed:
            allowed_rows.append(row)
            kept_rows.extend([row] * len(allowed))
            kept_tokens.extend(allowed)
        masked = state.masked_now(num_output, history)
        masked_rows.extend([row] * len(masked))
        masked_tokens.extend(masked)
    if bias_rows:
        index = _index([bias_rows, bias_tokens], device)
        logits_RV[index[0], index[1]] += upload(np.asarray(bias_values, dtype=np.float32), device)
    if allowed_rows:
        index = _index([kept_rows, kept_tokens], device)
        kept = logits_RV[index[0], index[1]]
        logits_RV.index_fill_(0, _index(allowed_rows, device), NEGATIVE_INFINITY)
        logits_RV[index[0], index[1]] = kept
    if masked_rows:
        index = _index([masked_rows, masked_tokens], device)
        logits_RV[index[0], index[1]] = NEGATIVE_INFINITY


def _column(values: Sequence[float], device: torch.device) -> torch.Tensor:
    return upload(np.asarray(values, dtype=np.float32), device)[:, None]


def _index(values: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    return upload(np.asarray(values, dtype=np.int64), device)
