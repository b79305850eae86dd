"""Distillation on a GPU: the divergence falls, a build of the checkpoint there has it, and captured steps are the steps."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from camshaft.export.distillation.captured import Captured
from camshaft.export.distillation.rounding import round_input
from camshaft.graph.linear_format import LinearFormat
from camshaft.graph.quantized_linear import quantize_activations
from distillation_cases import SMALL, tiny
from families import random_model, tiny_config

import camshaft

pytestmark = pytest.mark.gpu
ROWS = [torch.randint(0, 340, (1024,), generator=torch.Generator().manual_seed(0)).tolist()]


@pytest.mark.parametrize(("format", "dtype"), [("nvfp4", "float32"), ("int4", "bfloat16"), ("w4a8", "float32")])
def test_the_divergence_falls(format: str, dtype: str, tmp_path: Path) -> None:
    group = None if format == "nvfp4" else 32
    found = camshaft.distill(
        tiny(), tmp_path / "out", quantize=format, group=group, kv_cache_dtype="fp8", center_keys=True, data=ROWS, device="cuda",
        dtype=dtype, steps=32, **SMALL,
    )  # fmt: skip
    assert found.divergence < found.divergence_before and found.best_step > 0
    assert json.loads((tmp_path / "out" / "distillation.json").read_text())["outcome"]["captured"]
    assert torch.get_float32_matmul_precision() == "highest"
    engine = camshaft.compile(
        str(tmp_path / "out"), quantize=format, group=group, kv_cache_dtype="fp8", calibration=ROWS, target="eager",
        device="cuda", cache=False,
    )  # fmt: skip
    assert engine.weights_bytes > 0


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4", "int4:g32:zp/int8", "mxfp8"])
def test_captured_steps_are_the_steps(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same losses and divergences but for the order of sums, which weights amplify little in so few steps."""
    recipe = camshaft.Recipe(format=LinearFormat.parse(format)) if "/" in format else format
    given: dict[str, Any] = {"quantize": recipe, "data": ROWS, "device": "cuda", "steps": 12, **SMALL}
    given |= {"sampled_tokens": 0, "search_every": 2}
    replayed = _outcome(tmp_path / "replayed", given)
    monkeypatch.setattr(Captured, "_capture", lambda self: None)
    plain = _outcome(tmp_path / "plain", given)
    assert replayed["captured"] and not plain["captured"]
    for mine, theirs in zip(replayed["history"], plain["history"], strict=True):
        assert mine == pytest.approx(theirs, rel=0.02)


def _outcome(out: Path, given: dict[str, Any]) -> dict[str, Any]:
    camshaft.distill(tiny(), out, **given)
    found: dict[str, Any] = json.loads((out / "distillation.json").read_text())["outcome"]
    return found


def test_a_mixture_of_experts_trains_with_or_without_capture(tmp_path: Path) -> None:
    found = camshaft.distill(
        random_model(tiny_config("mixtral")), tmp_path / "out", quantize="int8_weight_only", data=[[i * 7 % 128 for i in ROWS[0]]],
        device="cuda", steps=8, **{**SMALL, "sampled_tokens": 0},
    )  # fmt: skip
    assert 0 <= found.divergence <= found.divergence_before


def test_what_cannot_be_captured_runs_on(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.zeros((), device="cuda")

    def count() -> float:
        x.add_(1)
        return float(x)  # waits for the GPU

    captured = Captured("counting", count, torch.device("cuda"), warmup=1)
    with caplog.at_level(logging.WARNING):
        assert [captured() for _ in range(4)] == [1, 2, 3, 4]
    assert not captured.replays and caplog.text.count("counting cannot be captured, and runs kernel by kernel") == 1


@pytest.mark.parametrize("kind", ["fp8", "fp8_block", "int8", "nvfp4", "nvfp4_search", "mxfp4", "mxfp8"])
def test_inputs_are_rounded_by_the_kernel_as_defined(kind: str) -> None:
    format = LinearFormat(weights="fp8", activations=kind)  # type: ignore[arg-type]
    x = torch.randn(3, 37, 288, generator=torch.Generator().manual_seed(1)).cuda()
    x *= torch.linspace(0.01, 30, 288, device="cuda")
    x[0, 3] = 0
    values, scale = quantize_activations(x, format)
    assert torch.equal(round_input(x, format), values if scale is None else values * scale)
