"""Work that is the same in every step of a training: on a GPU it is captured into a CUDA graph, which is replayed from then on.

A step of a small model is thousands of short kernels, for which the host takes longer than the GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class Captured(Generic[Result]):
    """A function without arguments that reads and writes the same tensors in every call; see the module.

    name: what it is, for a warning. warmup: calls that run kernel by kernel first: kernels are compiled, libraries allocate their
    workspaces, an optimizer its moments. What cannot be captured, because an operator asks the GPU for a number, goes on like that.
    A result is overwritten by the next call. replays: whether calls are replayed by now.
    """

    def __init__(self, name: str, function: Callable[[], Result], device: torch.device, warmup: int) -> None:
        self._name = name
        self._function = function
        self._calls_before = warmup if device.type == "cuda" else -1
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Result | None = None

    @property
    def replays(self) -> bool:
        """See the class."""
        return self._graph is not None

    def __call__(self) -> Result:
        if self._graph is None and self._calls_before == 0:
            self._capture()
        if self._graph is None:
            self._calls_before -= 1
            return self._function()
        self._graph.replay()
        return self._result  # type: ignore[return-value]

    def _capture(self) -> None:
        """Records the function, which runs nothing."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._result = self._function()
        except RuntimeError as error:
            logger.warning("%s cannot be captured, and runs kernel by kernel: %s", self._name, error)
            return
        self._graph = graph
