"""Log-likelihoods of continuations and tasks in JSONL, against Transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from camshaft.runtime.evaluate.likelihood import TokenPair, encode_pair, likelihoods
from camshaft.runtime.evaluate.tasks import read_task, run_task

from camshaft import LLM

from .tiny import log_likelihood

CONTEXT = tuple(range(40, 62))
PAIRS = [
    TokenPair(CONTEXT, (70, 71, 72)),
    TokenPair(CONTEXT, (80,)),
    TokenPair((5,), (6, 7)),
    TokenPair(CONTEXT, (90, 91)),
    TokenPair(CONTEXT[:6], tuple(range(100, 150))),
]
QUESTIONS = [
    {"context": "The quick brown", "choices": [" fox", " dog jumps", " box"], "answer": 0},
    {"context": "Pack my box with five dozen", "choices": [" jugs!", " liquor"], "answer": 1},
    {"context": "", "choices": ["Grüße", "señor"], "answer": 1},
]


def write(path: Path, items: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(item) for item in items) + "\n\n", encoding="utf-8")
    return path


def test_likelihoods_are_those_of_the_model(tiny: tuple[Path, Any], tiny_llm: LLM) -> None:
    before = tiny_llm.stats().scheduler.prefix_hit_tokens
    found = likelihoods(tiny_llm, PAIRS)
    for pair, entry in zip(PAIRS, found, strict=True):
        logprob, greedy = log_likelihood(tiny[1], pair.context, pair.continuation)
        assert entry.logprob == pytest.approx(logprob, abs=1e-3)  # float32 sums
        assert (entry.is_greedy, entry.num_tokens, entry.truncated) == (greedy, len(pair.continuation), False)
    # two more choices of the first context, from its blocks of 4 before row 21
    assert tiny_llm.stats().scheduler.prefix_hit_tokens - before >= 2 * 20


def test_a_greedy_continuation_is_known(tiny_llm: LLM) -> None:
    from camshaft import SamplingParams

    output = tiny_llm.generate([list(CONTEXT)], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))[0]
    pairs = [TokenPair(CONTEXT, tuple(output.token_ids)), TokenPair(CONTEXT, (*output.token_ids[:-1], 7))]
    assert [entry.is_greedy for entry in likelihoods(tiny_llm, pairs)] == [True, False]


def test_a_long_context_loses_its_beginning(tiny: tuple[Path, Any], tiny_llm: LLM) -> None:
    pair = TokenPair(tuple(i % 300 for i in range(100)), (3, 4, 5))
    entry = likelihoods(tiny_llm, [pair])[0]
    assert entry.truncated
    assert entry.logprob == pytest.approx(log_likelihood(tiny[1], pair.context[-60:], (3, 4, 5))[0], abs=1e-3)
    with pytest.raises(ValueError, match="a continuation has 70 tokens; allowed: at most 62"):
        likelihoods(tiny_llm, [TokenPair((1,), (2,) * 70)])


def test_pairs_are_the_tokens_of_the_whole_text(tiny_llm: LLM) -> None:
    tokenizer = tiny_llm.tokenizer
    assert tokenizer is not None
    whole = tokenizer.encode("The quick brown fox")
    for context, continuation in (("The quick brown", " fox"), ("The quick brown ", "fox")):
        pair = encode_pair(tokenizer, context, continuation)
        assert [*pair.context, *pair.continuation] == whole and pair.context[0] == 0
    alone = encode_pair(tokenizer, "", "fox")
    assert alone.context == (0,) and list(alone.continuation) == tokenizer.encode("fox", add_special_tokens=False)
    templated = encode_pair(tokenizer, "<s>The", " fox")
    assert templated.context.count(0) == 1  # the text brings its own beginning
    with pytest.raises(ValueError, match="has no tokens of its own"):
        encode_pair(tokenizer, "The", "")


def test_multiple_choice(tiny: tuple[Path, Any], tiny_llm: LLM, tmp_path: Path) -> None:
    task = read_task(write(tmp_path / "animals.jsonl", QUESTIONS))
    assert (task.name, task.kind, len(task.items)) == ("animals", "multiple choice", 3)
    result = run_task(tiny_llm, task)
    acc, acc_norm = [], []
    for question in QUESTIONS:
        pairs = [encode_pair(tiny_llm.tokenizer, question["context"], choice) for choice in question["choices"]]
        scores = np.array([log_likelihood(tiny[1], pair.context, pair.continuation)[0] for pair in pairs])
        acc.append(scores.argmax() == question["answer"])
        lengths = [len(choice.strip()) for choice in question["choices"]]
        acc_norm.append((scores / lengths).argmax() == question["answer"])
    assert result.metrics["acc"].value == pytest.approx(np.mean(acc))
    assert result.metrics["acc_norm"].value == pytest.approx(np.mean(acc_norm))
    mean = np.mean(acc)
    assert result.metrics["acc"].stderr == pytest.approx(math.sqrt(mean * (1 - mean) / 2))
    assert result.num_truncated == 0
    assert set(result.to_json()["metrics"]) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}


def test_continuations(tiny: tuple[Path, Any], tiny_llm: LLM, tmp_path: Path) -> None:
    items = [{"context": "The quick", "continuation": " brown fox"}]
    result = run_task(tiny_llm, read_task(write(tmp_path / "next.jsonl", items)))
    pair = encode_pair(tiny_llm.tokenizer, "The quick", " brown fox")
    logprob, greedy = log_likelihood(tiny[1], pair.context, pair.continuation)
    assert result.metrics["nats"].value == pytest.approx(-logprob, abs=1e-3) and result.metrics["acc"].value == greedy
    assert result.to_json()["metrics"]["nats_stderr"] is None  # of one item


GOOD = {"context": "a", "choices": ["b", "c"], "answer": 0}


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "has no items"),
        ([GOOD, {"context": "a", "options": ["b"]}], "line 2: the item has fields context, options; allowed:"),
        ([GOOD, {**GOOD, "answer": 2}], "line 2: answer is 2; allowed: the right choice's index, 0 to 1"),
        ([{**GOOD, "answer": "b"}], "line 1: answer is 'b'"),
        ([{**GOOD, "choices": ["b"]}], "at least two texts"),
        ([{**GOOD, "context": 3}], "context is 3; allowed: a text"),
        ([{"context": "a", "continuation": ""}], "continuation is ''; allowed: a text"),
        (
            [GOOD, {"context": "a", "continuation": "b"}],
            "line 2: the item is a continuation, and those before it are multiple",
        ),
        ([[1]], "line 1: the item has list; allowed:"),
    ],
)
def test_files_that_are_no_tasks(items: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_task(write(tmp_path / "task.jsonl", items))


def test_lines_that_are_no_json(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n{", encoding="utf-8")
    with pytest.raises(ValueError, match="line 3: no JSON"):
        read_task(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_task(tmp_path / "none.jsonl")
