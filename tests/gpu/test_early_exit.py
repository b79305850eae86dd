"""Hidden states and self speculation on a GPU: captured steps of all graphs, the tokens of plain decoding.

pytest -m gpu tests/gpu/test_early_exit.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from camshaft.export.targets import get_target
from camshaft.models import demo
from camshaft.passes.bisect import relative_error
from row_traces import batch_of, bind_caches

import camshaft
from camshaft import LLM, SamplingParams, SpeculativeConfig

pytestmark = pytest.mark.gpu
LIMITS: dict[str, Any] = {"max_seq_len": 768, "max_batch_tokens": 256, "max_sequences": 8, "block_size": 16}
LAYERS = (2, 9, -1)


def texts() -> list[str]:
    """Beginnings of held-out documents, of several lengths."""
    documents = demo.heldout_path().read_text(encoding="utf-8").split("\f")
    return [document[: 150 + 60 * number] for number, document in enumerate(documents[:12])]


@pytest.fixture(scope="module", params=["inductor", "tensorrt", "eager"])
def engine(request: Any) -> Any:
    torch.backends.cuda.matmul.allow_tf32 = False
    reason = get_target(request.param).unavailable(torch.device("cuda", 0))
    if reason is not None:
        pytest.skip(reason)
    return camshaft.compile("demo", target=request.param, dtype="float32", early_exit=8, hidden_layers=LAYERS, **LIMITS)


def test_hidden_states_of_captured_steps(engine: Any) -> None:
    prompts = [[(7 * i + 3 * j) % 4000 + 1 for j in range(40)] for i in range(3)]
    bind_caches(engine, 3)
    cpu = camshaft.compile("demo", target="eager", device="cpu", dtype="float32", hidden_layers=LAYERS, **LIMITS)
    bind_caches(cpu, 3)
    engine.capture()
    kept = []
    for chunks in ([(0, 0, 20), (1, 0, 7)], [(0, 20, 21), (1, 7, 8)], [(0, 21, 25), (1, 8, 13), (2, 0, 20)]):
        for _ in range(3):  # steps are captured when their shape comes again
            outputs = engine.step_outputs(batch_of(engine, prompts, chunks))
            right = cpu.step_outputs(batch_of(cpu, prompts, chunks))
            allowed = 2e-2 if "tensorrt" in engine.manifest.targets else 1e-3  # TF32 products
            for layer in range(len(LAYERS)):
                assert relative_error(right.hidden[:, layer], outputs.hidden[:, layer]) < allowed
            kept.append((outputs.hidden, outputs.hidden.clone()))
    torch.cuda.synchronize()
    assert all(torch.equal(hidden, copy) for hidden, copy in kept), "later steps leave hidden states alone"
    engine.release_cache()


def test_greedy_outputs_are_those_of_plain_decoding(engine: Any) -> None:
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    with LLM(engine, kv_cache_bytes=1 << 28) as llm:
        expected = [list(output.token_ids) for output in llm.generate(texts(), params)]
    with LLM(engine, kv_cache_bytes=1 << 28, speculative=SpeculativeConfig(method="self", adaptive=False)) as llm:
        for _ in range(3):  # steps are captured when their shapes come again; prefixes come out of the cache
            found = [list(output.token_ids) for output in llm.generate(texts(), params)]
            same = sum(a == b for a, b in zip(expected, found))
            assert same >= (
                len(found) if "tensorrt" not in engine.manifest.targets else len(found) - 2
            )  # TF32 products
        assert llm.stats().speculative.mean_accepted_length > 2
        if engine.uncaptured is None:
            for part in engine._split._parts:
                graphs = part.execution._graphs
                assert graphs.shapes and not graphs.failures


@pytest.mark.parametrize("quantize", [None, "fp8"])
def test_bfloat16_with_temperature(quantize: str | None) -> None:
    params = SamplingParams(temperature=0.5, seed=1, max_tokens=64, ignore_eos=True)
    config = SpeculativeConfig(method="self", exit_layer=8, adaptive=False)
    with LLM("demo", dtype="bfloat16", quantize=quantize, kv_cache_bytes=1 << 28, speculative=config, **LIMITS) as llm:
        for _ in range(2):
            outputs = llm.generate(texts(), params)
            assert all(len(output.token_ids) == 64 for output in outputs)
        assert llm.stats().speculative.mean_accepted_length > 1.8
