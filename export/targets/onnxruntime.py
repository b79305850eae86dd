"""onnxruntime: a segment as an ONNX graph, run by ONNX Runtime on the CPU.

The graph names its weights as external initializers without data; each layer opens the same graph with its own weights, which
ONNX Runtime then packs for its kernels.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ..segment import Segment
from .base import Bound, LoweringError

logger = logging.getLogger(__name__)

_MOE = torch.ops.camshaft.moe.default


class OnnxRuntimeTarget:
    """ONNX Runtime's CPU provider."""

    name = "onnxruntime"
    extension = "onnx"
    min_tokens = 1

    def unavailable(self, device: torch.device) -> str | None:
        if device.type != "cpu":
            return "the onnxruntime target runs on the CPU only"
        try:
            import onnxruntime  # noqa: F401
        except ImportError:
            return "onnxruntime is not installed; pip install 'camshaft[onnxruntime]'"
        return None

    def versions(self) -> dict[str, str]:
        import onnxruntime

        return {"onnxruntime": onnxruntime.__version__}

    def supports(self, node: fx.Node) -> bool:
        return node.target is not _MOE  # the number of tokens of an expert is known only at run time

    def lower(self, segment: Segment, device: torch.device, max_tokens: int) -> bytes:
        from .onnx_graph import segment_to_onnx

        try:
            return segment_to_onnx(segment, max_tokens)
        except (torch.onnx.OnnxExporterError, torch._dynamo.exc.UserError) as error:
            raise _lowering_error(segment, error) from error

    def load(self, segment: Segment, engine: Path | None, device: torch.device) -> _OnnxSegment:
        assert engine is not None
        return _OnnxSegment(segment, engine)


def _lowering_error(segment: Segment, error: BaseException) -> LoweringError:
    """The exporter's error with the names of the operators that it could not translate."""
    names: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        names += re.findall(r"torch\.ops\.([\w.]+)\]", str(cause))
        cause = cause.__cause__
    text = f"{', '.join(dict.fromkeys(names))} has no ONNX form" if names else str(error).strip().splitlines()[0]
    return LoweringError(f"segment {segment.id} cannot become an ONNX graph: {text}", operators=tuple(names))


class _OnnxSegment:
    def __init__(self, segment: Segment, engine: Path) -> None:
        self._segment = segment
        self._model = engine.read_bytes()
        self._name = engine.name

    def bind(self, weights: Sequence[Tensor]) -> Bound:
        import onnxruntime as ort

        options = session_options()
        names = [f"w{index}" for index in range(len(weights))]
        self._values = getattr(self, "_values", [])
        values = [ort.OrtValue.ortvalue_from_numpy(weight.detach().contiguous().numpy()) for weight in weights]
        self._values.append(values)  # ONNX Runtime reads them in place
        if names:
            options.add_external_initializers(names, values)
        try:
            session = ort.InferenceSession(self._model, options, providers=["CPUExecutionProvider"])
        except (RuntimeError, ValueError) as error:
            raise LoweringError(
                f"ONNX Runtime {ort.__version__} does not open {self._name}: {error}; build the engine again"
            ) from error
        return _runner(session, self._segment.num_inputs)


def session_options() -> Any:
    """Options of every session: torch's number of threads, and threads that sleep instead of spinning."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return options


def _runner(session: Any, num_inputs: int) -> Callable[..., Sequence[Tensor]]:
    names = [f"x{index}" for index in range(num_inputs)]
    expected = {entry.name for entry in session.get_inputs()}
    used = [(index, name) for index, name in enumerate(names) if name in expected]
    outputs = [entry.name for entry in session.get_outputs()]
    run = session.run

    def call(*inputs: Tensor) -> list[Tensor]:
        feeds = {name: inputs[index].contiguous().numpy() for index, name in used}
        return [torch.from_numpy(array) for array in run(outputs, feeds)]

    return call
