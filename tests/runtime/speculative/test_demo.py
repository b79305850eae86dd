"""The demo model with its drafts: 200 prompts in mixed batches, token for token; accepted lengths."""

from __future__ import annotations

import random
from typing import Any

import pytest
from camshaft.models import demo
from camshaft.runtime import Tokenizer

import camshaft
from camshaft import LLM, SamplingParams, SpeculativeConfig

pytestmark = pytest.mark.long
LIMITS: dict[str, Any] = {"max_seq_len": 640, "max_batch_tokens": 256, "max_sequences": 16}


@pytest.fixture(scope="module")
def engines() -> tuple[Any, Any]:
    draft = camshaft.compile(str(demo.draft_path()), target="onnxruntime", **LIMITS)
    return camshaft.compile("demo", target="onnxruntime", hidden_layers=(2, 5, 8, -1), **LIMITS), draft


@pytest.fixture(scope="module")
def text() -> list[int]:
    tokenizer = Tokenizer.from_dir(demo.path())
    return tokenizer.encode(demo.heldout_path().read_text(encoding="utf-8").replace("\f", "\n"))


def configs(draft: Any, **fields: Any) -> dict[str, SpeculativeConfig]:
    return {
        "ngram": SpeculativeConfig(method="ngram", **fields),
        "draft": SpeculativeConfig(method="draft", model=draft, **fields),
        "heads": SpeculativeConfig(method="heads", model=demo.heads_path(), **fields),
        "eagle": SpeculativeConfig(method="eagle", model=demo.eagle_path(), **fields),
    }


@pytest.mark.parametrize("adaptive", [False, True])
def test_greedy_outputs_of_200_prompts_are_those_of_plain_decoding(engines, text, adaptive) -> None:
    engine, draft = engines
    rng = random.Random(1)
    prompts = []
    for _ in range(200):
        begin = rng.randrange(len(text) - 100)
        prompts.append(text[begin : begin + rng.randrange(4, 100)])
    params = [SamplingParams(temperature=0, max_tokens=rng.randrange(8, 64)) for _ in prompts]
    with LLM(engine, kv_cache_bytes=1 << 28) as llm:
        plain = [o.token_ids for o in llm.generate(prompts, params, progress=False)]
    for name, config in configs(draft, adaptive=adaptive).items():
        with LLM(engine, kv_cache_bytes=1 << 28, speculative=config) as llm:
            found = [o.token_ids for o in llm.generate(prompts, params, progress=False)]
            assert llm.stats().speculative.num_verifications > 0 or adaptive, name
        assert found == plain, name


def test_accepted_lengths_on_held_out_text_and_code(engines, text) -> None:
    engine, draft = engines
    rng = random.Random(0)
    prompts = [text[at : at + 200] for at in (rng.randrange(len(text) - 200) for _ in range(24))]
    params = SamplingParams(temperature=0, max_tokens=96, ignore_eos=True)
    for name, config in configs(draft, adaptive=False).items():
        with LLM(engine, kv_cache_bytes=1 << 28, speculative=config) as llm:
            llm.generate(prompts, params, progress=False)
            length = llm.stats().speculative.mean_accepted_length
        assert length is not None and length > {"ngram": 1.5, "draft": 2.5, "heads": 1.2, "eagle": 2.7}[name], name


TREE = (
    (0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 0, 0, 0),
)  # fmt: skip


@pytest.mark.parametrize("shape", [{"num_draft_tokens": 6}, {"num_draft_tokens": 5, "tree": TREE}], ids=["6", "tree"])
def test_eagle_with_longer_chains_and_a_tree(engines, text, shape) -> None:
    rng = random.Random(0)
    prompts = [text[at : at + 200] for at in (rng.randrange(len(text) - 200) for _ in range(24))]
    config = SpeculativeConfig(method="eagle", model=demo.eagle_path(), adaptive=False, **shape)
    with LLM(engines[0], kv_cache_bytes=1 << 28, speculative=config) as llm:
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=96, ignore_eos=True), progress=False)
        length = llm.stats().speculative.mean_accepted_length
    assert length is not None and length > 3
