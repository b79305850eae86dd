"""inductor: a segment compiled ahead of time by Inductor. Weights are inputs; T varies.

On CUDA linear layers stay whole (`kernels.gemm_ops`): their kernels are chosen by the number of rows when the segment runs. A
segment with fp8 layers is compiled twice, the second time for one token (`one_row`).

CPU: an AOTInductor package (C++). CUDA: Inductor's Python wrapper with its Triton binaries (`inductor_source`): it builds in a
third of the time and needs no C++ compiler, whose own libstdc++, if it is linked statically, crashes an AOTInductor package.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, fx

from ...graph import ops
from ...graph.linear_format import PACKED_KINDS, LinearFormat
from ..kernels import gemm_ops
from ..kernels.errors import and_kernel_errors, reason_of
from ..segment import Segment
from ..trace import export_segment
from . import one_row
from .base import Bound, Built, Lowered, LoweringError, LowerRequest, Workers
from .inductor_source import Compiled, aligned, calls, compile_archive, open_archive, variants_of

logger = logging.getLogger(__name__)

_MOE = torch.ops.camshaft.moe.default
_ONE_ROW = "one_row"
"""The name of a segment's variant for one token."""
_INVARIANT = "camshaft.invariant_"
"""How the names of batch-invariant operators begin."""
_QUANTIZED = "camshaft.quantized_linear.default"


def _options(request: LowerRequest) -> dict[str, bool]:
    """Inductor's options for CUDA. deterministic: reductions get one configuration, not the fastest at the first size they meet."""
    return {"deterministic": request.batch_invariant}


_WEIGHT_AND_BIAS = {"aten.linear.default": (1, 2), "camshaft.scaled_linear.default": (2, 4)}
"""Where the arguments of linear layers stand."""


def linear_layers(segment: Segment) -> list[tuple[int, int, torch.dtype, bool]]:
    """(N, K, dtype of the weight, whether there is a bias) of the linear layers with half or fp8 weights, each once."""
    weights = {entry["name"]: entry for entry in segment.placeholders[segment.num_inputs :]}
    found: dict[tuple[int, int, torch.dtype, bool], None] = {}
    for entry in segment.nodes:
        if entry["op"] != "call_function" or entry["target"] not in _WEIGHT_AND_BIAS:
            continue
        weight_at, bias_at = _WEIGHT_AND_BIAS[entry["target"]]
        given = entry["args"]
        weight = weights.get(given[weight_at].get("node", ""))
        if weight is not None and weight["dtype"] in ("float16", "bfloat16", "float8_e4m3fn"):
            has_bias = len(given) > bias_at and given[bias_at] is not None
            found[(*weight["shape"], getattr(torch, weight["dtype"]), has_bias)] = None
    return list(found)


def quantized_layers(segment: Segment) -> list[tuple[int, int, str, bool, bool]]:
    """(N, K, format, whether there is a bias, and a scale for the input) of the layers in stored formats, each once."""
    weights = {entry["name"]: entry for entry in segment.placeholders[segment.num_inputs :]}
    found: dict[tuple[int, int, str, bool, bool], None] = {}
    for entry in segment.nodes:
        if entry["op"] == "call_function" and entry["target"] == _QUANTIZED:
            _, weight, *_, bias, x_scale, name = entry["args"]
            rows, columns = weights[weight["node"]]["shape"]
            packed = LinearFormat.parse(name).weights in PACKED_KINDS
            found[rows, columns * (2 if packed else 1), name, bias is not None, x_scale is not None] = None
    return list(found)


def _prepare_kernels(segment: Segment, device: torch.device, *, one_row: bool, batch_invariant: bool) -> None:
    from ..kernels import gemm

    dtypes = {entry["dtype"] for entry in segment.placeholders} & {"float16", "bfloat16"}
    if dtypes:
        dtype = getattr(torch, min(dtypes))
        layers = [gemm.Layer(*layer) for layer in linear_layers(segment)]
        gemm.prepare(layers, dtype, device, one_row=one_row, batch_invariant=batch_invariant)
        quantized = quantized_layers(segment)
        if quantized:
            from ..kernels.quantized.prepare import QuantizedLayer, prepare

            prepare([QuantizedLayer(*layer) for layer in quantized], dtype, device)


class _InductorSegment:
    def __init__(self, runner: object) -> None:
        self._runner = runner

    def bind(self, weights: Sequence[Tensor]) -> Bound:
        bound = [weight.contiguous() for weight in weights]  # compiled code takes the strides of the trace for granted
        call = self._runner.loader.run  # type: ignore[attr-defined]
        return lambda *inputs: call([x if x.is_contiguous() else x.contiguous() for x in inputs] + bound)


class _SourceSegment:
    """compiled: for any number of tokens; one_row: for one, or None; token_axis: the input and the axis that tell."""

    def __init__(
        self, compiled: Compiled, one_row: Compiled | None = None, token_axis: tuple[int, int] | None = None
    ) -> None:
        self._compiled, self._one_row, self._token_axis = compiled, one_row, token_axis

    def bind(self, weights: Sequence[Tensor]) -> Bound:
        bound = [aligned(weight) for weight in weights]
        call, alone = self._compiled, self._one_row
        if alone is None or self._token_axis is None:
            return lambda *inputs: call([*map(aligned, inputs), *bound])
        index, axis = self._token_axis

        def run(*inputs: Tensor) -> Sequence[Tensor]:
            return (alone if inputs[index].shape[axis] == 1 else call)([*map(aligned, inputs), *bound])

        return run


def _lower_source(segment: Segment, request: LowerRequest) -> Built:
    """The archive for CUDA. details["one_row"]: of a segment with fp8 layers, whether there is the variant, or why not."""
    inline = gemm_ops.inline_around(ops.inline, batch_invariant=request.batch_invariant)
    exported = export_segment(segment, request.device, request.max_tokens, inline)
    variants: dict[str, torch.export.ExportedProgram] = {}
    details: dict[str, bool | str] = {}
    if "camshaft.scaled_linear.default" in segment.operators:
        reason = "batch_invariant" if request.batch_invariant else one_row.obstacle(segment)
        details[_ONE_ROW] = reason or True
        if reason is None:
            alone = one_row.inline_one_row(inline)
            variants[_ONE_ROW] = export_segment(segment, request.device, request.max_tokens, alone, {one_row.TOKENS: 1})
    return Built(compile_archive(exported, _options(request), variants), details)


def _open_source(segment: Segment, engine: Path, device: torch.device) -> Lowered:
    has_one_row = _ONE_ROW in variants_of(engine)
    opened = _SourceSegment(
        open_archive(engine, device),
        open_archive(engine, device, _ONE_ROW) if has_one_row else None,
        one_row.token_axis(segment) if has_one_row else None,
    )
    _prepare_kernels(segment, device, one_row=has_one_row, batch_invariant=calls(engine, _INVARIANT))
    return opened


class InductorTarget:
    """Inductor's code: C++ and OpenMP on the CPU, Triton and cuBLAS on CUDA."""

    name = "inductor"
    extension = "pt2"
    fixed_sizes = False

    def fewest_tokens(self, device: torch.device) -> int:
        # exported for 2 and more: the package of the CPU checks that, the CUDA source does not
        return 1 if device.type == "cuda" else 2

    def unavailable(self, device: torch.device) -> str | None:
        if device.type == "cuda":
            if not torch.cuda.is_available():
                return "torch sees no CUDA device"
            if importlib.util.find_spec("triton") is None:
                return "Triton is not installed; install a CUDA build of torch, which brings it"
            compilers = ("gcc", "clang", "cc")  # for Triton's launchers
        else:
            compilers = ("g++", "clang++", "c++")
        if not any(shutil.which(compiler) for compiler in compilers):
            return f"none of the compilers {', '.join(compilers)} was found; install g++ (Debian: apt-get install g++)"
        return None

    def versions(self) -> dict[str, str]:
        return {"torch": str(torch.__version__)}

    def supports(self, node: fx.Node) -> bool:
        return node.target is not _MOE  # the number of tokens of an expert is known only at run time

    def workers(self, device: torch.device) -> Workers | None:
        return "processes" if device.type == "cpu" else None  # on CUDA no C++ is compiled

    def lower(self, segment: Segment, request: LowerRequest) -> Built:
        from torch._inductor import aoti_compile_and_package

        buffer = io.BytesIO()
        try:
            if request.device.type == "cuda":
                return _lower_source(segment, request)
            exported = export_segment(segment, request.device, request.max_tokens, ops.inline)
            aoti_compile_and_package(exported, package_path=buffer)
        except and_kernel_errors(RuntimeError, torch._inductor.exc.InductorError, torch._dynamo.exc.UserError) as error:
            raise LoweringError(f"Inductor could not compile segment {segment.id}: {reason_of(error)}") from error
        return Built(buffer.getvalue())

    def load(self, segment: Segment, engine: Path | None, device: torch.device) -> Lowered:
        assert engine is not None
        try:
            if device.type == "cuda":
                return _open_source(segment, engine, device)
            from torch._inductor import aoti_load_package

            # single-threaded: otherwise a call waits on the host until the previous one has left the device
            return _InductorSegment(aoti_load_package(str(engine), run_single_threaded=True))
        except and_kernel_errors(RuntimeError, OSError, ValueError) as error:
            raise LoweringError(
                f"{engine.name} cannot be opened ({reason_of(error)}); build the engine again here"
            ) from error
