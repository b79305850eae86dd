"""Batched sampling on the device, for rows that each have their own parameters.

    logits [R, V] -- penalties -- biases, masks -- temperature -- min_p -- top_k -- top_p -- one token per row

Random rows are drawn by inverting the cumulative distribution at ONE uniform number per row. That number is a hash of
(the request's seed, the index of the token), made on the host, so what a request draws depends neither on the batch
around it nor on the device. Nor does any arithmetic depend on the batch, see runtime/distribution.py. The inversion goes in
two levels (blocks of 256 tokens, then inside one block), so the probabilities are read once and are never sorted.

min_p, top_k and top_p all become one threshold on the logits per row; tokens of equal logit share their fate, whatever
their order. The thresholds come from a `topk` prefix; a row is sorted in full only if its prefix holds too little mass. That is
what the host has to ask the device, so rows with top_p and no top_k are sampled late (`Sampler.reads_device`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from .distribution import cut_threshold, draw_tokens, greedy_tokens, token_logprobs
from .logits import NEGATIVE_INFINITY, PenaltyPool, SamplingState, apply_token_rules
from .packing import HostCopy, upload

if TYPE_CHECKING:
    from .speculative.verification import VerificationRows

PREFIX = 1024
"""Largest tokens looked at first where a row asks for top_p and no (or a larger) top_k."""
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_STEP = np.uint64(0x9E3779B97F4A7C15)
_ACCEPT = np.uint64(0xD1B54A32D192ED03)
"""Tells the numbers that accept drafts from those that draw tokens."""


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def counter_uniform(seeds: npt.NDArray[np.uint64], steps: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1) with 40 random bits, a pure function of (seed, step), elementwise.

    The output function is SplitMix64 (Steele, Lea, Flood 2014, figure 15), applied to the seed and then to the step.
    """
    with np.errstate(over="ignore"):
        state = _mix(seeds + _STEP)
        bits = _mix(state + (steps + np.uint64(1)) * _STEP)
    return (bits >> np.uint64(24)).astype(np.float64) * 2.0**-40


def derive_seed(seed: int, index: int) -> int:
    """A 64-bit seed for child `index` of `seed`: requests of one LLM, samples of one request."""
    with np.errstate(over="ignore"):
        mixed = _mix(np.array([seed % 2**64], dtype=np.uint64) + _STEP)
        mixed = _mix(mixed ^ (np.array([index % 2**64], dtype=np.uint64) * _MIX_1 + _STEP))
    return int(mixed[0])


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities of n rows on the host, of the model's own distribution (before penalties and temperature)."""

    top_ids: npt.NDArray[np.int64]
    """[n, k] the k most likely tokens, most likely first; k may be 0."""
    top_logprobs: npt.NDArray[np.float32]
    """[n, k]"""
    logprobs: npt.NDArray[np.float32]
    """[n] of the chosen token."""
    ranks: npt.NDArray[np.int64]
    """[n] rank of the chosen token, 1 = most likely."""


@dataclass(frozen=True, slots=True)
class SamplerOutput:
    """One sampled token per row; -1 where a row has no finite logit left (NaN, or everything masked)."""

    tokens: npt.NDArray[np.int64]
    logprobs: TokenLogprobs | None
    logprob_index: dict[int, int]
    """Row -> index into `logprobs`, for the rows that asked."""


@dataclass(slots=True)
class PendingSample:
    """A sample whose tensors may still be under way on the device."""

    tokens: torch.Tensor
    """[R] int64 on the device: the next step may read it before the host does."""
    logprobs: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None
    logprob_index: dict[int, int]

    def tensors(self) -> list[torch.Tensor]:
        """What the host wants to know."""
        return [self.tokens, *(self.logprobs or ())]

    def output(self, values: Sequence[npt.NDArray[Any]]) -> SamplerOutput:
        """The result, of the values of `tensors()` on the host."""
        logprobs = None if self.logprobs is None else TokenLogprobs(*values[1:])
        return SamplerOutput(values[0], logprobs, self.logprob_index)

    def result(self) -> SamplerOutput:
        """Waits for the device and copies to the host."""
        return self.output(HostCopy(self.tensors(), self.tokens.device).wait())


class _Plan:
    """What one composition of the batch needs; kept until the composition changes."""

    def __init__(self, states: Sequence[SamplingState], vocab_size: int, device: torch.device) -> None:
        self.states = list(states)
        self.logprob_rows: list[int] = []
        self.logprob_index: dict[int, int] = {}
        self.penalised: list[int] = []
        self.ruled: list[int] = []
        self.random: list[int] = []
        self.only_compares = all([s.plain for s in states])
        if self.only_compares:
            return
        self.penalised = [i for i, s in enumerate(states) if s.penalised]
        self.ruled = [i for i, s in enumerate(states) if s.ruled]
        self.logprob_rows = [i for i, s in enumerate(states) if s.params.logprobs is not None]
        self.logprob_index = {row: n for n, row in enumerate(self.logprob_rows)}
        self.num_top = max((states[i].params.logprobs or 0 for i in self.logprob_rows), default=0)
        self.random = [i for i, s in enumerate(states) if not s.greedy]
        self.greedy = [i for i, s in enumerate(states) if s.greedy]
        drawn = [states[i] for i in self.random]

        def index(rows: list[int], of: int) -> torch.Tensor | None:
            """Rows on the device, None for all of them."""
            return None if len(rows) == of else upload(np.array(rows, dtype=np.int64), device)

        self.logprob_index_R = index(self.logprob_rows, len(states))
        self.penalised_R = index(self.penalised, len(states))
        self.greedy_R, self.random_R = index(self.greedy, len(states)), index(self.random, len(states))
        self.seeds = np.array([s.seed for s in drawn], dtype=np.uint64)

        def column(values: list[float], dtype: type = np.float32) -> torch.Tensor:
            return upload(np.array(values, dtype=dtype), device)[:, None]

        temperatures = [s.params.temperature for s in drawn]
        self.temperature = None if all(t == 1.0 for t in temperatures) else column(temperatures)
        min_ps = [s.params.min_p for s in drawn]
        self.log_min_p = column([math.log(p) if p > 0 else NEGATIVE_INFINITY for p in min_ps]) if any(min_ps) else None
        ks = [s.params.top_k if 0 < s.params.top_k < vocab_size else vocab_size for s in drawn]
        ps = [s.params.top_p if s.params.top_p < 1.0 else math.inf for s in drawn]
        self.cut = [i for i, (k, p) in enumerate(zip(ks, ps)) if k < vocab_size or p < 1.0]
        self.cut_k = column([ks[i] for i in self.cut], np.int64)
        self.cut_p = column([ps[i] for i in self.cut], np.float64)
        self.cut_N = index(self.cut, len(drawn))
        self.any_p = any(ps[i] < 1.0 for i in self.cut)
        self.any_unlimited = any(ks[i] == vocab_size for i in self.cut)
        widths = [ks[i] if ks[i] < vocab_size else PREFIX for i in self.cut]
        self.cut_width = min(max(widths, default=0), vocab_size)


class Sampler:
    """Samples one token per row of logits, each row under its own request's parameters."""

    def __init__(self, vocab_size: int, device: torch.device | str) -> None:
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self.penalties = PenaltyPool(vocab_size, self.device)
        self._plan: _Plan | None = None

    def release(self, state: SamplingState) -> None:
        """Frees what the sampler holds for a request that has ended."""
        self.penalties.release(state)
        self._plan = None

    def reads_device(self, state: SamplingState) -> bool:
        """Whether `launch` waits for the device where a row has this state: top_p without top_k over a large vocabulary."""
        params = state.params
        limited = 0 < params.top_k < self.vocab_size
        return params.top_p < 1.0 and not (state.greedy or limited) and self.vocab_size > PREFIX

    def sample(self, logits_RV: torch.Tensor, states: Sequence[SamplingState]) -> SamplerOutput:
        """`launch(...).result()`: samples the tokens that follow `output_token_ids`, and waits."""
        return self.launch(logits_RV, states, np.array([len(state.output_token_ids) for state in states])).result()

    @torch.inference_mode()
    def launch(
        self,
        logits_RV: torch.Tensor,
        states: Sequence[SamplingState],
        num_outputs: npt.NDArray[np.int64],
        drafted: VerificationRows | None = None,
    ) -> PendingSample:
        """Samples a token for every row; the logits are consumed (their memory may be overwritten).

        Args:
            logits_RV: [R, V] of any float dtype on the sampler's device, as the model gave them. Where all rows are greedy
                and nothing else is asked for, they are compared as they are; otherwise they are worked on in float32.
            states: one per row.
            num_outputs: [R] the number of the token that is to be sampled, from 0, tokens in flight counted.
            drafted: the drafts that some of the rows verify; a request with drafts has several rows.

        Raises:
            ValueError: the shapes do not fit.
        """
        if logits_RV.shape != (len(states), self.vocab_size):
            raise ValueError(
                f"logits have shape {tuple(logits_RV.shape)}; {len(states)} requests over a vocabulary of "
                f"{self.vocab_size} tokens need ({len(states)}, {self.vocab_size})"
            )
        plan = self._plan
        if plan is None or plan.states != states:
            plan = self._plan = _Plan(states, self.vocab_size, self.device)
        if not plan.only_compares or self.device.type == "cpu":
            logits_RV = logits_RV.float()
        raw = _select(logits_RV, plan.logprob_index_R).clone() if plan.logprob_rows else None
        if plan.penalised:
            penalised = [plan.states[i] for i in plan.penalised]
            self.penalties.update(penalised)
            seen = None if drafted is None else drafted.drafts_seen(plan.penalised)
            changed = self.penalties.apply(_select(logits_RV, plan.penalised_R), penalised, seen)
            if plan.penalised_R is None:
                logits_RV.copy_(changed)
            else:
                logits_RV.index_copy_(0, plan.penalised_R, changed)
        if plan.ruled:
            ruled = [plan.states[i] for i in plan.ruled]
            histories = None
            if drafted is not None:
                histories = [drafted.history(i) if s.follows_words else () for i, s in zip(plan.ruled, ruled)]
            apply_token_rules(logits_RV, plan.ruled, ruled, num_outputs[plan.ruled].tolist(), histories)
        tokens = self._choose(logits_RV, plan, num_outputs, drafted)
        logprobs = None
        if raw is not None:
            chosen = _select(tokens, plan.logprob_index_R).clamp(min=0)
            logprobs = token_logprobs(raw, chosen, plan.num_top)
        return PendingSample(tokens, logprobs, plan.logprob_index)

    @torch.inference_mode()
    def draw(
        self, logits_RV: torch.Tensor, states: Sequence[SamplingState], num_outputs: npt.NDArray[np.int64]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens [R], logits [R, V] float32 that they were drawn from), of rows that are all random and not penalised.

        What a draft model needs: the tokens' distribution is the softmax of these logits.
        """
        plan = self._plan
        if plan is None or plan.states != states:
            plan = self._plan = _Plan(states, self.vocab_size, self.device)
        assert len(plan.random) == len(states) and not plan.penalised, "drafts are drawn for random rows, unpenalised"
        x = logits_RV.float().clone()
        if plan.ruled:
            apply_token_rules(x, plan.ruled, [plan.states[i] for i in plan.ruled], num_outputs[plan.ruled].tolist())
        return self._draw(x, plan, num_outputs.astype(np.uint64), None), x

    def _choose(
        self,
        logits_RV: torch.Tensor,
        plan: _Plan,
        num_outputs: npt.NDArray[np.int64],
        drafted: VerificationRows | None,
    ) -> torch.Tensor:
        if not plan.random:
            return greedy_tokens(logits_RV)
        random = None if plan.greedy_R is None else plan.random_R
        drawn = self._draw(_select(logits_RV, random), plan, num_outputs[plan.random].astype(np.uint64), drafted)
        if plan.greedy_R is None or random is None:
            return drawn
        tokens = torch.empty(logits_RV.shape[0], dtype=torch.int64, device=logits_RV.device)
        tokens.index_copy_(0, plan.greedy_R, greedy_tokens(logits_RV.index_select(0, plan.greedy_R)))
        tokens.index_copy_(0, random, drawn)
        return tokens

    def _draw(
        self, x_NV: torch.Tensor, plan: _Plan, numbers: npt.NDArray[np.uint64], drafted: VerificationRows | None
    ) -> torch.Tensor:
        """Tokens for the random rows, which are the `numbers`-th of their requests; overwrites `x_NV`."""
        self._cut(x_NV, plan)
        uniform_N = upload(counter_uniform(plan.seeds, numbers), x_NV.device)
        tokens = draw_tokens(x_NV, uniform_N)
        if drafted is None:
            return tokens
        return drafted.choose(x_NV, plan.random, tokens, counter_uniform(plan.seeds ^ _ACCEPT, numbers), uniform_N)

    def _cut(self, x_NV: torch.Tensor, plan: _Plan) -> None:
        """Temperature, min_p, top_k and top_p of the random rows; in place."""
        if plan.temperature is not None:
            x_NV.div_(plan.temperature)
        low = None
        if plan.log_min_p is not None:
            low = x_NV.amax(-1, keepdim=True) + plan.log_min_p
        if plan.cut:
            x_CV = _select(x_NV, plan.cut_N)
            low_C = None if low is None else _select(low, plan.cut_N)
            cut = cut_threshold(
                x_CV, low_C, plan.cut_k, plan.cut_p if plan.any_p else None, plan.cut_width, plan.any_unlimited
            )
            if plan.cut_N is None:
                low = cut
            else:
                low = x_NV.new_full((x_NV.shape[0], 1), NEGATIVE_INFINITY) if low is None else low
                low.index_copy_(0, plan.cut_N, cut)
        if low is not None:
            x_NV.masked_fill_(x_NV < low, NEGATIVE_INFINITY)


def _select(x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """The given rows of `x`; `x` itself for None."""
    return x if rows is None else x.index_select(0, rows)
