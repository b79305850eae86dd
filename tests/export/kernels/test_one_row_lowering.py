"""The variant of a CUDA segment for one token: which segments have it, what it computes, how it is stored and chosen.

Inductor compiles for the CPU here; the operators are their definitions.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from camshaft.export.choose import plan_for
from camshaft.export.kernels import gemm_ops
from camshaft.export.segment import Segment
from camshaft.export.targets import inductor, one_row
from camshaft.export.targets.base import LowerRequest
from camshaft.export.targets.inductor import InductorTarget
from camshaft.export.targets.inductor_source import variants_of
from camshaft.export.trace import InliningInterpreter, example_inputs, export_segment
from camshaft.graph import ops, quant_ops
from camshaft.models.huggingface import open_model
from camshaft.passes import quantize_fp8
from camshaft.passes.manager import PassManager
from camshaft.passes.pipeline import decoder_passes
from camshaft.passes.quantization.recipe import Recipe
from families import random_model, tiny_config
from shared_traces import trace_decoder
from torch import Tensor

CPU = torch.device("cpu")
SCALED = "camshaft.scaled_linear.default"
WEIGHT_ONLY = torch.ops.camshaft.weight_only_linear.default
INLINE = one_row.inline_one_row(gemm_ops.inline_around(ops.inline, batch_invariant=False))
pytestmark = pytest.mark.long
needs_compiler = pytest.mark.skipif(
    InductorTarget().unavailable(CPU) is not None, reason="Inductor needs a C++ compiler"
)


def _segments(quantize: str | None) -> list[Segment]:
    source = open_model(random_model(tiny_config("llama")), torch.bfloat16)
    recipe = None if quantize is None else Recipe.named(quantize)
    program = PassManager(decoder_passes(block_size=16, quantize=recipe)).run(trace_decoder(source))
    return list(plan_for(program, "inductor").segments.values())


@pytest.fixture(scope="module")
def segments() -> list[Segment]:
    """Those with fp8 layers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize_fp8, "MIN_WEIGHTS", 0)
        return [segment for segment in _segments("fp8") if SCALED in segment.operators]


@pytest.fixture(scope="module")
def layer(segments: list[Segment]) -> Segment:
    """The one with most fp8 layers: what lies between two attentions."""
    return max(segments, key=lambda segment: segment.operators.count(SCALED))


def _inputs(segment: Segment, num_tokens: int) -> list[Tensor]:
    torch.manual_seed(0)
    values = example_inputs(segment, CPU, num_tokens)
    return [torch.randn(x.shape).to(x.dtype) if x.is_floating_point() else x for x in values]


def _error(actual: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    return max(float((a.float() - w.float()).norm() / w.float().norm()) for a, w in zip(actual, wanted, strict=True))


def _plain(segment: Segment, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """What the variant computes, by its definitions."""
    return InliningInterpreter(segment.graph_module(CPU), INLINE).run(*inputs)  # type: ignore[no-any-return]


def test_every_segment_with_fp8_layers_has_it(segments: list[Segment]) -> None:
    assert len(segments) >= 2
    for segment in segments:
        assert one_row.obstacle(segment) is None
        index, axis = one_row.token_axis(segment)
        assert segment.placeholders[index]["shape"][axis] == "T" and index < segment.num_inputs


def test_nothing_is_quantized_in_it(layer: Segment) -> None:
    exported = export_segment(layer, CPU, 64, INLINE, {one_row.TOKENS: 1})
    targets = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert targets.count(WEIGHT_ONLY) == layer.operators.count(SCALED)
    values = [node.meta["val"] for node in exported.graph.nodes if node.op == "call_function"]
    assert all(value.dtype != torch.float8_e4m3fn for value in values if isinstance(value, Tensor))
    inputs = _inputs(layer, 1)
    wanted = layer.graph_module(CPU)(*inputs)
    assert 0 < _error(_plain(layer, inputs), wanted) < 0.1  # fp8 activations keep 4 bits


@pytest.mark.parametrize("part", [0, 1])
def test_a_quantized_value_that_is_read_elsewhere(layer: Segment, part: int) -> None:
    nodes = copy.deepcopy(layer.nodes)
    source = next(entry["name"] for entry in nodes if "quantize" in entry.get("target", ""))
    kept = next(
        entry["name"]
        for entry in nodes
        if "getitem" in entry.get("target", "") and entry["args"][0] == {"node": source} and entry["args"][1] == part
    )
    output = next(entry for entry in nodes if entry["op"] == "output")
    output["args"] = [[*output["args"][0], {"node": kept}]]
    assert one_row.obstacle(replace(layer, nodes=nodes)) == "quantize_rows_default is also read by output"


def test_rows_that_come_in_quantized() -> None:
    graph = torch.fx.Graph()
    x, scale, weight, weight_scale = map(graph.placeholder, ("x", "scale", "weight", "weight_scale"))
    y = graph.call_function(
        torch.ops.camshaft.scaled_linear.default, (x, scale, weight, weight_scale, None, torch.bfloat16)
    )
    assert not one_row._is_part(y.args[0], 0)
    rows = graph.call_function(torch.ops.camshaft.quantize_rows.default, (weight,))
    assert one_row._is_part(graph.call_function(operator.getitem, (rows, 1)), 1)
    assert one_row._other_reader(rows) is None


@pytest.mark.parametrize("sizes", [{}, {"T": 7}])
def test_segments_of_other_sizes(layer: Segment, sizes: dict[str, int]) -> None:
    nodes = copy.deepcopy(layer.nodes)
    if not sizes:
        for entry in nodes:
            if entry["op"] == "placeholder":
                entry["shape"] = ["2*T" if size == "T" else size for size in entry["shape"]]
    assert "varying sizes" in (one_row.obstacle(replace(layer, nodes=nodes, sizes=sizes)) or "")


@needs_compiler
@pytest.mark.slow
def test_one_file_holds_both(layer: Segment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = LowerRequest(device=CPU, max_tokens=64)
    built = inductor._lower_source(layer, request)
    assert built.details == {"one_row": True}
    file = tmp_path / "segment.pt2"
    file.write_bytes(built.data)
    assert variants_of(file) == {"one_row"}
    prepared: list[bool] = []
    monkeypatch.setattr(inductor, "_prepare_kernels", lambda *args, one_row, batch_invariant: prepared.append(one_row))
    opened = inductor._open_source(layer, file, CPU)
    assert prepared == [True]
    for num_tokens, wanted_by in ((1, _plain), (5, lambda segment, values: segment.graph_module(CPU)(*values))):
        inputs = _inputs(layer, num_tokens)
        run = opened.bind(inputs[layer.num_inputs :])
        activations, wanted = inputs[: layer.num_inputs], wanted_by(layer, inputs)
        actual = run(*activations)
        assert [out.shape for out in actual] == [out.shape for out in wanted]
        assert _error(actual, wanted) < (1e-2 if num_tokens == 1 else 5e-2)  # a value between two steps of e4m3


@needs_compiler
@pytest.mark.slow
def test_no_variant_where_there_is_no_use(layer: Segment, tmp_path: Path) -> None:
    plain = max(_segments(None), key=lambda segment: segment.operators.count("aten.linear.default"))
    cases = ((plain, False, {}), (layer, True, {"one_row": "batch_invariant"}))
    for index, (segment, invariant, details) in enumerate(cases):
        built = inductor._lower_source(segment, LowerRequest(device=CPU, max_tokens=64, batch_invariant=invariant))
        file = tmp_path / str(index)
        file.write_bytes(built.data)
        assert built.details == details and not variants_of(file)


def test_the_operator_is_its_definition() -> None:
    torch.manual_seed(0)
    x, bias = torch.randn(2, 3, 32, dtype=torch.bfloat16), torch.randn(16, dtype=torch.bfloat16)
    weight, steps = quant_ops.quantize_rows(torch.randn(16, 32))
    scale = steps[:, 0].clone()
    for given in (None, bias):
        out = torch.ops.camshaft.weight_only_linear(x, weight, scale, given, torch.bfloat16)
        wanted = x.double() @ (weight.double() * steps.double()).t() + (0.0 if given is None else given.double())
        torch.testing.assert_close(out.double(), wanted, rtol=1e-2, atol=1e-2)
    with torch._subclasses.fake_tensor.FakeTensorMode() as mode:
        fake = WEIGHT_ONLY(*map(mode.from_tensor, (x, weight, scale)), None, torch.float16)
    assert fake.shape == (2, 3, 16) and fake.dtype == torch.float16
