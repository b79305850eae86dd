"""Drafts from hidden states on a GPU: heads and EAGLE's layer of the demo model, captured steps, the tokens of plain decoding.

pytest -m gpu tests/gpu/test_hidden_drafts.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from camshaft.models import demo

import camshaft
from camshaft import LLM, SamplingParams, SpeculativeConfig

pytestmark = pytest.mark.gpu
TREE = ((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1), (0, 0, 0, 0))
PATHS = {"heads": demo.heads_path(), "eagle": demo.eagle_path()}
LEAST = {"heads": 1.2, "eagle": 2.0}
"""Mean accepted length from which drafts are taken to be right; in bfloat16, too."""


def texts() -> list[str]:
    """Beginnings of held-out documents, of several lengths."""
    documents = demo.heldout_path().read_text(encoding="utf-8").split("\f")
    return [document[: 150 + 60 * number] for number, document in enumerate(documents[:12])]


@pytest.fixture(scope="module")
def engine() -> Any:
    torch.backends.cuda.matmul.allow_tf32 = False
    return camshaft.compile(
        "demo", target="inductor", dtype="float32", max_seq_len=768, max_batch_tokens=256, max_sequences=8,
        hidden_layers=(2, 5, 8, -1),
    )  # fmt: skip


@pytest.mark.parametrize("tree", [None, TREE])
@pytest.mark.parametrize("method", ["heads", "eagle"])
def test_greedy_outputs_are_those_of_plain_decoding(engine: Any, method: str, tree: Any) -> None:
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    with LLM(engine, kv_cache_bytes=1 << 28) as llm:
        expected = [list(output.token_ids) for output in llm.generate(texts(), params)]
    config = SpeculativeConfig(method=method, model=PATHS[method], tree=tree, adaptive=False)  # type: ignore[arg-type]
    with LLM(engine, kv_cache_bytes=1 << 28, speculative=config) as llm:
        for _ in range(3):  # steps are captured when their shapes come again; prefixes come out of the cache
            assert [list(output.token_ids) for output in llm.generate(texts(), params)] == expected
        stats = llm.stats()
        assert stats.speculative.mean_accepted_length > LEAST[method]
        if llm.draft_engine is not None:
            graphs = llm.draft_engine.prepare()._graphs  # type: ignore[attr-defined]
            assert graphs.shapes and not graphs.failures


@pytest.mark.parametrize("method", ["heads", "eagle"])
def test_bfloat16_with_temperature(method: str) -> None:
    config = SpeculativeConfig(method=method, model=PATHS[method], adaptive=False)  # type: ignore[arg-type]
    params = SamplingParams(temperature=0.5, seed=1, max_tokens=64, ignore_eos=True)
    with LLM(
        "demo", dtype="bfloat16", max_seq_len=768, max_sequences=16, kv_cache_bytes=1 << 28, speculative=config
    ) as llm:
        outputs = llm.generate(texts(), params)
        assert all(len(output.token_ids) == 64 for output in outputs)
        assert llm.stats().speculative.mean_accepted_length > LEAST[method] - 0.5
