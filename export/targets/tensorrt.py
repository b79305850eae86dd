"""tensorrt: a segment as TensorRT engines, one for each bucket, with weights as inputs.

Engines are built from the graph without a GPU and are small, because they hold no weights; running them needs a GPU. Which of
TensorRT and TensorRT-RTX it is, only `export/tensorrt/library.py` knows.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import fx

from ..segment import Segment
from .base import Built, Lowered, LoweringError, LowerRequest, Workers, node_signature

if TYPE_CHECKING:
    from ..tensorrt.header import EngineHeader
    from ..tensorrt.runtime import TensorRtEngine, TensorRtRuntime


class TensorRtTarget:
    """TensorRT, or TensorRT-RTX, on CUDA."""

    name = "tensorrt"
    extension = "engine"
    fixed_sizes = True

    def __init__(self) -> None:
        self._known: dict[str, bool] = {}

    def fewest_tokens(self, device: torch.device) -> int:
        return 1

    def unavailable(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return "TensorRT engines run on CUDA; give device='cuda' (building them needs no GPU)"
        from ..tensorrt.library import find_library

        try:
            find_library()
        except LoweringError as error:
            return str(error)
        return None

    def versions(self) -> dict[str, str]:
        from ..tensorrt.library import find_library

        library = find_library()
        return {library.flavour: library.version}

    def supports(self, node: fx.Node) -> bool:
        from ..tensorrt.network import supports

        key = node_signature(node)
        if key not in self._known:
            self._known[key] = supports(node)
        return self._known[key]

    def workers(self, device: torch.device) -> Workers | None:
        return "threads"

    def lower(self, segment: Segment, request: LowerRequest) -> Built:
        from ..tensorrt.network import build_segment

        built = build_segment(segment, request.sizes or {}, capabilities=request.capabilities)
        details: dict[str, Any] = {"layers": dict(built.layers), "seconds": round(built.seconds, 4)}
        header = header_of(built.data)
        if header is not None:
            details |= {"version": header.version_text, "capability_mask": header.capability_mask}
        return Built(built.data, details)

    def load(self, segment: Segment, engine: Path | None, device: torch.device) -> Lowered:
        assert engine is not None
        return open_engine(engine)


def open_engine(file: Path) -> TensorRtEngine:
    """Opens an engine file on the current GPU. Raises LoweringError."""
    if not torch.cuda.is_available():
        raise LoweringError(f"{file.name} is a TensorRT engine, and torch sees no CUDA device here to run it on")
    return runtime_of(file.parent).open(file.read_bytes(), file.name)


def inspect_engine(file: Path) -> dict[str, Any]:
    """The layers of an engine file, as TensorRT's inspector sees them. Raises LoweringError, without a GPU for one."""
    return dict(json.loads(open_engine(file).layer_information()))


def header_of(data: bytes) -> EngineHeader | None:
    """The header of an engine of TensorRT-RTX; None for full TensorRT, whose layout is not known. Raises LoweringError."""
    from ..tensorrt.header import EngineHeader
    from ..tensorrt.library import find_library

    return EngineHeader.parse(data) if find_library().flavour == "tensorrt_rtx" else None


def check_engines(directory: Path, names: Sequence[str]) -> None:
    """Reads the headers of engine files and compares them with this machine's TensorRT and GPU, before anything is loaded.

    Raises LoweringError for the first that is damaged, of another version, or for other GPUs.
    """
    from ..tensorrt.library import find_library
    from ..tensorrt.runtime import check_header

    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    for name in names:
        header = header_of((directory / name).read_bytes())
        if header is not None:
            check_header(header, find_library(), capability, name)


_LOCK = threading.Lock()
_RUNTIMES: WeakValueDictionary[tuple[int, Path], TensorRtRuntime] = WeakValueDictionary()

KERNELS = "tensorrt.kernels"
"""File beside the engines: kernels that TensorRT compiled for one GPU, so that the next start compiles none."""


def runtime_of(directory: Path) -> TensorRtRuntime:
    """The TensorRT runtime of the engines in a directory, on the current GPU; it lives as long as one of them is open."""
    from ..tensorrt.runtime import TensorRtRuntime

    index = torch.cuda.current_device()
    with _LOCK:
        runtime = _RUNTIMES.get((index, directory))
        if runtime is None:
            runtime = TensorRtRuntime(torch.device("cuda", index), (directory / KERNELS, own_kernels(directory)))
            _RUNTIMES[index, directory] = runtime
    return runtime


def own_kernels(directory: Path) -> Path:
    """Where this machine keeps the kernels of the engines in a directory that came without, or from another GPU."""
    from ..cache import cache_root
    from ..tensorrt.library import find_library

    library = find_library()
    names = sorted(file.name for file in directory.glob("*.engine"))
    name = torch.cuda.get_device_name()
    key = hashlib.sha256(json.dumps([library.flavour, library.version, name, names]).encode()).hexdigest()[:24]
    return cache_root() / "kernels" / f"{key}.kernels"


def keep_kernels(directory: Path) -> None:
    """Keeps what was compiled for the engines in a directory for the next start on this machine."""
    runtime = _RUNTIMES.get((torch.cuda.current_device(), directory))
    if runtime is not None:
        runtime.keep_kernels(own_kernels(directory))


def compile_kernels(directory: Path, names: Sequence[str]) -> None:
    """Opens engines of a directory, many at once, and writes the kernels that TensorRT compiled for this GPU beside them."""
    runtime = runtime_of(directory)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        opened = list(pool.map(lambda name: runtime.open((directory / name).read_bytes(), name), names))
    runtime.keep_kernels(directory / KERNELS)
    runtime.keep_kernels(own_kernels(directory))
    del opened


def kernels_of(directory: Path) -> bytes | None:
    """The kernels that were compiled for the engines in a directory in this process, None if there are none."""
    found = [runtime for (_, place), runtime in _RUNTIMES.items() if place == directory]
    return found[0].kernels() if found else None
