"""Requests, scheduling, KV blocks, sampling and serving. Importing this package imports no torch: names load on use."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "LLM": "llm",
    "GenerationError": "llm",
    "LLMStats": "llm",
    "StepTimes": "step_times",
    "RequestHandle": "async_llm",
    "SamplingParams": "sampling_params",
    "RequestOutput": "outputs",
    "CompletionOutput": "outputs",
    "Logprob": "outputs",
    "RequestMetrics": "outputs",
    "FinishReason": "request",
    "SpeculativeConfig": "speculative.config",
    "SpeculativeMetrics": "speculative.metrics",
    "Tokenizer": "tokenizer",
    "MemoryLedger": "memory",
    "Batch": "batch",
    "CacheGroupSpec": "batch",
    "Engine": "batch",
    "GroupMetadata": "batch",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
