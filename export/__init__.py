"""Lowering targets, the engine, and the artifact on disk."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Engine": ".engine",
    "load_engine": ".artifact",
    "is_artifact": ".artifact",
    "build_engine": ".build",
    "BuildRequest": ".build",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
