"""What the tests of Triton kernels share: on a GPU, or by Triton's interpreter on the CPU (TRITON_INTERPRET=1).

A test module calls `require_triton` before it imports kernels, which import Triton.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from paged_attention_cases import Case

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRET else "cuda"
HALF = torch.float16 if INTERPRET else torch.bfloat16
"""The interpreter multiplies bfloat16's bits as integers."""
FP8_VALUES = torch.float32 if INTERPRET else torch.float8_e4m3fn
"""What holds rounded fp8 values: the interpreter's cast to fp8 cuts off."""
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Of attention. bfloat16 and float16: weights and output are rounded to 8 and 11 bits; float32: no TF32, plain rounding."""

needs_cuda_graphs = pytest.mark.skipif(INTERPRET, reason="CUDA graphs need a GPU")
needs_dispatch = pytest.mark.skipif(INTERPRET, reason="dispatch picks by device")


def require_triton() -> None:
    """Skips the calling module where nothing runs Triton's kernels."""
    if not torch.cuda.is_available() and not INTERPRET:
        pytest.skip("no CUDA device (TRITON_INTERPRET=1 runs these on the CPU)", allow_module_level=True)
    pytest.importorskip("triton", reason="Triton is not installed")


def check_against_reference(case: Case, **more: Any) -> None:
    """Attention's results equal the reference's, its caches to the last bit. more: rope, and what the Triton kernels alone take."""
    from camshaft.export.kernels import reference, triton

    expected_case, dtype = case.clone(), case.tensors["q"].dtype
    expected = expected_case.call(reference.paged_attention, rope=more.get("rope"))
    out = case.call(triton.paged_attention, **more)
    torch.testing.assert_close(out, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    for name in ("k_cache", "v_cache"):
        got, want = (entry.tensors[name].float() for entry in (case, expected_case))
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
