"""Statistics in a file: builds from them need no text, other models and too little are refused, and the command writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_cases import data, tiny_model
from families import random_model, tiny_config
from typer.testing import CliRunner

import camshaft
from camshaft import LLM, Recipe, SamplingParams
from camshaft.cli.app import app

OPTIONS: dict[str, Any] = {
    "target": "eager",
    "device": "cpu",
    "cache": False,
    "max_seq_len": 64,
    "max_batch_tokens": 64,
}


def _rows() -> list[list[int]]:
    return [list(sequence) for sequence in data().sequences]


def test_a_build_from_statistics_is_one_from_the_text(tmp_path: Path) -> None:
    """SmoothQuant of the first layers looks at inputs that nothing quantized came before."""
    path = tmp_path / "tiny.safetensors"
    assert camshaft.calibrate(tiny_model(), path, _rows(), device="cpu") == 356
    by_text, by_file = (
        camshaft.compile(tiny_model(), quantize="int8_smoothquant", calibration=given, **OPTIONS)
        for given in (_rows(), path)
    )
    first = [name for name in by_text.weights if "layers.0.self_attn.q_proj" in name and name.endswith("int8")]
    assert first and all(torch.equal(by_text.weights[n].load(), by_file.weights[n].load()) for n in first)
    tokens = []
    for engine in (by_text, by_file):
        with LLM(engine, kv_cache_bytes=1 << 20) as llm:
            tokens.append(llm.generate([[5, 6, 7, 8]], SamplingParams(temperature=0.0, max_tokens=4))[0].token_ids)
    assert tokens[0] == tokens[1]


def test_what_statistics_do_not_do_for(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    camshaft.calibrate(tiny_model(), path, _rows(), moments=False, device="cpu")
    for options in ({"quantize": Recipe.named("int4_gptq", group=32)}, {"kv_cache_dtype": "int8"}):
        with pytest.raises(ValueError, match="saved calibration statistics are not enough for this build"):
            camshaft.compile(tiny_model(), calibration=path, **options, **OPTIONS)
    with pytest.raises(ValueError, match="calibrate again"):
        camshaft.compile(random_model(tiny_config("qwen2")), quantize="int8_smoothquant", calibration=path, **OPTIONS)
    with pytest.raises(ValueError, match=r"a file NAME\.safetensors"):
        camshaft.calibrate(tiny_model(), tmp_path / "small.bin", _rows())
    with pytest.raises(ValueError, match="calibration is missing"):
        camshaft.calibrate(tiny_model(), path)


def test_int8_caches_are_calibrated() -> None:
    """Greedy tokens are those of the unquantized cache; blocks take a quarter of the bytes; without data the build is refused."""
    plain = camshaft.compile(tiny_model(), **OPTIONS)
    int8 = camshaft.compile(tiny_model(), kv_cache_dtype="int8", calibration=_rows(), **OPTIONS)
    assert {layer.dtype for layer in int8.manifest.cache.layers} == {torch.int8}
    assert [4 * group.bytes_per_block for group in int8.cache_groups] == [g.bytes_per_block for g in plain.cache_groups]
    logits = []
    for engine in (plain, int8):
        with LLM(engine, kv_cache_bytes=1 << 20) as llm:
            params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
            found = llm.generate([list(range(40))], params)[0]
            logits.append([entry[token].logprob for token, entry in zip(range(1, 40), found.prompt_logprobs[1:])])
    difference = torch.tensor(logits[0]) - torch.tensor(logits[1])
    assert 0 < difference.abs().max() < 0.05  # nats
    with pytest.raises(ValueError, match="int8 KV cache needs calibration data"):
        camshaft.compile(tiny_model(), kv_cache_dtype="int8", **OPTIONS)


@pytest.mark.long
def test_the_command_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "demo.safetensors"
    found = CliRunner().invoke(app, ["calibrate", "demo", "-o", str(path), "--no-moments", "--device", "cpu", "--json"])
    assert found.exit_code == 0, found.output
    assert '"tokens": 65536' in found.stdout and path.stat().st_size < 1 << 20
