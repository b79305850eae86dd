"""The progress bar of `LLM.generate`, on stderr. rich is imported where a bar is shown."""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager


def progress_bar(total: int, show: bool | None) -> AbstractContextManager[Callable[[], None]]:
    """A context that gives a function to call once per finished prompt.

    show: whether there is a bar; None: if stderr is a terminal.
    """
    if show is False or (show is None and not sys.stderr.isatty()) or total == 0:
        return contextlib.nullcontext(lambda: None)
    return _rich_bar(total)


@contextmanager
def _rich_bar(total: int) -> Iterator[Callable[[], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
               TimeRemainingColumn())  # fmt: skip
    start = time.monotonic()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("prompts", total=total, rate="")
        done = itertools.count(1)

        def advance() -> None:
            rate = next(done) / max(time.monotonic() - start, 1e-9)
            bar.update(task, advance=1, rate=f"{rate:.1f}/s")

        yield advance
