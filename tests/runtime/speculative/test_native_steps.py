"""Native steps of the sizes that verifications have are there before the first text comes."""

from __future__ import annotations

import pytest
import torch
from camshaft.export.kernels.native import NativeBuildError
from camshaft.export.native_step import _library
from families import random_model, tiny_config

import camshaft
from camshaft import LLM, SamplingParams, SpeculativeConfig


def test_an_llm_that_speculates_has_its_native_steps_ready() -> None:
    try:
        _library()
    except NativeBuildError as error:
        pytest.skip(str(error))
    limits = {"max_seq_len": 96, "max_batch_tokens": 64, "max_sequences": 4, "dtype": torch.float32}
    engine = camshaft.compile(random_model(tiny_config("llama")), target="onnxruntime", **limits)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    with LLM(engine) as llm:
        expected = llm.generate([3, 4, 5] * 6, params)[0].token_ids
        assert len(engine._native._ready) < 4
    config = SpeculativeConfig(method="ngram", num_draft_tokens=5, adaptive=False, ngram_min=1)
    with LLM(engine, speculative=config) as llm:
        ready = set(engine._native._ready)
        assert ready == {(count, count) for count in range(1, 7)}
        assert llm.generate([3, 4, 5] * 6, params)[0].token_ids == expected
        assert llm.stats().speculative.num_verifications
        assert {size for size in engine._native._ready if size[1] > 1} <= ready
