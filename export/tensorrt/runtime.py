"""Runs TensorRT engines of fixed shapes: opened once, launched for every layer with that layer's addresses.

Activations and weights are inputs, outputs are allocated by torch, so that a launch can be captured in a CUDA graph together with
everything around it. Engines that run on one stream follow one another and share its scratch memory.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..targets.base import Bound, LoweringError
from .header import EngineHeader
from .library import Library, find_library

logger = logging.getLogger(__name__)

_TORCH_TYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "BOOL": torch.bool,
    "FP8": torch.float8_e4m3fn,
}


class TensorRtRuntime:
    """What all engines of a model share: the TensorRT runtime, scratch memory, and the cache of compiled kernels.

    kernels: files of kernels that another runtime kept; the first that fits this machine is used.
    """

    def __init__(self, device: torch.device, kernels: Sequence[Path] = ()) -> None:
        self.library = find_library()
        self.device = device
        self._runtime = self.library.trt.Runtime(self.library.log)
        self._scratch: dict[int, list[Tensor]] = {}
        self._scratch_bytes = 0
        self._cache: Any = None
        there = [file for file in kernels if file.is_file()]
        self._stored = sorted(there, key=lambda file: file.stat().st_size, reverse=True)  # the fullest first
        self._read: Path | None = None
        self._lock = threading.Lock()

    # ------------------------------------------------------------------------------------------------- compiled kernels
    def kernels(self) -> bytes | None:
        """The kernels that were compiled so far, to be given to the next runtime; None where TensorRT compiles none."""
        if self._cache is None:
            return None
        memory = self._cache.serialize()
        return bytes(memory) if memory is not None else None

    def keep_kernels(self, file: Path) -> None:
        """Writes `kernels` to a file, whole or not at all, unless it is one that was read and nothing has come to it since."""
        data = self.kernels()
        if data is None or file == self._read and file.stat().st_size >= len(data):
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.partial")
        part.write_bytes(data)
        part.replace(file)

    def _context(self, engine: Any) -> Any:
        """An execution context whose scratch memory comes from us, and whose kernels come from the cache."""
        strategy = self.library.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not hasattr(engine, "create_runtime_config"):
            return engine.create_execution_context(strategy)
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        if self.library.has_runtime_cache:
            with self._lock:
                if self._cache is None:
                    self._cache = config.create_runtime_cache()
                    self._read = next((f for f in self._stored if self._cache.deserialize(f.read_bytes())), None)
                    if self._read is None and self._stored:
                        logger.warning("the stored TensorRT kernels do not fit this machine; they are compiled again")
            config.set_runtime_cache(self._cache)
        return engine.create_execution_context(config)

    # ----------------------------------------------------------------------------------------------------------- engines
    def open(self, data: bytes, name: str) -> TensorRtEngine:
        """Opens an engine; its header is checked first. Raises LoweringError, which says what does not fit."""
        if self.library.flavour == "tensorrt_rtx":
            capability = torch.cuda.get_device_capability(self.device)
            check_header(EngineHeader.parse(data), self.library, capability, name)
        with self.library.messages() as errors, torch.cuda.device(self.device):
            engine = self._runtime.deserialize_cuda_engine(data)
            context = self._context(engine) if engine is not None else None
            if context is None:
                raise LoweringError(
                    f"{name}: TensorRT does not open the engine ({'; '.join(errors) or 'no reason given'}); "
                    "build it again here"
                )
            with self._lock:
                self._scratch_bytes = max(self._scratch_bytes, int(engine.device_memory_size_v2))
            return TensorRtEngine(self, engine, context, name)

    def scratch_address(self, stream: int) -> int:
        """Address of a stream's scratch memory, large enough for every engine that is open.

        Launches of one stream follow one another and share it. Smaller pieces are kept, since captured graphs know their
        addresses; before a capture each launch has run once on the same stream, so that nothing is allocated within.
        """
        pieces = self._scratch.setdefault(stream, [])
        if not pieces or pieces[-1].numel() < self._scratch_bytes:
            pieces.append(torch.empty(self._scratch_bytes, dtype=torch.uint8, device=self.device))
        return pieces[-1].data_ptr()


class TensorRtEngine:
    """An engine with its execution context: a `Lowered`."""

    def __init__(self, runtime: TensorRtRuntime, engine: Any, context: Any, name: str) -> None:
        trt = runtime.library.trt
        self.name = name
        self._runtime, self._engine, self._context = runtime, engine, context
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = {n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT}
        self._shapes = {n: tuple(engine.get_tensor_shape(n)) for n in names}
        self._dtypes = {n: _TORCH_TYPES[engine.get_tensor_dtype(n).name] for n in names}
        self._activations = sorted((n for n in inputs if n[0] == "x"), key=_number)
        self._weights = sorted((n for n in inputs if n[0] == "w"), key=_number)
        self._outputs = sorted((n for n in names if n not in inputs), key=_number)
        self._scratch_bytes = int(engine.device_memory_size_v2)

    def bind(self, weights: Sequence[Tensor]) -> Bound:
        """The engine with a layer's weights. The weights must stay where they are."""
        bound = [weight.contiguous() for weight in weights]
        addresses = []
        for name in self._weights:
            weight = bound[_number(name)]
            if tuple(weight.shape) != self._shapes[name] or weight.dtype != self._dtypes[name]:
                raise LoweringError(
                    f"{self.name}: weight {name} is {weight.dtype} {tuple(weight.shape)}, the engine takes "
                    f"{self._dtypes[name]} {self._shapes[name]}"
                )
            addresses.append((name, weight.data_ptr()))
        context, runtime, device = self._context, self._runtime, self._runtime.device
        set_address, execute = context.set_tensor_address, context.execute_async_v3
        activations = [(name, _number(name)) for name in self._activations]
        outputs = [(name, self._shapes[name], self._dtypes[name]) for name in self._outputs]
        scratch_bytes = self._scratch_bytes

        def call(*inputs: Tensor, _kept: list[Tensor] = bound) -> list[Tensor]:
            results = [torch.empty(shape, dtype=dtype, device=device) for _, shape, dtype in outputs]
            held = []
            for name, index in activations:
                tensor = inputs[index].contiguous()
                held.append(tensor)
                set_address(name, tensor.data_ptr())
            for name, address in addresses:
                set_address(name, address)
            for (name, _, _), result in zip(outputs, results):
                set_address(name, result.data_ptr())
            stream = torch.cuda.current_stream(device).cuda_stream
            if scratch_bytes:
                context.set_device_memory(runtime.scratch_address(stream), scratch_bytes)
            if not execute(stream):
                raise RuntimeError(f"{self.name}: TensorRT could not launch the engine; its log says why")
            return results

        return call

    def layer_information(self) -> str:
        """The engine's layers as JSON, as TensorRT's inspector sees them."""
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._context
        return str(inspector.get_engine_information(self._runtime.library.trt.LayerInformationFormat.JSON))


def _number(name: str) -> int:
    return int(name[1:])


def check_header(header: EngineHeader, library: Library, capability: tuple[int, int] | None, name: str) -> None:
    """Raises LoweringError if an engine was made by another version, or for other GPUs than this one (None: not checked).

    An engine built for no GPU in particular also runs on those that its mask has no bit for; one built for given GPUs does not.
    """
    fix = "load it with rebuild=True, which lowers it again from its own graphs"
    if not library.version.startswith(header.version_text):
        raise LoweringError(
            f"{name} was built with {library.flavour} {header.version_text}, here is {library.version}; {fix}"
        )
    if capability is None or not library.has_compute_capabilities or header.portable:
        return
    here = f"{capability[0]}.{capability[1]}"
    if here not in header.capabilities:
        raise LoweringError(
            f"{name} was built for compute capabilities {', '.join(header.capabilities)}, this GPU has {here}; {fix}"
        )
