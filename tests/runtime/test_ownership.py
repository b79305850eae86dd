"""An engine serves one LLM at a time, and is free again however that LLM ends."""

import gc

import pytest
from camshaft.runtime import LLM, SamplingParams
from camshaft.runtime.bench.recording import RecordingEngine
from camshaft.runtime.ownership import EngineClaim

from .fake_engine import FakeEngine, expected_tokens

GREEDY = SamplingParams(temperature=0, max_tokens=6)
TAKEN = "the engine serves another LLM, .*shut that one down first"


def check(llm: LLM, prompt: list[int]) -> None:
    assert llm.generate(prompt, GREEDY, progress=False)[0].token_ids == expected_tokens(prompt, 6, 101)


@pytest.mark.parametrize("wrap", [lambda engine: engine, RecordingEngine], ids=["bare", "wrapped"])
def test_a_second_llm_is_an_error_and_leaves_the_first_alone(wrap):
    engine = FakeEngine()
    first = LLM(wrap(engine))
    check(first, [1, 2, 3, 4, 5])
    for other in (engine, RecordingEngine(engine)):
        with pytest.raises(ValueError, match=TAKEN):
            LLM(other)
    check(first, [1, 2, 3, 4, 5, 6])
    first.shutdown()
    with LLM(engine) as second:
        first.shutdown()  # once more: the cache is the second one's by now
        check(second, [1, 2, 3])
        with pytest.raises(ValueError, match=TAKEN):
            LLM(engine)
    assert engine.caches == []


def test_an_llm_that_was_forgotten_does_not_keep_the_engine():
    engine = FakeEngine()
    first = LLM(engine)
    check(first, [1, 2])
    first.itself = first  # only the garbage collector ends it
    gc.disable()
    try:
        del first
        with LLM(engine) as second:
            check(second, [1, 2])
    finally:
        gc.enable()


def test_a_failed_construction_gives_the_engine_back():
    class Fragile(FakeEngine):
        fails = True

        def capture(self):
            if self.fails:
                raise RuntimeError("no graphs today")

    engine = Fragile()
    with pytest.raises(ValueError, match="kv_cache_bytes=16"):
        LLM(engine, kv_cache_bytes=16)
    with pytest.raises(RuntimeError, match="no graphs today"):
        LLM(engine)
    assert engine.caches == []
    engine.fails = False
    with LLM(engine) as llm:
        check(llm, [1, 2])


def test_a_claim_is_released_by_its_own_holder_alone():
    engine = FakeEngine()
    first = EngineClaim(engine)
    first.release()
    second = EngineClaim(engine)
    first.release()
    assert second.held and not first.held
