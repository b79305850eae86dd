"""Encoders with target="tensorrt": their engines are built, and their networks run in place of a GPU, masks and all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import camshaft

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")

from camshaft.export.segment import Segment
from camshaft.export.targets.tensorrt import TensorRtTarget
from camshaft.export.tensorrt.header import EngineHeader
from camshaft.export.tensorrt.library import find_library
from camshaft.export.tensorrt.network import emit_segment
from tensorrt_interpreter import run_network

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


class _Interpreted:
    """A segment whose network the interpreter of the tests runs."""

    def __init__(self, segment: Segment) -> None:
        self._segment = segment

    def bind(self, weights: Any) -> Any:
        maker, builder = emit_segment(find_library(), self._segment, {})
        fixed = {f"w{index}": weight for index, weight in enumerate(weights)}

        def call(*inputs: Tensor, _kept: Any = maker) -> list[Tensor]:
            given = {f"x{index}": x.contiguous() for index, x in enumerate(inputs)}
            made = run_network(builder.trt, builder.network, {**given, **fixed})
            return [made[f"y{index}"] for index in range(len(made))]

        return call


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The engines that were built; their networks run in their place."""
    built: list[bytes] = []

    def load(self: Any, segment: Segment, engine: Path, device: torch.device) -> _Interpreted:
        built.append(engine.read_bytes())
        return _Interpreted(segment)

    monkeypatch.setattr(TensorRtTarget, "unavailable", lambda self, device: None)
    monkeypatch.setattr(TensorRtTarget, "load", load)
    return built


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 0.01)])
def test_bert_is_one_engine(engines: list[bytes], dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(vocab_size=128, **SIZES)).eval().to(dtype)
    mask = torch.ones(2, 16, dtype=torch.int64)
    mask[1, 10:] = 0
    inputs = {"input_ids": torch.randint(0, 128, (2, 16)), "attention_mask": mask}
    _agrees(model, inputs, tolerance)
    assert len(engines) == 1 and EngineHeader.parse(engines[0]).portable


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 0.01)])
def test_vit_leaves_at_most_its_convolution(engines: list[bytes], dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    model = transformers.ViTModel(transformers.ViTConfig(image_size=32, patch_size=16, **SIZES)).eval().to(dtype)
    compiled = _agrees(model, {"pixel_values": torch.randn(2, 3, 32, 32, dtype=dtype)}, tolerance)
    assert len(engines) == 1
    outside = {name for segment in compiled.plan.segments.values() if segment.eager for name in segment.operators}
    assert outside <= {"aten.conv2d.default", "aten.reshape.default", "aten.transpose.int"}, compiled.report


@torch.no_grad()
def _agrees(model: nn.Module, inputs: dict[str, Tensor], tolerance: float) -> Any:
    compiled = camshaft.compile(model, inputs, target="tensorrt")
    assert compiled.target == "tensorrt"
    for given in (inputs, {name: x.flip(0) for name, x in inputs.items()}):
        made, expected = compiled(**given), model(**given)
        for key in ("last_hidden_state", "pooler_output"):
            assert float((made[key] - expected[key]).abs().max()) <= tolerance
    return compiled
