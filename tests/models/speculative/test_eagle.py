"""EAGLE's layer: published checkpoints, its engine against the module, and what does not fit."""

from __future__ import annotations

import json

import pytest
import torch
from camshaft.graph.weights import Weight
from camshaft.models.speculative.eagle import capture_layers, read_eagle, read_eagle_config, write_eagle
from camshaft.models.speculative.eagle_model import EagleModel
from camshaft.models.speculative.objectives import UnrolledAttention
from row_traces import batch_of, bind_caches
from safetensors.torch import load_file, save_file
from small_drafts import CAPTURE, tiny_eagle, tiny_target

import camshaft

VOCAB, DRAFT_VOCAB = 24, 20
LIMITS = {
    "device": "cpu",
    "dtype": "float32",
    "max_seq_len": 32,
    "max_batch_tokens": 32,
    "max_sequences": 3,
    "block_size": 4,
}


@pytest.fixture(scope="module")
def target():
    return tiny_target(VOCAB)


@pytest.fixture
def folder(target, tmp_path):
    write_eagle(tiny_eagle(target, DRAFT_VOCAB), tmp_path)
    return tmp_path


def rewrite(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_what_is_written_is_read(target, folder):
    draft, found = tiny_eagle(target, DRAFT_VOCAB).bfloat16(), read_eagle(folder)
    names = set(load_file(folder / "model.safetensors"))
    assert {"fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d", "midlayer.hidden_norm.weight"} < names
    assert "midlayer.self_attn.q_proj.weight" in names and "embed_tokens.weight" not in names
    assert found.embed_tokens.weight.is_meta
    for name, value in draft.state_dict().items():
        if name != "embed_tokens.weight":
            assert torch.equal(found.state_dict()[name], value), name
    assert found.draft_tokens.tolist() == list(range(4, 24)) and capture_layers(found.config, 3) == CAPTURE
    facts = json.loads((folder / "config.json").read_text())
    assert facts["architectures"] == ["LlamaForCausalLMEagle3"] and facts["draft_vocab_size"] == DRAFT_VOCAB


def test_other_names_for_the_same(folder):
    expected = read_eagle(folder).state_dict()

    def rename(tensors):
        for name in list(tensors):
            tensors["model." + name.replace("midlayer.", "layers.0.")] = tensors.pop(name)

    rewrite(folder, rename)
    found = read_eagle(folder).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items() if not value.is_meta)


def test_the_layers_that_are_captured(folder):
    config = read_eagle_config(folder)
    del config.eagle_config
    assert capture_layers(config, 32) == (2, 16, 29)
    with pytest.raises(
        ValueError, match=r"hidden states after layers \[2, 1, 0\], and the target has 3 layers; allowed: 1 to 2"
    ):
        capture_layers(config, 3)


def test_what_does_not_fit_is_refused(target, folder):
    embeddings = Weight.from_tensor(target.get_input_embeddings().weight)
    EagleModel.read(folder, embeddings, "tiny")
    with pytest.raises(ValueError, match="for a vocabulary of 24 tokens, and tiny has 25"):
        EagleModel.read(folder, Weight.from_tensor(torch.zeros(25, 64)), "tiny")
    with pytest.raises(ValueError, match="a hidden size of 64 and no embed_tokens, and tiny has embeddings of 32"):
        EagleModel.read(folder, Weight.from_tensor(torch.zeros(24, 32)), "tiny")
    rewrite(folder, lambda tensors: tensors["d2t"].fill_(9))
    with pytest.raises(ValueError, match="d2t leads to the tokens 9 to 28"):
        read_eagle(folder)
    rewrite(folder, lambda tensors: tensors["d2t"].fill_(3))
    with pytest.raises(ValueError, match="d2t and t2d name different tokens"):
        read_eagle(folder)
    rewrite(folder, lambda tensors: tensors.pop("midlayer.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"lacks 1 of 15 tensors, first 'midlayer\.mlp\.up_proj\.weight'"):
        read_eagle(folder)
    rewrite(folder, lambda tensors: tensors.pop("fc.weight"))
    with pytest.raises(ValueError, match=r"lacks 'fc\.weight', so it is no EAGLE-3 checkpoint"):
        read_eagle(folder)
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**facts, "num_hidden_layers": 32}))
    with pytest.raises(ValueError, match="num_hidden_layers is 32; EAGLE-3's draft has 1"):
        read_eagle(folder)
    (folder / "config.json").write_text(json.dumps({"hidden_size": 4}))
    with pytest.raises(ValueError, match="lacks intermediate_size, num_attention_heads, vocab_size"):
        read_eagle(folder)


@pytest.mark.parametrize("compiled_for", ["eager", "onnxruntime"])
def test_the_engine_computes_what_the_module_does(target, folder, compiled_for):
    """Chunks of prompts and decode steps, with hidden states in and out; native steps, too."""
    weight = target.get_input_embeddings().weight
    model = EagleModel.read(folder, Weight.from_tensor(weight), "tiny")
    engine = camshaft.compile(model, target=compiled_for, hidden_layers=(1,), cache=False, **LIMITS)
    assert engine.vocab_size == DRAFT_VOCAB and engine.manifest.model.hidden_input == 64
    draft = read_eagle(folder).float()
    draft.embed_tokens = torch.nn.Embedding.from_pretrained(weight)
    prompts = [[(7 * i + 3 * j) % VOCAB for j in range(n)] for i, n in enumerate((21, 1, 9))]
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(len(prompt), 64, generator=generator) for prompt in prompts]
    bind_caches(engine, len(prompts))
    for chunks in (((0, 0, 17),), ((0, 17, 20), (2, 0, 4)), ((0, 20, 21), (1, 0, 1), (2, 4, 9))):
        batch = batch_of(engine, prompts, chunks)
        with pytest.raises(
            ValueError, match=r"takes hidden states of 64 numbers beside each token .* the batch brings none"
        ):
            engine.step(batch)
        batch.hidden = torch.cat([states[s][first:end] for s, first, end in chunks])
        logits, hidden = engine.step_outputs(batch)
        expected = [
            draft(torch.tensor([prompts[s][:end]]), torch.arange(end)[None], states[s][None, :end], UnrolledAttention())
            for s, _, end in chunks
        ]
        wanted = torch.cat([g[0, first:end] for (_, g), (_, first, end) in zip(expected, chunks)])
        torch.testing.assert_close(hidden[:, 0], wanted, rtol=1e-4, atol=1e-4)
        rows = torch.cat([x[0, first:end] for (x, _), (_, first, end) in zip(expected, chunks)])[batch.sample_rows]
        torch.testing.assert_close(logits, rows, rtol=1e-4, atol=1e-4)
