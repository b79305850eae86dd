"""Every family, from a checkpoint on disk through a saved artifact, gives the tokens of Transformers' eager model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import FAMILIES, MORE_FAMILIES, every_family, greedy_choices, greedy_tokens, random_model, tiny_config

import camshaft
from camshaft import SamplingParams

MAX_SEQ_LEN = 128


def _prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Mixed lengths; every fourth prompt continues an earlier one, so that prefixes are shared."""
    generator = torch.Generator().manual_seed(seed)
    prompts: list[list[int]] = []
    for index in range(count):
        length = int(torch.randint(1, 48, (1,), generator=generator))
        row = torch.randint(3, 128, (length,), generator=generator).tolist()
        prompts.append(prompts[index // 2] + row[:8] if index % 4 == 3 else row)
    return prompts


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_equal_eager(name: str, tmp_path: Path) -> None:
    model = random_model(tiny_config(name))
    model.save_pretrained(tmp_path / "checkpoint")
    engine = camshaft.compile(
        tmp_path / "checkpoint",
        target="onnxruntime",
        max_seq_len=MAX_SEQ_LEN,
        max_batch_tokens=48,
        max_sequences=16,
        block_size=8,
        device="cpu",
    )
    engine.save(tmp_path / "engine")
    loaded = camshaft.load(tmp_path / "engine")
    prompts = _prompts(32)
    limits = [6 + index % 5 for index in range(32)]
    window_only = len(loaded.cache_groups) == 1 and loaded.cache_groups[0].window
    cache_bytes = sum(group.bytes_per_block for group in loaded.cache_groups) * (11 if window_only else 16)
    with camshaft.LLM(loaded, kv_cache_bytes=cache_bytes, policy="max_utilization") as llm:
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in limits]
        outputs = llm.generate(prompts, params)
        stats = llm.stats().scheduler
        again = llm.generate([prompts[0] + outputs[0].token_ids[:2]], params[0])
    for prompt, limit, output in zip(prompts, limits, outputs):
        assert len(output.token_ids) == limit
        assert output.token_ids == greedy_choices(model, prompt, output.token_ids)
    assert again[0].token_ids[: limits[0] - 2] == outputs[0].token_ids[2:]
    assert stats.preemptions > 0
    assert stats.prefix_hit_tokens > 0
    assert all(group.used == 0 for group in llm.stats().scheduler.groups)


@pytest.mark.parametrize("name", every_family(MORE_FAMILIES, ("deepseek_v3", "gpt_bigcode", "diffllama")))
def test_more_families(name: str) -> None:
    model = random_model(tiny_config(name))
    engine = camshaft.compile(
        model, target="eager", max_seq_len=MAX_SEQ_LEN, max_batch_tokens=32, max_sequences=4, block_size=8, device="cpu"
    )
    prompts = _prompts(4)
    with camshaft.LLM(engine, kv_cache_bytes=sum(group.bytes_per_block for group in engine.cache_groups) * 64) as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))
    for prompt, output in zip(prompts, outputs):
        assert output.token_ids == greedy_tokens(model, prompt, 6)


def test_layers_are_lowered_once() -> None:
    config = tiny_config("llama")
    config.num_hidden_layers = 4
    limits = {"max_seq_len": 64, "max_batch_tokens": 16, "max_sequences": 2}
    engine = camshaft.compile(random_model(config), target="eager", device="cpu", **limits)
    assert len(engine.plan.segments) == 3
    assert len(engine.plan.steps) == 9
