"""Distillation on a GPU: the divergence falls, and a build of the checkpoint there has it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distillation_cases import SMALL, tiny

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
    assert torch.get_float32_matmul_precision() == "highest"
    engine = camshaft.compile(
        str(tmp_path / "out"), quantize=format, group=group, kv_cache_dtype="fp8", calibration=ROWS, target="eager",
        device="cuda", cache=False,
    )  # fmt: skip
    assert engine.weights_bytes > 0
