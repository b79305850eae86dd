"""Every entry of the ONNX table against PyTorch, for two numbers of tokens; and what the table must refuse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import camshaft.graph.ops  # noqa: F401  registers camshaft::*
import pytest
import torch
from camshaft.export.segment import Segment
from camshaft.export.targets.base import LoweringError
from operator_cases import CASES, CPU, Case, In, Q, T, X, Y, build, flat, traced, value
from torch import Tensor

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from camshaft.export.targets.onnx_graph import operators, segment_to_onnx  # noqa: E402
from camshaft.export.targets.onnxruntime import OnnxRuntimeTarget  # noqa: E402

UNINITIALIZED = {"aten.empty.memory_format", "aten.new_empty.default", "aten.empty_like.default"}


def check(model: bytes) -> None:
    """onnx.checker, with external weights as inputs (they have no data that it could read)."""
    proto = onnx.load_from_string(model)
    external = [t for t in proto.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    for tensor in external:
        proto.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
        proto.graph.initializer.remove(tensor)
    onnx.checker.check_model(proto)


def run_both(segment: Segment, file: Path, inputs: Sequence[Tensor], compare: Callable[[Tensor, Tensor], None]) -> None:
    """Runs a stored segment and its graph in PyTorch, and compares."""
    target = OnnxRuntimeTarget()
    bound = target.load(segment, file, CPU).bind(inputs[segment.num_inputs :])
    with torch.no_grad():
        expected = segment.graph_module(CPU)(*[tensor.clone() for tensor in inputs])
        actual = bound(*inputs[: segment.num_inputs])
    assert len(expected) == len(actual)
    for a, b in zip(expected, actual):
        assert a.dtype == b.dtype and a.shape == b.shape, (a.dtype, b.dtype, a.shape, b.shape)
        compare(a, b)


def close(a: Tensor, b: Tensor) -> None:
    """fp32: the kernels sum in another order; integers and booleans are equal."""
    torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-5 if a.dtype.is_floating_point else 0, equal_nan=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_entry_equals_torch(case: Case, tmp_path: Path) -> None:
    segment, specs = build(case)
    model = segment_to_onnx(segment)
    check(model)
    (tmp_path / "segment.onnx").write_bytes(model)
    for num_tokens in (1, 7):
        inputs = [value(spec, num_tokens, seed) for seed, spec in enumerate(specs)]
        if case.name == "aten.squeeze.default" and num_tokens == 1:
            continue  # the traced graph has a varying T, which is not squeezed
        run_both(segment, tmp_path / "segment.onnx", inputs, close)


def test_every_entry_is_tested() -> None:
    quantized = {"camshaft.quantized_linear.default"}  # test_onnx_quant_ops.py
    assert set(operators()) - {case.name for case in CASES} == UNINITIALIZED | quantized


@pytest.mark.parametrize("case", [c for c in CASES if not any(isinstance(i, T) for i in flat([c.args]))][::7], ids=str)
def test_supports_accepts(case: Case) -> None:
    assert OnnxRuntimeTarget().supports(traced(case))


HALF = In([1, "T", 8], "half")
REFUSED = [
    Case("aten.silu.default", [HALF], label="half"),
    Case("aten._to_copy.default", [X], {"dtype": torch.bfloat16}, label="bfloat16"),
    Case("aten.linear.default", [HALF, In([5, 8], "half", True)], label="half"),
    Case("aten.erfinv.default", [X]),
    Case("aten.view_as_complex.default", [In([1, "T", 4, 2])]),
    Case("aten.dropout.default", [X, 0.5, True], label="training"),
    Case("aten.index.Tensor", [Q, [None, In([3], "ids"), In([3], "ids")]], label="two-indices"),
    Case("aten.div.Tensor_mode", [X, Y], {"rounding_mode": "trunc"}),
    Case("aten.fmod.Tensor", [X, Y]),
]


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_refused(case: Case) -> None:
    assert not OnnxRuntimeTarget().supports(traced(case))
    segment, _ = build(case)
    with pytest.raises(LoweringError, match="ONNX Runtime has no kernel for"):
        segment_to_onnx(segment)


def test_moe_is_refused_and_named() -> None:
    args = [In(["T", 8]), In(["T", 2], "ids"), In(["T", 2]), In([4, 12, 8], weight=True), In([4, 8, 6], weight=True)]
    segment, _ = build(Case("camshaft.moe.default", [*args, None, None, "silu", True, False, False]))
    with pytest.raises(LoweringError, match="camshaft.moe") as caught:
        segment_to_onnx(segment)
    assert caught.value.operators == ("camshaft.moe.default",)
