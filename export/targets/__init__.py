"""Lowering targets: what turns a segment into something fast, behind one interface."""

from __future__ import annotations

from .base import Bound, Lowered, LoweringError, Target, available_targets, get_target

__all__ = ["Bound", "Lowered", "LoweringError", "Target", "available_targets", "get_target"]
