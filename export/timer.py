"""Wall time of a build's phases."""

from __future__ import annotations

import time
from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""(what, done, total); total 0: not known."""


class Timer:
    """Wall time of each phase, in seconds, told to a progress function."""

    def __init__(self, progress: Progress | None) -> None:
        self.seconds: dict[str, float] = {}
        self.progress = progress
        self._name: str | None = None
        self._start = 0.0

    def begin(self, name: str) -> None:
        """Ends the phase that runs and begins another."""
        self.end()
        self._name, self._start = name, time.perf_counter()
        if self.progress is not None:
            self.progress(name, 0, 0)

    def end(self) -> None:
        """Ends the phase that runs."""
        if self._name is not None:
            self.seconds[self._name] = round(time.perf_counter() - self._start, 4)
            self._name = None
