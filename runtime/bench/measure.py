"""Timed runs of an LLM: all requests at once (throughput), or one after another (latency)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from ..sampling_params import SamplingParams
from .recording import RecordingEngine, Step
from .statistics import distribution
from .workload import BenchRequest

if TYPE_CHECKING:
    from ..llm import LLM
    from ..outputs import RequestOutput

Repeat = dict[str, float]
"""Metrics of one timed run, by name; the unit is the name's end (_s, _ms, tok_s)."""


def sampling_of(request: BenchRequest, *, ignore_eos: bool) -> SamplingParams:
    """Greedy, with the request's output length, token ids only."""
    return SamplingParams(temperature=0, max_tokens=request.output_len, ignore_eos=ignore_eos, detokenize=False)


def run_throughput(
    llm: LLM, engine: RecordingEngine, requests: Sequence[BenchRequest], *, ignore_eos: bool = True
) -> Repeat:
    """All requests at once. `engine` is the one that `llm` runs.

    Returns output_tok_s and total_tok_s (output, and prompt with output tokens, per second of the whole run), requests_s,
    duration_s; ttft_ms_* (arrival of all requests to first token, waiting included); tpot_ms_* (per request: first to last
    token, over the tokens between); e2e_ms_* (arrival to last token); itl_ms_* (time between steps, counted for every
    sequence that got a token, so a stall counts for all whom it stalls); mean_batch_size (sequences per step),
    mean_batch_tokens, and what `stats_between` gives.
    """
    params = [sampling_of(request, ignore_eos=ignore_eos) for request in requests]
    before = llm.stats()
    engine.clear()
    start = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": r.prompt} for r in requests], params, progress=False)
    end = time.perf_counter()
    counts = stats_between(before, llm.stats())
    num_output = sum(len(output.token_ids) for output in outputs)
    num_input = sum(len(request.prompt) for request in requests)
    duration = end - start
    return {
        "output_tok_s": num_output / duration,
        "total_tok_s": (num_input + num_output) / duration,
        "requests_s": len(requests) / duration,
        "duration_s": duration,
        "input_tokens": float(num_input),
        "output_tokens": float(num_output),
        **_request_times(outputs),
        **counts,
        **_step_times(engine.steps, end),
    }


def run_latency(
    llm: LLM, engine: RecordingEngine, requests: Sequence[BenchRequest], *, ignore_eos: bool = True
) -> Repeat:
    """One request after another, batch size 1.

    Returns decode_ms_* (from each token's delivery to the next one's), decode_tok_s (tokens after the first, over the time from
    each request's first token to its end, so without prompts), ttft_ms_*, request_s (median end-to-end seconds), output_tok_s,
    prompts included, and what `stats_between` gives.
    """
    ttft: list[float] = []
    totals: list[float] = []
    decode: list[float] = []
    decode_s, num_decoded, num_output = 0.0, 0, 0
    before = llm.stats()
    for request in requests:
        engine.clear()
        delivered: list[tuple[float, int]] = []
        start = time.perf_counter()
        output = llm.generate_async(
            {"prompt_token_ids": request.prompt},
            sampling_of(request, ignore_eos=ignore_eos),
            on_output=lambda new, to=delivered: to.append((time.perf_counter(), len(new.token_ids))),  # type: ignore[misc]
        ).result()
        totals.append(time.perf_counter() - start)
        num_output += len(output.token_ids)
        metrics = output.metrics
        if metrics.first_token_s is not None and metrics.finished_s is not None:
            ttft.append(1e3 * (metrics.first_token_s - metrics.arrival_s))
            decode_s += metrics.finished_s - metrics.first_token_s
            num_decoded += len(output.token_ids) - 1
        decode.extend(_delivery_intervals_ms(delivered))
    return {
        **distribution("decode_ms", decode),
        **({"decode_tok_s": num_decoded / decode_s} if num_decoded else {}),
        **distribution("ttft_ms", ttft),
        "request_s": sorted(totals)[len(totals) // 2],
        "output_tok_s": num_output / sum(totals),
        "output_tokens": float(num_output),
        **stats_between(before, llm.stats()),
    }


def _request_times(outputs: Sequence[RequestOutput]) -> dict[str, float]:
    ttft, tpot, e2e = [], [], []
    for output in outputs:
        metrics = output.metrics
        if metrics.first_token_s is None or metrics.finished_s is None:
            continue
        ttft.append(1e3 * (metrics.first_token_s - metrics.arrival_s))
        e2e.append(1e3 * (metrics.finished_s - metrics.arrival_s))
        if len(output.token_ids) > 1:
            tpot.append(1e3 * (metrics.finished_s - metrics.first_token_s) / (len(output.token_ids) - 1))
    return {**distribution("ttft_ms", ttft), **distribution("tpot_ms", tpot), **distribution("e2e_ms", e2e)}


def stats_between(before: Any, after: Any) -> Repeat:
    """What an LLM counted between two calls of `stats()`.

    steps, prefix_hit_tokens, preemptions; host_schedule_ms, host_launch_ms, host_deliver_ms and host_wait_ms, what the serving
    thread did per step, and ahead_share, the share of steps that were launched while the one before them computed; and every
    other number that it keeps, under its own name with "llm_" in front.
    """
    counts = {"steps": float(after.scheduler.steps - before.scheduler.steps)}
    for name in ("prefix_hit_tokens", "preemptions"):
        counts[name] = float(getattr(after.scheduler, name) - getattr(before.scheduler, name))
    found = _differences("llm", before, after)
    steps = found.get("llm_times_steps")
    if steps:
        for name in ("schedule", "launch", "deliver", "wait"):
            counts[f"host_{name}_ms"] = 1e3 * found[f"llm_times_{name}_s"] / steps
        counts["ahead_share"] = found["llm_times_ahead"] / steps
    return counts | found


def _differences(prefix: str, before: Any, after: Any) -> dict[str, float]:
    found: dict[str, float] = {}
    for field in fields(after):
        old, new = getattr(before, field.name), getattr(after, field.name)
        name = f"{prefix}_{field.name}"
        if field.name in ("scheduler", "memory", "num_unfinished"):
            continue
        if is_dataclass(new):
            found |= _differences(name, old, new)
        elif isinstance(new, (int, float)) and isinstance(old, (int, float)):
            found[name] = float(new - old)
    return found


def _delivery_intervals_ms(delivered: Sequence[tuple[float, int]]) -> list[float]:
    """Milliseconds from each token to the next; `delivered` holds (seconds, tokens), and tokens that came together share theirs."""
    intervals, last = [], None
    for now, count in delivered:
        if not count:
            continue
        if last is not None:
            intervals += [1e3 * (now - last) / count] * count
        last = now
    return intervals


def _intervals_ms(steps: Sequence[Step], end: float) -> tuple[list[Step], list[float]]:
    """Steps that sampled, and the milliseconds from one's launch to the next one's.

    In turns that is until its tokens were there. Asynchronously the tokens come a step later: a step has the interval of the
    one before it, which is launched when that one's tokens are there.
    """
    ends = [step.start_s for step in steps[1:]] + [end]
    kept, intervals, last = [], [], steps[0].start_s if steps else end
    for step, step_end in zip(steps, ends):
        if step.num_sampled:
            kept.append(step)
            intervals.append(1e3 * (step_end - last))
            last = step_end
    return kept, intervals


def _step_times(steps: Sequence[Step], end: float) -> dict[str, float]:
    if not steps:
        return {}
    sampled, intervals = _intervals_ms(steps, end)
    return {
        **distribution("itl_ms", intervals[1:], [float(step.num_sampled) for step in sampled[1:]]),
        "mean_batch_size": sum(step.num_sequences for step in steps) / len(steps),
        "mean_batch_tokens": sum(step.num_tokens for step in steps) / len(steps),
    }


def repeat_runs(
    run: Callable[[int], Repeat],
    *,
    repeats: int,
    warmup: int,
    on_run: Callable[[int, Repeat], None] | None = None,
) -> list[Repeat]:
    """Calls `run(i)` for the warm-up (negative i, dropped) and the repeats. Raises ValueError unless repeats >= 1, warmup >= 0."""
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeat is {repeats} and warmup is {warmup}; allowed: repeat >= 1, warmup >= 0")
    kept = []
    for index in range(-warmup, repeats):
        metrics = run(index)
        if index >= 0:
            kept.append(metrics)
            if on_run is not None:
                on_run(index, metrics)
    return kept
