"""One step on the device: plan -> batch -> engine -> sampler -> tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from .batch import Batch, BatchBuilder, Engine
from .logits import SamplingState
from .plan import ScheduledRequest, StepPlan
from .request import Request
from .sampler import Sampler, SamplerOutput, TokenLogprobs, prompt_token_logprobs


@dataclass(slots=True)
class StepResult:
    """What a step produced; indices are those of `plan.scheduled`."""

    sampled: list[list[int]]
    """New tokens, [] where nothing is sampled: what `Scheduler.update` takes."""
    logprobs: dict[int, tuple[TokenLogprobs, int]] = field(default_factory=dict)
    """Index -> (log-probabilities, the row in them) of the sampled token."""
    prompt_logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    """Index -> log-probabilities of the prompt tokens start + 1 ... that follow the computed rows."""
    failed: list[int] = field(default_factory=list)
    """Indices whose logits had no finite maximum; their `sampled` entry is a placeholder."""


class Runner:
    """Executes plans on an engine. Requests are added before their first step and released after their last.

    Not thread-safe; needs the engine's cache to be bound.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.sampler = Sampler(engine.vocab_size, engine.device)
        self._builder = BatchBuilder(
            num_groups=len(engine.cache_groups),
            block_size=engine.block_size,
            max_seq_len=engine.max_seq_len,
            max_sequences=engine.max_sequences,
            device=engine.device,
        )
        self._states: dict[str, SamplingState] = {}

    def add(self, request: Request, seed: int) -> None:
        """Takes note of a new request; `seed` (64 bits) decides all its random draws."""
        self._states[request.request_id] = SamplingState(
            request.params,
            request.prompt_token_ids,
            request.output_token_ids,
            seed,
            tuple(sorted(request.stop_ids)),
            tuple(tuple(word) for word in request.params.bad_token_ids or ()),
        )

    def release(self, request_id: str) -> None:
        """Frees what belongs to a request that has ended; harmless for an unknown one."""
        self._builder.release(request_id)
        state = self._states.pop(request_id, None)
        if state is not None:
            self.sampler.release(state)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Runs a plan and waits for its tokens; whatever the engine raises passes through."""
        batch = self._builder.build(plan)
        logits = self.engine.step(batch)
        self._check(logits, batch)
        return self._sample(plan.scheduled, logits)

    def _check(self, logits: torch.Tensor, batch: Batch) -> None:
        expected = (batch.sample_rows.shape[0], self.engine.vocab_size)
        assert logits.shape == expected, f"the engine gave logits {tuple(logits.shape)}; expected {expected}"

    def _sample(self, scheduled: Sequence[ScheduledRequest], logits: torch.Tensor) -> StepResult:
        sampling = [i for i, row in enumerate(scheduled) if row[5]]
        result = StepResult([[] for _ in scheduled])
        if len(sampling) != logits.shape[0]:  # some requests want the logits of their prompts
            ends = list(accumulate(row[4] for row in scheduled))
            for i, row in enumerate(scheduled):
                if row[4] and row[0].needs_prompt_logits:
                    self._prompt_logprobs(i, row, logits[ends[i] - row[4] : ends[i]], result)
            logits = logits[torch.tensor([ends[i] - 1 for i in sampling], dtype=torch.int64, device=logits.device)]
        if not sampling:
            return result
        states = self._states
        output = self.sampler.sample(logits, [states[scheduled[i][0].request_id] for i in sampling])
        self._collect(sampling, output, result)
        return result

    def _collect(self, sampling: Sequence[int], output: SamplerOutput, result: StepResult) -> None:
        tokens = output.tokens.tolist()
        if min(tokens) < 0:
            result.failed = [i for i, token in zip(sampling, tokens) if token < 0]
            tokens = [max(token, 0) for token in tokens]
        if len(tokens) == len(result.sampled):
            result.sampled = [[token] for token in tokens]
        else:
            for i, token in zip(sampling, tokens):
                result.sampled[i].append(token)
        if output.logprobs is not None:
            for row, n in output.logprob_index.items():
                result.logprobs[sampling[row]] = (output.logprobs, n)

    def _prompt_logprobs(self, index: int, row: ScheduledRequest, logits: torch.Tensor, result: StepResult) -> None:
        """Row p of a prompt predicts token p + 1; the last row predicts the first output token, which is sampled."""
        request, num_top = row.request, row.request.params.prompt_logprobs
        assert num_top is not None and not row.num_draft_tokens
        targets = request.prompt_token_ids[row.start + 1 : row.start + row.num_tokens + 1]
        if targets:
            result.prompt_logprobs[index] = prompt_token_logprobs(logits[: len(targets)], targets, num_top)
