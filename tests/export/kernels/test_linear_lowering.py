"""Linear layers in a segment for CUDA: whole operators in Inductor's code, found again by a fresh process."""

from __future__ import annotations

import functools
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from camshaft.export.choose import lower_program, plan_for
from camshaft.export.kernels import gemm_ops
from camshaft.export.lower import _jobs
from camshaft.export.manifest import BuildConfig
from camshaft.export.segment import Segment
from camshaft.export.targets import inductor_source
from camshaft.export.targets.base import get_target
from camshaft.export.targets.inductor import InductorTarget, linear_layers
from camshaft.export.timer import Timer
from camshaft.export.trace import example_inputs, export_segment
from camshaft.graph import ops
from camshaft.models.huggingface import open_model
from camshaft.passes.manager import PassManager
from camshaft.passes.pipeline import decoder_passes
from families import random_model, tiny_config
from shared_traces import trace_decoder

CPU = torch.device("cpu")
pytestmark = pytest.mark.long
needs_compiler = pytest.mark.skipif(
    InductorTarget().unavailable(CPU) is not None, reason="Inductor needs a C++ compiler"
)
CONFIG = BuildConfig(
    target="inductor", device="cuda", dtype="bfloat16", max_seq_len=64, max_batch_tokens=8, max_sequences=4, block_size=16,
    batch_invariant=True,
)  # fmt: skip
OPEN = """
import sys, torch
from pathlib import Path
from camshaft.export.targets import inductor
call = inductor.open_archive(Path(sys.argv[1]), torch.device("cpu"))
torch.save(list(call(torch.load(sys.argv[2]))), sys.argv[3])
"""


@pytest.fixture(scope="module")
def program() -> Any:
    source = open_model(random_model(tiny_config("llama")), torch.bfloat16)
    return PassManager(decoder_passes(block_size=16)).run(trace_decoder(source))


@pytest.fixture(scope="module")
def layer(program: Any) -> Segment:
    """The segment with most linear layers."""
    plan = plan_for(program, "inductor")
    return max(plan.segments.values(), key=lambda s: s.operators.count("aten.linear.default"))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("invariant", [False, True])
def test_a_fresh_process_finds_the_operators(layer: Segment, tmp_path: Path, invariant: bool) -> None:
    inline = gemm_ops.inline_around(ops.inline, batch_invariant=invariant)
    options = {"deterministic": True} if invariant else None
    data = inductor_source.compile_archive(export_segment(layer, CPU, 64, inline), options)
    (tmp_path / "segment").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "segment") as archive:
        source = archive.read("segment.py").decode()
    name = "invariant_linear" if invariant else "linear"
    assert source.count(f"torch.ops.camshaft.{name}.default(") == layer.operators.count("aten.linear.default")
    assert "extern_kernels.mm" not in source and "addmm" not in source
    torch.manual_seed(0)
    inputs = [torch.randn(t.shape).to(t.dtype) if t.is_floating_point() else t for t in example_inputs(layer, CPU, 5)]
    torch.save(inputs, tmp_path / "inputs")
    arguments = [str(tmp_path / part) for part in ("segment", "inputs", "outputs")]
    subprocess.run([sys.executable, "-c", OPEN, *arguments], check=True)
    wanted = layer.graph_module(CPU)(*inputs)
    for actual, expected in zip(torch.load(tmp_path / "outputs"), wanted, strict=True):
        error = (actual.float() - expected.float()).norm() / expected.float().norm()
        assert error < 2e-2  # bfloat16; Inductor keeps what lies between the ends of a kernel in float32


def test_layers_whose_kernels_are_prepared(layer: Segment) -> None:
    found = linear_layers(layer)
    assert found and len(set(found)) == len(found)
    shapes = {tuple(entry["shape"]) for entry in layer.placeholders[layer.num_inputs :]}
    assert all((n, k) in shapes and dtype == torch.bfloat16 and not bias for n, k, dtype, bias in found)


def test_fp8_layers_stay_whole() -> None:
    scaled = torch.ops.camshaft.scaled_linear.default
    assert gemm_ops.inline_around(ops.inline, batch_invariant=False)(scaled) is None
    invariant = gemm_ops.inline_around(ops.inline, batch_invariant=True)(scaled)
    assert invariant is torch.ops.camshaft.invariant_scaled_linear.default
    norm = torch.ops.camshaft.rms_norm.default
    assert gemm_ops.inline_around(ops.inline, batch_invariant=True)(norm) is ops.inline(norm)


@pytest.mark.parametrize("name", ["add_rms_norm_quantize", "glu_quantize", "quantize_rows"])
def test_quantizations_by_hand_are_a_choice(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    target = getattr(torch.ops.camshaft, name).default
    whole = gemm_ops.inline_around(ops.inline, batch_invariant=False)(target)
    assert isinstance(whole, functools.partial) and whole.args == (target, ops.inline(target))
    monkeypatch.setattr(gemm_ops, "WHOLE_QUANTIZATIONS", frozenset())
    assert gemm_ops.inline_around(ops.inline, batch_invariant=False)(target) is ops.inline(target)


@pytest.mark.parametrize(("name", "width"), [("quantize_rows", 32770), ("glu_quantize", 65538)])
def test_rows_too_wide_for_the_kernels_are_left_to_inductor(name: str, width: int) -> None:
    target = getattr(torch.ops.camshaft, name).default
    assert gemm_ops._whole_quantization(target, lambda x: "definition", torch.empty(0, width)) == "definition"
    rows = gemm_ops._whole_quantization(
        target, lambda x: "definition", torch.ones(1, width - 2), *("silu",) * ("glu" in name)
    )
    assert rows[0].dtype == torch.float8_e4m3fn


def test_other_weights_stay_with_aten_or_are_refused() -> None:
    x, weight = torch.randn(3, 8), torch.randn(4, 8)
    for invariant in (False, True):
        linear = gemm_ops.inline_around(ops.inline, batch_invariant=invariant)(torch.ops.aten.linear.default)
        assert linear is not None
        if invariant:
            with pytest.raises(ValueError, match=r"torch.float32 weight \[4, 8\], allowed: float16 and bfloat16"):
                linear(x, weight)
        else:
            assert torch.equal(linear(x, weight), torch.nn.functional.linear(x, weight))


def test_products_without_an_invariant_kernel_are_refused() -> None:
    matmul = torch.ops.aten.matmul.default
    assert gemm_ops.inline_around(ops.inline, batch_invariant=False)(matmul) is None
    product = gemm_ops.inline_around(ops.inline, batch_invariant=True)(matmul)
    assert product is not None
    frequencies, positions = torch.randn(1, 16, 1), torch.arange(40.0).view(1, 1, 40)
    assert torch.equal(product(frequencies, positions), frequencies @ positions)
    with pytest.raises(
        ValueError, match=r"no kernel for aten\.matmul\.default of \[1, 4, 2\] and \[2, 3\], allowed: .* outer products"
    ):
        product(torch.randn(1, 4, 2), torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"aten\.addmm\.default"):
        addmm = gemm_ops.inline_around(ops.inline, batch_invariant=True)(torch.ops.aten.addmm.default)
        addmm(torch.randn(3), torch.randn(4, 1), torch.randn(1, 3))  # type: ignore[misc]


def test_requests_say_whether_batches_matter(layer: Segment) -> None:
    (_, request), *_ = _jobs(layer, get_target("inductor"), CONFIG)
    assert request.batch_invariant


@pytest.mark.parametrize("target", ["eager", "tensorrt", "onnxruntime"])
def test_other_targets_are_not_batch_invariant(program: Any, tmp_path: Path, target: str) -> None:
    with pytest.raises(ValueError, match=rf"target is {target} on cuda; allowed: inductor \(or auto\) on cuda"):
        lower_program(program, replace(CONFIG, target=target), tmp_path, Timer(None))


def test_how_targets_lower_several_segments() -> None:
    cuda = torch.device("cuda")
    assert get_target("tensorrt").workers(cuda) == "threads"
    assert get_target("inductor").workers(CPU) == "processes" and get_target("inductor").workers(cuda) is None
    assert get_target("eager").workers(CPU) is None
