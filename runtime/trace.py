"""A scheduler's life as JSON lines, and its replay without a model. Imports no torch.

    {"event": "config", "version": 1, "config": {...}}
    {"event": "add", "request": {"request_id": "a", "prompt_token_ids": [...], "params": {...}, ...}}
    {"event": "plan", "drafts": {"a": [5, 6]}, "plan": {"step_id": 0, "rows": [["a", 0, 5, 0, 1, true]],
     "preempted": [], "left": [], "blocks_used": [2]}}
    {"event": "update", "sampled": [[17]]}
    {"event": "finish", "request_id": "a", "reason": "abort", "stop_reason": null}

A plan may come before the update of the plan before it; an update goes with the oldest plan that has none. A plan of null
says that nothing could be planned on top of the step in flight.

The scheduler is deterministic, so the same requests and sampled tokens give the same plans: a trace from production
reproduces a scheduling bug on any machine. A trace holds the prompts and outputs in full: treat it like them.
"""

from __future__ import annotations

import dataclasses
import json
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from .kv_cache import CacheGroup
from .plan import RequestUpdate, SchedulerConfig, SchedulerStats, StepPlan
from .request import FinishReason, Request
from .sampling_params import SamplingParams
from .scheduler import Scheduler
from .updates import Tokens

TRACE_VERSION = 2
"""Version of the format; a replay refuses others."""


class TraceMismatch(AssertionError):
    """A replayed step differs from the recorded one; the message gives line, field, recorded and replayed values."""


class ReplayResult(NamedTuple):
    """What a replay went through."""

    num_steps: int
    """Plans made and found equal to the recorded ones."""
    outputs: dict[str, list[int]]
    """Output token ids by request id; of an id used several times, the last."""
    stats: SchedulerStats
    """The scheduler's counts at the end."""


class TracedScheduler(Scheduler):
    """A scheduler that writes every call that changes it, and every plan, to a text stream."""

    def __init__(self, config: SchedulerConfig, stream: IO[str]) -> None:
        """Records to `stream`, which the caller opens and closes; each event is one line, written at once."""
        super().__init__(config)
        self._stream = stream
        self._write({"event": "config", "version": TRACE_VERSION, "config": dataclasses.asdict(config)})

    def _write(self, event: dict[str, Any]) -> None:
        self._stream.write(json.dumps(event, separators=(",", ":")) + "\n")

    def add_request(self, request: Request) -> None:
        """As Scheduler.add_request; a refused request leaves no record. Raises ValueError on multimodal input,
        which a trace cannot hold."""
        if request.multimodal is not None:
            raise ValueError(f"request {request.request_id!r} has multimodal input, which a trace cannot hold")
        super().add_request(request)
        self._write({"event": "add", "request": _request_record(request)})

    def finish(self, request_id: str, reason: FinishReason, stop_reason: int | str | None = None) -> bool:
        """As Scheduler.finish, which abort() calls too; recorded when the request was live."""
        was_live = super().finish(request_id, reason, stop_reason)
        if was_live:
            event = {"event": "finish", "request_id": request_id, "reason": reason.value, "stop_reason": stop_reason}
            self._write(event)
        return was_live

    def schedule(self) -> StepPlan | None:
        """As Scheduler.schedule; records the drafts it saw and the plan. No work at all leaves no record."""
        drafts = {request.request_id: request.draft_token_ids for request in self.running if request.draft_token_ids}
        drafts = {request_id: list(tokens) for request_id, tokens in drafts.items()}
        had_work = self.has_work
        plan = super().schedule()
        if had_work:
            record = None if plan is None else _plan_record(self, plan)
            self._write({"event": "plan", "drafts": drafts, "plan": record})
        return plan

    def update(self, plan: StepPlan, sampled: Tokens) -> list[RequestUpdate]:
        """As Scheduler.update; records the sampled tokens."""
        updates = super().update(plan, sampled)
        if isinstance(sampled, np.ndarray):
            tokens = iter(sampled.tolist())
            sampled = [[next(tokens)] if row.samples else [] for row in plan.scheduled]
        self._write({"event": "update", "sampled": [[int(token) for token in tokens] for tokens in sampled]})
        return updates


def replay(lines: Iterable[str], *, check_integrity: bool = True) -> ReplayResult:
    """Run a trace through a new scheduler and assert that it makes the recorded plans.

    `lines` is an open file or any iterable of JSON lines; check_integrity proves the scheduler's state after every
    event, which takes O(blocks) each. Raises TraceMismatch at the first difference and ValueError on a text that is
    no trace of this version.
    """
    scheduler: Scheduler | None = None
    requests: dict[str, Request] = {}
    plans: deque[StepPlan] = deque()
    for number, line in enumerate(lines, start=1):
        event = json.loads(line)
        kind = event.get("event")
        if scheduler is None:
            scheduler = Scheduler(_config_from(event, number))
            continue
        if kind == "add":
            request = _request_from(event["request"])
            requests[request.request_id] = request
            scheduler.add_request(request)
        elif kind == "finish":
            was_live = scheduler.finish(event["request_id"], FinishReason(event["reason"]), event["stop_reason"])
            _compare(number, f"whether {event['request_id']!r} was live", True, was_live)
        elif kind == "plan":
            for request_id, drafts in event["drafts"].items():
                requests[request_id].draft_token_ids = list(drafts)
            plan = scheduler.schedule()
            replayed = None if plan is None else _plan_record(scheduler, plan)
            if plan is not None:
                plans.append(plan)
            if event["plan"] is None or replayed is None:
                _compare(number, "plan", event["plan"], replayed)
                continue
            for name, recorded in event["plan"].items():
                _compare(number, name, recorded, replayed[name])
        elif kind == "update" and plans:
            scheduler.update(plans.popleft(), event["sampled"])
        else:
            raise ValueError(f"trace line {number} is a {kind!r} event; allowed: add, finish, plan, update after plan")
        if check_integrity:
            scheduler.check_integrity()
    if scheduler is None:
        raise ValueError("the trace is empty; allowed: a config event and what follows it")
    outputs = {request_id: list(request.output_token_ids) for request_id, request in requests.items()}
    return ReplayResult(scheduler.stats.steps, outputs, scheduler.stats)


def replay_file(path: str | Path, *, check_integrity: bool = True) -> ReplayResult:
    """replay() of the file at `path` (UTF-8)."""
    with open(path, encoding="utf-8") as stream:
        return replay(stream, check_integrity=check_integrity)


def _compare(number: int, name: str, recorded: object, replayed: object) -> None:
    if recorded != replayed:
        raise TraceMismatch(f"trace line {number}: {name} was recorded as {recorded!r} and replayed as {replayed!r}")


def _plan_record(scheduler: Scheduler, plan: StepPlan) -> dict[str, Any]:
    rows = [[row.request.request_id, *row[1:]] for row in plan.scheduled]
    return {
        "step_id": plan.step_id,
        "rows": rows,
        "num_tokens": plan.num_tokens,
        "preempted": list(plan.preempted),
        "left": list(plan.left),
        "blocks_used": [pool.num_used for pool in scheduler.kv.pools],
    }


def _request_record(request: Request) -> dict[str, Any]:
    params = dataclasses.asdict(request.params)
    defaults = dataclasses.asdict(SamplingParams())
    return {
        "request_id": request.request_id,
        "prompt_token_ids": request.prompt_token_ids,
        "params": {name: value for name, value in params.items() if value != defaults[name]},
        "eos_token_ids": sorted(request.eos_token_ids),
        "lora_id": request.lora_id,
        "cache_salt": request.cache_salt,
        "wait_for": request.wait_for,
    }


def _request_from(record: dict[str, Any]) -> Request:
    params = dict(record["params"])
    if params.get("logit_bias"):
        params["logit_bias"] = {int(token): bias for token, bias in params["logit_bias"].items()}
    eos_token_ids = frozenset(record["eos_token_ids"])
    return Request(**{**record, "params": SamplingParams(**params), "eos_token_ids": eos_token_ids})


def _config_from(event: dict[str, Any], number: int) -> SchedulerConfig:
    if event.get("event") != "config" or event.get("version") != TRACE_VERSION:
        raise ValueError(
            f"trace line {number} is a {event.get('event')!r} event of version {event.get('version')!r}; allowed: a "
            f"trace begins with a config event of version {TRACE_VERSION}; record it again with this version"
        )
    groups = tuple(CacheGroup(**group) for group in event["config"]["groups"])
    return SchedulerConfig(**{**event["config"], "groups": groups})
