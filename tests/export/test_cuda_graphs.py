"""Captured steps, replayed on the CPU: each step is padded to its shape in buffers that keep what earlier steps left there."""

from __future__ import annotations

import logging
from typing import Any, cast

import pytest
import torch
from camshaft.export import cuda_graphs
from camshaft.export.buckets import StepShape, bucket_of
from camshaft.export.cuda_graphs import CaptureLimits, StepGraphs
from camshaft.export.engine import Engine
from camshaft.export.kernels import errors
from families import random_model, tiny_config
from runtime.speculative.proposers import branching

import camshaft
from camshaft import LLM, SamplingParams, SpeculativeConfig


class _Replay:
    def __init__(self, graphs: OnCpu, shape: StepShape) -> None:
        self._graphs, self._shape, self._inputs = graphs, shape, graphs._inputs(shape)

    def replay(self) -> None:
        values, context = self._inputs
        logits, _ = self._graphs._launch(values, context)
        if self._shape.query_len:
            self._graphs._verify_logits = logits
        else:
            self._graphs._logits = logits
        self._graphs.replayed.append(self._shape)


class OnCpu(StepGraphs):
    """Graphs whose replay computes the step from the same buffers."""

    fails: str | None = None

    def _capture(self, shape: StepShape) -> bool:
        if self.fails:
            self.failures[shape] = self.fails
            return False
        self._graphs[shape] = cast(Any, _Replay(self, shape))
        return True

    @classmethod
    def of(cls, engine: Engine) -> OnCpu:
        execution = engine.prepare()
        cache = engine.manifest.cache
        limits = CaptureLimits(
            (1, 2, 4, 8), engine.max_batch_tokens, engine.max_sequences, engine.max_seq_len,
            -(-engine.max_seq_len // cache.block_size), len(cache.windows), engine.vocab_size,
        )  # fmt: skip
        graphs = cls(execution._launch, execution._sizes, limits, engine.device, cast(Any, None))
        graphs.replayed: list[StepShape] = []  # type: ignore[misc]
        execution._graphs = graphs
        return graphs


class Fixed:
    """Sizes of engines that take these and nothing else, as TensorRT's."""

    def __init__(self, buckets: tuple[int, ...]) -> None:
        self._buckets = buckets

    def padded(self, name: str, count: int) -> int:
        return bucket_of(self._buckets, count)


PROMPTS = [[5, 9, 3], list(range(3, 60)), [7] * 20, [11], [4, 4], list(range(80, 20, -1)), [1, 2, 3, 4, 5]]


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return camshaft.compile(
        random_model(tiny_config(request.param)), target="eager", max_seq_len=128, max_batch_tokens=100, max_sequences=6,
        block_size=4, cache=False,
    )  # fmt: skip


def test_replayed_steps_give_the_same_tokens(engine: Engine) -> None:
    params = [SamplingParams(temperature=0, max_tokens=5 + 3 * i, ignore_eos=True) for i in range(len(PROMPTS))]
    with LLM(engine, max_chunk_tokens=30) as llm:
        expected = [output.token_ids for output in llm.generate(PROMPTS, params)]
    with LLM(engine, max_chunk_tokens=30, enable_prefix_cache=False) as llm:
        graphs = OnCpu.of(engine)
        for _ in range(3):  # the first of each shape is launched, the second captured
            assert [output.token_ids for output in llm.generate(PROMPTS, params)] == expected
        assert {shape.decode for shape in graphs.replayed} == {True, False}
        assert set(graphs.replayed) == set(graphs.shapes)
        assert {shape.sequences for shape in graphs.shapes} <= {1, 2, 4, 6, 8}


def test_steps_that_verify_drafts_are_captured(engine: Engine) -> None:
    params = [SamplingParams(temperature=0, max_tokens=5 + 3 * i, ignore_eos=True) for i in range(len(PROMPTS))]
    with LLM(engine) as llm:
        expected = [output.token_ids for output in llm.generate(PROMPTS, params)]
    drafting = SpeculativeConfig(method="ngram", adaptive=False, ngram_min=1)
    with LLM(engine, enable_prefix_cache=False, speculative=drafting) as llm:
        graphs = OnCpu.of(engine)
        graphs._sizes = Fixed((1, 2, 4, 8, 16, 32, 64, engine.max_batch_tokens))  # type: ignore[assignment]
        for _ in range(3):
            assert [output.token_ids for output in llm.generate(PROMPTS, params)] == expected
        shapes = [shape for shape in graphs.replayed if shape.query_len]
        assert shapes and all(shape.rows == shape.tokens and shape.query_len <= 8 for shape in shapes)


def test_steps_that_verify_trees_have_graphs_of_their_own(engine: Engine) -> None:
    params = [SamplingParams(temperature=0, max_tokens=5 + 3 * i, ignore_eos=True) for i in range(len(PROMPTS))]
    with LLM(engine) as llm:
        expected = [output.token_ids for output in llm.generate(PROMPTS, params)]
    tree = ((0,), (1,), (0, 0), (1, 0), (1, 1), (1, 0, 0))
    texts = [[*prompt, *tokens] for prompt, tokens in zip(PROMPTS, expected)]
    drafting = SpeculativeConfig(method="custom", proposer=branching(texts), tree=tree, adaptive=False)
    with LLM(engine, enable_prefix_cache=False, speculative=drafting) as llm:
        graphs = OnCpu.of(engine)
        for _ in range(3):
            assert [output.token_ids for output in llm.generate(PROMPTS, params)] == expected
        assert llm.stats().speculative.mean_accepted_length > 1.5
        shapes = [shape for shape in graphs.replayed if shape.query_len]
        assert 8 in {shape.query_len for shape in shapes} and all(shape.trees for shape in shapes)
        assert not any(shape.trees for shape in graphs.replayed if not shape.query_len)


def test_a_failed_capture_is_launched_piece_by_piece(engine: Engine) -> None:
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    with LLM(engine) as llm:
        expected = [output.token_ids for output in llm.generate(PROMPTS, params)]
        graphs = OnCpu.of(engine)
        graphs.fails = "no capture today"
        for _ in range(2):
            assert [output.token_ids for output in llm.generate(PROMPTS, params)] == expected
        assert graphs.failures and not graphs.replayed


def test_sizes_between_captured_ones_run_in_the_larger_until_they_are_needed_often(engine: Engine) -> None:
    with LLM(engine) as llm:
        graphs = OnCpu.of(engine)
        graphs.decode_sizes = (1, 2, 3, 4, 8)
        for size in (8, 4):
            graphs._capture(StepShape(size, size, size, True))
        params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
        llm.generate(PROMPTS[:3], params)
        sizes = [shape.tokens for shape in graphs.replayed if shape.decode]
        assert sizes == [4] * 8 + [3] * (len(sizes) - 8) and len(sizes) > 12


def test_verifications_run_in_larger_ones_until_they_are_needed_often(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "_VERIFICATIONS_BEFORE_CAPTURE", 8)
    with LLM(engine):
        graphs = OnCpu.of(engine)
        large, small = StepShape(16, 4, 16, False, 8), StepShape(8, 2, 8, False, 8)
        graphs._capture(large)
        assert graphs._larger(small) == large and graphs._larger(small._replace(query_len=33)) is None
        assert graphs._larger(small._replace(trees=True)) is None and graphs._larger(StepShape(8, 2, 2, False)) is None
    drafting = SpeculativeConfig(method="ngram", adaptive=False, ngram_min=1)
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    with LLM(engine) as llm:
        expected = llm.generate([7] * 20, params)[0].token_ids
    with LLM(engine, speculative=drafting, enable_prefix_cache=False) as llm:
        graphs = OnCpu.of(engine)
        graphs._capture(large)
        assert llm.generate([7] * 20, params)[0].token_ids == expected
        shapes = [shape for shape in graphs.replayed if shape.query_len]
        own = next(index for index, shape in enumerate(shapes) if shape != large)
        assert own >= 8 and shapes[own].sequences == 1


def test_prompt_logprobs_are_never_captured(engine: Engine) -> None:
    with LLM(engine) as llm:
        graphs = OnCpu.of(engine)
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
        for _ in range(3):
            (output,) = llm.generate([list(range(40))], params)
            assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == 40
        assert not graphs.replayed


def test_so_many_mixed_steps_are_captured_and_no_more(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cuda_graphs, "MIXED_GRAPHS", 1)
    params = [SamplingParams(temperature=0, max_tokens=5 + 3 * i, ignore_eos=True) for i in range(len(PROMPTS))]
    with LLM(engine, max_chunk_tokens=30, enable_prefix_cache=False) as llm:
        expected = [output.token_ids for output in llm.generate(PROMPTS, params)]
        graphs = OnCpu.of(engine)
        with caplog.at_level(logging.INFO, "camshaft.export.cuda_graphs"):
            for _ in range(3):
                assert [output.token_ids for output in llm.generate(PROMPTS, params)] == expected
        assert sum(not shape.decode for shape in graphs.shapes) == 1
        assert any(shape.decode for shape in graphs.shapes)
        assert sum("further ones are launched piece by piece" in message for message in caplog.messages) == 1


class KernelError(Exception):
    """As Triton's: no RuntimeError."""


@pytest.mark.parametrize("error", [RuntimeError("no\nsecond line"), KernelError("at 1:2:\n  x\nno"), RuntimeError()])
def test_a_capture_that_fails_leaves_the_stream_as_it_was(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    calls: list[object] = []
    monkeypatch.setattr(errors, "kernel_errors", lambda: (KernelError,))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty_cache"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (calls.append("mem_get_info"), 0)[1:])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the current stream")
    monkeypatch.setattr(torch.cuda, "set_stream", calls.append)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)

    def record(self: StepGraphs, shape: StepShape, graph: object) -> None:
        raise error

    monkeypatch.setattr(StepGraphs, "_record", record)
    with LLM(engine):
        graphs = OnCpu.of(engine)
        shape = StepShape(4, 4, 4, True)
        assert not StepGraphs._capture(graphs, shape)
        assert graphs.failures[shape].startswith(("no", "at 1:2:", "RuntimeError")) and not graphs.shapes
    assert calls == ["empty_cache", "mem_get_info", "the current stream"]
