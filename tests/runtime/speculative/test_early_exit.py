"""Self speculation on a small random model: the tokens of plain decoding, in every kind of load."""

from __future__ import annotations

import pytest
import torch
from camshaft.runtime import LLM, SamplingParams, SpeculativeConfig
from families import random_model, tiny_config

import camshaft

from .test_llm import everything, run

LIMITS = {"device": "cpu", "max_seq_len": 64, "max_batch_tokens": 48, "max_sequences": 8, "block_size": 4}
LAYERS = 4


def shallow(family, **changes):
    """A random model whose last layers change little, so that its first ones draft well."""
    config = tiny_config(family)
    config.num_hidden_layers = LAYERS
    if getattr(config, "layer_types", None):
        config.layer_types = [("sliding_attention", "full_attention")[i % 2] for i in range(LAYERS)]
    for name, value in changes.items():
        setattr(config, name, value)
    model = random_model(config)
    for layer in model.model.layers[2:]:
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            module.weight.data *= 0.2
    return model


@pytest.fixture(scope="module")
def model():
    return shallow("llama")


def config(**changes):
    return SpeculativeConfig(**{"method": "self", "adaptive": False, **changes})


def compare(model, target="eager", speculative=None, load=None, count=10, **options):
    """Stats of an LLM that speculates, after proof that its tokens are those of one that does not. Greedy requests, and random ones
    whose drafts are accepted exactly."""
    prompts, params = everything(100)
    prompts, params = prompts[:count], params[:count]
    load = load or {}
    plain = camshaft.compile(model, target=target, **LIMITS, **options)
    split = camshaft.compile(model, target=target, early_exit=2, **LIMITS, **options)
    expected, _ = run(plain, None, prompts, params, **load)
    found, stats = run(split, speculative or config(acceptance="exact"), prompts, params, **load)
    for before, after in zip(expected, found):
        assert [s.token_ids for s in after.outputs] == [s.token_ids for s in before.outputs]
        assert [s.finish_reason for s in after.outputs] == [s.finish_reason for s in before.outputs]
    return stats


@pytest.mark.parametrize("target", ["eager", "onnxruntime", pytest.param("inductor", marks=pytest.mark.long)])
def test_tokens_of_plain_decoding(model, target):
    """Chunks of prompts beside drafts, prefix hits, preemptions, requests that do not speculate, stops, n > 1."""
    load = {"kv_cache_bytes": 160 << 10, "max_chunk_tokens": 9, "policy": "max_utilization"}
    stats = compare(model, target, load=load, count=24)
    assert stats.speculative.mean_accepted_length > 1.5
    assert stats.scheduler.preemptions > 0 and stats.scheduler.prefix_hit_tokens > 0


@pytest.mark.parametrize("asynchronous", [False, True])
def test_adaptive(model, asynchronous):
    stats = compare(
        model, speculative=config(adaptive=True, acceptance="exact"), load={"async_scheduling": asynchronous}
    )
    assert stats.speculative.num_verifications > 0


@pytest.mark.long
def test_windows():
    stats = compare(shallow("gemma3", sliding_window=8), load={"max_chunk_tokens": 16})
    assert stats.speculative.mean_accepted_length > 1.2


def test_fp8_cache(model):
    assert compare(model, kv_cache_dtype="fp8").speculative.mean_accepted_length > 1.5


def test_drafts_stay_on_the_device(model, monkeypatch):
    from camshaft.runtime.speculative.speculation import Speculation

    made = Speculation.__init__

    def keep(self, *args, **kwargs):
        made(self, *args, **kwargs)
        self._on_host = False

    monkeypatch.setattr(Speculation, "__init__", keep)
    assert compare(model).speculative.mean_accepted_length > 1.5


def test_first_layers_compute_drafts_once(model):
    """Rows that go through the first layers, of all that the whole model computes."""
    engine = camshaft.compile(model, target="eager", early_exit=2, **LIMITS)
    rows = {"draft": 0, "early": 0, "late": 0, "whole": 0}
    with LLM(engine, speculative=config()) as llm:
        split = engine._split
        parts = {"draft": split._draft.execution, "early": split._early.execution, "late": split._late.execution}
        for name, execution in {**parts, "whole": engine.prepare()}.items():

            def counted(batch, step=execution.step, name=name):
                rows[name] += batch.token_ids.shape[0]
                return step(batch)

            execution.step = counted
        llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=21), progress=False)
        counts = llm.stats().speculative
    assert rows["draft"] + rows["early"] == rows["late"], "each row that is verified, once"
    assert rows["late"] == sum(counts.drafted) + counts.num_verifications
    assert rows["whole"] == 3 + counts.num_tokens - 1 - counts.num_verified_tokens


def test_rejection_takes_draws(model):
    engine = camshaft.compile(model, target="eager", early_exit=2, **LIMITS)
    params = SamplingParams(temperature=0.9, top_k=5, max_tokens=30, seed=3)
    for acceptance in ("rejection", "typical"):
        outputs, stats = run(engine, config(acceptance=acceptance), [[5, 6, 7]] * 6, params)
        assert all(len(output.outputs[0].token_ids) == 30 for output in outputs)
        assert stats.speculative.mean_accepted_length > 1.3


def test_model_is_compiled_with_its_exit(model):
    with LLM(model, speculative=config(exit_layer=3), target="eager", **LIMITS) as llm:
        assert llm.engine.early_exit == 3
    with pytest.raises(ValueError, match="needs exit_layer="):
        LLM(model, speculative=config(), target="eager", **LIMITS)
    with pytest.raises(ValueError, match="early_exit is 4 for .*; allowed: 1 .* to 3, since it has 4 layers"):
        LLM(model, speculative=config(exit_layer=4), target="eager", **LIMITS)


def test_bad_input(model):
    plain = camshaft.compile(model, target="eager", **LIMITS)
    with pytest.raises(ValueError, match="without an early exit; compile it with early_exit=2"):
        LLM(plain, speculative=config(exit_layer=2))
    split = camshaft.compile(model, target="eager", early_exit=2, **LIMITS)
    with pytest.raises(ValueError, match="exit_layer is 3 and the engine was built with early_exit=2"):
        LLM(split, speculative=config(exit_layer=3))
    with pytest.raises(ValueError, match="drafts chains"):
        LLM(split, speculative=config(tree=((0,), (1,))))
    with pytest.raises(ValueError, match="exit_layer is 0; allowed: integers from 1"):
        config(exit_layer=0)
    with pytest.raises(ValueError, match="method 'ngram' has no exit_layer"):
        SpeculativeConfig(method="ngram", exit_layer=2)


def test_draft_writes_what_the_whole_model_writes(model):
    """Keys and values of the first layers are the same whoever computes them."""
    engine = camshaft.compile(model, target="eager", early_exit=2, **LIMITS)
    with LLM(engine) as llm:
        llm.generate([list(range(1, 20))], SamplingParams(temperature=0, max_tokens=12), progress=False)
        plain = [k.clone() for k, _ in engine.prepare().executor.caches]
    with LLM(engine, speculative=config()) as llm:
        llm.generate([list(range(1, 20))], SamplingParams(temperature=0, max_tokens=12), progress=False)
        assert len(plain) == LAYERS
        for before, (after, _) in zip(plain, engine.prepare().executor.caches):
            torch.testing.assert_close(after.flatten(0, 1)[:30], before.flatten(0, 1)[:30], rtol=1e-4, atol=1e-4)


def test_drafts_do_not_depend_on_the_batch(model):
    """Requests whose chains end at different lengths get the drafts that they get alone."""
    engine = camshaft.compile(model, target="eager", early_exit=2, **LIMITS)
    prompts = [[1, 2, 3], [4, 5, 6, 7], [8, 9], [3, 3, 3]]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (4, 17, 9, 30)]
    together, _ = run(engine, config(), prompts, params)
    for prompt, param, output in zip(prompts, params, together):
        ((alone,), _) = run(engine, config(), [prompt], [param])
        assert alone.metrics.speculative == output.metrics.speculative
