"""A self-test of TensorRT for `camshaft doctor`: a small engine is built and its header read; on a GPU it also runs.

x [4, 64] -> layer_norm -> linear -> y0 [4, 32]        fp32, weights w0..w3 as inputs, compared with PyTorch
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ...graph.serialize import graph_hash, graph_to_json
from ..segment import Segment
from ..targets.base import LoweringError
from .header import EngineHeader
from .library import Library, find_library
from .network import BuiltEngine, build_segment
from .runtime import TensorRtRuntime, check_header

TOLERANCE = 1e-2
"""Largest allowed difference from PyTorch, absolute, of sums of 64 products of about 1: TensorRT-RTX rounds the operands of fp32
products to TF32 (11 bits), whether the builder's TF32 flag is set or not; seen on an H200: 3e-3.
"""

REPEATS = 20
"""Launches that are timed; the median counts."""

_SHAPES = ((4, 64), (64,), (64,), (32, 64), (32,))  # x, norm weight and bias, linear weight and bias


@dataclass(frozen=True, kw_only=True)
class SelfTest:
    """What the self-test found; None stands for what was not reached.

    ok: whether nothing failed (without a GPU: the build and the header). detail: the outcome in words. flavour, version: of the
    package. build_s: seconds that the build took. engine_bytes: size of the engine. capabilities: those that the header names.
    ran: whether the engine was run. max_error: largest absolute difference from PyTorch. ms: median milliseconds of a launch.
    """

    ok: bool
    detail: str
    flavour: str | None = None
    version: str | None = None
    build_s: float | None = None
    engine_bytes: int | None = None
    capabilities: tuple[str, ...] = ()
    ran: bool = False
    max_error: float | None = None
    ms: float | None = None


def self_test(device: torch.device | None = None) -> SelfTest:
    """Builds, checks and, on a CUDA `device`, runs a small engine (None: the GPU that torch sees, if there is one).

    A failure is in the result (`ok`, `detail`) and not raised.
    """
    if device is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    try:
        library = find_library()
    except LoweringError as error:
        return SelfTest(ok=False, detail=str(error))
    try:
        built = build_segment(self_test_segment(), {}, library=library)
        header = None
        if library.flavour == "tensorrt_rtx":  # the layout of full TensorRT's engines is not known
            header = EngineHeader.parse(built.data)
            check_header(header, library, None, "the self-test's engine")
    except LoweringError as error:
        return SelfTest(ok=False, detail=str(error), flavour=library.flavour, version=library.version)
    if device is None or device.type != "cuda":
        return _result(library, built, header, True, "built; running it needs a GPU")
    try:
        difference, ms = _run(built.data, device)
    except (LoweringError, RuntimeError) as failure:  # CUDA's own errors are RuntimeErrors
        return _result(library, built, header, False, f"built, but it does not run: {failure}")
    close = difference <= TOLERANCE
    detail = f"largest difference from PyTorch {difference:.1e}" + ("" if close else f", more than {TOLERANCE:.0e}")
    return _result(library, built, header, close, detail, difference, ms)


def _result(
    library: Library,
    built: BuiltEngine,
    header: EngineHeader | None,
    ok: bool,
    detail: str,
    max_error: float | None = None,
    ms: float | None = None,
) -> SelfTest:
    return SelfTest(
        ok=ok, detail=detail, flavour=library.flavour, version=library.version, build_s=built.seconds,
        engine_bytes=built.num_bytes, capabilities=header.capabilities if header else (),
        ran=max_error is not None, max_error=max_error, ms=ms,
    )  # fmt: skip


def self_test_segment() -> Segment:
    """The graph of the self-test: one activation, four weights, one output."""
    graph = fx.Graph()
    inputs = []
    for index, shape in enumerate(_SHAPES):
        node = graph.placeholder("x0" if index == 0 else f"w{index - 1}")
        node.meta["spec"] = (shape, "float32")
        inputs.append(node)
    x, scale, shift, weight, bias = inputs
    normed = graph.call_function(torch.ops.aten.layer_norm.default, (x, [64], scale, shift, 1e-5))
    graph.output((graph.call_function(torch.ops.aten.linear.default, (normed, weight, bias)),))
    nodes = graph_to_json(graph)
    return Segment(graph_hash(nodes), nodes, num_inputs=1, num_weights=4, num_outputs=1)


def self_test_tensors(device: torch.device) -> list[Tensor]:
    """The values of the test: x and the weights, the same each time."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).mul_(0.5).to(device) for shape in _SHAPES]


@torch.inference_mode()
def _run(data: bytes, device: torch.device) -> tuple[float, float]:
    """(largest difference from PyTorch on the CPU, median milliseconds of a launch)."""
    x, *weights = self_test_tensors(torch.device("cpu"))
    (expected,) = self_test_segment().graph_module(torch.device("cpu"))(x, *weights)
    call = TensorRtRuntime(device).open(data, "the self-test's engine").bind([weight.to(device) for weight in weights])
    stream, there = torch.cuda.Stream(device), x.to(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    seconds = []
    with torch.cuda.stream(stream):
        (result,) = call(there)
        for _ in range(REPEATS):
            stream.synchronize()
            start = time.perf_counter()
            call(there)
            stream.synchronize()
            seconds.append(time.perf_counter() - start)
    return float((result.cpu() - expected).abs().max()), 1e3 * statistics.median(seconds)
