"""Token trees on a GPU, end to end: steps that verify them, captured, and slots that move give the tokens of plain decoding.

pytest -m gpu tests/gpu/test_tree_steps.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from camshaft.models import demo
from families import random_model, tiny_config
from runtime.speculative.proposers import branching

import camshaft
from camshaft import LLM, SamplingParams, SpeculativeConfig

pytestmark = pytest.mark.gpu
TREE = ((0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (1, 0, 0))
LENGTHS = [3, 70, 20, 1, 9, 33, 5, 64, 17, 2, 41, 8]
PROMPTS = [[(7 * i + 3 * j) % 120 + 1 for j in range(n)] for i, n in enumerate(LENGTHS)]
TEXTS = ["A dictionary maps", "The package manager keeps track of", "def main():", "The file system", "A thread is"]


def captured_trees(engine: Any) -> list[Any]:
    """The shapes of steps with trees that were captured, none having failed."""
    graphs = engine.prepare()._graphs
    assert graphs is not None and not graphs.failures
    return [shape for shape in graphs.shapes if shape.trees]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("target", ["inductor", "eager"])
def test_mixed_batches_of_trees_texts_and_prompts(family: str, target: str) -> None:
    """gemma2 has layers with windows: their distances are those of the branch."""
    torch.backends.cuda.matmul.allow_tf32 = False
    engine = camshaft.compile(
        random_model(tiny_config(family)).to("cuda"), target=target, dtype="float32", max_seq_len=128,
        max_batch_tokens=128, max_sequences=8, cache=False,
    )  # fmt: skip
    params = [SamplingParams(temperature=0, max_tokens=5 + 2 * i, ignore_eos=True) for i in range(len(PROMPTS))]
    options: dict[str, Any] = {"kv_cache_bytes": 1 << 24, "max_chunk_tokens": 40}
    with LLM(engine, **options) as llm:
        expected = [list(output.token_ids) for output in llm.generate(PROMPTS, params)]
    texts = [[*prompt, *tokens] for prompt, tokens in zip(PROMPTS, expected)]
    config = SpeculativeConfig(method="custom", proposer=branching(texts), tree=TREE, adaptive=False)
    with LLM(engine, speculative=config, **options) as llm:
        for _ in range(4):
            assert [list(output.token_ids) for output in llm.generate(PROMPTS, params)] == expected
        assert llm.stats().speculative.mean_accepted_length > 1.5
        assert captured_trees(engine)


def test_trees_of_the_demo_models_draft_model() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    limits: dict[str, Any] = {"dtype": "float32", "max_seq_len": 256, "max_batch_tokens": 256, "max_sequences": 8}
    engine, draft = (
        camshaft.compile(str(path), target="inductor", cache=False, **limits)
        for path in (demo.path(), demo.draft_path())
    )
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    with LLM(engine, kv_cache_bytes=1 << 28) as llm:
        expected = [list(output.token_ids) for output in llm.generate(TEXTS, params)]
    lengths = []
    for tree in (TREE, None):
        config = SpeculativeConfig(method="draft", model=draft, tree=tree, num_draft_tokens=3, adaptive=False)
        with LLM(engine, kv_cache_bytes=1 << 28, speculative=config) as llm:
            for _ in range(2):
                assert [list(output.token_ids) for output in llm.generate(TEXTS, params)] == expected
            lengths.append(llm.stats().speculative.mean_accepted_length)
            if tree is not None:
                assert captured_trees(engine) and captured_trees(draft)
    assert lengths[0] > lengths[1] > 1.5, "more than one branch is accepted more often"
