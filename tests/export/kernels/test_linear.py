"""Which kernel a linear layer gets, and the operators' definitions on the CPU; numerics of kernels: tests/gpu/test_linear.py."""

from __future__ import annotations

import camshaft.export.kernels.gemm_ops  # noqa: F401  registers the operators
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

ops = torch.ops.camshaft


@pytest.mark.parametrize("name", ["linear", "invariant_linear"])
def test_on_the_cpu_they_are_linear(name: str) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 3, 8), torch.randn(4, 8), torch.randn(4)
    for given in (None, bias):
        assert torch.equal(getattr(ops, name)(x, weight, given), F.linear(x, weight, given))


def test_invariant_scaled_linear_is_scaled_linear() -> None:
    torch.manual_seed(0)
    x, x_scale = ops.quantize_rows(torch.randn(3, 16))
    weight, scale = ops.quantize_rows(torch.randn(8, 16))
    expected = ops.scaled_linear(x, x_scale, weight, scale[:, 0], None, torch.float32)
    assert torch.equal(ops.invariant_scaled_linear(x, x_scale, weight, scale[:, 0], None, torch.float32), expected)


def test_shapes_of_results() -> None:
    with FakeTensorMode():
        x, weight = torch.empty(1, 5, 8, dtype=torch.bfloat16), torch.empty(4, 8, dtype=torch.bfloat16)
        assert ops.linear(x, weight, None).shape == (1, 5, 4)
        fp8 = torch.float8_e4m3fn
        out = ops.invariant_scaled_linear(
            x.to(fp8), torch.empty(1, 5, 1), weight.to(fp8), torch.empty(4), None, torch.float16
        )
        assert out.shape == (1, 5, 4) and out.dtype == torch.float16
