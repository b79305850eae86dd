"""What the kernels' compiler raises, for code that must also run where Triton is not installed."""

from __future__ import annotations

import functools
import importlib.util


@functools.cache
def kernel_errors() -> tuple[type[Exception], ...]:
    """Triton's errors: a kernel that does not compile, or needs more than the GPU has. They are not RuntimeErrors.

    Empty where Triton is not installed.
    """
    if importlib.util.find_spec("triton") is None:
        return ()
    from triton.errors import TritonError

    return (TritonError,)


def and_kernel_errors(*errors: type[Exception]) -> tuple[type[Exception], ...]:
    """For an except clause: these and Triton's."""
    return (*errors, *kernel_errors())


def reason_of(error: Exception) -> str:
    """The first line of an error's message; of the compiler's errors, which begin with a place in the source, the last one too."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"{lines[0]} {lines[-1]}" if isinstance(error, kernel_errors()) and len(lines) > 1 else lines[0]
