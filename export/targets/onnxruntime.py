"""onnxruntime: a segment as an ONNX graph, run by ONNX Runtime on the CPU.

The graph names its weights as external initializers without data; each layer opens the same graph with its own weights, which
ONNX Runtime then packs for its kernels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ..segment import Segment
from .base import Bound, Built, LoweringError, LowerRequest, Workers, node_signature

logger = logging.getLogger(__name__)


class OnnxRuntimeTarget:
    """ONNX Runtime's CPU provider."""

    name = "onnxruntime"
    extension = "onnx"
    fixed_sizes = False

    def __init__(self) -> None:
        self._known: dict[str, bool] = {}

    def fewest_tokens(self, device: torch.device) -> int:
        return 1

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
        from .onnx_graph import UnsupportedError

        try:
            key = node_signature(node)
            if key not in self._known:
                self._known[key] = _opens(node)
        except UnsupportedError as error:
            logger.debug("%s: %s", node.name, error)
            return False
        return self._known[key]

    def workers(self, device: torch.device) -> Workers | None:
        return None

    def lower(self, segment: Segment, request: LowerRequest) -> Built:
        from .onnx_graph import segment_to_onnx

        return Built(segment_to_onnx(segment))

    def load(self, segment: Segment, engine: Path | None, device: torch.device) -> _OnnxSegment:
        assert engine is not None
        return _OnnxSegment(segment, engine)


def _opens(node: fx.Node) -> bool:
    """Whether ONNX Runtime opens a model of this one node. Raises UnsupportedError where there is no such model."""
    import onnxruntime as ort

    from .onnx_graph import node_to_onnx

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    try:
        _open(node_to_onnx(node), options)
    except _errors() as error:
        logger.debug("%s: %s", node.name, error)
        return False
    return True


def _open(model: bytes, options: Any) -> Any:
    import onnxruntime as ort

    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"], enable_fallback=0)


def _errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises for a model that it does not take."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    graph = (state.Fail, state.InvalidGraph, state.InvalidProtobuf, state.NoModel, state.NotImplemented)
    return (*graph, state.InvalidArgument, state.RuntimeException, RuntimeError, ValueError)


class _OnnxSegment:
    def __init__(self, segment: Segment, engine: Path) -> None:
        self._segment = segment
        self._model = engine.read_bytes()
        self._name = engine.name

    def bind(self, weights: Sequence[Tensor]) -> Bound:
        import onnxruntime as ort

        options = session_options()
        names = [f"w{index}" for index in range(len(weights))]
        values = [ort.OrtValue.ortvalue_from_numpy(weight.detach().contiguous().numpy()) for weight in weights]
        if names:
            options.add_external_initializers(names, values)
        try:
            session = _open(self._model, options)
        except _errors() as error:
            raise LoweringError(
                f"ONNX Runtime {ort.__version__} does not open {self._name}: {error}; build the engine again"
            ) from error
        return _runner(session, self._segment.num_inputs, values)


def session_options() -> Any:
    """Options of every session: torch's number of threads, and threads that sleep instead of spinning.

    Not ONNX Runtime's global thread pool: it would hold for the whole process, spin, and refuse other code's sessions.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return options


def _runner(session: Any, num_inputs: int, weights: list[Any]) -> Callable[..., Sequence[Tensor]]:
    """A call of the session. Measured against I/O binding and DLPack, plain numpy views cost least for a few tokens."""
    names = [f"x{index}" for index in range(num_inputs)]
    expected = {entry.name for entry in session.get_inputs()}
    used = [(index, name) for index, name in enumerate(names) if name in expected]
    outputs = [entry.name for entry in session.get_outputs()]
    run = session.run

    def call(*inputs: Tensor, _weights: list[Any] = weights) -> list[Tensor]:  # ONNX Runtime reads the weights in place
        feeds = {name: inputs[index].contiguous().numpy() for index, name in used}
        return [torch.from_numpy(array) for array in run(outputs, feeds)]

    return call
