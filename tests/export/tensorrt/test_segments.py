"""Whole segments of small decoders: their networks against eager, and real engines at two sizes, portable and for given GPUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, MORE_FAMILIES, REPRESENTATIVE, every_family, random_model, tiny_config
from tensorrt_interpreter import run_network
from torch import Tensor

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")

from camshaft.export.partition import partition
from camshaft.export.segment import Plan, Segment
from camshaft.export.tensorrt.header import EngineHeader
from camshaft.export.tensorrt.library import find_library
from camshaft.export.tensorrt.network import build_segment, emit_segment, supports
from camshaft.models import demo
from camshaft.models.huggingface import open_model
from camshaft.passes.manager import PassManager
from camshaft.passes.pipeline import decoder_passes
from shared_traces import trace_decoder

CPU = torch.device("cpu")
EVERY = ["demo", *FAMILIES, *MORE_FAMILIES]
CORE = ("demo", *REPRESENTATIVE, "phi", "gemma3", "gptj", "apertus", "deepseek_v2")
"""What `make test` builds engines of; the others are left to `make test-long`."""

COMPLEX = {"deepseek_v2"}
"""Families that compute RoPE on complex numbers, which TensorRT does not have."""

BUILDS = [({"T": 1, "R": 1}, ()), ({"T": 8, "R": 4}, ()), ({"T": 8, "R": 4}, ("8.9", "12.0"))]
seen: set[str] = set()


@pytest.fixture(scope="module", params=every_family(EVERY, CORE))
def family(request: Any) -> tuple[str, Plan]:
    """A family with its plan in fp32 (the demo model in bf16, as it is stored), as builds for CUDA cut it."""
    name = request.param
    if name == "demo":
        source = open_model(demo.path(), torch.bfloat16)
    else:
        source = open_model(random_model(tiny_config(name)), torch.float32)
    return name, partition(
        PassManager(decoder_passes(block_size=16, fuse_rope=True)).run(trace_decoder(source)), supports
    )


def lowered(family: tuple[str, Plan]) -> list[Segment]:
    """The segments that TensorRT takes."""
    return [segment for segment in family[1].segments.values() if not segment.eager]


def random_inputs(segment: Segment, sizes: dict[str, int]) -> list[Tensor]:
    """Random activations and weights; integers are small enough for every table."""
    generator = torch.Generator().manual_seed(sizes["T"])
    made = []
    for entry in segment.placeholders:
        shape = [sizes[size] if isinstance(size, str) else size for size in entry["shape"]]
        dtype = getattr(torch, entry["dtype"])
        if dtype.is_floating_point:
            scale = 0.1 if entry["name"].startswith("w") else 1.0
            made.append((torch.randn(shape, generator=generator) * scale).to(dtype))
        else:
            made.append(torch.randint(0, min(sizes["T"], 4), shape, generator=generator).to(dtype))
    return made


def test_what_runs_in_pytorch(family: tuple[str, Plan]) -> None:
    name, plan = family
    assert lowered(family)
    if name in COMPLEX:
        assert any("aten.view_as_complex" in line for line in plan.report)
    else:
        assert plan.report == []


@pytest.mark.parametrize("num_tokens", [1, 8])
def test_networks_equal_eager(family: tuple[str, Plan], num_tokens: int) -> None:
    sizes = {"T": num_tokens, "R": min(num_tokens, 4)}
    for segment in lowered(family):
        _, builder = emit_segment(find_library(), segment, sizes)
        inputs = random_inputs(segment, sizes)
        names = [entry["name"] for entry in segment.placeholders]
        with torch.no_grad():
            expected = segment.graph_module(CPU)(*[tensor.clone() for tensor in inputs])
            actual = run_network(builder.trt, builder.network, dict(zip(names, inputs)))
        assert list(actual) == [f"y{index}" for index in range(segment.num_outputs)]
        for a, b in zip(actual.values(), expected, strict=True):
            # fp32: sums in another order; bf16: four units of the last place, a segment is a dozen roundings deep
            tolerance = 1e-5 if a.dtype == torch.float32 else 4 * 2.0**-8
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_segments_build(family: tuple[str, Plan]) -> None:
    version = tuple(int(part) for part in find_library().version.split("."))
    for segment in lowered(family):
        if segment.id in seen:
            continue
        seen.add(segment.id)
        for sizes, capabilities in BUILDS:
            built = build_segment(segment, sizes, capabilities=capabilities)
            header = EngineHeader.parse(built.data)
            assert header.version == version and header.num_bytes == built.num_bytes
            assert header.portable != bool(capabilities)
            assert not capabilities or header.capabilities == capabilities
            assert [info.name for info in built.inputs] == [entry["name"] for entry in segment.placeholders]
            for info, entry in zip(built.inputs, segment.placeholders, strict=True):
                shape = tuple(sizes[size] if isinstance(size, str) else size for size in entry["shape"])
                assert (str(info.dtype), info.shape) == (f"torch.{entry['dtype']}", shape)
            assert [info.name for info in built.outputs] == [f"y{index}" for index in range(segment.num_outputs)]
            products = sum(name in ("aten.linear.default", "aten.matmul.default") for name in segment.operators)
            assert built.layers.get("MATRIX_MULTIPLY", 0) <= products + 2 * segment.operators.count(
                "camshaft.moe.default"
            )
            assert built.layers.get("MATRIX_MULTIPLY", 0) >= segment.operators.count("aten.linear.default")
