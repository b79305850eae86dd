"""Targets on a GPU: a decoder saved, loaded in a new process with empty caches, and stepped; modules; the torch.compile backend.

pytest -m gpu tests/gpu/test_targets.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from camshaft.export.dynamo import camshaft_backend
from families import random_model, tiny_config
from torch import Tensor, nn
from torch.export import Dim

import camshaft

pytestmark = pytest.mark.gpu
TARGETS = ["eager", "inductor"]
PROMPTS = [[5, 9, 3], [7] * 20, list(range(3, 60))]
CHILD = """
import json, sys
import camshaft
from camshaft import SamplingParams
with camshaft.LLM(camshaft.load(sys.argv[1]), kv_cache_bytes=1 << 24) as llm:
    outputs = llm.generate(json.loads(sys.argv[2]), SamplingParams(temperature=0, max_tokens=16, ignore_eos=True))
print(json.dumps([list(output.token_ids) for output in outputs]))
"""


class Encoder(nn.Module):
    """Two pre-norm encoder layers over [B, T, 64]."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(64, 192) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(64) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for qkv, out, norm in zip(self.qkv, self.out, self.norms):
            q, k, v = (t.unflatten(-1, (4, 16)).transpose(1, 2) for t in qkv(norm(x)).chunk(3, dim=-1))
            x = x + out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x


@torch.no_grad()
def greedy(model: nn.Module, prompt: list[int], count: int) -> list[int]:
    """Transformers' own tokens, EOS ignored."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens], device="cuda")).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("target", TARGETS)
def test_a_saved_decoder_generates_eagers_tokens_in_a_new_process(target: str, tmp_path: Path) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    model = random_model(tiny_config("llama")).to("cuda")
    engine = camshaft.compile(model, target=target, dtype="float32", max_seq_len=128, max_batch_tokens=64, cache=False)
    engine.save(tmp_path / "engine")
    for file in (tmp_path / "engine" / "engines").glob("*"):
        assert not file.read_bytes().startswith(b"\x80"), f"{file} is a pickle"
    caches = {name: str(tmp_path / name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    child = subprocess.run(
        [sys.executable, "-c", CHILD, tmp_path / "engine", json.dumps(PROMPTS)],
        env={**os.environ, **caches}, capture_output=True, text=True,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-2000:]
    assert json.loads(child.stdout.splitlines()[-1]) == [greedy(model, prompt, 16) for prompt in PROMPTS]


@pytest.mark.parametrize("target", [*TARGETS, "auto"])
def test_a_compiled_module_computes_what_the_module_computes(target: str) -> None:
    torch.manual_seed(0)
    module = Encoder().cuda().eval()
    example = torch.randn(2, 8, 64, device="cuda")
    compiled = camshaft.compile(
        module, (example,), target=target, dynamic_shapes=({0: Dim("B", max=32), 1: Dim("T", max=64)},)
    )
    with torch.no_grad():
        for shape in ((2, 8, 64), (3, 33, 64)):
            x = torch.randn(shape, device="cuda")
            torch.testing.assert_close(compiled(x), module(x), rtol=1e-4, atol=1e-4)


def test_torch_compile_with_the_camshaft_backend() -> None:
    torch.manual_seed(0)
    module = Encoder().cuda().eval()
    compiled = torch.compile(module, backend=camshaft_backend)
    with torch.no_grad():
        for tokens in (8, 8, 33):
            x = torch.randn(2, tokens, 64, device="cuda")
            torch.testing.assert_close(compiled(x), module(x), rtol=1e-4, atol=1e-4)
