"""Token trees from end to end: packed with their masks, followed along the accepted path, whose keys and values move into place."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from camshaft.models import demo
from camshaft.runtime import LLM, GenerationError, SamplingParams, SpeculativeConfig
from camshaft.runtime.speculative import Drafts

import camshaft

from ..fake_engine import FakeEngine, context_hash, expected_tokens, logits_of
from .proposers import branching

TREE = ((0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (1, 0, 0))


class TreeEngine(FakeEngine):
    """The fake engine with tree masks: a row's context is what its mask says, in the order of the rows."""

    takes_tree_masks = True
    num_trees = num_moves = 0

    def copy_slots(self, group, source, destination):
        assert len(set(destination)) == len(destination) == len(source)
        self.num_moves += 1
        self.caches[group][destination] = self.caches[group][source]

    def step(self, batch):
        if batch.tree_mask is None:
            return super().step(batch)
        self.num_trees += 1
        tokens, positions, masks = batch.token_ids.numpy(), batch.positions.numpy(), batch.tree_mask.numpy()
        starts, lengths = batch.query_start.numpy(), batch.seq_lens.numpy()
        keys = np.zeros(len(tokens), dtype=np.int64)
        for cache, group in zip(self.caches, batch.groups):
            cache[group.slot_mapping.numpy()] = tokens
            for s, length in enumerate(lengths):
                table, first = group.block_tables[s].numpy(), length - (starts[s + 1] - starts[s])
                slots = [
                    int(table[i // self.block_size]) * self.block_size + i % self.block_size for i in range(length)
                ]
                for number, row in enumerate(range(starts[s], starts[s + 1])):
                    mask = int(masks[row]) or (2 << number) - 1
                    seen = slots[:first] + [slots[first + j] for j in range(number + 1) if mask >> j & 1]
                    assert len(seen) == positions[row] + 1, "a row is at the depth that its mask says"
                    keys[row] = context_hash(cache[seen])
        return torch.from_numpy(
            np.stack([logits_of(int(keys[r]), self.vocab_size) for r in batch.sample_rows.tolist()])
        )


class TreeOracle:
    """Of each node's children one is right, or none, at a random place."""

    hidden_layers = ()

    def __init__(self, context):
        self.tree, self.vocab_size, self.rng = context.config.tree, context.engine.vocab_size, random.Random(0)

    def add(self, request, state):
        pass

    def release(self, request_id):
        pass

    def observe(self, verified):
        pass

    def propose(self, targets):
        index = {path: n for n, path in enumerate(self.tree)}
        parents = [index.get(path[:-1], -1) for path in self.tree]
        drafts = []
        for target in targets:
            texts, tokens = {-1: list(target.request.all_token_ids)}, []
            right = {parent: self.rng.choice([0, 0, 1, 1, 9]) for parent in sorted(set(parents))}
            for node, path in enumerate(self.tree[: target.num_drafts]):
                before = texts[parents[node]]
                token = expected_tokens(before, 1, self.vocab_size)[0]
                if path[-1] != right[parents[node]]:
                    token = (token + 1 + path[-1]) % self.vocab_size
                tokens.append(token)
                texts[node] = [*before, token]
            drafts.append(tokens)
        return Drafts([len(tokens) for tokens in drafts], drafts, parents=[parents] * len(drafts))


CONFIG = SpeculativeConfig(method="custom", proposer=TreeOracle, tree=TREE, adaptive=False)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["in turns", "asynchronous"])
def test_greedy_and_exact_tokens_are_those_of_plain_decoding(asynchronous):
    rng = random.Random(0)
    prompts = [[rng.randrange(7) for _ in range(rng.randrange(1, 25))] for _ in range(30)]
    params = [
        SamplingParams(
            temperature=0.0 if i % 3 else 0.7, seed=i, max_tokens=rng.randrange(1, 40), stop_token_ids=[0] * (i % 2),
            repetition_penalty=1.3 if i % 4 == 1 else 1.0, bad_token_ids=[[1, 2]] if i % 5 == 2 else None,
            logprobs=1 if i % 6 == 3 else None, speculative=False if i % 7 == 5 else None,
        )
        for i in range(30)
    ]  # fmt: skip
    kwargs = dict(kv_cache_bytes=64 * 30, policy="max_utilization", async_scheduling=asynchronous)
    with LLM(FakeEngine(vocab_size=7), **kwargs) as llm:
        plain = llm.generate(prompts, params, progress=False)
    engine = TreeEngine(vocab_size=7)
    with LLM(engine, speculative=CONFIG, **kwargs) as llm:
        found = llm.generate(prompts, params, progress=False)
        stats = llm.stats()
        while llm._core.has_work:
            pass
        llm._core.scheduler.check_integrity()
    assert [(o.token_ids, o.finish_reason, o.logprobs) for o in found] == [
        (o.token_ids, o.finish_reason, o.logprobs) for o in plain
    ]
    assert engine.num_trees > 20 and engine.num_moves > 10 and stats.scheduler.preemptions > 0
    assert len(stats.speculative.drafted) == 3, "by depth"
    assert stats.speculative.mean_accepted_length > 1.7


def test_accepted_branches_are_in_the_prefix_cache():
    """Those of requests that have ended, too: their blocks are found by later prompts."""
    rng = random.Random(2)
    prompts = [[rng.randrange(7) for _ in range(rng.randrange(1, 9))] for _ in range(20)]
    params = SamplingParams(temperature=0, max_tokens=24, stop_token_ids=[0])
    kwargs = dict(kv_cache_bytes=1 << 16)
    with LLM(FakeEngine(vocab_size=7), **kwargs) as llm:
        texts = [prompt + output.token_ids for prompt, output in zip(prompts, llm.generate(prompts, params))]
        expected = [output.token_ids for output in llm.generate(texts, params)]
    with LLM(TreeEngine(vocab_size=7), speculative=CONFIG, **kwargs) as llm:
        llm.generate(prompts, params)
        outputs = llm.generate(texts, params)
    assert [output.token_ids for output in outputs] == expected
    assert sum(output.metrics.num_cached_tokens for output in outputs) > 50


class SecondChoice(TreeEngine):
    """Now and then its likeliest token is the target's second."""

    def step(self, batch):
        logits = super().step(batch)
        best = logits.topk(2).indices
        swapped = logits.scatter(1, best, logits.gather(1, best).flip(1))
        return torch.where((best[:, :1] % 3 == 0), swapped, logits)


@pytest.mark.parametrize("engine_class", [TreeEngine, SecondChoice])
@pytest.mark.parametrize("on_demand", [False, True], ids=["all blocks", "few blocks"])
def test_trees_of_a_draft_model(engine_class, on_demand):
    """Each level is one step of the draft model, whose accepted keys and values move, too."""
    rng = random.Random(1)
    prompts = [[rng.randrange(11) for _ in range(rng.randrange(1, 25))] for _ in range(20)]
    warm = 0.7 if engine_class is SecondChoice else 0.0
    params = [
        SamplingParams(temperature=0.0 if i % 3 else warm, seed=i, max_tokens=rng.randrange(1, 40)) for i in range(20)
    ]
    kwargs = dict(kv_cache_bytes=64 * 30 if on_demand else 1 << 16, policy="max_utilization", max_chunk_tokens=7)
    with LLM(TreeEngine(vocab_size=11), **kwargs) as llm:
        plain = llm.generate(prompts, params, progress=False)
    draft = engine_class(vocab_size=11)
    config = SpeculativeConfig(method="draft", model=draft, tree=TREE, adaptive=False)
    kwargs["kv_cache_bytes"] *= 2
    with LLM(TreeEngine(vocab_size=11), speculative=config, **kwargs) as llm:
        found = llm.generate(prompts, params, progress=False)
        stats = llm.stats()
    assert [output.token_ids for output in found] == [output.token_ids for output in plain]
    assert draft.num_trees > 20 and draft.num_moves > 10 and (stats.scheduler.preemptions > 0) == on_demand
    drafted, accepted = stats.speculative.drafted, stats.speculative.accepted
    assert stats.speculative.mean_accepted_length > 2.5
    assert accepted == drafted or engine_class is SecondChoice, "the target's own logits draft what it chooses"


def test_a_draft_model_of_trees_takes_tree_masks():
    config = SpeculativeConfig(method="draft", model=FakeEngine(), tree=TREE, adaptive=False)
    with pytest.raises(ValueError, match="the draft model's attention takes no tree masks"):
        LLM(TreeEngine(), speculative=config)


def test_trees_need_an_engine_that_takes_them():
    with LLM(FakeEngine(), speculative=CONFIG) as llm, pytest.raises(GenerationError, match="takes no tree masks"):
        llm.generate([1, 2], SamplingParams(temperature=0))


@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
def test_greedy_tokens_of_the_demo_model_are_those_of_plain_decoding(target):
    """Real attention, in mixed batches with chunked prompts, a prefix cache and preemption; ONNX Runtime has native steps, too."""
    engine = camshaft.compile(
        str(demo.path()), target=target, max_seq_len=256, max_batch_tokens=96, max_sequences=8, block_size=8
    )
    rng = random.Random(0)
    shared = [rng.randrange(300, 4000) for _ in range(20)]
    prompts = [
        (shared if i % 2 else []) + [rng.randrange(300, 4000) for _ in range(rng.randrange(1, 60))] for i in range(10)
    ]
    params = [SamplingParams(temperature=0, max_tokens=rng.randrange(4, 28), ignore_eos=True) for _ in prompts]
    blocks = sum(group.bytes_per_block for group in engine.cache_groups)
    kwargs = dict(kv_cache_bytes=28 * blocks, policy="max_utilization", max_chunk_tokens=24)
    with LLM(engine, **kwargs) as llm:
        plain = [output.token_ids for output in llm.generate(prompts, params, progress=False)]
    texts = [[*prompt, *tokens] for prompt, tokens in zip(prompts, plain)]
    config = SpeculativeConfig(method="custom", proposer=branching(texts), tree=TREE, adaptive=False)
    with LLM(engine, speculative=config, **kwargs) as llm:
        for _ in range(2):  # the second time from the prefix cache
            found = [output.token_ids for output in llm.generate(prompts, params, progress=False)]
            assert found == plain
        stats = llm.stats()
        llm._core.scheduler.check_integrity()
    assert stats.speculative.mean_accepted_length > 1.5 and stats.scheduler.preemptions > 0
