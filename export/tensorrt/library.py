"""The one place that imports TensorRT: finds full TensorRT or TensorRT-RTX and says what it can do.

Both have the same Python interface but for a few calls, which are detected by name and never by version.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from ..targets.base import LoweringError

logger = logging.getLogger(__name__)

Flavour = Literal["tensorrt", "tensorrt_rtx"]
FLAVOURS: tuple[Flavour, ...] = ("tensorrt", "tensorrt_rtx")
"""The packages, the preferred one first."""

_FIX = "pip install 'camshaft[tensorrt]'"
_NOISE = (
    "catchCudaError",  # a machine without a GPU logs it at every step of a build
    "Unused Input",  # every segment keeps all of its inputs
    "RemoveDeadLayers",
)


@dataclass(frozen=True)
class Library:
    """A TensorRT package that was found.

    trt: the module; flavour: its name; version: exact, as in engines; log: where its messages go, one for the process.
    """

    trt: Any
    flavour: Flavour
    version: str
    log: Any

    @property
    def needs_strongly_typed_flag(self) -> bool:
        """Whether a network is strongly typed only if asked (10.x); later releases know no other kind."""
        return hasattr(self.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")

    @property
    def has_compute_capabilities(self) -> bool:
        """Whether an engine may be built for given GPUs without one of them being here (TensorRT-RTX)."""
        return hasattr(self.trt, "ComputeCapability")

    @property
    def has_runtime_cache(self) -> bool:
        """Whether kernels that were compiled when an engine opened can be kept (TensorRT-RTX)."""
        return hasattr(self.trt, "IRuntimeCache")

    @property
    def has_kernel_specialization(self) -> bool:
        """Whether `dynamic_shapes_kernel_specialization_strategy` exists (TensorRT-RTX)."""
        return hasattr(self.trt, "DynamicShapesKernelSpecializationStrategy")

    def has_method(self, name: str) -> bool:
        """Whether networks have a method, such as `add_attention_v2`."""
        return hasattr(self.trt.INetworkDefinition, name)

    @contextlib.contextmanager
    def messages(self) -> Iterator[list[str]]:
        """Collects the errors that TensorRT logs meanwhile, in order."""
        collected: list[str] = []
        self.log.listeners.append(collected)
        try:
            yield collected
        finally:
            self.log.listeners[:] = [item for item in self.log.listeners if item is not collected]

    def compute_capability(self, name: str) -> Any:
        """The enum member of a compute capability such as "8.9". Raises LoweringError for one it cannot build for."""
        if not self.has_compute_capabilities:
            raise LoweringError(
                f"compute capability {name}: {self.flavour} {self.version} builds for the GPU of this machine only; "
                "give no capabilities, or use tensorrt_rtx"
            )
        members = self.trt.ComputeCapability.__members__
        known = {f"{key[2:-1]}.{key[-1]}": member for key, member in members.items() if key.startswith("SM")}
        if name not in known:
            raise LoweringError(
                f"{self.flavour} {self.version} cannot build for compute capability {name!r}; allowed: "
                f"{', '.join(known)}; with none given the engine runs on all that it knows"
            )
        return known[name]


def find_library(flavour: str | None = None) -> Library:
    """The TensorRT of this machine; `flavour`, or CAMSHAFT_TENSORRT, chooses where both are there.

    Raises LoweringError if there is none, or if its shared libraries cannot be loaded.
    """
    wanted = flavour or os.environ.get("CAMSHAFT_TENSORRT") or None
    if wanted is not None and wanted not in FLAVOURS:
        raise LoweringError(f"TensorRT package {wanted!r} is unknown; allowed: {', '.join(FLAVOURS)}")
    candidates = [name for name in FLAVOURS if wanted in (None, name)]
    for name in candidates:
        if _is_installed(name):
            return _load(name)
    raise LoweringError(f"{' or '.join(candidates)} is not installed; {_FIX}")


def _is_installed(name: str) -> bool:
    """Whether a package is there. Torch-TensorRT puts tensorrt_rtx into sys.modules as "tensorrt": that one is not tensorrt."""
    loaded = sys.modules.get(name)
    if loaded is not None and loaded.__package__ != name:
        return False
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None  # a folder of that name on the path has no origin


def _load(name: Flavour) -> Library:
    try:
        trt = importlib.import_module(name)
    except (ImportError, OSError) as error:  # OSError: a shared library that the package brings or needs
        raise LoweringError(f"{name} is installed but cannot be loaded ({error}); install it again: {_FIX}") from error
    return Library(trt, name, str(trt.__version__), _log_of(name))


@functools.cache
def _log_of(name: str) -> Any:
    """TensorRT keeps the first logger that it is given for the whole process, so there is one for each package."""
    trt = importlib.import_module(name)
    severity = trt.ILogger.Severity
    levels = {
        severity.INTERNAL_ERROR: logging.ERROR,
        severity.ERROR: logging.ERROR,
        severity.WARNING: logging.WARNING,
        severity.INFO: logging.DEBUG,
        severity.VERBOSE: logging.DEBUG,
    }

    base: Any = trt.ILogger

    class PythonLog(base):
        """TensorRT's messages to Python's logging; an error that somebody collects is not shown as well."""

        def __init__(self) -> None:
            base.__init__(self)
            self.listeners: list[list[str]] = []

        def log(self, severity: Any, message: str) -> None:
            level = logging.DEBUG if any(text in message for text in _NOISE) else levels[severity]
            if level >= logging.ERROR and self.listeners:
                for listener in self.listeners:
                    listener.append(message)
                level = logging.DEBUG
            logger.log(level, "%s", message)

    return PythonLog()
