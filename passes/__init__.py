"""Optimization passes: one file per rewrite, one written pipeline, one manager."""

from __future__ import annotations

from ..graph import ops as _ops  # noqa: F401  registers camshaft::*, which the passes match
