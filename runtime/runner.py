"""One step on the device: plan -> batch -> engine -> sampler -> tokens.

`launch` puts a step into the device's queue and returns; `collect` waits for its tokens. A step may be launched while the
one before it computes: tokens go from the sampler to the next batch on the device, and come to the host beside that.

    launch(n)            launch(n + 1)  collect(n)            launch(n + 2)  collect(n + 1)
    device: | engine n . sample n | copy | engine n + 1 . sample n + 1 | copy | ...

What is launched later may overwrite the engine's logits: the sampler has read them by then, on the same stream.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .batch import Batch, Engine
from .batch_builder import BatchBuilder
from .distribution import token_logprobs
from .logits import SamplingState
from .packing import HostCopy, upload
from .plan import ScheduledRequest, StepPlan
from .request import Request
from .sampler import PendingSample, Sampler, SamplerOutput, TokenLogprobs
from .sampling_params import SamplingParams
from .speculative.config import SpeculativeConfig
from .speculative.hidden_rows import StepHidden, columns_of
from .speculative.verification import Outcome, StepDrafts, VerificationRows

_ENDED = SamplingState(SamplingParams(temperature=0), (), (), 0)
"""Stands for a request that ended before its row was sampled: nobody looks at the token."""
_NOTHING: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)


@dataclass(slots=True)
class StepResult:
    """What a step produced; indices are those of `plan.scheduled`."""

    tokens: npt.NDArray[np.int64] | list[list[int]]
    """One new token for each row that samples, or the new tokens of every row: what `Scheduler.update` takes."""
    logprobs: dict[int, tuple[TokenLogprobs, tuple[int, ...]]] = field(default_factory=dict)
    """Index -> (log-probabilities, the rows in them) of the new tokens."""
    outcomes: list[Outcome] = field(default_factory=list)
    """What became of the drafts of the requests that had some."""
    prompt_logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    """Index -> log-probabilities of the prompt tokens first_logit_row + 1 ... that follow the computed rows."""
    failed: list[int] = field(default_factory=list)
    """Indices whose logits had no finite maximum; their token is a placeholder."""
    failed_prompts: dict[int, int] = field(default_factory=dict)
    """Index -> the first position of its prompt whose logits give no probabilities (NaN or infinite)."""
    hidden: StepHidden | None = None
    """Hidden states of all rows, where a proposer reads them."""
    wait_s: float = 0.0
    """How long the host waited for the device."""


class LaunchedStep:
    """A step in the device's queue."""

    __slots__ = (
        "accepted",
        "drafted",
        "hidden",
        "logits",
        "num_outputs",
        "pending",
        "plan",
        "prompts",
        "states",
        "values",
    )

    def __init__(self, plan: StepPlan) -> None:
        self.plan = plan
        self.states: list[SamplingState] = []
        """Of the rows that sample."""
        self.num_outputs = _NOTHING
        """[R] which of its request's tokens each of them samples, from 0."""
        self.logits: torch.Tensor | None = None
        """[R, V] of the same rows, until they are sampled."""
        self.pending: PendingSample | None = None
        self.prompts: list[tuple[int, tuple[torch.Tensor, ...]]] = []
        """Index of a row, and the log-probabilities of its prompt tokens."""
        self.values: HostCopy | None = None
        self.drafted: VerificationRows | None = None
        """The drafts that the step verifies."""
        self.hidden: StepHidden | None = None
        self.accepted: torch.Tensor | None = None
        """[Q] the last accepted draft of each request with drafts."""


class Runner:
    """Executes plans on an engine. Requests are added before their first step and released after their last.

    speculative: how drafts are accepted; None: no plan has drafts.

    Not thread-safe; needs the engine's cache to be bound.
    """

    def __init__(self, engine: Engine, speculative: SpeculativeConfig | None = None) -> None:
        self.engine = engine
        self.speculative = speculative
        self.sampler = Sampler(engine.vocab_size, engine.device)
        self._builder = BatchBuilder(
            num_groups=len(engine.cache_groups),
            block_size=engine.block_size,
            max_seq_len=engine.max_seq_len,
            max_sequences=engine.max_sequences,
            device=engine.device,
        )
        self._hidden_columns: list[int] = []
        self._states: dict[str, SamplingState] = {}
        self._num_late = 0
        self._tokens: torch.Tensor | None = None
        self._decodes: tuple[Request, ...] | None = None
        self._decode_states: list[SamplingState] = []
        self._num_prompt: npt.NDArray[np.int64] = _NOTHING

    def add(self, request: Request, seed: int) -> SamplingState:
        """Takes note of a new request; `seed` (64 bits) decides all its random draws."""
        state = self._states[request.request_id] = SamplingState(
            request.params,
            request.prompt_token_ids,
            request.output_token_ids,
            seed,
            tuple(sorted(request.stop_ids)),
            tuple(tuple(word) for word in request.params.bad_token_ids or ()),
        )
        state.late = state.follows_tokens or self.sampler.reads_device(state)
        self._num_late += state.late
        return state

    def capture_hidden(self, layers: Sequence[int]) -> None:
        """Every step's result has these hidden states from now on. Raises ValueError for an engine that was built without them."""
        self._hidden_columns = columns_of(self.engine, layers)

    def state(self, request_id: str) -> SamplingState:
        """The sampling state of a live request."""
        return self._states[request_id]

    def end_steps(self, request_id: str) -> None:
        """No later step has this request: its place in the batch goes to others. To be followed by `release`."""
        self._builder.release(request_id)

    def release(self, request_id: str) -> None:
        """Frees what belongs to a request that has ended; harmless for an unknown one."""
        self._builder.release(request_id)
        state = self._states.pop(request_id, None)
        if state is not None:
            state.alive = False
            self._num_late -= state.late
            self.sampler.release(state)

    def execute(self, plan: StepPlan) -> StepResult:
        """Runs a plan and waits for its tokens; whatever the engine raises passes through."""
        step = self.launch(plan)
        self.sample(step)
        return self.collect(step)

    @torch.inference_mode()
    def launch(self, plan: StepPlan, drafts: StepDrafts | None = None) -> LaunchedStep:
        """Puts a plan into the device's queue; whatever the engine raises passes through.

        drafts: what the plan's rows with drafts verify.

        `sample` has to follow when the step in flight has its result, unless the step `is_sampled` at once. It is not
        where a row's distribution depends on the token in flight (penalties, bad words of several tokens), or where sampling
        would make the host wait for this step before it delivers the one in flight (top_p without top_k).
        """
        batch = self._builder.build(plan, self._tokens if plan.on_top else None, drafts)
        step = LaunchedStep(plan)
        if self._hidden_columns:
            logits, step.hidden = self._step_with_hidden(batch, plan)
        else:
            logits = self.engine.step(batch)
        self._check(logits, batch)
        kept = self._choose_rows(step, logits, drafts)
        if plan.has_drafts:
            assert drafts is not None and self.speculative is not None, "a plan with drafts goes with their proposal"
            rows = batch.sample_rows if kept is None else batch.sample_rows.index_select(0, kept)
            every = rows.shape[0] == batch.num_tokens  # rows ascend
            at_R = batch.token_ids if every else batch.token_ids.index_select(0, rows)
            step.drafted = VerificationRows(plan, drafts, self.speculative, at_R)
        if not (plan.on_top and self._num_late and any(state.late for state in step.states)):
            self.sample(step)
        return step

    def _step_with_hidden(self, batch: Batch, plan: StepPlan) -> tuple[torch.Tensor, StepHidden]:
        engine: Any = self.engine
        logits, states = engine.step_outputs(batch)
        if len(self._hidden_columns) < states.shape[1] or self._hidden_columns != sorted(self._hidden_columns):
            states = states[:, self._hidden_columns]
        return logits, StepHidden(states, [plan.request(index).num_preemptions for index in range(plan.num_sequences)])

    @staticmethod
    def is_sampled(step: LaunchedStep) -> bool:
        """Whether a launched step has been sampled."""
        return step.values is not None

    @torch.inference_mode()
    def sample(self, step: LaunchedStep) -> None:
        """Samples a launched step that is not sampled yet."""
        if step.values is not None:
            return
        tensors = [tensor for _, parts in step.prompts for tensor in parts]
        if step.states:
            assert step.logits is not None
            states = step.states
            if not all([state.alive for state in states]):
                states = [state if state.alive else _ENDED for state in states]
            step.pending = self.sampler.launch(step.logits, states, step.num_outputs, step.drafted)
            self._tokens = step.pending.tokens
            tensors += step.pending.tensors()
            if step.drafted is not None:
                step.accepted = step.drafted.follow(step.pending.tokens)
                tensors += [step.accepted, *step.drafted.device_values()]
        step.logits = None
        step.values = HostCopy(tensors, self.engine.device)

    def collect(self, step: LaunchedStep) -> StepResult:
        """Waits for the end of a sampled step, and for its tokens."""
        assert step.values is not None, f"step {step.plan.step_id} is not sampled"
        start = time.perf_counter()
        values = step.values.wait()
        result = StepResult(_NOTHING, hidden=step.hidden, wait_s=time.perf_counter() - start)
        for n, (index, parts) in enumerate(step.prompts):
            found = TokenLogprobs(*values[len(parts) * n : len(parts) * (n + 1)])
            undefined = np.flatnonzero(np.isnan(found.logprobs))
            if len(undefined):
                first = step.plan.others[index - len(step.plan.decodes)].first_logit_row
                result.failed_prompts[index] = first + int(undefined[0])
            else:
                result.prompt_logprobs[index] = found
        if step.pending is None:
            return result
        sampled = values[4 * len(step.prompts) :]
        num_sampled = len(step.pending.tensors())
        output = step.pending.output(sampled[:num_sampled])
        if step.drafted is not None:
            step.drafted.learn(sampled[num_sampled + 1 :])
            self._verify(step, step.drafted.outcomes(sampled[num_sampled]), output, result)
            return result
        result.tokens = output.tokens
        if len(output.tokens) and output.tokens.min() < 0:
            rows = step.plan.sampling_rows()
            result.failed = [rows[i] for i in np.flatnonzero(output.tokens < 0).tolist()]
            result.tokens = np.maximum(output.tokens, 0)
        if output.logprobs is not None:
            rows = step.plan.sampling_rows()
            result.logprobs = {rows[i]: (output.logprobs, (n,)) for i, n in output.logprob_index.items()}
        return result

    @staticmethod
    def _verify(step: LaunchedStep, outcomes: list[Outcome], output: SamplerOutput, result: StepResult) -> None:
        """The tokens of a step that verified drafts: of every request those along its accepted drafts."""
        plan, paths, first = step.plan, {outcome.index: outcome.path for outcome in outcomes}, 0
        tokens: list[list[int]] = [[] for _ in range(plan.num_sequences)]
        values = output.tokens.tolist()
        for index in plan.sampling_rows():
            path = paths.get(index, (first,))
            tokens[index] = [values[row] for row in path]
            if tokens[index][-1] < 0:
                result.failed.append(index)
                tokens[index][-1] = 0
            if output.logprobs is not None and first in output.logprob_index:
                result.logprobs[index] = (output.logprobs, tuple(output.logprob_index[row] for row in path))
            drafts = 0 if index < len(plan.decodes) else plan.others[index - len(plan.decodes)].num_draft_tokens
            first += 1 + drafts
        result.tokens, result.outcomes = tokens, outcomes

    def _check(self, logits: torch.Tensor, batch: Batch) -> None:
        expected = (batch.sample_rows.shape[0], self.engine.vocab_size)
        assert logits.shape == expected, f"the engine gave logits {tuple(logits.shape)}; expected {expected}"

    def _choose_rows(self, step: LaunchedStep, logits: torch.Tensor, drafts: StepDrafts | None) -> torch.Tensor | None:
        """The rows that are sampled, and on the way the log-probabilities of prompts; which of the rows of logits they are, on
        the device, or None for all of them.

        A request with drafts has a row for its last known token and one for each draft.
        """
        plan = step.plan
        if plan.decodes is not self._decodes:
            self._decodes = plan.decodes
            self._decode_states = [self._states[request.request_id] for request in plan.decodes]
            self._num_prompt = np.array([len(r.prompt_token_ids) for r in plan.decodes], dtype=np.int64)
        num_decodes = len(plan.decodes)
        sampling = [row for row in plan.others if row.samples]
        step.states, step.num_outputs = self._decode_states, plan.starts + 1 - self._num_prompt
        if sampling:
            states = list(step.states)
            more: list[int] = []
            for row in sampling:
                rows = 1 + row.num_draft_tokens
                end = row.start + row.num_tokens - row.request.num_prompt_tokens
                states += [self._states[row.request.request_id]] * rows
                if drafts is not None and row.num_draft_tokens:
                    first = end - row.num_draft_tokens
                    more += [first + depth for depth in drafts.depths(row)]
                else:
                    more.append(end)
            step.states = states
            step.num_outputs = np.concatenate((step.num_outputs, np.array(more, dtype=np.int64)))
        kept = None
        if logits.shape[0] != len(step.states):  # some requests want the logits of their prompts
            ends = list(accumulate((row.num_logit_rows for row in plan.others), initial=num_decodes))
            last = list(range(num_decodes))
            for index, row in enumerate(plan.others):
                if row.num_logit_rows and row.request.needs_prompt_logits:
                    self._prompt_logprobs(step, index + num_decodes, row, logits[ends[index] : ends[index + 1]])
                if row.samples:
                    last += range(ends[index + 1] - 1 - row.num_draft_tokens, ends[index + 1])
            kept = upload(np.array(last, dtype=np.int64), logits.device)
            logits = logits.index_select(0, kept)
        step.logits = logits
        return kept

    @staticmethod
    def _prompt_logprobs(step: LaunchedStep, index: int, row: ScheduledRequest, logits: torch.Tensor) -> None:
        """Row p of a prompt predicts token p + 1; the last row predicts the first output token, which is sampled."""
        request, num_top = row.request, row.request.params.prompt_logprobs
        assert num_top is not None and not row.num_draft_tokens
        targets: Sequence[int] = request.prompt_token_ids[row.first_logit_row + 1 : row.start + row.num_tokens + 1]
        if targets:
            tokens = upload(np.array(targets, dtype=np.int64), logits.device)
            step.prompts.append((index, token_logprobs(logits[: len(targets)], tokens, num_top)))
