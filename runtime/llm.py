"""`LLM`: a compiled model with its scheduler, from Python.

llm = LLM("my-engine")
for output in llm.generate(["Hello", "Once upon a time"], SamplingParams(max_tokens=64)):
    print(output.text)
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

import torch

from .async_llm import RequestHandle, ServingThread
from .batch import Engine
from .core import ServingCore
from .generation import Generation
from .inputs import CheckedInput, InputChecker, Message, split_prompts
from .kv_cache import CacheGroup
from .memory import MemoryLedger, plan_cache
from .opening import engine_of, tokenizer_of
from .outputs import RequestOutput
from .ownership import EngineClaim
from .plan import SchedulerConfig, SchedulerStats
from .policies import PolicyName
from .progress_bar import progress_bar
from .sampler import derive_seed
from .sampling_params import SamplingParams
from .scheduler import Scheduler
from .speculative.build import check_config, make_proposer, open_draft_engine, write_steps
from .speculative.config import SpeculativeConfig
from .speculative.draft_model import full_group
from .speculative.metrics import SpeculativeMetrics
from .speculative.speculation import Speculation
from .step_times import StepTimes
from .trace import TracedScheduler

logger = logging.getLogger(__name__)


class GenerationError(RuntimeError):
    """Some requests of a `generate` call were lost; the others' results are in `outputs`.

    Attributes:
        outputs: one entry per prompt, None where it was lost.
        errors: index of a prompt -> what happened.
    """

    def __init__(self, outputs: list[RequestOutput | None], errors: dict[int, Exception]) -> None:
        index, first = next(iter(errors.items()))
        super().__init__(f"{len(errors)} of {len(outputs)} requests were lost; prompts[{index}]: {first}")
        self.outputs = outputs
        self.errors = errors


@dataclass(frozen=True, slots=True, kw_only=True)
class LLMStats:
    """Load of an LLM and its counts since the start."""

    scheduler: SchedulerStats
    memory: MemoryLedger
    num_unfinished: int
    """Requests that have not ended."""
    num_computed_tokens: int
    """Tokens that went through the model, prompts included."""
    times: StepTimes
    """Steps, how many were launched ahead, and where the serving thread's time went."""
    speculative: SpeculativeMetrics | None = None
    """Drafts and their acceptance; None for an LLM that does not speculate."""


class LLM:
    """Serves one engine: batches whatever is asked of it, from any thread and from asyncio, in one serving thread.

    An engine has one KV cache, so it serves one LLM at a time: until `shutdown`, or until the LLM is garbage-collected.

    Args:
        model: an Engine; the directory of a saved artifact; or what `camshaft.compile` takes (a Hugging Face
            directory or id, an nn.Module), which is compiled first.
        kv_cache_bytes: size of the KV cache; None: what `memory_fraction` leaves (GPU), or what `max_sequences` full
            requests need within a share of the free memory (CPU).
        memory_fraction: share of the device's memory to use, in (0, 1]; not together with kv_cache_bytes.
        policy: when waiting requests start, see runtime/policies.py.
        chunked_prefill: compute long prompts over several steps.
        max_chunk_tokens: most tokens of one request in a step; None: the engine's max_batch_tokens.
        enable_prefix_cache: share KV blocks between requests with equal beginnings.
        cuda_graphs: capture decode steps as CUDA graphs at the start (GPU); False: launch them piece by piece.
        async_scheduling: plan and launch each step while the one before it computes, so that the GPU never waits for the
            host; None: on a GPU. On the CPU nothing overlaps. The tokens are the same.
        seed: of the requests that bring none; equal calls in equal order then draw equal tokens.
        speculative: draft tokens and verify several in a step, see docs/speculative.md; None: one token a step.
        trace: file to which every scheduling decision is written, for replay (it holds prompts and outputs in full).
        compile_kwargs: for `camshaft.compile`.

    Raises:
        ValueError: unfit arguments, memory too small for one block, or an engine that serves another LLM.
    """

    def __init__(
        self,
        model: Engine | str | Path | torch.nn.Module,
        *,
        kv_cache_bytes: int | None = None,
        memory_fraction: float | None = None,
        policy: PolicyName = "guaranteed_no_evict",
        chunked_prefill: bool = True,
        max_chunk_tokens: int | None = None,
        enable_prefix_cache: bool = True,
        cuda_graphs: bool = True,
        async_scheduling: bool | None = None,
        seed: int = 0,
        speculative: SpeculativeConfig | None = None,
        trace: str | Path | None = None,
        **compile_kwargs: Any,
    ) -> None:
        if speculative is not None and not isinstance(speculative, SpeculativeConfig):
            raise ValueError(f"speculative is a {type(speculative).__name__}; allowed: SpeculativeConfig or None")
        self.engine = engine = engine_of(model, compile_kwargs, speculative)
        self.draft_engine: Engine | None = None
        """Of speculation by a draft model."""
        if speculative is not None:
            check_config(speculative, engine)
            self.draft_engine = open_draft_engine(speculative, engine)
        engines = [engine] if self.draft_engine is None else [engine, self.draft_engine]
        with contextlib.ExitStack() as undo:  # if this fails, others can use the engines
            self._claims = []
            for one in engines:
                self._claims.append(EngineClaim(one))
                undo.callback(self._claims[-1].release)
            chunk = min(max_chunk_tokens or engine.max_batch_tokens, engine.max_batch_tokens)
            for one in engines:
                one.prepare()
            shared = 0 if self.draft_engine is None else full_group(engine)
            plan = plan_cache(
                engine, max_chunk_tokens=chunk, kv_cache_bytes=kv_cache_bytes, memory_fraction=memory_fraction,
                graph_bytes=sum(one.graph_bytes() for one in engines) if cuda_graphs else 0, draft=self.draft_engine,
                draft_group=shared,
            )  # fmt: skip
            self.memory = plan.ledger
            """Where the device's memory goes."""
            groups = tuple(
                CacheGroup(num_blocks=n, block_size=engine.block_size, window=spec.window)
                for n, spec in zip(plan.num_blocks, engine.cache_groups, strict=True)
            )
            config = SchedulerConfig(
                groups=groups,
                max_batch_tokens=engine.max_batch_tokens,
                max_sequences=engine.max_sequences,
                max_seq_len=engine.max_seq_len,
                policy=policy,
                chunked_prefill=chunked_prefill,
                max_chunk_tokens=max_chunk_tokens,
                enable_prefix_cache=enable_prefix_cache,
            )
            for one in engines:
                undo.callback(one.release_cache)
            engine.bind_cache(plan.num_blocks)
            if self.draft_engine is not None:
                self.draft_engine.bind_cache([plan.num_blocks[shared]] * len(self.draft_engine.cache_groups))
            if cuda_graphs:
                for one in engines:
                    one.capture()
            if speculative is not None:
                write_steps(speculative, engine, self.draft_engine)
            self.tokenizer = tokenizer_of(engine)
            """None where the engine came without one: then prompts are token ids and outputs have no text."""
            self._checker = InputChecker(self.tokenizer, vocab_size=engine.vocab_size, max_seq_len=engine.max_seq_len,
                                         speculates=speculative is not None)  # fmt: skip
            stream = None if trace is None else open(trace, "w", encoding="utf-8")  # noqa: SIM115 - closed by shutdown
            if stream is not None:
                undo.callback(stream.close)
            scheduler = Scheduler(config) if stream is None else TracedScheduler(config, stream)
            self._core = ServingCore(
                engine, scheduler, self.tokenizer,
                asynchronous=engine.device.type == "cuda" if async_scheduling is None else async_scheduling,
                speculative=speculative,
            )  # fmt: skip
            if speculative is not None:
                proposer = make_proposer(speculative, engine, self.draft_engine)
                self._core.speculation = Speculation(
                    speculative, proposer, scheduler, self._core.runner, drafts_on_host=stream is not None
                )
            self._serving = ServingThread(self._core)
            self._seed = seed
            self._numbers = itertools.count()
            self._close = weakref.finalize(self, _close, self._serving, stream, tuple(self._claims))
            undo.pop_all()
        logger.info("%s", self.memory)

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]:
        """Completes prompts, and returns one output per prompt, in their order.

        Args:
            prompts: one prompt or a list: a string, token ids, {"prompt": str}, {"prompt_token_ids": [...]}, or a chat
                (a list of {"role": ..., "content": ...}).
            sampling_params: for all, or one per prompt; None: `SamplingParams()`.
            progress: show a progress bar; None: if stderr is a terminal. `use_tqdm` is another name for it.

        Raises:
            ValueError: an input is not in order; then nothing was queued. The message names every bad prompt.
            GenerationError: requests were lost on the way; it carries the results of the others.
        """
        items, _ = split_prompts(prompts)
        with _no_collection():
            handles = self._submit(self._checker.check_all(items, sampling_params), stream=False)
        show = progress if progress is not None else use_tqdm
        try:
            with progress_bar(len(handles), show) as advance:
                for handle in handles:
                    handle.exception()  # errors are collected below, when all have ended
                    advance()
        except BaseException:
            for handle in handles:
                handle.abort()
            raise
        return _collect(handles)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str = "default",
        progress: bool | None = None,
        **template_variables: Any,
    ) -> list[RequestOutput]:
        """Answers one conversation, or several; see `generate` and `Tokenizer.render_chat`."""
        if self.tokenizer is None:
            raise ValueError("chat() needs a tokenizer and this engine has none; use generate() with token ids")
        one = bool(messages) and isinstance(messages[0], Mapping)
        chats = cast(Sequence[Sequence[Message]], [messages] if one or not messages else messages)
        prompts = []
        for chat in chats:
            text = self.tokenizer.render_chat(
                chat, add_generation_prompt=add_generation_prompt, tools=tools, template=template, **template_variables
            )
            ids = self.tokenizer.encode(text, add_special_tokens=False)
            prompts.append({"prompt": text, "prompt_token_ids": ids})
        return self.generate(prompts, sampling_params, progress=progress)

    def generate_async(
        self,
        prompt: Any,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        on_output: Callable[[RequestOutput], None] | None = None,
    ) -> RequestHandle:
        """Starts one request and returns at once; `async for` (or `for`) over the handle streams what is new.

        Args:
            prompt: one prompt of any form that `generate` takes.
            request_id: a name of your own, for `abort`; None: made up.
            on_output: called on the serving thread with what is new, instead of iterating; it must be quick. If it
                raises, the request ends with that error.

        Raises:
            ValueError: the input is not in order; nothing was queued.
        """
        checked = self._checker.check(prompt, SamplingParams() if sampling_params is None else sampling_params)
        return self._submit([checked], stream=True, request_id=request_id, on_output=on_output)[0]

    def abort(self, request_id: str) -> None:
        """Ends a request with what it has; harmless if it has ended or never was."""
        self._serving.abort(request_id)

    def stats(self) -> LLMStats:
        """Load and counts as of now."""
        return LLMStats(
            scheduler=self._core.scheduler.stats,
            memory=self.memory,
            num_unfinished=self._core.num_generations,
            num_computed_tokens=self._serving.num_tokens,
            times=dataclasses.replace(self._core.times),
            speculative=None if self._core.speculation is None else self._core.speculation.totals.copy(),
        )

    def shutdown(self) -> None:
        """Ends the serving thread and frees the KV cache; requests under way fail. The LLM cannot be used afterwards."""
        self._serving.close()
        for engine, claim in zip((self.engine, self.draft_engine), self._claims):
            if engine is not None and claim.held:  # otherwise this was shut down before: the cache may be another LLM's
                engine.release_cache()
        self._close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def _submit(
        self,
        inputs: Sequence[CheckedInput],
        *,
        stream: bool,
        request_id: str | None = None,
        on_output: Callable[[RequestOutput], None] | None = None,
    ) -> list[RequestHandle]:
        """Queues checked inputs, all or (raising ValueError) none."""
        handles: list[RequestHandle] = []
        generations: list[Generation] = []
        errors: list[str] = []
        for position, checked in enumerate(inputs):
            number = next(self._numbers)
            name = f"request-{number}" if request_id is None else request_id
            seed = derive_seed(self._seed, number) if checked.params.seed is None else checked.params.seed
            handle = RequestHandle(name, self._serving, wants_increments=stream, on_output=on_output)
            generation = Generation(name, checked, seed, handle, self._core.eos_token_ids)
            try:
                self._core.check_fits(generation)
            except ValueError as error:
                errors.append(f"prompts[{position}]: {error}" if len(inputs) > 1 else str(error))
            handles.append(handle)
            generations.append(generation)
        if errors:
            raise ValueError("\n".join(errors))

        def add() -> None:
            with _no_collection():
                for generation in generations:
                    try:
                        self._core.add(generation)
                    except ValueError as error:
                        generation.sink.fail(error)

        self._serving.submit(add)
        return handles


def _close(serving: ServingThread, trace: IO[str] | None, claims: Sequence[EngineClaim]) -> None:
    serving.close()
    for claim in claims:
        claim.release()
    if trace is not None:
        trace.close()


def _collect(handles: Sequence[RequestHandle]) -> list[RequestOutput]:
    outputs: list[RequestOutput | None] = []
    errors: dict[int, Exception] = {}
    for index, handle in enumerate(handles):
        error = handle.exception()
        if error is None:
            outputs.append(handle.result())
        else:
            outputs.append(None)
            errors[index] = error
    if errors:
        raise GenerationError(outputs, errors) from next(iter(errors.values()))
    return [output for output in outputs if output is not None]


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keeps the garbage collector from looking through thousands of requests, again and again, while they are made."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
