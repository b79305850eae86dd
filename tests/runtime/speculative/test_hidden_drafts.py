"""Drafts from hidden states, Medusa's heads and EAGLE's layer, on a tiny model: the tokens of plain decoding in every load."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from camshaft.models.speculative.eagle import read_eagle, write_eagle
from camshaft.models.speculative.heads import read_heads
from camshaft.models.speculative.objectives import EagleObjective, HeadsObjective, Target
from camshaft.runtime import LLM, SamplingParams, SpeculativeConfig
from small_drafts import CAPTURE, tiny_eagle, tiny_target, write_drafts

import camshaft

from .test_acceptance import chi_square

VOCAB = 12
HIDDEN = (*CAPTURE, -1)
TREE = ((0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0))
LIMITS = {"device": "cpu", "dtype": "float32", "target": "eager", "max_seq_len": 96, "max_batch_tokens": 32, "max_sequences": 6,
          "block_size": 4}  # fmt: skip


@pytest.fixture(scope="module")
def target():
    return tiny_target(VOCAB)


@pytest.fixture(scope="module")
def engine(target):
    return camshaft.compile(target, hidden_layers=HIDDEN, cache=False, **LIMITS)


@pytest.fixture(scope="module")
def paths(target, tmp_path_factory):
    heads, eagle = write_drafts(target, tmp_path_factory.mktemp("drafts"), VOCAB - 2)
    return {"heads": str(heads), "eagle": str(eagle)}


def config(paths, method, **fields):
    return SpeculativeConfig(method=method, model=paths[method], num_draft_tokens=3, **{"adaptive": False, **fields})


def load(num_requests=24):
    """Prompts, some with a common head, and greedy parameters."""
    rng = random.Random(3)
    head = [rng.randrange(VOCAB) for _ in range(19)]
    prompts = [
        (head if n % 3 == 0 else []) + [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 45))]
        for n in range(num_requests)
    ]
    params = [SamplingParams(temperature=0, max_tokens=rng.randrange(1, 30)) for _ in prompts]
    return prompts, params


def outputs_of(engine, config, prompts, params, **fields):
    with LLM(engine, speculative=config, **fields) as llm:
        outputs = [output.token_ids for output in llm.generate(prompts, params, progress=False)]
        again = [output.token_ids for output in llm.generate(prompts[:6], params[:6], progress=False)]
        llm._core.scheduler.check_integrity()
        return outputs, again, llm.stats()


@pytest.fixture(scope="module")
def plain(engine):
    prompts, params = load()
    return outputs_of(engine, None, prompts, params)[0]


@pytest.mark.parametrize("method", ["heads", "eagle"])
@pytest.mark.parametrize("kind", ["chain", "tree", "adaptive", "small cache"])
def test_greedy_outputs_are_those_of_plain_decoding(engine, paths, plain, method, kind):
    """Prompts in chunks, prefixes found in the cache (again, too), preemptions, ends inside drafts."""
    fields = {"tree": {"tree": TREE}, "adaptive": {"adaptive": True}}.get(kind, {})
    prompts, params = load()
    size = (
        {"policy": "max_utilization", "kv_cache_bytes": _blocks(engine, paths, method, 46)} if "small" in kind else {}
    )
    outputs, again, stats = outputs_of(engine, config(paths, method, **fields), prompts, params, **size)
    assert outputs == plain and again == plain[:6]
    if kind != "adaptive":  # whose lengths follow from measured times
        assert stats.speculative.num_verifications > 0 and sum(stats.speculative.accepted) > 0
    assert ("small" in kind) == (stats.scheduler.preemptions > 0)
    assert stats.scheduler.prefix_hit_tokens > 0


def _blocks(engine, paths, method, count):
    with LLM(engine, speculative=config(paths, method)) as llm:
        ledger, groups = llm.memory, llm.stats().scheduler.groups
    return ledger.kv_bytes // groups[0].total * count


@pytest.mark.parametrize("method", ["heads", "eagle"])
def test_drafts_are_those_of_teacher_forcing(target, engine, paths, plain, method):
    """The layer's keys, values and hidden states are right: as many drafts are accepted as on the finished texts at once."""
    objective = (
        EagleObjective(_module(target, paths["eagle"]), CAPTURE) if method == "eagle"
        else HeadsObjective(read_heads(Path(paths["heads"])).float())
    )  # fmt: skip
    frozen, num_verifications, accepted = Target(target), 0, 0
    prompts, params = load()
    for prompt, output in zip(prompts, plain):
        text = prompt + output
        with torch.no_grad():
            hits = objective.hits(frozen.features(torch.tensor([text]), CAPTURE), 3)[0].long().cumprod(-1)
        at = len(prompt)
        while (room := min(3, len(text) - at - 2)) > 0:
            num_verifications += 1
            right = int(hits[at, :room].sum())
            accepted, at = accepted + right, at + 1 + right
    with LLM(engine, speculative=config(paths, method), enable_prefix_cache=False) as llm:
        llm.generate(prompts, params, progress=False)
        stats = llm.stats()
    assert (stats.speculative.num_verifications, sum(stats.speculative.accepted)) == (num_verifications, accepted)


def _module(target, path):
    draft = read_eagle(Path(path)).float()
    draft.embed_tokens = torch.nn.Embedding.from_pretrained(target.get_input_embeddings().weight)
    return draft


def test_long_prompts_are_computed_as_they_come(engine, paths):
    """Hidden states of prompts do not pile up: the layer reads them when there are more than a step of its own."""
    prompts = [[(3 * i + n) % VOCAB for i in range(80)] for n in range(6)]
    params = SamplingParams(temperature=0, max_tokens=6)
    expected, _, _ = outputs_of(engine, None, prompts, [params] * 6, max_chunk_tokens=8)
    with LLM(engine, speculative=config(paths, "eagle"), max_chunk_tokens=8) as llm:
        proposer = llm._core.speculation.proposer
        most, observe = 0, proposer.observe

        def watch(verified):
            nonlocal most
            observe(verified)
            most = max(most, proposer._store.num_rows)

        proposer.observe = watch
        found = [output.token_ids for output in llm.generate(prompts, params, progress=False)]
        assert proposer._store.num_rows == 0
    assert found == expected and 12 < most <= engine.max_batch_tokens


@pytest.mark.parametrize("acceptance", ["rejection", "exact", "typical"])
@pytest.mark.parametrize("method", ["heads", "eagle"])
def test_requests_with_temperature(engine, paths, method, acceptance):
    prompts, _ = load(12)
    params = [SamplingParams(temperature=0.8, top_p=0.9, seed=n, max_tokens=12) for n in range(12)]
    expected, _, _ = outputs_of(engine, None, prompts, params)
    outputs, again, stats = outputs_of(engine, config(paths, method, acceptance=acceptance), prompts, params)
    assert sum(stats.speculative.accepted) > 0 and [len(o) for o in outputs] == [12] * 12
    if acceptance == "exact":
        assert outputs == expected and again == expected[:6]


def test_what_does_not_fit_is_refused(target, engine, paths, tmp_path):
    plain = camshaft.compile(target, **LIMITS)
    for method in ("heads", "eagle"):
        with pytest.raises(
            ValueError, match=r"the engine was built with hidden_layers=\(\); compile it with hidden_layers="
        ):
            LLM(plain, speculative=config(paths, method))
    with pytest.raises(
        ValueError, match="num_draft_tokens is 4 and .* has 3 heads, one for each draft; allowed: at most 3"
    ):
        LLM(engine, speculative=SpeculativeConfig(method="heads", model=paths["heads"]))
    other = tiny_target(VOCAB + 1)
    write_eagle(tiny_eagle(other, VOCAB), tmp_path)
    with pytest.raises(ValueError, match="for a vocabulary of 13 tokens, and .* has 12"):
        LLM(engine, speculative=SpeculativeConfig(method="eagle", model=str(tmp_path)))
    write_eagle(tiny_eagle(target, VOCAB, capture=(1, 7)), tmp_path)
    with pytest.raises(ValueError, match=r"after layers \[1, 7\], and the target has 3 layers; allowed: 1 to 2"):
        LLM(engine, speculative=SpeculativeConfig(method="eagle", model=str(tmp_path)))
    with pytest.raises(ValueError, match=r"has no config\.json"):
        LLM(engine, speculative=SpeculativeConfig(method="heads", model=str(tmp_path / "nowhere")))


def test_a_quantized_engine_from_disk(target, paths, tmp_path):
    """Its embeddings, which the layer reads, are in the artifact."""
    options = {**LIMITS, "quantize": "int8", "hidden_layers": HIDDEN}
    camshaft.compile(target, **options).save(tmp_path / "engine")
    engine = camshaft.load(tmp_path / "engine")
    prompts, params = load(8)
    expected, _, _ = outputs_of(engine, None, prompts, params)
    for method in ("heads", "eagle"):
        assert outputs_of(engine, config(paths, method), prompts, params)[0] == expected, method


@pytest.mark.long
@pytest.mark.parametrize("method", ["heads", "eagle"])
def test_samples_have_the_target_distribution(tmp_path, method):
    """20,000 samples of three tokens each; the layer drafts three of the four tokens."""
    target = tiny_target(4, seed=2)
    target.lm_head.weight.data *= 2
    heads, eagle = write_drafts(target, tmp_path, 3)
    engine = camshaft.compile(target, hidden_layers=HIDDEN, cache=False,
                              **{**LIMITS, "max_sequences": 64, "max_batch_tokens": 640, "max_seq_len": 16})  # fmt: skip
    drafting = SpeculativeConfig(
        method=method, model=heads if method == "heads" else eagle, num_draft_tokens=2, adaptive=False
    )
    params = SamplingParams(n=1000, temperature=1.2, max_tokens=4, ignore_eos=True)
    counts = np.zeros((4, 4, 4))
    with LLM(engine, speculative=drafting, seed=3) as llm:
        for output in llm.generate([[1, 2, 3]] * 20, params, progress=False):
            for sample in output.outputs:
                counts[tuple(sample.token_ids[:3])] += 1
        accepted = llm.stats().speculative.accepted
    assert counts.sum() == 20_000 and sum(accepted) > 1000
    statistic, bound = chi_square(counts.ravel(), _probabilities(target, [1, 2, 3], 1.2).ravel())
    assert statistic < bound


def _probabilities(target, prompt, temperature):
    """[4, 4, 4] of the three tokens after a prompt."""
    rows = torch.cartesian_prod(*[torch.arange(4)] * 3)
    texts = torch.cat([torch.tensor(prompt).expand(64, -1), rows], 1)
    with torch.no_grad():
        logits = target(texts).logits[:, len(prompt) - 1 : -1].double() / temperature
    return logits.softmax(-1).gather(-1, rows[..., None])[..., 0].prod(-1).view(4, 4, 4).numpy()
