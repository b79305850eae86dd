"""Registers operators of the namespace camshaft with PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIB = torch.library.Library("camshaft", "DEF")


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """An operator: its schema, the reference implementation that defines it, and its shape function."""
    name = schema.split("(")[0]
    _LIB.define(schema)
    _LIB.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"camshaft::{name}", fake, lib=_LIB)


def implement(name: str, implementation: Callable[..., Any], dispatch_key: str) -> None:
    """A faster implementation of an operator for one kind of device, such as "CUDA"."""
    _LIB.impl(name, implementation, dispatch_key)
