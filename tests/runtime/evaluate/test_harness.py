"""The adapter for lm-evaluation-harness; where that is not installed, over a stand-in of what the adapter uses of it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from camshaft import LLM, SamplingParams

from .tiny import log_likelihood


class _Model:
    """What the adapter uses of lm_eval.api.model.LM."""

    def __init__(self) -> None:
        self.cache_hook = _Hook()


class _Hook:
    def __init__(self) -> None:
        self.added: list[tuple[str, Any, Any]] = []

    def add_partial(self, kind: str, request: Any, result: Any) -> None:
        self.added.append((kind, request, result))


def _register(name: str) -> Callable[[type], type]:
    assert name == "camshaft"
    return lambda kind: kind


@dataclass
class Request:
    args: tuple[Any, ...]


@pytest.fixture(scope="module")
def harness() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("lm_eval") is None:
            names = ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.registry")
            modules = {name: ModuleType(name) for name in names}
            vars(modules["lm_eval.api.model"])["LM"] = _Model
            vars(modules["lm_eval.api.registry"])["register_model"] = _register
            for name, module in modules.items():
                patch.setitem(sys.modules, name, module)
        yield importlib.import_module("camshaft.runtime.evaluate.harness")
        sys.modules.pop("camshaft.runtime.evaluate.harness", None)


@pytest.fixture
def adapter(harness: Any, tiny_llm: LLM) -> Any:
    return harness.CamshaftLM(tiny_llm)


def test_loglikelihood(adapter: Any, tiny: tuple[Path, Any]) -> None:
    requests = [Request(("The quick brown", " fox")), Request(("", "Pack")), Request(("The quick brown", " jugs"))]
    results = adapter.loglikelihood(requests, disable_tqdm=True)
    encode = adapter.tokenizer.encode
    whole, context = encode("The quick brown fox"), encode("The quick brown")
    logprob, greedy = log_likelihood(tiny[1], context, whole[len(context) :])
    assert results[0] == (pytest.approx(logprob, abs=1e-3), greedy) and len(results) == 3
    if isinstance(adapter.cache_hook, _Hook):
        assert [added[:2] for added in adapter.cache_hook.added] == [("loglikelihood", r.args) for r in requests]


def test_loglikelihood_of_a_text_longer_than_the_engine(adapter: Any, tiny: tuple[Path, Any]) -> None:
    text = "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs! " * 2
    tokens = adapter.tokenizer.encode(text, add_special_tokens=False)
    assert len(tokens) > 63
    expected = log_likelihood(tiny[1], [0], tokens[:62])[0]
    for begin in range(62, len(tokens), 62):
        scored = tokens[begin : begin + 62]
        expected += log_likelihood(tiny[1], tokens[begin - 63 + len(scored) : begin], scored)[0]
    assert adapter.loglikelihood_rolling([Request((text,))]) == [pytest.approx(expected, abs=1e-2)]


def test_windows_have_every_token_once(harness: Any) -> None:
    windows = harness.rolling_windows([10, 11, 12, 13, 14, 15, 16], 0, 4)
    assert [(w.context, w.continuation) for w in windows] == [
        ((0,), (10, 11, 12)), ((12,), (13, 14, 15)), ((13, 14, 15), (16,))
    ]  # fmt: skip
    assert harness.rolling_windows([], 0, 4) == []


def test_generate_until(adapter: Any, tiny_llm: LLM) -> None:
    free = tiny_llm.generate(["The quick"], SamplingParams(temperature=0, max_tokens=12))[0].text
    stop = free[len(free) // 2]
    requests = [
        Request(("The quick", {"until": [], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0})),
        Request(("The quick", {"until": stop, "max_gen_toks": 12})),
        Request(("word " * 100, {"until": ["\n\n"], "max_gen_toks": 3})),
    ]
    whole, stopped, _ = adapter.generate_until(requests)
    assert whole == free and stopped == free[: free.index(stop)]
    sampled = adapter.sampling_params({"do_sample": True, "temperature": 0.7, "top_p": 0.9})
    assert (sampled.temperature, sampled.top_p, sampled.max_tokens) == (0.7, 0.9, 256)
    with pytest.raises(ValueError, match="generation options num_beams are unknown; allowed: until"):
        adapter.sampling_params({"num_beams": 4})
    with pytest.raises(ValueError, match="max_gen_toks is 64; allowed: less than 64"):
        adapter.generate_until([Request(("a", {"max_gen_toks": 64}))])


def test_chat(adapter: Any) -> None:
    text = adapter.apply_chat_template([{"role": "user", "content": "hi"}])
    assert text == "<|im_start|>user\nhi<|im_end|><|im_start|>assistant\n"  # blocks trim the line end behind them
    assert "im_start" in adapter.chat_template(True) and adapter.chat_template() is None
    assert "/" not in adapter.tokenizer_name


def test_options_beside_an_llm(harness: Any, tiny_llm: LLM) -> None:
    with pytest.raises(ValueError, match="seed are options of an LLM"):
        harness.CamshaftLM(tiny_llm, seed=1)
