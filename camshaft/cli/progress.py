"""The progress bar of commands that do not go through `camshaft.compile`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Report = Callable[[str, int, int], None]


@contextmanager
def progress_bar() -> Iterator[Report]:
    """A function (what, done, total) that draws a bar on stderr where that is a terminal, and else does nothing."""
    from ..api import progress_bar as bar

    with bar(None) as report:
        yield report if report is not None else _ignore


def _ignore(what: str, done: int, total: int) -> None:
    pass
