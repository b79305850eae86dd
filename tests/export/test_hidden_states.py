"""Engines with hidden layers: what every step gives besides logits, for whole prompts, chunks and decode steps."""

from __future__ import annotations

import pytest
import torch
from families import random_model, tiny_config
from row_traces import batch_of, bind_caches

import camshaft

LAYERS = (2, 0, -1)
PROMPTS = [[(7 * i + 3 * j) % 120 + 1 for j in range(n)] for i, n in enumerate((21, 1, 9))]
STEPS = (((0, 0, 16),), ((0, 16, 20), (2, 0, 4)), ((0, 20, 21), (1, 0, 1), (2, 4, 9)))
"""Chunks: sequence, first position, end."""
LIMITS = {
    "device": "cpu",
    "max_seq_len": 32,
    "max_batch_tokens": 32,
    "max_sequences": 3,
    "block_size": 4,
    "cache": False,
}


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config("llama"))


def expected(model):
    """[sequences] of [tokens, layers, H]."""
    seen = []
    handle = model.model.layers[-1].register_forward_hook(lambda _, __, out: seen.append(out))
    found = []
    for prompt in PROMPTS:
        with torch.no_grad():
            states = model(torch.tensor([prompt]), output_hidden_states=True, use_cache=False).hidden_states
        found.append(torch.stack([seen.pop()[0], states[0][0], states[-1][0]], dim=1))
    handle.remove()
    return found


def check(engine, right):
    bind_caches(engine, len(PROMPTS))
    kept = []
    for chunks in STEPS:
        batch = batch_of(engine, PROMPTS, chunks)
        outputs = engine.step_outputs(batch)
        assert torch.equal(outputs.logits, engine.step(batch))
        kept.append(outputs.hidden)
    for chunks, hidden in zip(STEPS, kept):  # later steps have not written to it
        wanted = torch.cat([right[s][first:end] for s, first, end in chunks])
        assert hidden.shape == (len(wanted), len(LAYERS), 64)
        torch.testing.assert_close(hidden, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", ["eager", "onnxruntime", pytest.param("inductor", marks=pytest.mark.long)])
def test_states_of_steps(model, target):
    engine = camshaft.compile(model, target=target, hidden_layers=LAYERS, **LIMITS)
    assert engine.hidden_layers == LAYERS and engine.manifest.model.hidden_size == 64
    right = expected(model)
    check(engine, right)
    if target != "eager":
        assert engine._native is not None  # steps of up to 16 tokens ran there
        engine._native = None
        check(engine, right)


def test_artifact_and_inspection(model, tmp_path):
    engine = camshaft.compile(model, target="eager", hidden_layers=LAYERS, **LIMITS)
    plain = camshaft.compile(model, target="eager", **LIMITS)
    assert set(plain.plan.segments) & set(engine.plan.segments)  # layers are the same segments
    assert plain.hidden_layers == ()
    bind_caches(plain, len(PROMPTS))
    assert plain.step_outputs(batch_of(plain, PROMPTS, STEPS[0])).hidden is None
    assert engine.activation_bytes() - plain.activation_bytes() == 32 * 3 * 64 * 4
    loaded = camshaft.load(engine.save(tmp_path / "engine"))
    assert loaded.hidden_layers == LAYERS
    assert "capture_hidden" in [record.name for record in loaded.manifest.passes]
    assert "hidden states" in loaded._repr_html_()
    check(loaded, expected(model))


def test_bad_layers(model):
    with pytest.raises(ValueError, match=r"hidden_layers holds 5 .*allowed: 0 .* to 2 "):
        camshaft.compile(model, target="eager", hidden_layers=(5,), **LIMITS)
    with pytest.raises(ValueError, match="each layer once"):
        camshaft.compile(model, target="eager", hidden_layers=(1, 1), **LIMITS)
    with pytest.raises(ValueError, match="hidden_layers and early_exit are options of decoders"):
        camshaft.compile(torch.nn.Linear(2, 2), (torch.zeros(1, 2),), hidden_layers=(1,))
