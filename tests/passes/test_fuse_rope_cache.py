"""fuse_rope_cache: whole and partial rope, what stays as it is, and engines of families whose attention turns q and k."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from camshaft.export import build
from camshaft.export.bisect import bisect_target, check_engine
from camshaft.export.build import passes_of
from camshaft.export.engine import Engine
from camshaft.export.kernels.rope import Rope
from camshaft.export.native_program import Unsupported, translate
from camshaft.export.native_weights import WeightStore
from camshaft.export.partition import partition
from camshaft.export.segment import AttentionStep, Plan, SegmentStep
from camshaft.graph.program import Program
from camshaft.graph.verify import verify, verify_packed
from camshaft.models.huggingface import open_model
from camshaft.passes.base import GraphPass
from camshaft.passes.bisect import relative_error, run_row
from camshaft.passes.fuse_rope_cache import PAGED_ROPE_ATTENTION, FuseRopeCache
from camshaft.passes.manager import PassManager
from camshaft.passes.match_rope import ROPE
from camshaft.passes.normalize import Normalize
from camshaft.passes.page_attention import PAGED_ATTENTION, PageAttention
from camshaft.passes.pipeline import decoder_passes
from families import random_model, tiny_config
from graph_cases import captured
from shared_traces import trace_decoder
from torch import Tensor, nn

import camshaft

HEADS, DIM, R = 2, 8, 4


class Attends(nn.Module):
    """Attention behind rope in the layout that passes leave; `kind` says what differs from the plain case."""

    def __init__(self, kind: str = "plain", rotated: int = DIM) -> None:
        super().__init__()
        self.kind, self.rotated = kind, rotated

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [1, T, heads, D]."""
        if self.rotated == DIM:
            return torch.ops.camshaft.rope(x, cos, sin, False)
        start, end = (0, self.rotated) if self.kind != "wrong part" else (DIM - self.rotated, DIM)
        return torch.cat((torch.ops.camshaft.rope(x[..., start:end], cos, sin, False), x[..., self.rotated :]), -1)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        q = k = x.unflatten(2, (HEADS, DIM))
        v = k + 1
        angles = (sin, cos) if self.kind == "other angles" else (cos, sin)
        q, k = self.turn(q * 2, cos, sin), self.turn(k, *angles)
        if self.kind == "scaled":
            q = q * 0.5
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        out = torch.ops.camshaft.attention(q, k, v, None, None, None, 0.5, 0, 0.0)
        return (out, k) if self.kind == "key is returned" else (out,)


def _paged(module: nn.Module, rotated: int = DIM) -> Program:
    def inputs(size: int) -> tuple[Tensor, ...]:
        return torch.randn(1, size, HEADS * DIM), torch.randn(1, size, rotated), torch.randn(1, size, rotated)

    return PassManager([Normalize(), PageAttention(block_size=4), Normalize()]).run(captured(module, inputs))


def _count(program: Program, target: Any) -> int:
    return sum(node.target is target for node in program.graph.nodes)


@pytest.mark.parametrize("rotated", [DIM, R])
def test_joined(rotated: int) -> None:
    paged = _paged(Attends(rotated=rotated), rotated)
    result = FuseRopeCache()(paged)
    assert result.num_matches == 1
    verify(result.program, after="fuse_rope_cache")
    (node,) = [n for n in result.program.graph.nodes if n.target is PAGED_ROPE_ATTENTION]
    (before,) = [n for n in paged.graph.nodes if n.target is PAGED_ATTENTION]
    assert node.args[11:14] == before.args[11:14] and node.args[16] is False
    assert [value.meta["val"].shape[2:] for value in node.args[:2]] == [(HEADS, DIM)] * 2
    assert node.meta["val"].shape == before.meta["val"].shape
    assert not _count(result.program, ROPE) and not _count(result.program, torch.ops.aten.cat.default)
    assert FuseRopeCache()(result.program).num_matches == 0


@pytest.mark.parametrize("kind", ["other angles", "scaled", "key is returned"])
@pytest.mark.parametrize("rotated", [DIM, R])
def test_stays(kind: str, rotated: int) -> None:
    assert FuseRopeCache()(_paged(Attends(kind, rotated), rotated)).num_matches == 0


def test_another_part_of_the_head_stays() -> None:
    assert FuseRopeCache()(_paged(Attends("wrong part", R), R)).num_matches == 0


def test_no_attention() -> None:
    program = captured(nn.Linear(8, 8), lambda size: (torch.randn(1, size, 8),))
    assert FuseRopeCache()(program).num_matches == 0


# -------------------------------------------------------------------------------------------------------------- families
LAYERS = {"llama": 2, "qwen3": 2, "gpt_neox": 2, "phi3": 2, "gemma2": 2, "gpt_oss": 2, "cohere2": 1, "glm4": 0}
"""Layers whose rope is joined: one of Cohere 2's has none; GLM 4's is not a camshaft::rope."""


def _fused_passes(config: Any, quantizer: None = None, exit_weights: None = None) -> list[GraphPass]:
    return decoder_passes(block_size=config.block_size, fuse_rope=True)


def _program(family: str) -> Program:
    source = open_model(random_model(tiny_config(family)), torch.float32)
    return PassManager(decoder_passes(block_size=4, fuse_rope=True)).run(trace_decoder(source))


def _engine(model: Any) -> Engine:
    engine: Engine = camshaft.compile(
        model, target="eager", device="cpu", cache=False, max_seq_len=64, max_batch_tokens=64, block_size=4
    )
    return engine


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in ("llama", "gpt_neox") else pytest.mark.long) for name in LAYERS]
)
def test_families(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy tokens of a prompt in two chunks and of decode steps are those of the program without any pass."""
    model = random_model(tiny_config(family))
    program = trace_decoder(open_model(model, torch.float32))
    monkeypatch.setattr(build, "passes_of", _fused_passes)
    engine = _engine(model)
    check = check_engine(engine, program)
    assert (engine.manifest.passes[-1].name, engine.manifest.passes[-1].num_matches) == (
        "fuse_rope_cache",
        LAYERS[family],
    )
    assert check.ok and check.tokens == check.expected_tokens
    assert sum(isinstance(step, AttentionStep) and step.cos is not None for step in engine.plan.steps) == LAYERS[family]


def test_only_builds_for_cuda_join() -> None:
    config = _engine(random_model(tiny_config("llama"))).config
    assert "fuse_rope_cache" not in [p.name for p in passes_of(config)]
    assert config.device == "cpu"
    assert passes_of(replace(config, device="cuda"))[-1].name == "fuse_rope_cache"


def test_plan_and_partition() -> None:
    program = _program("llama")
    verify_packed(program)
    plan = partition(program, lambda node: True)
    steps = [step for step in plan.steps if isinstance(step, AttentionStep)]
    assert all(step.inputs == (step.q, step.k, step.v, step.cos, step.sin) for step in steps)
    first, *middle, last = [step for step in plan.steps if isinstance(step, SegmentStep)]
    assert {steps[0].cos, steps[0].sin} <= set(first.outputs)
    assert not {steps[0].cos, steps[0].sin} & {name for step in (*middle, last) for name in step.inputs}
    assert not any("rope" in name for segment in plan.segments.values() for name in segment.operators)
    assert Plan.from_json(plan.to_json()).to_json() == plan.to_json()


def test_plans_from_before() -> None:
    data = partition(_program("glm4"), lambda node: True).to_json()
    for step in data["steps"]:
        for name in ("cos", "sin", "interleaved"):
            step.pop(name, None)
    steps = [step for step in Plan.from_json(data).steps if isinstance(step, AttentionStep)]
    assert all(step.inputs == (step.q, step.k, step.v) for step in steps)


def test_bisection() -> None:
    program = _program("llama")
    found = bisect_target(program, "eager", device=torch.device("cpu"), tolerance=1e-4)
    assert found.ok, found
    captured_program = trace_decoder(open_model(random_model(tiny_config("llama")), torch.float32))
    row = torch.arange(9)
    assert relative_error(run_row(captured_program, row), run_row(program, row)) < 1e-5


def test_native_steps_refuse() -> None:
    program = _program("llama")
    plan = partition(program, lambda node: True)
    weights = {name: program.weights[name].load() for name in plan.weight_names}
    assert program.cache is not None
    caches = [
        (torch.zeros(4, 4, c.num_kv_heads, c.head_dim), torch.zeros(4, 4, c.num_kv_heads, c.value_dim))
        for c in program.cache.layers
    ]
    with pytest.raises(Unsupported, match="rope inside attention"):
        translate(plan, weights, caches, WeightStore(16), 1, 1)


# ------------------------------------------------------------------------------------------------------------ arguments
@pytest.mark.parametrize(
    "cos,sin,message",
    [
        (torch.zeros(5, 8), torch.zeros(5, 8), r"cos has shape \(5, 8\)"),
        (torch.zeros(6, 10), torch.zeros(6, 10), "an even R of at most 8"),
        (torch.zeros(6, 3), torch.zeros(6, 3), "an even R"),
        (torch.zeros(8, 6).T, torch.zeros(8, 6).T, "must be contiguous"),
        (torch.zeros(6, 8), torch.zeros(6, 4), "must be alike"),
        (torch.zeros(6, 8, dtype=torch.int64), torch.zeros(6, 8), "expected a floating dtype"),
    ],
)
def test_angles_that_do_not_fit(cos: Tensor, sin: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rope(cos, sin, False).check(torch.zeros(6, 2, 8))
