"""target="torch_tensorrt" without a GPU: what it hands to Torch-TensorRT's compiler, with a stand-in for the compiler.

The stand-in keeps its arguments and returns the exported program, so a module runs to its end through the same code.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from camshaft.export.targets.base import LoweringError
from camshaft.export.targets.torch_tensorrt import TorchTensorRtTarget, _indexed
from torch import Tensor, nn

import camshaft

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """What the stand-in was called with; the target believes that it can run here."""
    made: list[tuple[Any, dict[str, Any]]] = []

    def compile(exported: Any, **options: Any) -> Any:
        made.append((exported, options))
        return exported.run_decompositions({}).module()

    package = ModuleType("torch_tensorrt")
    package.dynamo = SimpleNamespace(compile=compile)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_tensorrt", package)
    monkeypatch.setattr(TorchTensorRtTarget, "unavailable", lambda self, device: None)
    return made


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = transformers.ViTModel(transformers.ViTConfig(image_size=32, patch_size=16, **SIZES)).eval()
    return model, {"pixel_values": torch.randn(2, 3, 32, 32)}


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(vocab_size=128, **SIZES)).eval()
    mask = torch.ones(2, 16, dtype=torch.int64)
    mask[1, 10:] = 0
    return model, {"input_ids": torch.randint(0, 128, (2, 16)), "attention_mask": mask}


@pytest.mark.parametrize("make", [vit, bert])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_encoder_is_one_program_with_its_weights(make: Any, dtype: torch.dtype, calls: list[Any]) -> None:
    model, inputs = make()
    model = model.to(dtype)
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    compiled = camshaft.compile(model, inputs, target="torch_tensorrt")
    assert len(calls) == 1 and not compiled.report
    exported, options = calls[0]
    assert [tuple(x.shape) for x in options["arg_inputs"]] == [tuple(x.shape) for x in inputs.values()]
    assert [x.dtype for x in options["arg_inputs"]] == [x.dtype for x in inputs.values()]
    assert options["attn_bias_is_causal"] is False  # an encoder's mask is not causal
    assert "enabled_precisions" not in options and options["use_explicit_typing"] and options["disable_tf32"]
    assert not any(tensor.requires_grad for tensor in exported.state_dict.values())
    names = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert not any(name.startswith("camshaft.") for name in names)  # there are no converters for these
    other = {name: x.flip(0) for name, x in inputs.items()}
    with torch.no_grad():
        for given in (inputs, other):
            made, expected = compiled(**given), model(**given)
            for key in ("last_hidden_state", "pooler_output"):
                torch.testing.assert_close(
                    made[key], expected[key], rtol=0, atol=1e-5 if dtype == torch.float32 else 0.03
                )


def test_semantic_operators_are_inlined(calls: list[Any]) -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(16))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    x, module = torch.randn(3, 16), Norm()
    compiled = camshaft.compile(module, (x,), target="torch_tensorrt")
    assert any("camshaft.rms_norm" in name for segment in compiled.plan.segments.values() for name in segment.operators)
    torch.testing.assert_close(compiled(x), module(x).detach())
    assert all("camshaft" not in str(node.target) for node in calls[0][0].graph.nodes)


@pytest.mark.parametrize("message", ["no converter\nfor this", ""])
def test_a_failed_compile_names_the_segment_and_the_fix(calls: list[Any], message: str) -> None:
    def fail(exported: Any, **options: Any) -> Any:
        raise AssertionError(message)

    sys.modules["torch_tensorrt"].dynamo.compile = fail
    first = message.split("\n")[0] or "AssertionError"
    with pytest.raises(LoweringError, match=f"could not compile segment .*: {first}; use target='inductor' or 'eager'"):
        camshaft.compile(nn.Linear(4, 4), (torch.zeros(2, 4),), target="torch_tensorrt")


def test_sizes_that_vary_are_refused(calls: list[Any]) -> None:
    rows = torch.export.Dim("rows", min=2, max=8)
    with pytest.raises(LoweringError, match="torch_tensorrt engines take one size only"):
        camshaft.compile(nn.Linear(4, 4), (torch.zeros(4, 4),), target="torch_tensorrt", dynamic_shapes=({0: rows},))
    assert not calls


def test_the_device_has_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert _indexed(torch.device("cuda")) == torch.device("cuda", 3)
    assert _indexed(torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert _indexed(torch.device("cpu")) == torch.device("cpu")
