"""What a generation returns: `RequestOutput` with one `CompletionOutput` per sample. Imports no torch."""

from __future__ import annotations

import html
from dataclasses import dataclass, field

from .speculative.metrics import SpeculativeMetrics


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log-probability of a token under the model's own distribution (before penalties and temperature)."""

    logprob: float
    rank: int
    """1 = most likely."""
    decoded_token: str | None = None
    """The token's text, None without a tokenizer."""


TokenLogprobDict = dict[int, Logprob]
"""Token id -> Logprob: the chosen token and the most likely ones."""


@dataclass(slots=True)
class RequestMetrics:
    """Times of a request, in seconds of `time.monotonic()`, and what happened to it."""

    arrival_s: float
    first_token_s: float | None = None
    finished_s: float | None = None
    num_cached_tokens: int = 0
    """Prompt tokens that the prefix cache had (of the first sample)."""
    num_preemptions: int = 0
    """Times the request lost its blocks and was recomputed (over all samples)."""
    speculative: SpeculativeMetrics | None = None
    """Drafts and their acceptance (over all samples); None for a request that does not speculate."""

    @property
    def time_to_first_token_s(self) -> float | None:
        """From arrival to the first token, waiting included."""
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s


@dataclass(slots=True)
class CompletionOutput:
    """One sample of a request; in a stream, what is new of it."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    """Sum over all tokens so far, None unless logprobs were asked for."""
    logprobs: list[TokenLogprobDict] | None = None
    """One entry per token of `token_ids`, None unless asked for."""
    finish_reason: str | None = None
    """"stop", "length" or "abort"; None while it goes on."""
    stop_reason: int | str | None = None
    """The stop string or stop token id that ended it; None for the model's own end and for other reasons."""


@dataclass(slots=True)
class RequestOutput:
    """The result of a request; in a stream, what is new since the previous one.

    `text`, `token_ids`, `finish_reason` and `logprobs` are those of the first (usually the only) sample.
    """

    request_id: str
    prompt: str | None
    """The prompt's text, None where it was given as token ids."""
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: list[TokenLogprobDict | None] | None = None
    """One entry per prompt token, None for the first and for those before `prompt_logprobs_start`; None unless asked for."""

    @property
    def text(self) -> str:
        """Text of the first sample."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        """Tokens of the first sample."""
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> str | None:
        """Why the first sample ended, None while it goes on."""
        return self.outputs[0].finish_reason

    @property
    def stop_reason(self) -> int | str | None:
        """What stopped the first sample."""
        return self.outputs[0].stop_reason

    @property
    def logprobs(self) -> list[TokenLogprobDict] | None:
        """Log-probabilities of the first sample's tokens."""
        return self.outputs[0].logprobs

    def _repr_html_(self) -> str:
        prompt = self.prompt if self.prompt is not None else f"{len(self.prompt_token_ids)} tokens"
        rows = "".join(
            f"<tr><td>{o.index}</td><td style='white-space:pre-wrap;text-align:left'>{html.escape(o.text)}</td>"
            f"<td>{len(o.token_ids)}</td><td>{html.escape(str(o.finish_reason))}</td></tr>"
            for o in self.outputs
        )
        return (
            f"<table><caption style='white-space:pre-wrap;text-align:left'>{html.escape(prompt)}</caption>"
            f"<tr><th></th><th style='text-align:left'>text</th><th>tokens</th><th>finished</th></tr>{rows}</table>"
        )
