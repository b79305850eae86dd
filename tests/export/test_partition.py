"""partition: cuts at attention and refused operators, equal segments once, sizes read where they are."""

from __future__ import annotations

import pytest
import torch
from camshaft.export.executor import Executor
from camshaft.export.partition import partition
from camshaft.export.segment import AttentionStep, Plan, SegmentStep
from camshaft.export.targets.base import get_target
from camshaft.graph import ops as _ops  # noqa: F401
from camshaft.graph.program import Program
from camshaft.passes.manager import PassManager
from camshaft.passes.normalize import Normalize
from camshaft.passes.page_attention import PageAttention
from graph_cases import captured, heads, rows, run
from torch import Tensor, fx, nn

aten = torch.ops.aten


def _run(plan: Plan, program: Program, *inputs: Tensor) -> list[Tensor]:
    lowered = {s.id: get_target("eager").load(s, None, torch.device("cpu")) for s in plan.segments.values()}
    weights = {name: program.weights[name].load() for name in plan.weight_names}
    return Executor(plan, lowered, weights).run(inputs)


def _refuse(*targets: object):
    def supports(node: fx.Node) -> bool:
        return node.target not in targets

    return supports


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q = heads(self.q(x), 2)
        return x + self.o(torch.ops.camshaft.attention(q, q, q, None, None, None, 0.5, 0, 0.0).flatten(2))


class Sines(nn.Module):
    """Three equal layers around an operator that may be refused; sizes are needed on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.sinc(layer(x)).reshape(x.shape[0], -1).view(x.shape) + torch.arange(x.shape[1])[None, :, None]
        return x


def test_equal_layers_are_one_segment() -> None:
    program = PassManager([Normalize(), PageAttention(block_size=4)]).run(
        captured(nn.Sequential(*[Layer() for _ in range(4)]), rows(8))
    )
    plan = partition(program, _refuse())
    kinds = [type(step) for step in plan.steps]
    assert kinds == [SegmentStep, AttentionStep] * 4 + [SegmentStep]
    assert len(plan.segments) == 3  # the first half, what stands between two attentions, the last half
    assert plan.inputs == ["input"]
    assert [step.layer for step in plan.steps if isinstance(step, AttentionStep)] == [0, 1, 2, 3]
    assert Plan.from_json(plan.to_json()).to_json() == plan.to_json()
    assert len(plan.weight_names) == 16


def test_one_segment_where_all_is_supported() -> None:
    program = Normalize()(captured(Sines(), rows(8))).program
    plan = partition(program, _refuse())
    (segment,) = plan.segments.values()
    assert (segment.num_inputs, segment.num_weights, segment.num_outputs, segment.eager) == (1, 6, 1, False)
    assert segment.placeholders[0]["shape"] == [1, "T", 8]
    assert segment.sizes == {"T": 8}
    assert plan.report == []


def test_refused_operators_run_beside() -> None:
    program = Normalize()(captured(Sines(), rows(8))).program
    plan = partition(program, _refuse(aten.sinc.default))
    assert plan.report == ["aten.sinc runs in PyTorch (no lowering)"]
    eager = [plan.segments[step.segment].eager for step in plan.steps]
    assert eager == [False, True] * 3 + [False]
    assert len(plan.segments) == 5  # sinc once
    for size in (8, 13):
        x = torch.randn(1, size, 8)
        assert torch.equal(_run(plan, program, x)[0], run(program, (x,))[0])


class Sizes(nn.Module):
    """Two sizes that vary; a piece needs one of a tensor that it does not read otherwise."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        a = torch.sinc(x)
        steps = torch.arange(y.shape[0]) * 2
        return torch.sinc(a.sum() + steps), a.reshape(x.shape[0] * 2, -1)


def test_sizes_of_other_tensors() -> None:
    from camshaft.graph.capture import capture

    shapes = ({0: torch.export.Dim("A", min=2)}, {0: torch.export.Dim("B", min=2)})
    program = capture(
        Sizes(), (torch.randn(3, 8), torch.randn(5)), dynamic_shapes=shapes, weights={}, kind="module", name="Sizes"
    )
    for supports in (
        _refuse(),
        _refuse(aten.sinc.default),
        _refuse(aten.arange.default),
        _refuse(aten.view.default, aten.reshape.default),
    ):
        plan = partition(program, supports)
        texts = {
            s
            for segment in plan.segments.values()
            for entry in segment.placeholders
            for s in entry["shape"]
            if isinstance(s, str)
        }
        assert texts <= {"T", "D1", "2*T"}
        for a, b in ((3, 5), (6, 2)):
            inputs = (torch.randn(a, 8), torch.randn(b))
            for actual, expected in zip(_run(plan, program, *inputs), run(program, inputs), strict=True):
                assert torch.equal(actual, expected)


@pytest.mark.parametrize("refused", [(), (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)])
def test_results_with_several_parts(refused: tuple[object, ...]) -> None:
    class Parts(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            a, b = (x + 1).chunk(2, -1)
            return a * 2, b

    program = Normalize()(captured(Parts(), rows(8))).program
    x = torch.randn(1, 9, 8)
    for actual, expected in zip(
        _run(partition(program, _refuse(*refused)), program, x), run(program, (x,)), strict=True
    ):
        assert torch.equal(actual, expected)
