"""Engines with an early exit: drafts by the first layers, verification by the others, and whole steps as ever."""

from __future__ import annotations

import pytest
import torch
from camshaft.models.speculative.exit import ExitHead, write_exit
from camshaft.runtime.batch import EarlyRows
from families import random_model, tiny_config
from row_traces import batch_of, bind_caches

import camshaft

PROMPTS = [[(7 * i + 3 * j) % 120 + 1 for j in range(n)] for i, n in enumerate((30, 12))]
LIMITS = {"device": "cpu", "max_seq_len": 32, "max_batch_tokens": 32, "max_sequences": 2, "block_size": 4}


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config("llama"))


def compiled(model, **options):
    return camshaft.compile(model, **{"target": "eager", "early_exit": 1, "cache": False, **LIMITS, **options})


def verified(engine, first, drafted, end):
    """Logits of sequence 0 from `first` to `end`, `drafted` tokens of which were drafted, beside a chunk of sequence 1."""
    bind_caches(engine, 2)
    engine.step(batch_of(engine, PROMPTS, [(0, 0, first), (1, 0, 3)]))
    kept = []
    for position in range(first, first + drafted):
        outputs = engine.draft(batch_of(engine, PROMPTS, [(0, position, position + 1)]))
        assert outputs.logits.shape == (1, engine.vocab_size) and outputs.hidden.shape == (1, 1, 64)
        kept.append(outputs.hidden[:, 0])
    batch = batch_of(engine, PROMPTS, [(0, first, end), (1, 3, 12)])
    count = batch.num_tokens
    rest = [(0, first + drafted, end)] * (first + drafted < end) + [(1, 3, 12)]
    batch.early = EarlyRows(
        torch.cat(kept), torch.arange(drafted), batch_of(engine, PROMPTS, rest), torch.arange(drafted, count)
    )
    outputs = engine.step_outputs(batch)
    assert outputs.hidden is None
    return outputs.logits.clone()


def whole(engine, first, end):
    bind_caches(engine, 2)
    engine.step(batch_of(engine, PROMPTS, [(0, 0, first), (1, 0, 3)]))
    return engine.step(batch_of(engine, PROMPTS, [(0, first, end), (1, 3, 12)])).clone()


@pytest.mark.parametrize("target", ["eager", "onnxruntime", pytest.param("inductor", marks=pytest.mark.long)])
def test_verification_is_the_whole_model(model, target):
    engine, plain = compiled(model, target=target), compiled(model, target=target, early_exit=None)
    assert engine.early_exit == 1 and plain.early_exit is None
    assert engine.weights_bytes == plain.weights_bytes, "parts share weights"
    assert set(plain.plan.segments) < set(engine.plan.segments)
    for first, drafted, end in ((8, 2, 11), (8, 3, 11), (20, 4, 25)):
        expected = whole(plain, first, end)
        torch.testing.assert_close(whole(engine, first, end), expected)
        torch.testing.assert_close(verified(engine, first, drafted, end), expected, rtol=1e-4, atol=1e-4)


def test_native_steps_share_weights(model):
    engine, plain = compiled(model, target="onnxruntime"), compiled(model, target="onnxruntime", early_exit=None)
    engine.prepare()
    plain.prepare()
    parts = engine._split._parts
    assert all(part.native is not None for part in parts)
    assert engine._native.copied_bytes == plain._native.copied_bytes


def test_artifact_and_cache(model, tmp_path, monkeypatch):
    monkeypatch.setenv("CAMSHAFT_CACHE", str(tmp_path / "cache"))
    made = [compiled(model, target="onnxruntime", cache=True) for _ in range(2)]
    assert "cached" in made[1].manifest.timings
    expected = verified(made[0], 8, 2, 11)
    loaded = camshaft.load(made[0].save(tmp_path / "engine"))
    assert loaded.early_exit == 1 and list(loaded.plan.parts) == ["early", "exit", "late"]
    assert {"mark_exit", "split_early_exit"} <= {record.name for record in loaded.manifest.passes}
    assert "early exit" in loaded._repr_html_()
    for engine in (made[1], loaded):
        assert torch.equal(verified(engine, 8, 2, 11), expected)


def test_trained_exit(model, tmp_path):
    head = ExitHead(1, 64, 8, 1e-5)
    torch.nn.init.normal_(head.up.weight)
    head.norm.weight.data += 0.5
    for tensor in head.state_dict().values():
        tensor.copy_(tensor.bfloat16())
    write_exit(head, tmp_path / "exit")
    engine, plain = compiled(model, early_exit=tmp_path / "exit", hidden_layers=(1,)), compiled(model)
    assert engine.early_exit == 1 and engine.config.exit_head and not plain.config.exit_head
    torch.testing.assert_close(whole(engine, 8, 11), whole(plain, 8, 11))
    bind_caches(engine, 2)
    hidden = engine.step_outputs(batch_of(engine, PROMPTS, [(0, 0, 9)])).hidden[:, 0]
    logits = engine.draft(batch_of(engine, PROMPTS, [(0, 8, 9)])).logits
    with torch.no_grad():
        torch.testing.assert_close(logits, model.lm_head(head(hidden[8:])), rtol=1e-4, atol=1e-4)
    loaded = camshaft.load(engine.save(tmp_path / "engine"))
    bind_caches(loaded, 2)
    loaded.step(batch_of(loaded, PROMPTS, [(0, 0, 8)]))
    torch.testing.assert_close(
        loaded.draft(batch_of(loaded, PROMPTS, [(0, 8, 9)])).logits, logits, rtol=1e-4, atol=1e-4
    )


def test_bad_exits(model, tmp_path):
    for layer in (0, 2, -3, 1.5, True):
        with pytest.raises(ValueError, match="early_exit is .* for .*; allowed: 1 "):
            compiled(model, early_exit=layer)
    with pytest.raises(ValueError, match="no config.json"):
        compiled(model, early_exit=tmp_path)
    write_exit(ExitHead(1, 32, 8, 1e-5), tmp_path / "small")
    with pytest.raises(ValueError, match="for hidden states of 32"):
        compiled(model, early_exit=tmp_path / "small")
    plain = compiled(model, early_exit=None)
    bind_caches(plain, 2)
    with pytest.raises(ValueError, match="built without an early exit"):
        plain.draft(batch_of(plain, PROMPTS, [(0, 0, 1)]))
