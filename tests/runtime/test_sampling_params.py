"""SamplingParams: what is stored, and that every bad value is refused with the value and what is allowed."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
from camshaft.runtime.sampling_params import MAX_SEED, SamplingParams


def test_defaults_sample_freely() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_k, params.top_p, params.min_p) == (1, 1.0, 0, 1.0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.seed, params.logprobs) == (32, 0, None, None)
    assert (params.stop, params.stop_token_ids, params.bad_words, params.bad_token_ids) == ((), (), (), ())
    assert not params.is_greedy
    assert SamplingParams(temperature=0).is_greedy


def test_sequences_are_normalised() -> None:
    params = SamplingParams(
        stop="END",
        stop_token_ids=[3, 4],
        bad_words=["x"],
        bad_token_ids=[[1, 2], [3]],
        allowed_token_ids=range(3),
        top_k=-1,
    )
    assert params.stop == ("END",)
    assert params.stop_token_ids == (3, 4)
    assert params.bad_words == ("x",)
    assert params.bad_token_ids == ((1, 2), (3,))
    assert params.allowed_token_ids == (0, 1, 2)
    assert params.top_k == 0
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert params == dataclasses.replace(params)


def test_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().top_k = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        SamplingParams(2)  # type: ignore[misc]
    with pytest.raises(TypeError):
        SamplingParams(top_q=0.5)  # type: ignore[call-arg]


def test_logit_bias_is_a_copy() -> None:
    bias = {5: -3.5}
    params = SamplingParams(logit_bias=bias)
    bias[6] = 1.0
    assert params.logit_bias == {5: -3.5}


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": MAX_SEED},
        {"max_tokens": None, "min_tokens": 1000},
        {"top_p": 1, "temperature": 2},
        {"logprobs": 0, "prompt_logprobs": 5},
        {"presence_penalty": -2, "frequency_penalty": 2.0},
    ],
)
def test_legal_edges(fields: dict[str, Any]) -> None:
    SamplingParams(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": 0}, "n is 0; allowed: integers >= 1"),
        ({"n": True}, "n is True"),
        ({"temperature": -0.1}, "temperature is -0.1; allowed: finite numbers >= 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": -2}, "top_k is -2; allowed: integers >= -1; 0 or -1 keeps all tokens"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"top_p": 0.0}, "top_p is 0.0; allowed: finite numbers in (0, 1]"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; allowed: finite numbers > 0"),
        ({"presence_penalty": 2.1}, "presence_penalty is 2.1; allowed: finite numbers in [-2, 2]"),
        ({"frequency_penalty": -2.1}, "frequency_penalty is -2.1"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": MAX_SEED + 1}, f"allowed: integers from 0 to {MAX_SEED}"),
        ({"max_tokens": 0}, "max_tokens is 0; allowed: integers >= 1, or None"),
        ({"min_tokens": -1}, "min_tokens is -1"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens is 5 and max_tokens is 4"),
        ({"stop": [""]}, "stop holds ''; allowed: non-empty strings"),
        ({"stop": [7]}, "stop holds 7"),
        ({"stop": "x", "detokenize": False}, "set detokenize=True or use stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids holds -1; allowed: integers >= 0"),
        ({"bad_words": "x"}, "bad_words is 'x'; allowed: a sequence of strings"),
        ({"bad_words": [""]}, "bad_words holds ''"),
        ({"bad_token_ids": [[]]}, "bad_token_ids[0] is empty"),
        ({"bad_token_ids": [[1], [-2]]}, "bad_token_ids[1] holds -2"),
        ({"allowed_token_ids": []}, "allowed_token_ids is empty"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias keys holds -1"),
        ({"logit_bias": {1: float("inf")}}, "logit_bias[1] is inf"),
        ({"logprobs": -1}, "logprobs is -1; allowed: integers >= 0, or None"),
        ({"prompt_logprobs": -1}, "prompt_logprobs is -1"),
        ({"ignore_eos": 1}, "ignore_eos is 1; allowed: True or False"),
    ],
)
def test_bad_values_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        SamplingParams(**fields)
