"""An engine that notes its steps and start-up times, and can be given smaller limits than it was built for. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class Step:
    """One step: when its launch began (seconds of `time.perf_counter`), and its size."""

    start_s: float
    num_tokens: int
    num_sequences: int
    num_sampled: int


class RecordingEngine:
    """An engine that notes when each step began and how large it was, and is otherwise the engine it wraps.

    steps: emptied by `clear`. A step costs a microsecond more. seconds: of `prepare`, `bind_cache` and `capture`, when they ran.
    max_sequences, max_batch_tokens: smaller limits for the scheduler than the engine's own; None: the engine's. Raises ValueError
    for larger ones.
    """

    def __init__(self, engine: Any, *, max_sequences: int | None = None, max_batch_tokens: int | None = None) -> None:
        self._engine = engine
        self.steps: list[Step] = []
        self.seconds: dict[str, float] = {}
        self.on_step: Callable[[int], None] | None = None
        """Called before each step with its number since `clear`."""
        self.max_sequences = _limit("max_sequences", max_sequences, engine.max_sequences)
        self.max_batch_tokens = _limit("max_batch_tokens", max_batch_tokens, engine.max_batch_tokens)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    @property
    def serving_claim(self) -> Any:
        """Which LLM serves the wrapped engine, see runtime/ownership.py."""
        return getattr(self._engine, "serving_claim", None)

    @serving_claim.setter
    def serving_claim(self, claim: Any) -> None:
        self._engine.serving_claim = claim

    def prepare(self) -> Any:
        """Prepares the wrapped engine."""
        return self._timed("prepare", self._engine.prepare)

    def bind_cache(self, num_blocks: Sequence[int]) -> None:
        """Allocates the wrapped engine's KV cache."""
        self._timed("bind_cache", lambda: self._engine.bind_cache(num_blocks))

    def capture(self) -> Any:
        """Captures the wrapped engine's steps."""
        return self._timed("capture", self._engine.capture)

    def step(self, batch: Any) -> Any:
        """Runs the wrapped engine's step."""
        self._record(batch)
        return self._engine.step(batch)

    def step_outputs(self, batch: Any) -> Any:
        """Runs the wrapped engine's step, with hidden states."""
        self._record(batch)
        return self._engine.step_outputs(batch)

    def _record(self, batch: Any) -> None:
        if self.on_step is not None:
            self.on_step(len(self.steps))
        rows = batch.sample_rows.shape[0]
        self.steps.append(Step(time.perf_counter(), batch.token_ids.shape[0], batch.seq_lens.shape[0], rows))

    def clear(self) -> None:
        """Forgets all steps."""
        self.steps = []

    def _timed(self, name: str, run: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = run()
        self.seconds[name] = time.perf_counter() - start
        return result


def _limit(name: str, asked: int | None, built: int) -> int:
    if asked is not None and not 1 <= asked <= built:
        raise ValueError(f"{name} is {asked}; allowed: 1 to {built}, which the engine was built for")
    return built if asked is None else asked
