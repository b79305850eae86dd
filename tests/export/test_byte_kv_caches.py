"""Engines with KV caches of 8 bits on the CPU: the C kernels give the tokens of the torch reference."""

from __future__ import annotations

from typing import Any

import pytest
from camshaft.export.kernels import dispatch
from camshaft.export.kernels.native import NativeBuildError, find_compiler
from camshaft.models import demo
from camshaft.runtime.outputs import CompletionOutput

import camshaft
from camshaft import LLM, SamplingParams

try:
    find_compiler()
except NativeBuildError:
    pytest.skip("no C compiler", allow_module_level=True)

LIMITS: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "cache": False, "progress": False, "max_seq_len": 160, "max_batch_tokens": 24,
    "max_sequences": 3, "block_size": 8,
}  # fmt: skip
START = "# Regular expressions\n\nA regular expression is a pattern. The package manager keeps track of the files that it has.\n\n"
PROMPTS = [
    START,
    START + "A dictionary maps",
    "To install the package, run the following command:\n\n",
    START + "A list is",
]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=2)
TIE = 0.1
"""Nats between two tokens that another order of float32 sums may swap: a key at the edge between two integers becomes the other."""


def build(target: str, kv_cache_dtype: str) -> camshaft.Engine:
    """The demo model; prompts are longer than a step, so they come in pieces, and share their first blocks."""
    data = [demo.calibration_path().read_text()[:4000]]
    calibration = data if kv_cache_dtype == "int8" else None
    return camshaft.compile(
        str(demo.path()), target=target, kv_cache_dtype=kv_cache_dtype, calibration=calibration, **LIMITS
    )


def generated(engine: camshaft.Engine) -> list[CompletionOutput]:
    """After a first prompt alone, whose blocks are then found again, and after all together."""
    with LLM(engine, kv_cache_bytes=1 << 22) as llm:
        first = llm.generate(PROMPTS[:1], GREEDY)
        rest = llm.generate(PROMPTS, GREEDY)
        assert rest[1].metrics.num_cached_tokens > 0
        return [output.outputs[0] for output in [*first, *rest]]


def assert_same_tokens(got: list[CompletionOutput], expected: list[CompletionOutput]) -> None:
    """Token by token, up to where two were as likely."""
    compared = 0
    for mine, other in zip(got, expected, strict=True):
        assert other.logprobs is not None
        for token, wanted, entry in zip(mine.token_ids, other.token_ids, other.logprobs, strict=True):
            if token != wanted:
                likely = sorted(logprob.logprob for logprob in entry.values())
                assert likely[-1] - likely[-2] < TIE, (mine.token_ids, other.token_ids)
                break
            compared += 1
    assert compared > 60  # of 120


@pytest.mark.parametrize(
    ("target", "kv_cache_dtype"),
    [
        ("onnxruntime", "int8"),
        pytest.param("onnxruntime", "fp8", marks=pytest.mark.long),
        pytest.param("inductor", "int8", marks=pytest.mark.long),
        pytest.param("inductor", "fp8", marks=pytest.mark.long),
    ],
)
def test_greedy_tokens_are_those_of_the_reference(
    target: str, kv_cache_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build(target, kv_cache_dtype)
    eager = build("eager", kv_cache_dtype)
    got = [generated(engine), generated(eager)]
    assert engine.native_step.startswith("native step up to 16 tokens")
    monkeypatch.setattr(dispatch.cpu, "supports", lambda *_: False)
    expected = generated(eager)
    for outputs in got:
        assert_same_tokens(outputs, expected)
