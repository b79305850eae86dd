"""torch.compile(backend="camshaft"): inference, sizes that vary, parameters that change, and clear refusals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from camshaft.export import dynamo
from camshaft.export.targets.inductor import InductorTarget
from graph_cases import LlamaNorm, heads
from torch import Tensor, nn


class Block(nn.Module):
    """RMSNorm, gated MLP, residual sum, LayerNorm, causal attention; also counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.second, self.last = LlamaNorm(8), LlamaNorm(8), nn.LayerNorm(8)
        self.gate, self.up, self.down = nn.Linear(8, 16, bias=False), nn.Linear(8, 16, bias=False), nn.Linear(16, 8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, factor: int = 1) -> tuple[Tensor, int, Tensor, Tensor]:
        self.calls.add_(1)
        y = self.norm(x)
        y = self.down(F.silu(self.gate(y)) * self.up(y)) + x
        y = self.last(self.second(y) + y) * factor
        q = heads(y, 2)
        return F.scaled_dot_product_attention(q, q, q, is_causal=True), x.shape[0] * 2, y.transpose(1, 2), y


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def runners(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every program that is lowered during the test."""
    made: list[Any] = []
    original = dynamo.lower_for

    def record(*args: Any) -> Any:
        made.append(original(*args))
        return made[-1]

    monkeypatch.setattr(dynamo, "lower_for", record)
    return made


def _compare(module: nn.Module, compiled: Any, *inputs: Any) -> None:
    with torch.no_grad():
        expected, actual = module(*inputs), compiled(*inputs)
    for a, b in zip(actual, expected, strict=True):
        if isinstance(b, Tensor):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # fp32, another order of sums
            assert a.stride() == b.stride()
        else:
            assert a == b


def test_is_listed() -> None:
    assert "camshaft" in torch._dynamo.list_backends()


@pytest.mark.parametrize(("target", "dynamic"), [("eager", True), ("eager", False), ("onnxruntime", True)])
def test_module(target: str, dynamic: bool, runners: list[Any]) -> None:
    module = Block().eval()
    compiled = torch.compile(module, backend="camshaft", dynamic=dynamic, options={"target": target})
    for batch, tokens, factor in ((2, 5, 3), (4, 7, 5), (3, 6, 5)):
        _compare(module, compiled, torch.randn(batch, tokens, 8), factor)
    assert module.calls == 6
    assert len(runners) == (1 if dynamic else 3)
    matches = {record.name: record.num_matches for record in runners[0].flat.program.history}
    wanted = {
        "match_attention": 1,
        "match_linear": 3,
        "match_rms_norm": 2,
        "fuse_projections": 1,
        "fuse_glu": 1,
        "fuse_add_norm": 1,
    }
    assert {name: matches[name] for name in wanted} == wanted
    targets = [node.target for node in runners[0].flat.program.graph.nodes]
    assert torch.ops.aten.layer_norm.default in targets
    assert torch.ops.aten.addmm.default not in targets
    assert runners[0].target == target


@pytest.mark.long
@pytest.mark.skipif(InductorTarget().unavailable(torch.device("cpu")) is not None, reason="needs a C++ compiler")
def test_a_target_that_traces_compiles_at_the_first_call() -> None:
    module = nn.Linear(4, 4)
    compiled = torch.compile(module, backend="camshaft", options={"target": "inductor"})
    with torch.no_grad():
        x = torch.randn(3, 4)
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-5, atol=1e-6)


def test_parameters_that_change(runners: list[Any]) -> None:
    module = Block().eval()
    compiled = torch.compile(module, backend="camshaft", dynamic=True, options={"target": "eager"})
    _compare(module, compiled, torch.randn(2, 5, 8))
    with torch.no_grad():
        module.gate.weight.add_(0.1)  # joined with another weight by then
    _compare(module, compiled, torch.randn(2, 5, 8))
    module.load_state_dict(Block().state_dict())
    _compare(module, compiled, torch.randn(2, 5, 8))
    module.norm.weight = nn.Parameter(torch.rand(8))
    _compare(module, compiled, torch.randn(2, 5, 8))
    assert len(runners) == 1


def test_mark_dynamic_and_inference_mode(runners: list[Any]) -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval()
    compiled = torch.compile(module, backend="camshaft", options={"target": "eager"})
    for size in (5, 9, 12):
        x = torch.randn(size, 8)
        torch._dynamo.mark_dynamic(x, 0)
        with torch.inference_mode():
            torch.testing.assert_close(compiled(x), module(x))
    assert len(runners) == 1


def test_graph_breaks_and_functions() -> None:
    @torch.compile(backend="camshaft", options={"target": "eager"})
    def function(x: Tensor) -> Tensor:
        y = x.sin() + 1
        if y.sum() > 0:
            return y * 2
        return y.clone()

    with torch.no_grad():
        for x in (torch.ones(4), -torch.ones(4) * 1.6 - 3):
            expected = x.sin() + 1
            torch.testing.assert_close(function(x), expected * 2 if expected.sum() > 0 else expected)


def test_clones_share_no_memory() -> None:
    compiled = torch.compile(lambda x: (x.clone(), x + 0), backend="camshaft", options={"target": "eager"})
    x = torch.randn(4)
    with torch.no_grad():
        results = compiled(x)
    assert len({x.data_ptr(), *(r.data_ptr() for r in results)}) == 3


def test_training_is_refused() -> None:
    compiled = torch.compile(nn.Linear(4, 4), backend="camshaft")
    with pytest.raises(Exception, match="compiles for inference only.*torch.no_grad"):
        compiled(torch.ones(2, 4))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"goal": "eager"}, r"unknown options \['goal'\]; allowed: 'target'"),
        ({"target": "tpu"}, "unknown target 'tpu'"),
    ],
)
def test_options(options: dict[str, str], text: str) -> None:
    compiled = torch.compile(nn.ReLU(), backend="camshaft", options=options)
    with pytest.raises(Exception, match=text), torch.no_grad():
        compiled(torch.ones(2))
