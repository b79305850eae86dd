"""The onnxruntime target on whole segments of small decoders, from the traced model to the bound session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import camshaft.graph.ops  # noqa: F401  registers camshaft::*
import pytest
import torch
from camshaft.export.partition import partition
from camshaft.export.segment import Plan, Segment, SegmentStep
from camshaft.export.targets.base import LoweringError, LowerRequest
from camshaft.models.huggingface import open_model
from camshaft.passes.manager import PassManager
from camshaft.passes.pipeline import decoder_passes
from shared_traces import trace_decoder
from torch import Tensor, fx

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
transformers = pytest.importorskip("transformers")

from camshaft.export.targets.onnxruntime import OnnxRuntimeTarget  # noqa: E402

CPU = torch.device("cpu")
REQUEST = LowerRequest(device=CPU, max_tokens=64)
COMMON = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**COMMON),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}


@pytest.fixture(scope="module", params=CONFIGS)
def plan(request: Any) -> Plan:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param]()).eval()
    program = PassManager(decoder_passes(block_size=16)).run(trace_decoder(open_model(model, torch.float32)))
    return partition(program, OnnxRuntimeTarget().supports)


def random_inputs(segment: Segment, num_tokens: int) -> list[Tensor]:
    """Random activations and weights; two sampled rows; cos and sin carry every angle twice."""
    generator = torch.Generator().manual_seed(num_tokens)
    angles = {
        arg["node"]
        for node in segment.nodes
        if node.get("target") == "camshaft.rope.default"
        for arg in node["args"][1:3]
    }
    made = []
    for entry in segment.placeholders:
        shape = [{"T": num_tokens, "R": 2}[size] if isinstance(size, str) else size for size in entry["shape"]]
        if not getattr(torch, entry["dtype"]).is_floating_point:
            made.append(torch.randint(0, num_tokens, shape, generator=generator, dtype=getattr(torch, entry["dtype"])))
            continue
        tensor = torch.randn(shape, generator=generator) * (0.1 if entry["name"].startswith("w") else 1.0)
        half = tensor[..., : shape[-1] // 2]
        made.append(torch.cat([half, half], dim=-1) if entry["name"] in angles else tensor)
    return made


def test_no_segment_runs_in_pytorch(plan: Plan) -> None:
    assert plan.report == []
    assert not any(segment.eager for segment in plan.segments.values())
    assert sum(isinstance(step, SegmentStep) for step in plan.steps) == 3


@pytest.mark.parametrize("num_tokens", [1, 7])
def test_segments_equal_eager(plan: Plan, num_tokens: int, tmp_path: Path) -> None:
    target = OnnxRuntimeTarget()
    for segment in plan.segments.values():
        file = tmp_path / f"{segment.id}.onnx"
        file.write_bytes(target.lower(segment, REQUEST).data)
        inputs = random_inputs(segment, num_tokens)
        with torch.no_grad():
            expected = segment.graph_module(CPU)(*inputs)
            bound = target.load(segment, file, CPU).bind(inputs[segment.num_inputs :])
            actual = bound(*inputs[: segment.num_inputs])
        for a, b in zip(expected, actual, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            assert (a - b).abs().max() <= 1e-5  # fp32: sums in another order


def test_weights_are_not_in_the_engine(plan: Plan) -> None:
    for segment in plan.segments.values():
        proto = onnx.load_from_string(OnnxRuntimeTarget().lower(segment, REQUEST).data)
        weights = {t.name: t for t in proto.graph.initializer if t.name.startswith("w")}
        assert len(weights) == segment.num_weights
        assert all(t.data_location == onnx.TensorProto.EXTERNAL and not t.raw_data for t in weights.values())


def test_equal_segments_give_equal_bytes(plan: Plan) -> None:
    segment = next(iter(plan.segments.values()))
    assert OnnxRuntimeTarget().lower(segment, REQUEST).data == OnnxRuntimeTarget().lower(segment, REQUEST).data


def test_one_engine_for_two_layers(plan: Plan, tmp_path: Path) -> None:
    segment = next(s for s in plan.segments.values() if s.num_weights and "aten.linear.default" in s.operators)
    target = OnnxRuntimeTarget()
    (tmp_path / "s.onnx").write_bytes(target.lower(segment, REQUEST).data)
    lowered = target.load(segment, tmp_path / "s.onnx", CPU)
    inputs = random_inputs(segment, 3)
    weights = inputs[segment.num_inputs :]
    first, second = lowered.bind(weights), lowered.bind([weight * 2 for weight in weights])
    a, b = first(*inputs[: segment.num_inputs]), second(*inputs[: segment.num_inputs])
    assert not all(torch.equal(x, y) for x, y in zip(a, b))
    assert all(torch.equal(x, y) for x, y in zip(a, first(*inputs[: segment.num_inputs])))


def test_inputs_and_weights_that_nothing_reads(tmp_path: Path) -> None:
    spec = {"op": "placeholder", "shape": [1, "T"], "dtype": "float32"}
    nodes = [
        {"name": "x0", **spec}, {"name": "x1", **spec}, {"name": "w0", **spec, "shape": [4]},
        {"name": "n0", "op": "call_function", "target": "aten.neg.default", "args": [{"node": "x1"}]},
        {"name": "output", "op": "output", "args": [[{"node": "n0"}, {"node": "n0"}, {"node": "x1"}]]},
    ]  # fmt: skip
    segment = Segment("0", nodes, 2, 1, 3)
    target = OnnxRuntimeTarget()
    (tmp_path / "s.onnx").write_bytes(target.lower(segment, REQUEST).data)
    x = torch.randn(1, 5)
    bound = target.load(segment, tmp_path / "s.onnx", CPU).bind([torch.zeros(4)])
    negated, again, same = bound(torch.zeros(1, 5), x)
    assert torch.equal(negated, -x) and torch.equal(again, -x) and torch.equal(same, x)


def test_a_damaged_engine_is_named(tmp_path: Path) -> None:
    segment = Segment("0", [], 0, 0, 0)
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(LoweringError, match="bad.onnx"):
        OnnxRuntimeTarget().load(segment, tmp_path / "bad.onnx", CPU).bind([])


def test_supports_is_asked_once_for_equal_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    from camshaft.export.targets import onnx_graph

    calls: list[fx.Node] = []
    original = onnx_graph.node_to_onnx
    monkeypatch.setattr(onnx_graph, "node_to_onnx", lambda node: (calls.append(node), original(node))[1])
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2, 3, device="meta")
    target = OnnxRuntimeTarget()
    for _ in range(3):
        node = graph.call_function(torch.ops.aten.silu.default, (x,))
        node.meta["val"] = x.meta["val"]
        assert target.supports(node)
    assert len(calls) == 1
