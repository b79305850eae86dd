"""What the emitters (FX graph to another graph format, node by node from a table) have in common."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any


class UnsupportedError(Exception):
    """An operator, or these arguments or dtypes of it, that a table does not have; the message says which."""


def call_emitter(name: str, emitter: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls the emitter of an operator. Raises UnsupportedError where it does not take these arguments."""
    try:
        bound = inspect.signature(emitter).bind(*args, **kwargs)
    except TypeError as error:
        raise UnsupportedError(f"operator {name} with these arguments ({error})") from error
    return emitter(*bound.args, **bound.kwargs)


def reduce_dims(shape: Sequence[Any], dim: int | Sequence[int] | None) -> list[int]:
    """The dimensions of a reduction as a list; all of them for None or an empty list."""
    if dim is None or (isinstance(dim, Sequence) and not dim):
        return list(range(len(shape)))
    return [dim] if isinstance(dim, int) else list(dim)


def each_name(emitter: Callable[..., Any], *names: str) -> dict[str, Callable[..., Any]]:
    """Table entries of one emitter for several operators of aten."""
    return {f"aten.{name}": emitter for name in names}
