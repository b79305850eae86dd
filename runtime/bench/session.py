"""A session: one engine, measured on one case after another. The LLM is kept as long as the cases want it alike."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cases import DEFAULT_NAME, Case
from .document import result_entry
from .environment import seconds_since_start
from .load import arrival_times, run_load
from .measure import Repeat, repeat_runs, run_latency, run_throughput
from .profile import StepProfiler
from .recording import RecordingEngine
from .workload import BenchRequest, Workload, make_requests

if TYPE_CHECKING:
    from ..llm import LLM
    from ..speculative.config import SpeculativeConfig

_LATENCY_STEPS_BEFORE_PROFILE = 4
_PROFILED_BATCHES = 2
"""A profiled run has the requests of so many full batches, or all: its middle is like that of the whole run, and sooner there."""


class Session:
    """Measures an engine.

    engine: a compiled engine. text_tokens: take prompts from these tokens instead of random ones. tell: called with a case's label,
    the number of a repeat and its metrics. trace: file for the Chrome trace of a profile, or None. speculative: how the LLM drafts.
    """

    def __init__(
        self,
        engine: Any,
        *,
        text_tokens: Sequence[int] | None = None,
        tell: Callable[[str, int, Repeat], None] | None = None,
        trace: Path | None = None,
        speculative: SpeculativeConfig | None = None,
    ) -> None:
        self.engine = engine
        self._speculative = speculative
        self._text_tokens = text_tokens
        self._tell = tell or (lambda label, index, metrics: None)
        self._trace = trace
        self._llm: LLM | None = None
        self._recording: RecordingEngine | None = None
        self._kind: tuple[Any, ...] = ()
        self.start_up: dict[str, float] = {}
        """Seconds of the LLM that is open: prepare_s (weights to the device, engines opened), bind_cache_s, capture_s (CUDA
        graphs), ready_s (all of it), first_token_s (of a first request), process_s (from the process's start to that token)."""

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Shuts the LLM down; the engine stays prepared."""
        if self._llm is not None:
            self._llm.shutdown()
            self._llm = self._recording = None
            self._kind = ()
            if self.engine.device.type == "cuda":
                _free_device_memory()

    def requests(self, workload: Workload, repeat: int, salt: str = "") -> list[BenchRequest]:
        """The requests of a repeat, equal for all systems; salt: as in `make_requests`."""
        return make_requests(
            workload, repeat, vocab_size=self.engine.vocab_size, text_tokens=self._text_tokens, salt=salt
        )

    def measure(self, case: Case) -> list[dict[str, Any]]:
        """Camshaft's results of a case: one, or one for each rate. Raises ValueError for a case that the engine does not take."""
        case.workload.check_fits(self.engine.max_seq_len)
        llm, recording = self._open(case)
        facts = {
            "policy": case.policy,
            "limits": {"max_sequences": recording.max_sequences, "max_batch_tokens": recording.max_batch_tokens},
            "memory_bytes": dict(llm.memory.rows()),
            "start_up": dict(self.start_up),
        }
        for index in range(-case.warmup, 0):
            self._run(case, case.warmup_workload, index, math.inf if case.rates else None)
        entries = []
        for rate in case.rates or (None,):
            entry = result_entry("camshaft", case.mode, self._timed_runs(case, rate), **facts)
            if (metrics := llm.stats().speculative) is not None:
                entry["speculative"] = dataclasses.asdict(metrics)
            if rate is not None:
                entry |= {"request_rate": "inf" if math.isinf(rate) else rate, "slos": dict(case.slos)}
            entries.append(entry)
        return entries

    def profile(self, case: Case, entries: Sequence[dict[str, Any]]) -> None:
        """Adds "profile" to the results that `measure` gave for a case. Once it has run, a profiler may slow what is timed."""
        self._open(case)
        for rate, entry in zip(case.rates or (None,), entries, strict=True):
            entry["profile"] = self._profile(case, rate, entry["repeats"][-1])

    def _timed_runs(self, case: Case, rate: float | None) -> list[Repeat]:
        label = "camshaft" if case.name == DEFAULT_NAME else case.name
        label = label if rate is None else f"{label}, {rate:g} requests/s"
        return repeat_runs(
            lambda index: self._run(case, case.workload, index, rate),
            repeats=case.repeats, warmup=0, on_run=lambda index, metrics: self._tell(label, index, metrics),
        )  # fmt: skip

    def _run(self, case: Case, workload: Workload, index: int, rate: float | None) -> Repeat:
        llm, recording = self._opened()
        salt = "" if case.name == DEFAULT_NAME and rate is None else f" {case.name} {rate}"  # one prefix cache for all
        requests = self.requests(workload, index, salt)
        if rate is not None:
            arrivals = arrival_times(rate, len(requests), workload.seed + index)
            recording.clear()
            return run_load(llm, requests, arrivals, slos=case.slos, ignore_eos=workload.ignore_eos)
        measure = run_latency if case.mode == "latency" else run_throughput
        return measure(llm, recording, requests, ignore_eos=workload.ignore_eos)

    def _profile(self, case: Case, rate: float | None, timed: Repeat) -> dict[str, Any]:
        """Steps from the middle of one more run, beside the time of a step in a run without the profiler."""
        _, recording = self._opened()
        if case.mode == "latency":
            workload = dataclasses.replace(case.workload, num_requests=1)
            begin, wanted = _LATENCY_STEPS_BEFORE_PROFILE, case.profile_steps
            step_ms = timed.get("decode_ms_p50", math.nan)
        else:
            requests = min(case.workload.num_requests, _PROFILED_BATCHES * recording.max_sequences)
            workload = dataclasses.replace(case.workload, num_requests=requests)
            num_steps = int(timed["steps"] * requests / case.workload.num_requests)
            wanted = max(1, min(case.profile_steps, num_steps // 2))
            begin, step_ms = (num_steps - wanted) // 2, 1e3 * timed["duration_s"] / timed["steps"]
        profiler = StepProfiler(begin, wanted, device=self.engine.device.type, trace=self._trace)
        recording.on_step = profiler
        try:
            self._run(case, workload, case.repeats, rate)
        finally:
            recording.on_step = None
        return {**profiler.result(), "timed_step_ms": step_ms}

    # --- the LLM --------------------------------------------------------------------------------------------------

    def _opened(self) -> tuple[LLM, RecordingEngine]:
        assert self._llm is not None and self._recording is not None
        return self._llm, self._recording

    def _open(self, case: Case) -> tuple[LLM, RecordingEngine]:
        """The LLM that a case wants, and the engine that it steps; the present one where it is alike."""
        kind = (case.policy, case.max_sequences, case.max_batch_tokens, case.kv_cache_bytes)
        if self._llm is None or kind != self._kind:
            self.close()
            self._start(case)
            self._kind = kind
        return self._opened()

    def _start(self, case: Case) -> None:
        from ..llm import LLM

        start = time.perf_counter()
        recording = RecordingEngine(
            self.engine, max_sequences=case.max_sequences, max_batch_tokens=case.max_batch_tokens
        )
        policy: Any = case.policy
        self._llm = LLM(recording, policy=policy, kv_cache_bytes=case.kv_cache_bytes, speculative=self._speculative)
        self._recording = recording
        ready = time.perf_counter() - start
        low, _ = case.workload.input_len
        one = dataclasses.replace(
            case.workload, num_requests=1, input_len=(low, low), shared_prefix=0, output_len=(1, 1)
        )
        start = time.perf_counter()
        self._run(Case(workload=one), one, -case.warmup - 1, None)
        first = time.perf_counter() - start
        parts = {f"{name}_s": seconds for name, seconds in recording.seconds.items()}
        self.start_up = {**parts, "ready_s": ready, "first_token_s": first}
        since_start = seconds_since_start()
        if since_start is not None:
            self.start_up["process_s"] = since_start


def _free_device_memory() -> None:
    """Gives a closed LLM's KV cache and graphs back to the device, so that the next one finds the memory free."""
    import gc

    import torch

    gc.collect()
    torch.cuda.empty_cache()
