"""`LLM` from end to end over the fake engine: results, streams, bad inputs, failures, many at once."""

import asyncio
import gc
import subprocess
import sys
import threading
import time

import pytest
import torch
from camshaft.runtime import LLM, GenerationError, SamplingParams
from camshaft.runtime.opening import tokenizer_of
from camshaft.runtime.packing import HostCopy
from camshaft.runtime.trace import replay_file

from .fake_engine import FakeEngine, expected_tokens
from .small_tokenizers import CHATML, byte_level, save

GREEDY = SamplingParams(temperature=0, max_tokens=10)


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory):
    return save(byte_level(), tmp_path_factory.mktemp("tokenizer"), chat_template=CHATML)


@pytest.fixture(params=[False, True], ids=["in turns", "asynchronous"])
def make(request):
    made = []

    def build(engine=None, *, tokenizer_path=None, **kwargs):
        options = {k: kwargs.pop(k) for k in list(kwargs) if k in ENGINE_OPTIONS}
        vocab_size = 340 if tokenizer_path else 101
        engine = engine or FakeEngine(**{"vocab_size": vocab_size, "tokenizer_path": tokenizer_path, **options})
        made.append(LLM(engine, **{"async_scheduling": request.param, **kwargs}))
        return made[-1]

    yield build
    for llm in made:
        if not llm._serving._closing:
            deadline = time.monotonic() + 10
            while llm._core.has_work and time.monotonic() < deadline:
                time.sleep(0.001)  # a step ahead may still be under way
            llm._core.scheduler.check_integrity()
            stats = llm.stats()
            assert all(g.used == 0 for g in stats.scheduler.groups), "blocks leaked"
            assert not llm._core._samples and not llm._core.runner._states
            assert llm._core.runner.sampler.penalties.num_slots_in_use == 0
        llm.shutdown()


ENGINE_OPTIONS = (
    "max_seq_len",
    "max_batch_tokens",
    "max_sequences",
    "windows",
    "eos_token_ids",
    "on_step",
    "vocab_size",
)


def test_generate_gives_the_definition_tokens_in_order(make):
    llm = make(windows=(0, 7))
    prompts = [[i, i + 1, 5] * (i + 1) for i in range(20)]
    outputs = llm.generate(prompts, GREEDY, progress=False)
    for prompt, output in zip(prompts, outputs):
        assert output.token_ids == output.outputs[0].token_ids == expected_tokens(prompt, 10, 101, (0, 7))
        assert (output.finish_reason, output.finished, output.prompt, output.text) == ("length", True, None, "")
        assert output.prompt_token_ids == prompt
        assert output.metrics.finished_s >= output.metrics.first_token_s >= output.metrics.arrival_s
    assert llm.generate([], GREEDY) == []
    assert llm.generate([1, 2, 3], GREEDY)[0].token_ids == expected_tokens([1, 2, 3], 10, 101, (0, 7))
    again = llm.generate(prompts[-1], GREEDY)[0]
    assert again.metrics.num_cached_tokens > 0 and again.token_ids == outputs[-1].token_ids


def test_all_prompt_forms(make, tokenizer_path):
    llm = make(tokenizer_path=tokenizer_path)
    ids = llm.tokenizer.encode("Hello")
    forms = ["Hello", ids, {"prompt": "Hello"}, {"prompt_token_ids": ids}, torch.tensor(ids).numpy()]
    outputs = llm.generate(forms, GREEDY)
    assert {tuple(o.prompt_token_ids) for o in outputs} == {tuple(ids)}
    assert len({o.text for o in outputs}) == 1
    assert outputs[0].text == llm.tokenizer.decode(outputs[0].token_ids) and outputs[0].prompt == "Hello"
    chat = [{"role": "user", "content": "Hi"}]
    assert llm.generate(chat, GREEDY)[0].prompt_token_ids == llm.tokenizer.apply_chat_template(chat)
    assert llm.generate([chat, "Hello"], GREEDY)[0].token_ids == llm.chat(chat, GREEDY)[0].token_ids
    assert len(llm.chat([chat, chat], GREEDY)) == 2
    assert "Hello" in outputs[0]._repr_html_()


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], None, "the prompt is empty"),
        ([1, 400], None, r"token id 400 at position 1 is outside the vocabulary; allowed: 0 to 339"),
        ([1, -1], None, "token id -1 at position 1"),
        ([1, "a"], None, r"holds 'a' \(str\) at position 1"),
        ([True], None, "holds True"),
        (7, None, "the prompt is a int; allowed: a string"),
        ({"text": "a"}, None, r"a dict with the keys \['text'\]"),
        ([1] * 256, None, "has 256 tokens and max_seq_len is 256; allowed: at most 255"),
        ([1], SamplingParams(stop_token_ids=[999]), "stop_token_ids id 999"),
        ([1], SamplingParams(logit_bias={999: 1.0}), "logit_bias id 999"),
        ([1], SamplingParams(logprobs=1000), "logprobs is 1000; allowed: at most the vocabulary's 340"),
        ([1], {"temperature": 0}, "sampling_params is a dict"),
    ],
)
def test_bad_input_is_one_error_and_queues_nothing(make, tokenizer_path, prompt, params, message):
    llm = make(tokenizer_path=tokenizer_path)
    with pytest.raises(ValueError, match=message):
        llm.generate_async(prompt, params)
    with pytest.raises(ValueError, match=r"^prompts\[1\]: .*" + message):
        llm.generate([[1, 2], prompt, [3]], None if params is None else [GREEDY, params, GREEDY])
    assert llm.engine.num_steps == 0 and llm.stats().num_unfinished == 0
    assert llm.generate([1, 2], GREEDY)[0].finished


def test_requests_that_can_never_fit_and_numbers_of_params(make):
    llm = make(kv_cache_bytes=16 * 4 * 8)
    with pytest.raises(ValueError, match="needs 10 blocks of cache group 0.*it has 8"):
        llm.generate([1] * 20, SamplingParams(max_tokens=20))
    with pytest.raises(ValueError, match="2 sampling_params for 3 prompts"):
        llm.generate([[1], [2], [3]], [GREEDY, GREEDY])
    with pytest.raises(ValueError, match="a text prompt needs a tokenizer"):
        llm.generate("text")


def test_stop_strings_streamed_and_not(make, tokenizer_path):
    llm = make(tokenizer_path=tokenizer_path)
    full = llm.generate("abc", SamplingParams(temperature=0, max_tokens=40))[0].text
    stop = full[10:13]
    assert full.index(stop) == full.find(stop)
    for include in (False, True):
        params = SamplingParams(temperature=0, max_tokens=40, stop=[stop], include_stop_str_in_output=include)
        output = llm.generate("abc", params)[0]
        assert output.text == full[: full.index(stop) + (3 if include else 0)]
        assert (output.finish_reason, output.stop_reason) == ("stop", stop)
        pieces = list(llm.generate_async("abc", params))
        assert "".join(p.text for p in pieces) == output.text
        assert [t for p in pieces for t in p.token_ids] == output.token_ids
        assert [p.finished for p in pieces] == [False] * (len(pieces) - 1) + [True]
        assert pieces[-1].finish_reason == "stop"


def test_stop_tokens_end_and_are_not_shown(make, tokenizer_path):
    tokens = expected_tokens([1, 2, 3], 10, 340)
    llm = make(tokenizer_path=tokenizer_path, eos_token_ids=(tokens[4],))
    output = llm.generate([1, 2, 3], SamplingParams(temperature=0, max_tokens=10))[0]
    first = tokens.index(tokens[4])
    assert output.token_ids == tokens[: first + 1] and output.finish_reason == "stop" and output.stop_reason is None
    assert output.text == llm.tokenizer.decode(tokens[:first])
    assert "".join(o.text for o in llm.generate_async([1, 2, 3], GREEDY)) == output.text
    ignoring = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, stop_token_ids=[tokens[1]])
    output = llm.generate([1, 2, 3], ignoring)[0]
    assert output.token_ids == tokens[:2] and output.stop_reason == tokens[1]


def test_seeds_are_reproducible_and_samples_differ(make):
    params = SamplingParams(n=3, temperature=2.0, seed=5, max_tokens=12)
    llm = make()
    first = llm.generate([4, 5, 6], params)[0]
    busy = llm.generate([[7, 8]] * 5 + [[4, 5, 6]], [SamplingParams(max_tokens=9)] * 5 + [params])[-1]
    assert [o.token_ids for o in first.outputs] == [o.token_ids for o in busy.outputs]
    assert [o.index for o in first.outputs] == [0, 1, 2] and len({tuple(o.token_ids) for o in first.outputs}) == 3
    unseeded = SamplingParams(temperature=2.0, max_tokens=12)
    runs = [[o.token_ids for o in make(seed=s).generate([[4, 5]] * 3, unseeded)] for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2] and runs[0][0] != runs[0][1]


def test_n_streams_are_told_apart(make):
    llm = make()
    params = SamplingParams(n=3, temperature=1.5, seed=1, max_tokens=6)
    whole = llm.generate([4, 5], params)[0]
    tokens = {0: [], 1: [], 2: []}
    for piece in llm.generate_async([4, 5], params):
        tokens[piece.outputs[0].index] += piece.token_ids
    assert tokens == {o.index: o.token_ids for o in whole.outputs}


def test_logprobs(make, tokenizer_path):
    llm = make(tokenizer_path=tokenizer_path, max_batch_tokens=8, max_sequences=4)
    params = SamplingParams(temperature=0, max_tokens=5, logprobs=2, prompt_logprobs=1)
    prompt = list(range(20, 40))
    output, plain = llm.generate([prompt, prompt], [params, GREEDY])
    assert plain.logprobs is None and plain.prompt_logprobs is None
    assert len(output.logprobs) == 5 and len(output.prompt_logprobs) == 20 and output.prompt_logprobs[0] is None
    for token, entry in zip(output.token_ids, output.logprobs):
        assert entry[token].rank == 1 and len(entry) == 2
        assert entry[token].logprob == max(e.logprob for e in entry.values())
        assert entry[token].decoded_token == llm.tokenizer.decode_token(token)
    for position in range(1, 20):
        entry = output.prompt_logprobs[position]
        assert prompt[position] in entry and {e.rank for e in entry.values()} >= {1}
    total = sum(entry[t].logprob for t, entry in zip(output.token_ids, output.logprobs))
    assert output.outputs[0].cumulative_logprob == pytest.approx(total)
    streamed = list(llm.generate_async(prompt, params))
    assert streamed[0].prompt_logprobs == output.prompt_logprobs and streamed[1].prompt_logprobs is None
    assert [e for p in streamed for e in p.logprobs] == output.logprobs


def test_prompt_logprobs_from_a_start_on(make):
    llm = make(max_batch_tokens=8, max_sequences=4)
    prompt = list(range(20, 40))
    everything = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1))[0]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, prompt_logprobs_start=14)
    for _ in range(2):
        output = llm.generate([prompt], params)[0]
        assert output.metrics.num_cached_tokens == 12  # the blocks of 4 tokens before row 13, which predicts token 14
        assert output.prompt_logprobs[:14] == [None] * 14
        assert output.prompt_logprobs[14:] == everything.prompt_logprobs[14:]
    with pytest.raises(ValueError, match="prompt_logprobs_start is 14 and the prompt has 3 tokens; allowed: 0 to 2"):
        llm.generate([[1, 2, 3]], params)


def test_bad_words_in_both_spellings(make, tokenizer_path):
    llm = make(tokenizer_path=tokenizer_path)
    checked = llm._checker.check("x", SamplingParams(bad_words=["fox"]))
    encode = llm.tokenizer.backend.encode
    assert set(checked.params.bad_token_ids) == {
        tuple(encode(word, add_special_tokens=False).ids) for word in ("fox", " fox")
    }


def test_many_concurrent_streams(make):
    llm = make(max_sequences=8)
    prompts = [[i % 100, 3, 4] for i in range(200)]

    async def follow(prompt):
        tokens = []
        async for piece in llm.generate_async(prompt, GREEDY):
            tokens += piece.token_ids
        return tokens

    async def main():
        streams = asyncio.gather(*(follow(p) for p in prompts))
        whole = await llm.generate_async([9, 9], GREEDY)
        return await streams, whole

    results, whole = asyncio.run(main())
    assert results == [expected_tokens(p, 10, 101) for p in prompts]
    assert whole.token_ids == expected_tokens([9, 9], 10, 101)


def test_abort_of_a_stream_and_by_leaving_it(make):
    llm = make()
    long = SamplingParams(temperature=0, max_tokens=200)

    async def main():
        handle = llm.generate_async([1, 2], long, request_id="mine")
        async for piece in handle:
            assert piece.request_id == "mine"
            llm.abort("mine")
            break
        aborted = await handle
        other = llm.generate_async([1, 2], long)
        async for _ in other:
            break
        return aborted, await other

    for output in asyncio.run(main()):
        assert output.finish_reason == "abort" and 1 <= len(output.token_ids) < 200
    handle = llm.generate_async([1, 2], long)
    handle.abort()
    assert handle.result(10).finish_reason == "abort"
    llm.abort("never was")


def test_a_request_id_in_use_is_an_error(make):
    gate = threading.Event()
    llm = make(on_step=lambda batch: gate.wait(10))
    first = llm.generate_async([1], GREEDY, request_id="x")
    second = llm.generate_async([1], GREEDY, request_id="x")
    gate.set()
    with pytest.raises(ValueError, match="'x' is in use"):
        second.result(10)
    assert first.result(10).finished


def test_engine_errors_reach_every_waiter_and_free_the_blocks(make):
    state = {"fail": False}

    def on_step(batch):
        if state["fail"] and batch.num_tokens > 2:
            raise MemoryError("out of memory in segment 3")

    llm = make(on_step=on_step, max_sequences=4)
    good = llm.generate([5, 6], GREEDY)[0]
    state["fail"] = True
    with pytest.raises(
        GenerationError, match=r"4 of 4 .*prompts\[0\].*MemoryError: out of memory in segment 3"
    ) as info:
        llm.generate([[i, 7, 8] for i in range(4)], GREEDY)
    assert isinstance(info.value.errors[0].__cause__, MemoryError)

    async def main():
        results = await asyncio.gather(
            *(llm.generate_async([i, 2, 3], GREEDY) for i in range(6)), return_exceptions=True
        )
        streamed = llm.generate_async([1, 2, 3], GREEDY)
        with pytest.raises(RuntimeError, match="was lost"):
            async for _ in streamed:
                pass
        return results

    assert all(isinstance(r, RuntimeError) for r in asyncio.run(main()))
    state["fail"] = False
    assert llm.generate([5, 6], GREEDY)[0].token_ids == good.token_ids


def test_nan_logits_fail_only_their_request(make):
    class Broken(FakeEngine):
        def step(self, batch):
            logits = super().step(batch)
            for row, at in enumerate(batch.sample_rows.tolist()):
                if batch.token_ids[at] == 77:
                    logits[row] = float("nan")
            return logits

    llm = make(Broken())
    with pytest.raises(GenerationError, match=r"1 of 3 .*prompts\[1\].*NaN or infinite") as info:
        llm.generate([[1, 2], [1, 77], [1, 3]], SamplingParams(temperature=0, max_tokens=3))
    assert [o is None for o in info.value.outputs] == [False, True, False]
    assert info.value.outputs[2].token_ids == expected_tokens([1, 3], 3, 101)


def test_nan_logits_of_a_prompt_fail_only_their_request(make):
    """Their log-probabilities would be NaN; the row that samples is not concerned."""

    class Broken(FakeEngine):
        def step(self, batch):
            logits = super().step(batch)
            logits[torch.isin(batch.token_ids[batch.sample_rows], torch.tensor([77])), 5] = float("nan")
            logits[torch.isin(batch.token_ids[batch.sample_rows], torch.tensor([78])), 5] = float("inf")
            return logits

    llm = make(Broken(max_batch_tokens=8))
    params = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=1)
    prompts = [[1, 2, 3], [*range(12), 77, 3], [1, 78, 3], [1, 5, 3]]
    with pytest.raises(GenerationError, match=r"2 of 4 .*prompts\[1\].*no log-probabilities after position 12") as info:
        llm.generate(prompts, params)
    assert [o is None for o in info.value.outputs] == [False, True, True, False]
    for prompt, output in zip(prompts, info.value.outputs):
        if output is not None:
            assert output.token_ids == expected_tokens(prompt, 3, 101) and len(output.prompt_logprobs) == 3


def test_an_error_of_on_output_ends_only_its_own_request(make):
    llm = make()
    seen, calls = [], []

    def broken(output):
        calls.append(output)
        raise KeyError("in the user's code")

    long = SamplingParams(temperature=0, max_tokens=100)
    bad = llm.generate_async([1, 2], long, on_output=broken)
    at_the_end = llm.generate_async([4, 2], SamplingParams(max_tokens=1), on_output=broken)
    good = llm.generate_async([1, 3], GREEDY, on_output=lambda output: seen.extend(output.token_ids))
    for handle in (bad, at_the_end):
        with pytest.raises(KeyError, match="in the user's code"):
            handle.result(10)
    assert good.result(10).token_ids == seen == expected_tokens([1, 3], 10, 101)
    assert llm.generate([5, 6], GREEDY)[0].token_ids == expected_tokens([5, 6], 10, 101)
    assert len(calls) == 2 and llm.stats().num_unfinished == 0


def test_preemption_and_long_queues_change_nothing(make):
    llm = make(kv_cache_bytes=16 * 4 * 30, policy="max_utilization", max_sequences=8)
    prompts = [[i, 2, 3, 4, i] * 2 for i in range(30)]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=40))
    assert [o.token_ids for o in outputs] == [expected_tokens(p, 40, 101) for p in prompts]
    assert sum(o.metrics.num_preemptions for o in outputs) > 0


def test_penalties_reach_the_sampler(make):
    llm = make()
    never = llm.generate([1, 2], SamplingParams(temperature=0, max_tokens=40, allowed_token_ids=range(50),
                                                frequency_penalty=2.0, presence_penalty=2.0))[0]  # fmt: skip
    plain = llm.generate([1, 2], SamplingParams(temperature=0, max_tokens=40, allowed_token_ids=range(50)))[0]
    assert max(never.token_ids) < 50 and len(set(never.token_ids)) > len(set(plain.token_ids))


def test_what_follows_its_own_tokens_is_sampled_late_and_the_same(make):
    params = [
        SamplingParams(temperature=0, max_tokens=30, frequency_penalty=1.5),
        SamplingParams(temperature=1.5, seed=3, max_tokens=30, repetition_penalty=1.3, top_k=20, logprobs=1),
        SamplingParams(temperature=0, max_tokens=30, bad_token_ids=[[5, 6], expected_tokens([4, 2, 3], 2, 101)]),
        SamplingParams(temperature=0.8, seed=1, max_tokens=30, min_tokens=6, stop_token_ids=range(40)),
        SamplingParams(temperature=0, max_tokens=30),
    ] * 3
    prompts = [[i, 2, 3] for i in range(2, 17)]
    llm, in_turns = make(), make(async_scheduling=False)
    outputs, expected = (one.generate(prompts, params, progress=False) for one in (llm, in_turns))
    for mine, other in zip(outputs, expected):
        assert (mine.token_ids, mine.finish_reason, mine.logprobs) == (
            other.token_ids, other.finish_reason, other.logprobs,
        )  # fmt: skip
    times = llm.stats().times
    assert in_turns.stats().times.ahead == in_turns.stats().times.late == 0
    if llm._core.asynchronous:
        assert times.steps > times.ahead >= times.late > 0
        assert times.host_s > 0 and times.wait_s >= 0


def test_top_p_without_top_k_is_sampled_late_and_the_same(make):
    """Its sampling waits for the device, which may not hold up the tokens of the step before; with top_k nothing waits."""
    alone = SamplingParams(temperature=1.3, seed=3, max_tokens=12, top_p=0.9)
    limited = SamplingParams(temperature=1.3, seed=3, max_tokens=12, top_p=0.9, top_k=30)
    prompts = [[i, 2, 3] for i in range(5)]
    for params in (limited, alone):
        llm, in_turns = make(vocab_size=2500), make(vocab_size=2500, async_scheduling=False)
        outputs, expected = (one.generate(prompts, params, progress=False) for one in (llm, in_turns))
        assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]
        times = llm.stats().times
        assert times.late == (times.ahead if params is alone else 0)


def test_the_host_is_never_more_than_a_step_ahead(make, monkeypatch):
    """Of prompt pieces too, which bring no tokens: each step is waited for when the next one is in the queue."""
    waiting, depths = set(), []

    class Copy(HostCopy):
        def __init__(self, *args):
            super().__init__(*args)
            waiting.add(self)

        def wait(self):
            waiting.remove(self)
            return super().wait()

    monkeypatch.setattr("camshaft.runtime.runner.HostCopy", Copy)
    llm = make(max_batch_tokens=8, on_step=lambda batch: depths.append((len(waiting), batch.sample_rows.shape[0])))
    llm.generate([list(range(60))], GREEDY, progress=False)
    assert max(depth for depth, _ in depths) == llm._core.asynchronous and sum(rows == 0 for _, rows in depths) == 7
    assert not waiting


def test_random_rows_draw_the_same_in_both_orders(make):
    params = [
        SamplingParams(n=2, temperature=1.2, seed=5, max_tokens=20, top_p=0.8),
        SamplingParams(temperature=2.0, seed=6, max_tokens=25, min_p=0.01, logprobs=2, prompt_logprobs=1),
    ] * 6
    prompts = [[i] * (i + 1) for i in range(12)]
    options = {"policy": "max_utilization", "kv_cache_bytes": 16 * 4 * 30, "max_batch_tokens": 16}
    runs = [
        [(o.token_ids, o.logprobs) for output in one.generate(prompts, params) for o in output.outputs]
        for one in (make(**options), make(async_scheduling=False, **options))
    ]
    assert runs[0] == runs[1]


def test_an_error_of_a_step_ahead_leaves_the_results_before_it(make):
    """The step that fails is launched before the results of the one before it are looked at; those still count."""
    steps = []

    def on_step(batch):
        steps.append(batch.num_tokens)
        if len(steps) == 4:
            raise RuntimeError("boom")

    llm = make(on_step=on_step)
    short, long = SamplingParams(temperature=0, max_tokens=3), SamplingParams(temperature=0, max_tokens=9)
    with pytest.raises(GenerationError, match="1 of 2 .*boom") as info:
        llm.generate([[1, 2], [3, 4]], [short, long])
    assert info.value.outputs[0].token_ids == expected_tokens([1, 2], 3, 101)
    assert llm.generate([3, 4], GREEDY)[0].token_ids == expected_tokens([3, 4], 10, 101)


def test_trace_replays(make, tmp_path):
    llm = make(trace=tmp_path / "trace.jsonl", policy="max_utilization", kv_cache_bytes=16 * 4 * 20)
    llm.generate([[i, 2, 3] for i in range(12)], SamplingParams(temperature=0, max_tokens=30))
    llm.shutdown()
    assert replay_file(tmp_path / "trace.jsonl").num_steps == llm.stats().scheduler.steps


def test_shutdown_fails_what_is_under_way(make):
    gate = threading.Event()
    llm = make(on_step=lambda batch: gate.wait(10))
    handle = llm.generate_async([1], GREEDY)
    closer = threading.Thread(target=llm.shutdown)
    closer.start()
    gate.set()
    closer.join(10)
    with pytest.raises(RuntimeError, match="shut down"):
        handle.result(10)
    with pytest.raises(RuntimeError, match="was shut down"):
        llm.generate([1], GREEDY)
    llm.shutdown()


def test_garbage_collection_ends_the_thread():
    llm = LLM(FakeEngine())
    llm.generate([1], GREEDY)
    thread = llm._serving._thread
    del llm
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_arguments_are_checked(make, tmp_path):
    with pytest.raises(ValueError, match="target: these are options of camshaft.compile"):
        LLM(FakeEngine(), target="eager")
    with pytest.raises(ValueError, match="model is a int; allowed: an engine"):
        LLM(3)
    with pytest.raises(ValueError, match=r"16 B \(kv_cache_bytes=16\), which is not one block of 4 tokens"):
        LLM(FakeEngine(), kv_cache_bytes=16)
    assert tokenizer_of(FakeEngine(tokenizer_path=tmp_path)) is None


def test_progress_bar_is_quiet_unless_asked(make, capsys):
    llm = make()
    llm.generate([[1], [2]], GREEDY)
    assert capsys.readouterr().err == ""
    llm.generate([[1], [2]], GREEDY, use_tqdm=True)


def test_serving_imports_no_compiler_and_the_package_no_torch():
    code = "import sys, camshaft.runtime; assert 'torch' not in sys.modules; from camshaft.runtime import LLM; "
    code += (
        "bad = {'transformers', 'camshaft.passes', 'camshaft.models', 'rich'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
