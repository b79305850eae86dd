"""The serving core: scheduler, runner and detokenisation around one engine.

    Generation (what a user asked for, n samples) -- n Samples, each with a scheduler Request
        in turns:       schedule n, launch n, wait for n, update, text -> what is new goes to each Generation's sink
        asynchronous:   schedule n + 1, launch n + 1 while n computes; wait for n, update, text
        with drafts:    wait for n, update; propose, schedule n + 1, launch n + 1; text of n

One thread drives it. `LLM` puts a thread, handles and prompts around it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .batch import Engine
from .detokenizer import Detokenizer, StreamFactory
from .generation import Generation, Sample
from .logprob_records import LogprobRecords
from .plan import RequestUpdate, StepPlan
from .request import FinishReason, Request
from .runner import LaunchedStep, Runner, StepResult
from .sampler import TokenLogprobs
from .scheduler import Scheduler
from .speculative.config import SpeculativeConfig
from .speculative.metrics import SpeculativeMetrics
from .speculative.speculation import Speculation
from .speculative.verification import StepDrafts
from .step_times import StepTimes
from .tokenizer import Tokenizer

_NO_TOKEN = ", or every token is masked (allowed_token_ids, bad words, min_tokens). If no masks were asked for"


class _Received(NamedTuple):
    """A step's result that the scheduler has taken in and nobody else knows of yet."""

    plan: StepPlan
    result: StepResult
    updates: list[RequestUpdate]
    now: float
    """When it came, in seconds of `time.monotonic()`."""


class ServingCore:
    """Steps an engine through all generations. Not thread-safe, except `check_fits`.

    Args:
        engine: with its cache bound.
        scheduler: over the engine's blocks.
        tokenizer: None serves token ids only.
        asynchronous: plan and launch each step while the one before it computes.
        speculative: how drafts are accepted; `speculation` is then to be set, before the first request.
    """

    def __init__(
        self,
        engine: Engine,
        scheduler: Scheduler,
        tokenizer: Tokenizer | None,
        *,
        asynchronous: bool = False,
        speculative: SpeculativeConfig | None = None,
    ) -> None:
        self.engine = engine
        self.scheduler = scheduler
        self.tokenizer = tokenizer
        self.asynchronous = asynchronous
        self.times = StepTimes()
        self.runner = Runner(engine, speculative)
        self.speculation: Speculation | None = None
        self._in_flight: LaunchedStep | None = None
        self.eos_token_ids = frozenset(engine.eos_token_ids)
        self._streams = {} if tokenizer is None else {
            skip: StreamFactory(tokenizer, skip_special_tokens=skip) for skip in (True, False)
        }  # fmt: skip
        self._generations: dict[str, Generation] = {}
        self._samples: dict[str, tuple[Generation, Sample]] = {}
        self._logprobs = LogprobRecords(tokenizer)

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        return self.scheduler.has_work or self._in_flight is not None

    @property
    def num_generations(self) -> int:
        """Generations that have not ended."""
        return len(self._generations)

    def check_fits(self, generation: Generation) -> None:
        """Raises ValueError, with the numbers, for a generation that can never run; changes nothing."""
        self.scheduler.check_fits(generation.requests[0])

    def add(self, generation: Generation) -> None:
        """Queues a generation. Raises ValueError if it cannot run or its id is in use, and then queues nothing."""
        if generation.request_id in self._generations:
            raise ValueError(f"request id {generation.request_id!r} is in use; choose another")
        for request in generation.requests:
            if request.request_id in self._samples:
                raise ValueError(f"request id {request.request_id!r} is in use; choose another")
        params = generation.params
        speculates = self.speculation is not None and params.speculative is not False
        generation.metrics.speculative = SpeculativeMetrics() if speculates else None
        for index, (request, seed) in enumerate(zip(generation.requests, generation.seeds)):
            detokenizer = None
            if self._streams and params.detokenize:
                stops = tuple(params.stop or ())
                detokenizer = Detokenizer(
                    self._streams[params.skip_special_tokens].make(),
                    stops,
                    include_stop=params.include_stop_str_in_output,
                    min_tokens=params.min_tokens,
                )
            request.reports_tokens = bool(
                generation.sink.wants_increments or params.stop or params.logprobs is not None
            )
            sample = Sample(index, request, detokenizer, params.logprobs is not None)
            self.scheduler.add_request(request)  # raises for the first, or for none: they have the same lengths
            generation.samples.append(sample)
            state = self.runner.add(request, seed)
            if self.speculation is not None and generation.metrics.speculative is not None:
                self.speculation.add(request, state, generation.metrics.speculative)
            self._samples[request.request_id] = (generation, sample)
        self._generations[generation.request_id] = generation

    def abort(self, request_id: str) -> bool:
        """Ends a generation with what it has; False if no live one has the id."""
        generation = self._generations.get(request_id)
        if generation is None:
            return False
        for sample in generation.samples:
            if not sample.finished:
                self.scheduler.finish(sample.request.request_id, FinishReason.ABORT)
                self._end(generation, sample, [])
        return True

    def step(self) -> int:
        """Launches one step and delivers the results of one; returns the number of tokens launched.

        In turns that is the same step; asynchronously it is the step before, whose results are waited for when the new
        one is in the device's queue. Where drafts are wanted, they are waited for first: they decide where the next step
        begins, and only their delivery goes on beside it. If the engine raises, every generation of the step's plan fails
        with that error, its blocks are freed, and the core can go on with others.
        """
        before, self._in_flight = self._in_flight, None
        received: _Received | None = None
        drafts: StepDrafts | None = None
        if self.speculation is not None:
            self.speculation.begin_step(None if before is None else before.plan)
            if self.speculation.wants_drafts():
                if before is not None:
                    received, before = self._receive(before), None
                try:
                    drafts = self._propose()
                except Exception as error:  # the draft model's boundary: those who wait for a result get the error
                    self._deliver(received)
                    self._fail_running(error)
                    return 0
        start = time.perf_counter()
        plan = self.scheduler.schedule()
        now = time.perf_counter()
        self.times.schedule_s += now - start
        launched = None if plan is None else self._launch(plan, drafts)
        self.times.launch_s += time.perf_counter() - now
        ahead = before is not None
        if before is not None:
            received = self._receive(before)
        self._deliver(received)
        if plan is None:
            return 0
        self.times.steps += 1
        self.times.ahead += ahead
        if isinstance(launched, LaunchedStep) and not self.runner.is_sampled(launched):
            self.times.late += 1
            launched = self._sample_late(launched)
        if isinstance(launched, Exception):
            self._fail_step(plan, launched)
        elif self.asynchronous:
            self._in_flight = launched
        elif launched is not None:
            self._deliver(self._receive(launched))
        return plan.num_tokens

    def _propose(self) -> StepDrafts | None:
        assert self.speculation is not None
        start = time.perf_counter()
        drafts = self.speculation.propose()
        self.times.propose_s += time.perf_counter() - start
        return drafts

    def _launch(self, plan: StepPlan, drafts: StepDrafts | None) -> LaunchedStep | Exception:
        try:
            return self.runner.launch(plan, drafts)
        except Exception as error:  # the engine's boundary: whoever waits for a result gets the error
            return error

    def _sample_late(self, step: LaunchedStep) -> LaunchedStep | Exception:
        try:
            self.runner.sample(step)
        except Exception as error:  # as above
            return error
        return step

    def _receive(self, step: LaunchedStep) -> _Received | None:
        """Waits for a step's tokens and takes them into the scheduler; None if the step failed."""
        plan = step.plan
        try:
            result = self.runner.collect(step)
        except Exception as error:  # the device's boundary, as above
            self._fail_step(plan, error)
            return None
        start = time.perf_counter()
        self.times.wait_s += result.wait_s
        now = time.monotonic()
        for index in result.failed:
            request = plan.request(index)
            self._fail_row(request, f"no token can be chosen at position {request.num_tokens}", _NO_TOKEN)
        for index, position in result.failed_prompts.items():
            self._fail_row(plan.request(index), f"no log-probabilities after position {position} of the prompt", "")
        if self.speculation is not None:
            self.speculation.keep_branches(result.outcomes, plan)
        updates = self.scheduler.update(plan, result.tokens)
        for update in updates:
            if (
                update.finished
            ):  # its place may be another's in the next step, which is launched before this is delivered
                self.runner.end_steps(update.request.request_id)
        if self.speculation is not None:
            self.speculation.end_step(plan, result.tokens)
            self.speculation.observe(result, plan, updates)
        self.times.deliver_s += time.perf_counter() - start
        return _Received(plan, result, updates, now)

    def _deliver(self, received: _Received | None) -> None:
        """Brings what a step gave to those who wait for it."""
        if received is None:
            return
        plan, result, updates, now = received
        start = time.perf_counter()
        for index, logprobs in result.prompt_logprobs.items():
            self._keep_prompt_logprobs(plan, index, logprobs)
        if result.logprobs:
            self._keep_logprobs(plan, result, updates)
        for update in updates:
            entry = self._owner(update.request)
            if entry is None:  # lost since: the step behind it failed
                continue
            generation, sample = entry
            if generation.metrics.first_token_s is None:
                generation.metrics.first_token_s = now
            self._take(generation, sample, update)
        self.times.deliver_s += time.perf_counter() - start

    def _owner(self, request: Request) -> tuple[Generation, Sample] | None:
        """Whose request it is; None once it has ended (its id may be another's by then)."""
        entry = self._samples.get(request.request_id)
        return entry if entry is not None and entry[1].request is request else None

    def fail_all(self, error: Exception) -> None:
        """Fails every generation and frees its blocks; waits for the step in flight."""
        for generation in list(self._generations.values()):
            self._fail(generation, error)
        if self._in_flight is not None:
            step, self._in_flight = self._in_flight, None
            self._deliver(self._receive(step))

    # --- results ------------------------------------------------------------------------------------------------

    def _take(self, generation: Generation, sample: Sample, update: RequestUpdate) -> None:
        """New tokens of one sample: text, stop strings, delivery."""
        tokens = update.new_token_ids
        if update.finished:
            self._end(generation, sample, tokens)
            return
        stream = generation.sink.wants_increments
        detokenizer = sample.detokenizer
        if detokenizer is None or not (stream or generation.params.stop):
            if stream:
                generation.sink.increment(generation.increment(sample, ""))
            return
        text, taken = detokenizer.push(tokens)
        if detokenizer.stop is not None:
            self.scheduler.finish(sample.request.request_id, FinishReason.STOP, detokenizer.stop)
            self._drop_tokens(sample, len(tokens) - taken)
            self._close(generation, sample, text)
        elif stream:
            generation.sink.increment(generation.increment(sample, text))

    def _end(self, generation: Generation, sample: Sample, tokens: Sequence[int]) -> None:
        """The request has ended, for another reason than a stop string; `tokens` are its last new ones."""
        request, params, detokenizer = sample.request, generation.params, sample.detokenizer
        text = ""
        if detokenizer is not None:
            hides_last = request.finish_reason is FinishReason.STOP and not params.include_stop_str_in_output
            if generation.sink.wants_increments or params.stop:
                shown = tokens[: len(tokens) - hides_last]
                text, taken = detokenizer.push(shown)
                dropped = len(tokens) - taken if detokenizer.stop is not None else 0
                text += detokenizer.flush()
                if detokenizer.stop is not None:
                    self._drop_tokens(sample, dropped)
                    request.finish_reason, request.stop_reason = FinishReason.STOP, detokenizer.stop
            else:
                assert self.tokenizer is not None
                ids = request.output_token_ids[: len(request.output_token_ids) - hides_last]
                detokenizer.text = self.tokenizer.decode(ids, skip_special_tokens=params.skip_special_tokens)
        self._close(generation, sample, text)

    def _drop_tokens(self, sample: Sample, num_tokens: int) -> None:
        """Forgets tokens that came in the same step behind the one that completed a stop string."""
        if num_tokens:
            del sample.request.output_token_ids[-num_tokens:]
            if sample.logprobs is not None:
                del sample.logprobs[-num_tokens:]

    def _close(self, generation: Generation, sample: Sample, text: str) -> None:
        """Marks a sequence finished and delivers it, and the generation with its last one."""
        sample.finished = True
        generation.num_unfinished -= 1
        self._forget(sample.request.request_id)
        if generation.num_unfinished == 0:
            generation.metrics.finished_s = time.monotonic()
            del self._generations[generation.request_id]
        if generation.sink.wants_increments:
            generation.sink.increment(generation.increment(sample, text))
        if generation.num_unfinished == 0:
            generation.sink.finish(generation.final_output())

    def _forget(self, request_id: str) -> None:
        self.runner.release(request_id)
        entry = self._samples.pop(request_id, None)
        if entry is not None and self.speculation is not None:
            self.speculation.release(entry[1].request)

    # --- failures -----------------------------------------------------------------------------------------------

    def _fail_row(self, request: Request, what: str, masks: str) -> None:
        owner = self._owner(request)
        if owner is not None:
            self._fail(owner[0], RuntimeError(
                f"request {request.request_id!r}: {what}: the logits are NaN or infinite{masks}, the model's numerics are "
                "at fault: compare with target='eager'"
            ))  # fmt: skip

    def _fail_step(self, plan: StepPlan, error: Exception) -> None:
        for row in plan.scheduled:
            entry = self._owner(row.request)
            if entry is not None:
                failure = RuntimeError(
                    f"request {entry[0].request_id!r} was lost: step {plan.step_id} ({plan.num_sequences} sequences, "
                    f"{plan.num_tokens} tokens) raised {type(error).__name__}: {error}"
                )
                failure.__cause__ = error
                self._fail(entry[0], failure)
        # All requests of the plan have ended, so it takes no tokens; the scheduler only wants it answered.
        self.scheduler.update(plan, [[] for _ in plan.scheduled])

    def _fail_running(self, error: Exception) -> None:
        """Every generation with a running request fails: no drafts could be made."""
        for request in self.scheduler.running:
            entry = self._owner(request)
            if entry is not None:
                failure = RuntimeError(
                    f"request {entry[0].request_id!r} was lost: drafting raised {type(error).__name__}: {error}"
                )
                failure.__cause__ = error
                self._fail(entry[0], failure)

    def _fail(self, generation: Generation, error: Exception) -> None:
        for sample in generation.samples:
            if not sample.finished:
                self.scheduler.finish(sample.request.request_id, FinishReason.ABORT)
                self._forget(sample.request.request_id)
        with contextlib.suppress(KeyError):
            del self._generations[generation.request_id]
            generation.sink.fail(error)

    # --- log-probabilities --------------------------------------------------------------------------------------

    def _keep_logprobs(self, plan: StepPlan, result: StepResult, updates: Iterable[RequestUpdate]) -> None:
        rows = {id(plan.request(index)): found for index, found in result.logprobs.items()}
        for update in updates:
            entry, found = self._owner(update.request), rows.get(id(update.request))
            if entry is not None and found is not None and entry[1].logprobs is not None:
                values, numbers = found
                self._logprobs.add_output(entry[1], values, numbers, update.new_token_ids)

    def _keep_prompt_logprobs(self, plan: StepPlan, index: int, values: TokenLogprobs) -> None:
        request = plan.request(index)
        entry = self._owner(request)
        if entry is not None:
            first = plan.others[index - len(plan.decodes)].first_logit_row
            self._logprobs.add_prompt(entry[0], request, first + 1, values)
