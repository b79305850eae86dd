"""select_rows: rows are chosen in front of the head, behind which scaling and soft caps may stand."""

from __future__ import annotations

import pytest
import torch
from camshaft.graph.numerics import run_program
from camshaft.graph.verify import verify
from camshaft.passes import quantize_fp8
from camshaft.passes.fuse_add_norm import FuseAddNorm
from camshaft.passes.fuse_norm_quantize import FuseNormQuantize
from camshaft.passes.match_rms_norm import MatchRmsNorm
from camshaft.passes.normalize import Normalize
from camshaft.passes.quantization.recipe import Recipe
from camshaft.passes.quantize_linear import QuantizeLinear
from camshaft.passes.select_rows import SelectRows
from graph_cases import LlamaNorm, captured, rows, run
from torch import Tensor, nn

aten = torch.ops.aten


class Head(nn.Module):
    """Gemma 2: a soft cap behind the head."""

    def __init__(self, cap: bool = True) -> None:
        super().__init__()
        self.body, self.head, self.cap = nn.Linear(8, 8), nn.Linear(8, 20, bias=False), cap

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(self.body(x).relu())
        return torch.tanh(logits / 30.0) * 30.0 if self.cap else logits


class Used(Head):
    """The head's result has a second reader, so the rows are chosen from the logits."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(self.body(x))
        return logits - logits.logsumexp(-1, keepdim=True)


@pytest.mark.parametrize(("module", "moved"), [(Head(), True), (Head(cap=False), True), (Used(), False)])
def test_selects(module: nn.Module, moved: bool) -> None:
    program = Normalize()(captured(module, rows(8))).program
    result = SelectRows()(program)
    assert result.num_matches == 1
    verify(result.program, after="select_rows")
    (select,) = [n for n in result.program.graph.nodes if n.target == aten.index_select.default]
    width = 8 if moved else 20
    assert select.meta["val"].shape[-1] == width
    output = next(node for node in result.program.graph.nodes if node.op == "output")
    rows_name = next(spec.shape[0] for spec in result.program.inputs if spec.key == "sample_rows")
    assert str(output.args[0][0].meta["val"].shape[1]) == rows_name
    for size, chosen in ((8, [7, 0, 3]), (13, [12])):
        x = torch.randn(1, size, 8)
        with torch.no_grad():
            expected = module(x)[:, chosen]
        actual = run_program(result.program, {"x": x, "sample_rows": torch.tensor(chosen)})[0]
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)  # fp32, products of another size


def test_no_rows() -> None:
    program = SelectRows()(captured(Head(), rows(8))).program
    assert run_program(program, {"x": torch.randn(1, 8, 8), "sample_rows": torch.zeros(0, dtype=torch.int64)})[
        0
    ].shape == (1, 0, 20)


class NormedHead(nn.Module):
    """A head behind a norm, of a sum or not; kept: the sum is returned as well."""

    def __init__(self, *, residual: bool, kept: bool = False) -> None:
        super().__init__()
        self.norm, self.head, self.residual, self.kept = LlamaNorm(32), nn.Linear(32, 16), residual, kept

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        total = x + x.abs() if self.residual else x
        return self.head(self.norm(total)), *([total] if self.kept else [])


@pytest.mark.parametrize(
    "module", [NormedHead(residual=False), NormedHead(residual=True), NormedHead(residual=True, kept=True)]
)
def test_the_rows_of_an_fp8_head_are_chosen_before_they_are_quantized(
    module: NormedHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize_fp8, "MIN_WEIGHTS", 0)
    torch.manual_seed(0)
    program = captured(module, rows(32))
    recipe = Recipe.named("fp8_lm_head")
    for step in (Normalize(), MatchRmsNorm(), FuseAddNorm(), QuantizeLinear(recipe), FuseNormQuantize()):
        program = step(program).program
    x = torch.randn(1, 9, 32)
    expected = run(program, (x,))
    selected = Normalize()(SelectRows()(program).program).program
    verify(selected, after="select_rows")
    (head,) = [node for node in selected.graph.nodes if node.target is quantize_fp8.SCALED_LINEAR]
    quantizer = head.args[0].args[0]
    assert quantizer.args[0].target is aten.index_select.default
    actual = run_program(selected, {"x": x, "sample_rows": torch.tensor([7, 0])})
    torch.testing.assert_close(actual[0], expected[0][:, [7, 0]], rtol=1e-5, atol=1e-6)  # products of another size
    assert all(torch.equal(a, b) for a, b in zip(actual[1:], expected[1:], strict=True))
