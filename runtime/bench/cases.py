"""Cases: a workload and how it is measured; and suites, lists of cases that share one engine. Imports no torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

from .load import parse_rates, parse_slos
from .workload import Range, Workload, parse_range

Mode = Literal["throughput", "latency", "load"]
DEFAULT_NAME = "run"
"""Name of the case that the command line's options make."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One workload and how it is measured. Raises ValueError for what does not go together."""

    name: str = DEFAULT_NAME
    """Of the case in a suite, and of its file."""
    mode: Mode = "throughput"
    """All requests at once, one at a time, or at the rates of `rates`."""
    workload: Workload = field(default_factory=Workload)
    rates: tuple[float, ...] = ()
    """Of mode load: requests per second, each measured by itself; inf: all at once."""
    slos: Mapping[str, float] = field(default_factory=dict)
    """Of mode load: most ms of "ttft", "tpot", "e2e" that a good request takes."""
    repeats: int = 3
    """Timed runs, >= 1."""
    warmup: int = 1
    """Runs before them, >= 0."""
    warmup_requests: int | None = None
    """Requests of a warm-up run; None: all."""
    warmup_output_len: int | None = None
    """Most output tokens of a warm-up request; None: as in the workload."""
    policy: str = "guaranteed_no_evict"
    max_sequences: int | None = None
    """Most sequences in a step; None: what the engine was built for."""
    max_batch_tokens: int | None = None
    """Most tokens in a step; None: what the engine was built for."""
    kv_cache_bytes: int | None = None
    """Size of the KV cache; None: by the free memory."""
    profile_steps: int = 0
    """Steps to profile after the timed runs; 0: none."""

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode is {self.mode!r}; allowed: {', '.join(get_args(Mode))}")
        if (self.mode == "load") != bool(self.rates):
            raise ValueError(
                f"mode is {self.mode} and rates are {list(self.rates)}; mode load takes rates, the others none"
            )
        if self.slos and self.mode != "load":
            raise ValueError(f"service-level objectives are for mode load, and the mode is {self.mode}; leave them out")
        if self.repeats < 1 or self.warmup < 0 or self.profile_steps < 0:
            raise ValueError(
                f"repeat is {self.repeats}, warmup {self.warmup}, profile {self.profile_steps}; allowed: repeat >= 1, "
                "warmup >= 0, profile >= 0"
            )
        for name in ("warmup_requests", "warmup_output_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; allowed: integers >= 1")

    @property
    def warmup_workload(self) -> Workload:
        """The workload of warm-up runs."""
        workload = self.workload
        low, high = workload.output_len
        most = self.warmup_output_len or high
        requests = min(self.warmup_requests or workload.num_requests, workload.num_requests)
        return dataclasses.replace(workload, num_requests=requests, output_len=(min(low, most), min(high, most)))


def read_suite(path: Path) -> list[Case]:
    """The cases of a suite file: {"cases": [{"name": ..., "mode": ..., "num_requests": ..., "input_len": "128", ...}]}.

    A case holds fields of Case and of Workload; lengths are a number, "A:B" or [A, B]; rates a list or "1,4,inf"; slos
    {"ttft": 200}. Raises ValueError for unknown fields, two cases of one name, or values that do not fit.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    entries = data.get("cases") if isinstance(data, dict) else None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f'{path} is no suite; it must be {{"cases": [{{"name": ..., "num_requests": ...}}, ...]}}')
    cases = []
    for number, entry in enumerate(entries):
        try:
            cases.append(_case(entry))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, case {entry.get('name', number)}: {error}") from error
    names = [case.name for case in cases]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: the names of the cases are {', '.join(names)}; each must have its own")
    return cases


def _case(entry: Mapping[str, Any]) -> Case:
    of_workload = {f.name for f in dataclasses.fields(Workload)}
    of_case = {f.name for f in dataclasses.fields(Case)} - {"workload"}
    unknown = sorted(set(entry) - of_workload - of_case)
    if unknown:
        raise ValueError(f"unknown fields {', '.join(unknown)}; allowed: {', '.join(sorted(of_workload | of_case))}")
    workload = {name: entry[name] for name in entry if name in of_workload}
    for name in ("input_len", "output_len"):
        if name in workload:
            workload[name] = _range(workload[name], name)
    rest = {name: entry[name] for name in entry if name in of_case}
    if "rates" in rest:
        rates = rest["rates"]
        rest["rates"] = parse_rates(rates if isinstance(rates, str) else ",".join(map(str, rates)))
    if "slos" in rest:
        rest["slos"] = parse_slos([f"{name}={value}" for name, value in rest["slos"].items()])
    return Case(workload=Workload(**workload), **rest)


def _range(value: Any, name: str) -> Range:
    if isinstance(value, list):
        return cast(Range, parse_range(":".join(map(str, value)), name))
    return parse_range(str(value), name)
