"""What a user may ask of one generation: `SamplingParams`, validated when it is made. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MAX_SEED = 2**63 - 1
"""Largest legal seed: seeds travel as signed 64 bit integers."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are drawn and when it stops.

    Sequences are stored as tuples and `logit_bias` as a plain dict, so that two equal requests compare equal.
    Every field is checked in `__post_init__`, which raises ValueError with the value and what is allowed.
    """

    n: int = 1
    """Sequences generated for the prompt, >= 1. The caller of the scheduler makes one request of each."""
    temperature: float = 1.0
    """Divides the logits, >= 0; 0 is greedy decoding."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 or -1 keeps all (-1 is stored as 0)."""
    top_p: float = 1.0
    """Keep the likeliest tokens whose probabilities sum up to top_p, in (0, 1] (Holtzman et al. 2020, section 3.1)."""
    min_p: float = 0.0
    """Drop tokens less likely than min_p times the likeliest one, in [0, 1] (Nguyen et al. 2024, section 3)."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens seen in prompt or output, > 0 (Keskar et al. 2019,
    section 4.1); 1 is off."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of a token seen in the output, in [-2, 2]."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once per occurrence in the output, in [-2, 2]."""
    seed: int | None = None
    """Makes this request's draws repeatable, in [0, 2**63); None draws from the engine's generator."""
    max_tokens: int | None = 32
    """Most tokens generated, >= 1; None generates until the scheduler's max_seq_len."""
    min_tokens: int = 0
    """Tokens that must precede an end-of-sequence or stop token: earlier ones do not stop, in [0, max_tokens]."""
    stop: str | Sequence[str] | None = None
    """Texts that end the output (needs detokenize); stored as a tuple, None as ()."""
    stop_token_ids: Sequence[int] | None = None
    """Token ids that end the output besides the model's own; stored as a tuple, None as ()."""
    include_stop_str_in_output: bool = False
    """Whether the text that stopped the output stays in it."""
    ignore_eos: bool = False
    """Whether generation goes on past the model's end-of-sequence tokens (stop_token_ids still stop)."""
    logit_bias: Mapping[int, float] | None = None
    """Finite numbers added to the logits of the token ids that are its keys."""
    bad_words: Sequence[str] | None = None
    """Texts that may not be generated, tokenised by the LLM into bad_token_ids; stored as a tuple, None as ()."""
    bad_token_ids: Sequence[Sequence[int]] | None = None
    """Token sequences that may not be generated; stored as a tuple of tuples, None as ()."""
    allowed_token_ids: Sequence[int] | None = None
    """The only token ids that may be generated, at least one; None allows all."""
    logprobs: int | None = None
    """How many log-probabilities to return per output token besides the token's own, >= 0; None returns none."""
    prompt_logprobs: int | None = None
    """The same per prompt token, >= 0; every prompt row from `prompt_logprobs_start` on is computed, the prefix cache aside."""
    prompt_logprobs_start: int = 0
    """The first prompt token that `prompt_logprobs` are returned for, >= 0; what precedes it may come from the prefix cache."""
    detokenize: bool = True
    """Whether text is made of the tokens."""
    skip_special_tokens: bool = True
    """Whether special tokens are left out of the text."""
    speculative: bool | None = None
    """Whether tokens are drafted and verified several at a time; None: if the LLM does so."""

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_lengths()
        self._normalise_texts()
        self._normalise_tokens()

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken (temperature 0)."""
        return self.temperature == 0.0

    def _check_numbers(self) -> None:
        _check_int("n", self.n, 1)
        _check_number("temperature", self.temperature, self.temperature >= 0, ">= 0 (0 is greedy)")
        _check_int("top_k", self.top_k, -1, "; 0 or -1 keeps all tokens")
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        _check_number("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]")
        _check_number("min_p", self.min_p, 0 <= self.min_p <= 1, "in [0, 1]")
        _check_number("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0, "> 0 (1 is off)")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _check_number(name, value, -2 <= value <= 2, "in [-2, 2]")
        if self.seed is not None:
            _check_int("seed", self.seed, 0)
            if self.seed > MAX_SEED:
                raise ValueError(f"seed is {self.seed}; allowed: integers from 0 to {MAX_SEED}, or None")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _check_int(name, value, 0, ", or None for none")
        _check_int("prompt_logprobs_start", self.prompt_logprobs_start, 0)
        for name in ("include_stop_str_in_output", "ignore_eos", "detokenize", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: True or False")
        if self.speculative is not None and not isinstance(self.speculative, bool):
            raise ValueError(f"speculative is {self.speculative!r}; allowed: True, False, or None")

    def _check_lengths(self) -> None:
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, ", or None for as many as max_seq_len leaves room for")
        _check_int("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens is {self.min_tokens} and max_tokens is {self.max_tokens}; "
                f"allowed: min_tokens <= max_tokens; raise max_tokens or lower min_tokens"
            )

    def _normalise_texts(self) -> None:
        object.__setattr__(self, "stop", _texts("stop", (self.stop,) if isinstance(self.stop, str) else self.stop))
        if isinstance(self.bad_words, str):
            raise ValueError(f"bad_words is {self.bad_words!r}; allowed: a sequence of strings; put it in a list")
        object.__setattr__(self, "bad_words", _texts("bad_words", self.bad_words))
        if self.stop and not self.detokenize:
            raise ValueError(
                f"stop is {self.stop!r} and detokenize is False: stop strings are found in the text; "
                f"set detokenize=True or use stop_token_ids"
            )

    def _normalise_tokens(self) -> None:
        object.__setattr__(self, "stop_token_ids", _tokens("stop_token_ids", self.stop_token_ids))
        sequences = tuple(
            _tokens(f"bad_token_ids[{i}]", tokens, non_empty=True) for i, tokens in enumerate(self.bad_token_ids or ())
        )
        object.__setattr__(self, "bad_token_ids", sequences)
        if self.allowed_token_ids is not None:
            tokens = _tokens("allowed_token_ids", self.allowed_token_ids, non_empty=True)
            object.__setattr__(self, "allowed_token_ids", tokens)
        if self.logit_bias is not None:
            _tokens("logit_bias keys", tuple(self.logit_bias))
            for token, bias in self.logit_bias.items():
                is_number = isinstance(bias, (int, float)) and not isinstance(bias, bool)
                if not is_number or not math.isfinite(bias):
                    raise ValueError(f"logit_bias[{token}] is {bias!r}; allowed: finite numbers; ban by bad_token_ids")
            object.__setattr__(self, "logit_bias", dict(self.logit_bias))


def _check_int(name: str, value: object, minimum: int, note: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} is {value!r}; allowed: integers >= {minimum}{note}")


def _check_number(name: str, value: object, in_range: bool, allowed: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or not in_range:
        raise ValueError(f"{name} is {value!r}; allowed: finite numbers {allowed}")


def _texts(name: str, values: Sequence[str] | None) -> tuple[str, ...]:
    texts = tuple(values or ())
    for text in texts:
        if not isinstance(text, str) or not text:
            raise ValueError(f"{name} holds {text!r}; allowed: non-empty strings; leave it out")
    return texts


def _tokens(name: str, values: Sequence[int] | None, *, non_empty: bool = False) -> tuple[int, ...]:
    tokens = tuple(values or ())
    if non_empty and not tokens:
        raise ValueError(f"{name} is empty; allowed: at least one token id; leave it out")
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise ValueError(f"{name} holds {token!r}; allowed: integers >= 0")
    return tokens
