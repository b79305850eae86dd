"""The scheduler trace: what is written, that it replays, and that a difference is found."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from camshaft.runtime.kv_cache import CacheGroup
from camshaft.runtime.request import FinishReason, Request
from camshaft.runtime.sampling_params import SamplingParams
from camshaft.runtime.scheduler import SchedulerConfig
from camshaft.runtime.trace import TracedScheduler, TraceMismatch, replay, replay_file

CONFIG = SchedulerConfig(
    groups=(CacheGroup(num_blocks=4, block_size=4), CacheGroup(num_blocks=8, block_size=2, window=3)),
    max_batch_tokens=8,
    max_sequences=4,
    max_seq_len=32,
    policy="max_utilization",
)


def record(stream: io.StringIO | None = None) -> tuple[list[str], TracedScheduler, list[Request]]:
    """Three requests with all events: drafts, a preemption, an abort in flight, a stop string, a refused request."""
    stream = stream or io.StringIO()
    scheduler = TracedScheduler(CONFIG, stream)
    a = Request("a", [1, 2, 3, 4, 5, 6, 7], SamplingParams(max_tokens=6, logit_bias={3: 1.5}), frozenset({9, 8}))
    b = Request("b", [1, 2, 3], SamplingParams(max_tokens=9, stop="x", stop_token_ids=[4]), cache_salt="s")
    c = Request("c", [1, 2, 3, 4, 6], SamplingParams(max_tokens=2), wait_for="a", lora_id="l")
    scheduler.add_request(a)
    scheduler.add_request(b)
    with pytest.raises(ValueError, match="prompt is empty"):
        scheduler.add_request(Request("e", [], SamplingParams()))
    number = 0
    while (plan := scheduler.schedule()) is not None:
        if number == 2:
            scheduler.add_request(c)
        if number == 6:
            scheduler.finish("b", FinishReason.STOP, "x")
        if number == 7:
            scheduler.abort("c")
            scheduler.abort("nobody")
        drafts = [row.request.draft_token_ids[: row.num_draft_tokens] for row in plan.scheduled]
        rows = [[*tokens, 5] if row.samples else [] for tokens, row in zip(drafts, plan.scheduled)]
        scheduler.update(plan, rows)
        if number == 1:
            a.draft_token_ids = [5, 6]
        number += 1
    return stream.getvalue().splitlines(), scheduler, [a, b, c]


def test_a_trace_replays_to_the_same_plans() -> None:
    lines, scheduler, requests = record()
    result = replay(lines)
    assert result.num_steps == scheduler.stats.steps
    assert result.stats == scheduler.stats
    assert result.outputs == {request.request_id: request.output_token_ids for request in requests}
    assert scheduler.stats.preemptions > 0


def test_what_is_written() -> None:
    lines, _, _ = record()
    events = [json.loads(line) for line in lines]
    assert [event["event"] for event in events[:5]] == ["config", "add", "add", "plan", "update"]
    assert events[0]["version"] == 2
    assert events[0]["config"]["groups"][1] == {"num_blocks": 8, "block_size": 2, "window": 3}
    assert events[1]["request"] == {
        "request_id": "a",
        "prompt_token_ids": [1, 2, 3, 4, 5, 6, 7],
        "params": {"max_tokens": 6, "logit_bias": {"3": 1.5}},
        "eos_token_ids": [8, 9],
        "lora_id": None,
        "cache_salt": None,
        "wait_for": None,
    }
    assert events[3]["plan"] == {
        "step_id": 0,
        "rows": [["a", 0, 7, 0, 1, True], ["b", 0, 1, 0, 0, False]],
        "num_tokens": 8,
        "preempted": [],
        "left": [],
        "blocks_used": [3, 5],
    }
    assert events[4] == {"event": "update", "sampled": [[5], []]}
    assert {"a": [5, 6]} in [event["drafts"] for event in events if event["event"] == "plan"]
    finishes = [event for event in events if event["event"] == "finish"]
    assert [event["request_id"] for event in finishes if event["reason"] == "stop"] == ["b"]


def test_a_file_replays(tmp_path: Path) -> None:
    lines, scheduler, _ = record()
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert replay_file(path).stats == scheduler.stats


def test_a_different_plan_is_found() -> None:
    lines, _, _ = record()
    index = next(i for i, line in enumerate(lines) if '"plan"' in line)
    event = json.loads(lines[index])
    event["plan"]["rows"][0][2] = 6
    lines[index] = json.dumps(event)
    with pytest.raises(TraceMismatch, match=rf"trace line {index + 1}: rows was recorded as .*6.* and replayed as .*7"):
        replay(lines)


def test_a_different_config_is_found() -> None:
    lines, _, _ = record()
    event = json.loads(lines[0])
    event["config"]["max_batch_tokens"] = 7
    with pytest.raises(TraceMismatch):
        replay([json.dumps(event), *lines[1:]])


def test_a_missing_plan_is_found() -> None:
    lines, _, _ = record()
    last = next(line for line in lines if '"plan"' in line)
    with pytest.raises(TraceMismatch, match="replayed as None"):
        replay([lines[0], last])


def test_what_is_no_trace_is_refused() -> None:
    lines, _, _ = record()
    with pytest.raises(ValueError, match="the trace is empty"):
        replay([])
    with pytest.raises(ValueError, match="begins with a config event"):
        replay(lines[1:])
    with pytest.raises(ValueError, match="of version 1; allowed"):
        replay([lines[0].replace('"version":2', '"version":1')])
    with pytest.raises(ValueError, match="line 2 is a 'pause' event"):
        replay([lines[0], '{"event": "pause"}'])


def test_multimodal_input_is_refused() -> None:
    scheduler = TracedScheduler(CONFIG, io.StringIO())
    with pytest.raises(ValueError, match="multimodal"):
        scheduler.add_request(Request("a", [1], SamplingParams(), multimodal=object()))
