"""Engines in fp8: small families against the definitions run by eager, saved and loaded, and what stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from camshaft.export.bisect import check_engine
from camshaft.export.build import passes_of
from camshaft.export.engine import Engine
from camshaft.models import demo
from camshaft.models.huggingface import open_model
from camshaft.passes import quantize_fp8
from camshaft.passes.manager import PassManager
from camshaft.runtime.bench.perplexity import document_tokens, perplexity
from families import random_model, tiny_config
from shared_traces import trace_decoder

import camshaft
from camshaft import LLM, SamplingParams

FP8: dict[str, Any] = {"quantize": "fp8", "kv_cache_dtype": "fp8"}
SIZES: dict[str, Any] = {"cache": False, "max_seq_len": 64, "max_batch_tokens": 64}
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(autouse=True)
def _small_layers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize_fp8, "MIN_WEIGHTS", 0)


def _build(model: Any, target: str = "eager", **options: Any) -> Engine:
    engine: Engine = camshaft.compile(model, target=target, device="cpu", **{**SIZES, **FP8, **options})
    return engine


def _matches(engine: Engine, name: str) -> int:
    return next(record.num_matches for record in engine.manifest.passes if record.name == name)


def _stored(engine: Engine) -> set[str]:
    return {name for name in engine.plan.weight_names if engine.weights[name].dtype == torch.float8_e4m3fn}


@pytest.mark.parametrize(
    ("family", "layers", "target"),
    [
        pytest.param("llama", 8, "inductor", marks=pytest.mark.long),
        pytest.param("gpt2", 8, "onnxruntime", marks=pytest.mark.long),
        pytest.param("phi3", 8, "onnxruntime", marks=pytest.mark.long),
        ("qwen2", 8, "eager"),
        pytest.param("gemma2", 8, "onnxruntime", marks=pytest.mark.long),
        pytest.param("mixtral", 4, "eager", marks=pytest.mark.long),
        pytest.param("qwen3_moe", 4, "onnxruntime", marks=pytest.mark.long),
    ],
)
def test_families_agree_with_the_definitions(family: str, layers: int, target: str) -> None:
    model = random_model(tiny_config(family))
    engine = _build(model, target)
    assert (engine.config.target, _matches(engine, "quantize_linear")) == (target, layers)
    assert len(_stored(engine)) == layers
    assert any("it makes the logits" in line for line in engine.manifest.report)
    if "mixtral" in family or "moe" in family:
        assert any("experts of camshaft.moe" in line for line in engine.manifest.report)
    if target == "onnxruntime":
        assert any("camshaft.scaled_linear" in line and "runs in PyTorch" in line for line in engine.manifest.report)
    program = PassManager(passes_of(engine.config)).run(trace_decoder(open_model(model, torch.float32)))
    check = check_engine(engine, program)
    assert check.ok, check
    assert engine.native_step.startswith("no native step")


def test_a_tied_head_keeps_the_embedding() -> None:
    config = tiny_config("llama")
    config.tie_word_embeddings = True
    engine = _build(random_model(config))
    tables = [name for name in engine.plan.weight_names if name.endswith(("lm_head.weight", "embed_tokens.weight"))]
    assert len(tables) == 1 and engine.weights[tables[0]].dtype == torch.float32
    assert len(_stored(engine)) == 8


def test_half_precision_and_blocks_of_half_the_size() -> None:
    model = random_model(tiny_config("llama"))
    engine, plain = _build(model, dtype="bfloat16"), _build(model, dtype="bfloat16", kv_cache_dtype="auto")
    assert [2 * group.bytes_per_block for group in engine.cache_groups] == [
        g.bytes_per_block for g in plain.cache_groups
    ]
    with LLM(engine, kv_cache_bytes=1 << 20) as llm:
        assert len(llm.generate([[1, 2, 3]], GREEDY)[0].token_ids) == 12


def test_saved_loaded_and_found_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMSHAFT_CACHE", str(tmp_path / "cache"))
    model = random_model(tiny_config("llama"))
    first, again = _build(model, cache=True), _build(model, cache=True)
    assert "cached" in again.manifest.timings and "cached" not in first.manifest.timings
    first.save(tmp_path / "engine")
    loaded = camshaft.load(tmp_path / "engine")
    assert loaded.manifest.cache == first.manifest.cache and loaded.config == first.config
    assert loaded.manifest.cache.layers[0].dtype == torch.float8_e4m3fn and _stored(loaded) == _stored(first)
    assert (
        sum((tmp_path / "engine" / f).stat().st_size for f in set(loaded.manifest.weights.values()))
        < 1.1 * first.weights_bytes
    )
    tokens = []
    for engine in (first, again, loaded):
        with LLM(engine, kv_cache_bytes=1 << 20) as llm:
            tokens.append(llm.generate([[5, 6, 7, 8]], GREEDY)[0].token_ids)
    assert tokens[0] == tokens[1] == tokens[2]


def test_auto_on_the_cpu_names_its_reason() -> None:
    engine = _build(random_model(tiny_config("llama")), target="auto")
    assert engine.config.target == "eager"
    assert "auto: eager, since fp8 linear layers have no ONNX Runtime form" in engine.manifest.report


def test_modules_refuse_options_of_decoders() -> None:
    with pytest.raises(ValueError, match="options of decoders"):
        camshaft.compile(torch.nn.Linear(4, 4), (torch.ones(2, 4),), quantize="fp8")


def test_perplexity_of_the_demo_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize_fp8, "MIN_WEIGHTS", 1 << 17)
    text = demo.heldout_path().read_text(encoding="utf-8")[:1600]
    scores = {}
    for name, options in (("plain", {"quantize": None, "kv_cache_dtype": "auto"}), ("fp8", FP8)):
        with LLM(_build("demo", max_seq_len=256, max_batch_tokens=256, **options), kv_cache_bytes=16 << 20) as llm:
            tokens = document_tokens(llm.tokenizer, text)
            scores[name] = perplexity(llm, tokens, context=128)
    assert scores["plain"].num_tokens == scores["fp8"].num_tokens == len(tokens) - 1
    assert scores["fp8"].perplexity / scores["plain"].perplexity < 1.03  # 1.016 on the whole text (bench/results)


def test_what_perplexity_refuses() -> None:
    with LLM(_build(random_model(tiny_config("llama"))), kv_cache_bytes=1 << 20) as llm:
        with pytest.raises(ValueError, match="context is 100 tokens; allowed: 1 to 62"):
            perplexity(llm, [1, 2, 3], context=100)
        with pytest.raises(ValueError, match="needs at least 2"):
            perplexity(llm, [1], context=8)
