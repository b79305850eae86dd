"""Launching attention kernels, or only compiling them: several at once, for launches that are still to come.

A kernel is compiled for each number of splits, so a server's captured steps need a dozen. One after another they take longer than
everything else of a start on a machine whose Triton cache is empty.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from triton import AsyncCompileMode

_compiles_only: ContextVar[bool] = ContextVar("compiles_only", default=False)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """`kernel[grid](*args, **options)`; inside of `compiling` the kernel is compiled for these arguments, and not run."""
    kernel.run(*args, grid=grid, warmup=_compiles_only.get(), **options)


@contextmanager
def compiling(threads: int = 8) -> Iterator[None]:
    """Inside, on this thread, `launch` hands kernels to threads that compile them; at the end all are compiled.

    Tensors that the kernels would have filled hold anything. A kernel that does not compile says so when it is launched.
    """
    token = _compiles_only.set(True)
    try:
        with ThreadPoolExecutor(threads) as pool, AsyncCompileMode(pool, ignore_errors=True):
            yield
    finally:
        _compiles_only.reset(token)
