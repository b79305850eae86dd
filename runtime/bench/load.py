"""Load: requests that arrive by a Poisson process, and what each of them had to wait for.

    due (drawn before the run) -- submit (client thread) -- first token -- tokens ... -- last token (serving thread)
    |------------------ TTFT -----------------------------|---- ITL, ITL ... ----------|
    |------------------ E2E -----------------------------------------------------------|

Times count from the moment at which a request was due, not from when the client came round to it, so a slow client makes the
figures worse and never better; `submit_lag_ms` says by how much. Tokens are taken where the serving thread hands them on.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .measure import Repeat, sampling_of, stats_between
from .statistics import distribution
from .workload import BenchRequest

if TYPE_CHECKING:
    from ..llm import LLM
    from ..outputs import RequestOutput

SLO_METRICS = ("ttft", "tpot", "e2e")
"""What a service-level objective may bound, in ms."""
_LEAD_S = 0.05


def parse_rates(text: str) -> tuple[float, ...]:
    """ "1,4,inf" -> (1.0, 4.0, inf), requests per second. Raises ValueError."""
    try:
        rates = tuple(float(part) for part in text.split(","))
    except ValueError:
        rates = ()
    if not rates or not all(rate > 0 for rate in rates):
        raise ValueError(
            f"--load is {text!r}; allowed: requests per second, such as 4 or 1,4,16,inf (inf: all at once)"
        )
    return rates


def parse_slos(texts: Sequence[str]) -> dict[str, float]:
    """["ttft=200", "tpot=20"] -> {"ttft": 200.0, "tpot": 20.0}, ms. Raises ValueError."""
    slos = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            limit = float(value)
        except ValueError:
            limit = -1.0
        if name not in SLO_METRICS or not limit > 0:
            raise ValueError(
                f"--slo is {text!r}; allowed: NAME=MS with NAME one of {', '.join(SLO_METRICS)}, such as ttft=200"
            )
        slos[name] = limit
    return slos


def arrival_times(rate: float, count: int, seed: int) -> list[float]:
    """Seconds after the start at which `count` requests are due: a Poisson process of `rate` per second, the first one at 0."""
    if math.isinf(rate):
        return [0.0] * count
    draw, now, times = random.Random(f"arrivals {seed}"), 0.0, []
    for _ in range(count):
        times.append(now)
        now += draw.expovariate(rate)
    return times


@dataclass(slots=True)
class Timeline:
    """What happened to one request, in seconds of `time.monotonic`."""

    due_s: float
    submitted_s: float = math.nan
    token_times_s: list[float] = field(default_factory=list)
    num_tokens: int = 0

    def take(self, output: RequestOutput) -> None:
        """Notes when new tokens came; runs on the serving thread."""
        count = len(output.token_ids)
        if count:
            self.token_times_s.append(time.monotonic())
            self.num_tokens += count

    def latencies_ms(self) -> dict[str, float]:
        """ttft, tpot (first to last token, over the tokens between; 0 where there is one token) and e2e, in ms."""
        first, last = self.token_times_s[0], self.token_times_s[-1]
        tpot = (last - first) / (self.num_tokens - 1) if self.num_tokens > 1 else 0.0
        return {"ttft": 1e3 * (first - self.due_s), "tpot": 1e3 * tpot, "e2e": 1e3 * (last - self.due_s)}


def run_load(
    llm: LLM,
    requests: Sequence[BenchRequest],
    arrivals_s: Sequence[float],
    *,
    slos: Mapping[str, float] | None = None,
    ignore_eos: bool = True,
) -> Repeat:
    """Submits each request when it is due, and waits for all.

    arrivals_s: seconds after the start, ascending, one per request. slos: most ms of "ttft", "tpot", "e2e".

    Returns ttft_ms_*, tpot_ms_*, itl_ms_* (every pause between the tokens of a request), e2e_ms_*, submit_lag_ms_*, output_tok_s,
    total_tok_s and requests_s (over the time from the first arrival to the last token), duration_s, max_in_flight,
    prefix_hit_tokens, preemptions, and with slos goodput_requests_s (requests that met all of them, per second) and slo_share.
    """
    params = [sampling_of(request, ignore_eos=ignore_eos) for request in requests]
    inputs = [{"prompt_token_ids": request.prompt} for request in requests]
    before = llm.stats()
    start = time.monotonic() + _LEAD_S
    timelines = [Timeline(start + arrival) for arrival in arrivals_s]
    handles = []
    for given, sampling, timeline in zip(inputs, params, timelines, strict=True):
        wait = timeline.due_s - time.monotonic()
        if wait > 0:
            time.sleep(wait)
        timeline.submitted_s = time.monotonic()
        handles.append(llm.generate_async(given, sampling, on_output=timeline.take))
    for handle in handles:
        handle.result()
    num_input = sum(len(request.prompt) for request in requests)
    return {**load_metrics(timelines, num_input, slos or {}), **stats_between(before, llm.stats())}


def load_metrics(timelines: Sequence[Timeline], num_input: int, slos: Mapping[str, float]) -> Repeat:
    """The metrics of `run_load` that follow from the requests' times alone."""
    latencies = [timeline.latencies_ms() for timeline in timelines]
    duration = max(t.token_times_s[-1] for t in timelines) - timelines[0].due_s
    num_output = sum(t.num_tokens for t in timelines)
    pauses = [1e3 * (b - a) for t in timelines for a, b in zip(t.token_times_s, t.token_times_s[1:])]
    metrics: Repeat = {
        "output_tok_s": num_output / duration,
        "total_tok_s": (num_input + num_output) / duration,
        "requests_s": len(timelines) / duration,
        "duration_s": duration,
        "input_tokens": float(num_input),
        "output_tokens": float(num_output),
        **distribution("ttft_ms", [entry["ttft"] for entry in latencies]),
        **distribution("tpot_ms", [entry["tpot"] for entry, t in zip(latencies, timelines) if t.num_tokens > 1]),
        **distribution("itl_ms", pauses),
        **distribution("e2e_ms", [entry["e2e"] for entry in latencies]),
        **distribution("submit_lag_ms", [1e3 * (t.submitted_s - t.due_s) for t in timelines]),
        "max_in_flight": float(_max_in_flight(timelines)),
    }
    if slos:
        good = sum(all(entry[name] <= limit for name, limit in slos.items()) for entry in latencies)
        metrics |= {"goodput_requests_s": good / duration, "slo_share": good / len(timelines)}
    return metrics


def _max_in_flight(timelines: Sequence[Timeline]) -> int:
    """Most requests that had arrived and not ended at one time."""
    changes = sorted([(t.due_s, 1) for t in timelines] + [(t.token_times_s[-1], -1) for t in timelines])
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most
