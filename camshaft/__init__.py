"""Camshaft compiles PyTorch language models ahead of time into small engines, and serves them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .api import calibrate, compile, distill, load, trace
    from .export.engine import Engine
    from .export.whole import Export, export_model
    from .passes.quantization.recipe import Recipe
    from .runtime import LLM, RequestOutput, SamplingParams, SpeculativeConfig

_HOME = {
    "calibrate": ".api",
    "compile": ".api",
    "distill": ".api",
    "load": ".api",
    "trace": ".api",
    "Engine": ".export.engine",
    "Export": ".export.whole",
    "export_model": ".export.whole",
    "LLM": ".runtime",
    "Recipe": ".passes.quantization.recipe",
    "SamplingParams": ".runtime",
    "RequestOutput": ".runtime",
    "SpeculativeConfig": ".runtime",
}

__all__ = [
    "LLM",
    "Engine",
    "Export",
    "Recipe",
    "RequestOutput",
    "SamplingParams",
    "SpeculativeConfig",
    "__version__",
    "calibrate",
    "compile",
    "distill",
    "export_model",
    "load",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name], __name__), name)
    raise AttributeError(f"module 'camshaft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
