"""Models with random weights: drawn by seed and name, when they are loaded, and held by nobody."""

from __future__ import annotations

import json

import pytest
import torch
from camshaft.models.random_weights import SHAPES, RandomWeights

import camshaft
from camshaft import LLM, SamplingParams

TINY = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512, "max_position_embeddings": 512, "initializer_range": 0.05,
    "attention_bias": True, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return tmp_path


def _weights(config, **options):
    return RandomWeights.of(config, device="cpu", **options).open(torch.float32).weights


def test_weights_follow_from_seed_and_name(config):
    one, again, other = _weights(config), _weights(config / "config.json"), _weights(config, seed=1)
    matrix = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(one[matrix].load(), again[matrix].load())
    assert not torch.equal(one[matrix].load(), other[matrix].load())
    assert not torch.equal(one[matrix].load(), one["model.layers.1.mlp.up_proj.weight"].load())
    values = one[matrix].load()
    assert values.mean().abs() < 0.005 and values.std().item() == pytest.approx(0.05, rel=0.05)
    assert (one["model.layers.0.input_layernorm.weight"].load() == 1).all()
    assert (one["model.layers.0.self_attn.q_proj.bias"].load() == 0).all()
    assert torch.equal(one["lm_head.weight"].load(), one["model.embed_tokens.weight"].load())
    assert one[matrix].load() is not one[matrix].load()  # nobody keeps it


def test_an_engine_of_random_weights_generates(config):
    tokens = []
    for seed in (0, 0, 3):
        model = RandomWeights.of(config, seed=seed, device="cpu")
        engine = camshaft.compile(
            model, target="eager", device="cpu", max_sequences=4, max_batch_tokens=64, cache=False
        )
        assert engine.manifest.model.name == f"{config.name} (random weights)" and engine.tokenizer_path is None
        with LLM(engine, kv_cache_bytes=1 << 20) as llm:
            outputs = llm.generate([[1, 2, 3], [7] * 20], SamplingParams(temperature=1, seed=5, max_tokens=8))
        tokens.append([output.token_ids for output in outputs])
    assert tokens[0] == tokens[1] != tokens[2]


@pytest.mark.parametrize(
    "name, billions",
    [("llama-3.1-8b", 8.03), ("llama-3.1-70b", 70.55), ("llama-3.2-1b", 1.24), ("llama-3.2-3b", 3.21), ("qwen3-0.6b", 0.60),
     ("qwen3-8b", 8.19), ("qwen3-32b", 32.76), ("mistral-7b", 7.25)],
)  # fmt: skip
def test_shapes_have_the_parameters_of_their_models(name, billions):
    source = RandomWeights.of(name).open(torch.bfloat16)
    tied = source.config.tie_word_embeddings
    sizes = {
        key: weight.num_bytes // 2 for key, weight in source.weights.items() if not (tied and key == "lm_head.weight")
    }
    assert sum(sizes.values()) / 1e9 == pytest.approx(billions, abs=0.006)
    assert source.config.model_type == SHAPES[name]["model_type"] and source.max_positions >= 32768


def test_bad_shapes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such shape and no such file; .*llama-3.1-8b"):
        RandomWeights.of("llama-9")
    file = tmp_path / "config.json"
    for text, message in (
        ("{", "is not JSON"),
        ("{}", "names no model_type"),
        ('{"model_type": "nonsense"}', "Transformers makes no config of it"),
        (json.dumps({**TINY, "quantization_config": {}}), "of a quantized model"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            RandomWeights.of(file)
