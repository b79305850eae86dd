"""Native steps with quantized linear layers against the operator's definition."""

from __future__ import annotations

import pytest
import torch
from camshaft.export.kernels.native import NativeBuildError, find_compiler
from camshaft.export.native_program import Unsupported
from camshaft.export.native_step import NativeStep
from camshaft.export.native_weights import group_length
from camshaft.export.segment import Plan, Segment, SegmentStep
from camshaft.graph.linear_format import LinearFormat
from camshaft.graph.quant_formats import quantize_weight
from camshaft.graph.quantized_linear import QUANTIZED_LINEAR, quantized_linear
from camshaft.graph.serialize import graph_hash, graph_to_json
from camshaft.runtime.batch import Batch
from torch import Tensor, fx

try:
    find_compiler()
except NativeBuildError:
    pytest.skip("no C compiler", allow_module_level=True)

VOCAB = 16
FORMATS = (
    "int8/none", "int8/int8", "int8/int8_static", "int8:g64/none", "int8:g64:zp/none", "int8:zp/int8", "int8:g12/none",
    "int4/none", "int4:g32/none", "int4:g128/none", "int4:g128:zp/none", "int4:g64/int8", "int4:g64:zp/int8_static",
    "int4:g384/none",
)  # fmt: skip


class Layer:
    """A plan that looks up rows of `table` and puts them through one quantized layer, with its operands."""

    def __init__(self, text: str, num_outputs: int, dim: int, bias: bool = True, weights: Tensor | None = None) -> None:
        generator = torch.Generator().manual_seed(7)
        self.format = LinearFormat.parse(text)
        if weights is None:
            weights = torch.randn(num_outputs, dim, generator=generator) + 0.3
        parts = quantize_weight(weights, self.format)
        self.table = torch.randn(VOCAB, dim, generator=generator) * torch.logspace(-2, 1, VOCAB)[:, None]
        operands = {
            "weight": parts.values,
            "scale": parts.scale,
            "zero_point": parts.zero_point,
            "global_scale": None,
            "bias": torch.randn(num_outputs, generator=generator) if bias else None,
            "x_scale": torch.tensor(0.05) if self.format.activations.endswith("_static") else None,
        }
        self.operands, self.num_outputs = operands, num_outputs
        graph = fx.Graph()
        tokens = _placeholder(graph, "x0", (1, "T"), "int64")
        given = {"table": self.table} | {name: value for name, value in operands.items() if value is not None}
        nodes = {
            name: _placeholder(graph, name, tuple(value.shape), str(value.dtype).removeprefix("torch."))
            for name, value in given.items()
        }
        x = graph.call_function(torch.ops.aten.embedding.default, (nodes["table"], tokens))
        out = graph.call_function(QUANTIZED_LINEAR, (x, *(nodes.get(name) for name in operands), text))
        graph.output((out,))
        recorded = graph_to_json(graph)
        segment = Segment(graph_hash(recorded), recorded, 1, len(given), 1)
        step = SegmentStep(segment.id, tuple(given), ("token_ids",), ("out",))
        plan = Plan({segment.id: segment}, [step], ["token_ids", "positions", "sample_rows"], ["out"])
        self.native = NativeStep(plan, given, num_outputs)

    def expected(self, tokens: Tensor) -> Tensor:
        return quantized_linear(self.table[tokens], *self.operands.values(), str(self.format))

    def run(self, tokens: Tensor) -> Tensor:
        count = len(tokens)
        batch = Batch(
            token_ids=tokens,
            positions=torch.arange(count),
            groups=(),
            query_start=torch.tensor([0, count], dtype=torch.int32),
            seq_lens=torch.tensor([count], dtype=torch.int32),
            sample_rows=torch.arange(count),
            max_query_len=count,
            max_seq_len=count,
        )
        return self.native.step(batch, ())


def _placeholder(graph: fx.Graph, name: str, shape: tuple[int | str, ...], dtype: str) -> fx.Node:
    node = graph.placeholder(name)
    node.meta["spec"] = (shape, dtype)
    return node


@pytest.mark.parametrize("text", FORMATS)
def test_formats_equal_the_definition(text: str) -> None:
    layer = Layer(text, num_outputs=75, dim=384, bias="g" in text)
    for count in (1, 2, 3, 4, 5, 11):
        tokens = (torch.arange(count) * 5 + 1) % VOCAB
        got, expected = layer.run(tokens), layer.expected(tokens)
        # activations that stay float are rounded to 16 bits of their group's largest: 2^-16 of it, which sums average out
        bound = 2e-4 if layer.format.activations == "none" else 2e-6
        assert ((got - expected).abs().amax(-1) <= bound * expected.abs().amax(-1)).all(), count


@pytest.mark.parametrize("text", ["int8/int8", "int8/int8_static", "int8/none", "int4/none", "int4/int8"])
def test_columns_that_fill_no_word(text: str) -> None:
    layer = Layer(text, num_outputs=5, dim=42)
    tokens = torch.arange(3)
    torch.testing.assert_close(layer.run(tokens), layer.expected(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text", ["int8/none", "int4/none", "int4:g256:zp/none", "int8:g256:zp/none", "int8/int8"])
def test_largest_products_do_not_overflow(text: str) -> None:
    dim = 2048
    weights = torch.ones(20, dim)
    weights[1] = -1
    weights[2, ::2] = -1
    layer = Layer(text, num_outputs=20, dim=dim, bias=False, weights=weights)
    layer.table[0] = 3.0
    layer.table[1] = -3.0
    tokens = torch.tensor([0, 1])
    torch.testing.assert_close(layer.run(tokens), layer.expected(tokens), rtol=1e-4, atol=0.5)


@pytest.mark.parametrize("text", ["int8/none", "int8/int8", "int8/int8_static", "int4:g32/none"])
def test_nan_stays_in_its_row(text: str) -> None:
    layer = Layer(text, num_outputs=20, dim=64)
    layer.table[1, 7] = float("nan")
    got = layer.run(torch.tensor([0, 1, 2]))
    assert got[1].isnan().all() and got[[0, 2]].isfinite().all()


def test_weights_are_held_once_at_their_size() -> None:
    layer = Layer("int4:g32/none", num_outputs=128, dim=256)
    layer.native.check([])
    layer.native.check([])
    assert layer.native.copied_bytes == 128 * 256 // 2 + 128 * 256 // 32 * 4


def test_formats_without_integers_are_refused() -> None:
    for text in ("nvfp4/nvfp4", "fp8/none", "int8/fp8"):
        with pytest.raises(Unsupported, match="quantized_linear"):
            Layer(text, num_outputs=16, dim=64).native.check([])


def test_group_lengths() -> None:
    parse = LinearFormat.parse
    assert group_length(parse("int4:g128/none"), 4096) == 128
    assert group_length(parse("int4:g1024/none"), 4096) == 256
    assert group_length(parse("int8/int8"), 4095) == 4096
    assert group_length(parse("int8/none"), 4095) == 256
    with pytest.raises(Unsupported, match="groups of 12"):
        group_length(parse("int4:g12/none"), 48)
