"""What a user asked for, and what has come of it: a `Generation` with its samples, and the sink of its results."""

from __future__ import annotations

import dataclasses
import time
from typing import Protocol

from .detokenizer import Detokenizer
from .inputs import CheckedInput
from .outputs import CompletionOutput, RequestMetrics, RequestOutput, TokenLogprobDict
from .request import Request
from .sampler import derive_seed


class Sink(Protocol):
    """Where a generation's results go; called on the core's thread, so it must be quick and must not raise."""

    wants_increments: bool
    """Whether `increment` is to be called; if not, only the final output is made."""

    def increment(self, output: RequestOutput) -> None:
        """What is new since the last call."""

    def finish(self, output: RequestOutput) -> None:
        """The whole result."""

    def fail(self, error: Exception) -> None:
        """The generation was lost."""


class Sample:
    """One sample of a generation: its request, text and log-probabilities."""

    def __init__(self, index: int, request: Request, detokenizer: Detokenizer | None, keep_logprobs: bool) -> None:
        self.index = index
        self.request = request
        self.detokenizer = detokenizer
        self.logprobs: list[TokenLogprobDict] | None = [] if keep_logprobs else None
        self.cumulative_logprob: float | None = 0.0 if keep_logprobs else None
        self.finished = False
        self.num_delivered = 0

    def output(self, text: str, since: int) -> CompletionOutput:
        """The tokens from number `since` on, with the given text."""
        request = self.request
        reason = request.finish_reason if self.finished else None
        return CompletionOutput(
            self.index,
            text,
            request.output_token_ids[since:],
            self.cumulative_logprob,
            None if self.logprobs is None else self.logprobs[since:],
            None if reason is None else reason.value,
            request.stop_reason if self.finished else None,
        )


class Generation:
    """One user request: `params.n` sequences over one prompt."""

    def __init__(self, request_id: str, checked: CheckedInput, seed: int, sink: Sink, eos: frozenset[int]) -> None:
        self.request_id = request_id
        self.prompt = checked.prompt
        self.params = checked.params
        self.sink = sink
        self.metrics = RequestMetrics(arrival_s=time.monotonic())
        self.prompt_logprobs: dict[int, TokenLogprobDict] = {}
        self.samples: list[Sample] = []
        self.num_unfinished = self.params.n
        self.prompt_announced = False
        n = self.params.n
        ids = [request_id] if n == 1 else [f"{request_id}/{i}" for i in range(n)]
        later = self.params if n == 1 else dataclasses.replace(self.params, prompt_logprobs=None)
        self.requests = [
            Request(
                ids[i],
                checked.token_ids,
                self.params if i == 0 else later,
                eos_token_ids=eos,
                wait_for=ids[0] if i else None,
            )
            for i in range(n)
        ]
        self.seeds = [seed if i == 0 else derive_seed(seed, i) for i in range(n)]

    def final_output(self) -> RequestOutput:
        """The whole result of finished (or aborted) sequences."""
        self._count()
        outputs = [s.output(s.detokenizer.text if s.detokenizer else "", 0) for s in self.samples]
        return self._wrap(outputs, self._all_prompt_logprobs())

    def increment(self, sample: Sample, text: str) -> RequestOutput:
        """What is new of one sequence."""
        output = sample.output(text, sample.num_delivered)
        sample.num_delivered = len(sample.request.output_token_ids)
        prompt_logprobs = None
        if not self.prompt_announced:
            self.prompt_announced = True
            self._count()
            prompt_logprobs = self._all_prompt_logprobs()
        elif sample.finished:
            self._count()
        return self._wrap([output], prompt_logprobs)

    def _wrap(
        self, outputs: list[CompletionOutput], prompt_logprobs: list[TokenLogprobDict | None] | None
    ) -> RequestOutput:
        ids = self.requests[0].prompt_token_ids
        return RequestOutput(
            self.request_id, self.prompt, ids, outputs, self.num_unfinished == 0, self.metrics, prompt_logprobs
        )

    def _all_prompt_logprobs(self) -> list[TokenLogprobDict | None] | None:
        if self.params.prompt_logprobs is None:
            return None
        return [self.prompt_logprobs.get(i) for i in range(self.requests[0].num_prompt_tokens)]

    def _count(self) -> None:
        self.metrics.num_cached_tokens = self.requests[0].num_cached_tokens
        self.metrics.num_preemptions = sum(r.num_preemptions for r in self.requests)
