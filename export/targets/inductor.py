"""inductor: a segment compiled ahead of time by AOTInductor, on CPU and CUDA. Weights are inputs; T varies."""

from __future__ import annotations

import io
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, fx

from ...graph import ops
from ..segment import Segment
from ..trace import export_segment
from .base import Bound, LoweringError

logger = logging.getLogger(__name__)

_MOE = torch.ops.camshaft.moe.default


class _InductorSegment:
    def __init__(self, runner: object) -> None:
        self._runner = runner

    def bind(self, weights: Sequence[Tensor]) -> Bound:
        bound = [weight.contiguous() for weight in weights]  # compiled code takes the strides of the trace for granted
        call = self._runner.loader.run  # type: ignore[attr-defined]
        return lambda *inputs: call([x if x.is_contiguous() else x.contiguous() for x in inputs] + bound)


class InductorTarget:
    """AOTInductor packages: C++ and OpenMP on the CPU, Triton and cuBLAS on CUDA."""

    name = "inductor"
    extension = "pt2"
    min_tokens = 2

    def unavailable(self, device: torch.device) -> str | None:
        if not any(shutil.which(compiler) for compiler in ("g++", "clang++", "c++")):
            return "no C++ compiler was found; install g++ (Debian: apt-get install g++)"
        if device.type == "cuda" and not torch.cuda.is_available():
            return "torch sees no CUDA device"
        return None

    def versions(self) -> dict[str, str]:
        return {"torch": str(torch.__version__)}

    def supports(self, node: fx.Node) -> bool:
        return node.target is not _MOE  # the number of tokens of an expert is known only at run time

    def lower(self, segment: Segment, device: torch.device, max_tokens: int) -> bytes:
        from torch._inductor import aoti_compile_and_package

        buffer = io.BytesIO()
        try:
            exported = export_segment(segment, device, max_tokens, ops.inline)
            aoti_compile_and_package(exported, package_path=buffer)
        except (RuntimeError, torch._inductor.exc.InductorError, torch._dynamo.exc.UserError) as error:
            raise LoweringError(
                f"Inductor could not compile segment {segment.id}: {str(error).splitlines()[0]}"
            ) from error
        return buffer.getvalue()

    def load(self, segment: Segment, engine: Path | None, device: torch.device) -> _InductorSegment:
        from torch._inductor import aoti_load_package

        assert engine is not None
        try:
            # single-threaded: otherwise a call waits on the host until the previous one has left the device
            return _InductorSegment(aoti_load_package(str(engine), run_single_threaded=True))
        except (RuntimeError, OSError) as error:
            raise LoweringError(
                f"{engine.name} cannot be opened ({str(error).splitlines()[0]}); build the engine again here"
            ) from error
