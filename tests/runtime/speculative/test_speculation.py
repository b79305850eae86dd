"""Speculation in the serving core, on a device of made-up times: what is planned ahead, and what a step in flight decides."""

from __future__ import annotations

from collections import deque

import pytest
from camshaft.runtime import SamplingParams, SpeculativeConfig
from camshaft.runtime.core import ServingCore
from camshaft.runtime.generation import Generation
from camshaft.runtime.inputs import CheckedInput
from camshaft.runtime.kv_cache import CacheGroup
from camshaft.runtime.scheduler import Scheduler, SchedulerConfig
from camshaft.runtime.speculative.build import make_proposer
from camshaft.runtime.speculative.speculation import Speculation

from ..fake_engine import FakeEngine, expected_tokens
from .proposers import oracle


class Sink:
    """Keeps a generation's output."""

    wants_increments = False

    def __init__(self):
        self.output = self.error = None

    def finish(self, output):
        self.output = output

    def fail(self, error):
        self.error = error


class TimedEngine(FakeEngine):
    """Counts the seconds that an imagined device has spent when a step's result comes: so many for it, and for each token."""

    def __init__(self, step_s, token_s):
        super().__init__(max_sequences=4, max_batch_tokens=64, max_seq_len=512)
        self.seconds, self._step_s, self._token_s = 0.0, step_s, token_s
        self._launched = deque()

    def step(self, batch):
        self._launched.append(self._step_s + self._token_s * batch.token_ids.shape[0])
        return super().step(batch)

    def wait(self):
        self.seconds += self._launched.popleft()


def make_core(engine, rate, **options):
    config = SpeculativeConfig(method="custom", proposer=oracle(rate), **options)
    engine.bind_cache([600])
    scheduler = Scheduler(
        SchedulerConfig(
            groups=(CacheGroup(num_blocks=600, block_size=engine.block_size),),
            max_batch_tokens=engine.max_batch_tokens, max_sequences=engine.max_sequences, max_seq_len=engine.max_seq_len,
        )
    )  # fmt: skip
    core = ServingCore(engine, scheduler, None, asynchronous=True, speculative=config)
    collect = core.runner.collect
    core.runner.collect = lambda step: engine.wait() or collect(step)
    proposer = make_proposer(config, engine, None)
    core.speculation = Speculation(config, proposer, scheduler, core.runner, clock=lambda: engine.seconds)
    return core


def add(core, name, num_tokens, **options):
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False, **options)
    sink = Sink()
    core.add(Generation(name, CheckedInput(None, [5, 9, 3, len(name)], params), 0, sink, frozenset()))
    return sink


@pytest.mark.parametrize(("token_s", "rate"), [(0.0, 0.9), (10.0, 0.3)])
def test_steps_are_planned_ahead_where_no_drafts_pay(token_s, rate):
    engine = TimedEngine(1.0, token_s)
    core = make_core(engine, rate)
    sinks = [add(core, "r" * (i + 1), 400) for i in range(4)]
    while core.has_work:
        core.step()
    for index, sink in enumerate(sinks):
        assert sink.error is None
        assert sink.output.token_ids == expected_tokens([5, 9, 3, index + 1], 400, engine.vocab_size)
    times = core.times
    if token_s:
        assert times.ahead > 0.9 * times.steps and engine.seconds < 1.15 * 400 * (1 + 4 * token_s)
    else:
        assert times.ahead < 0.2 * times.steps and engine.seconds < 250


def test_a_step_that_verifies_drafts_is_waited_for_though_its_request_has_ended():
    engine = TimedEngine(1.0, 0.0)
    core = make_core(engine, 1.0, adaptive=False)
    drafted, other = add(core, "drafted", 100), add(core, "other", 20, speculative=False)
    while core._in_flight is None or not core._in_flight.plan.has_drafts:
        core.step()
    core.abort("drafted")
    while core.has_work:
        core.step()
    assert drafted.output.finish_reason == "abort"
    assert other.output.token_ids == expected_tokens([5, 9, 3, 5], 20, engine.vocab_size)
    core.scheduler.check_integrity()
