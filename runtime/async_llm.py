"""The thread that steps the core, and the handles through which any other thread or event loop follows a request.

caller's thread / event loop                serving thread
----------------------------                ---------------------------------------
submit(operation) ------- inbox ----------> operation(); core.step(); core.step() ...
handle <------ increments, result --------- after each step: one wake-up per event loop
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import Future

from .core import ServingCore
from .outputs import RequestOutput

logger = logging.getLogger(__name__)


class RequestHandle:
    """A request under way. Follow it in one of these ways:

        async for output in handle: ...     what is new, while it comes; leaving the loop early aborts the request
        for output in handle: ...           the same without asyncio
        output = await handle               the whole result
        output = handle.result()            the whole result, without asyncio

    All of them raise what went wrong. Iterating yields increments only if the handle was made for streaming. With `on_output`
    every increment is given to that function on the serving thread, and none is kept for iterating; if the function raises,
    the request ends with that error.
    """

    def __init__(
        self,
        request_id: str,
        serving: ServingThread,
        *,
        wants_increments: bool,
        on_output: Callable[[RequestOutput], None] | None = None,
    ) -> None:
        self.request_id = request_id
        self.wants_increments = wants_increments
        self._on_output = on_output
        self._serving = serving
        self._items: deque[RequestOutput] = deque()
        self._future: Future[RequestOutput] = Future()
        self._arrived = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_arrived: asyncio.Event | None = None

    @property
    def done(self) -> bool:
        """Whether the request has ended, well or not."""
        return self._future.done()

    def result(self, timeout_s: float | None = None) -> RequestOutput:
        """The whole result, waiting for it; raises TimeoutError, or the error that ended the request."""
        return self._future.result(timeout_s)

    def exception(self, timeout_s: float | None = None) -> Exception | None:
        """The error that ended the request, None if it ended well; waits for its end."""
        error = self._future.exception(timeout_s)
        assert error is None or isinstance(error, Exception)
        return error

    def abort(self) -> None:
        """Ends the request with what it has (finish reason "abort"); harmless after its end."""
        if not self.done:
            self._serving.abort(self.request_id)

    def __await__(self) -> Generator[object, None, RequestOutput]:
        return asyncio.shield(asyncio.wrap_future(self._future)).__await__()

    def __aiter__(self) -> AsyncIterator[RequestOutput]:
        return self._stream()

    async def _stream(self) -> AsyncGenerator[RequestOutput, None]:
        self._loop = asyncio.get_running_loop()
        self._loop_arrived = asyncio.Event()
        try:
            while True:
                self._loop_arrived.clear()
                done = self.done  # before the items: the last of them come before the end
                while self._items:
                    yield self._items.popleft()
                if done:
                    self.result()
                    return
                await self._loop_arrived.wait()
        finally:
            self.abort()

    def __iter__(self) -> Iterator[RequestOutput]:
        try:
            while True:
                self._arrived.clear()
                done = self.done
                while self._items:
                    yield self._items.popleft()
                if done:
                    self.result()
                    return
                self._arrived.wait()
        finally:
            self.abort()

    # --- the sink of a generation: called on the serving thread --------------------------------------------------

    def increment(self, output: RequestOutput) -> None:
        """Takes what is new."""
        if self._on_output is None:
            self._items.append(output)
            self._wake()
        elif not self.done:
            self._call(self._on_output, output)

    def finish(self, output: RequestOutput) -> None:
        """Takes the whole result."""
        if not self.done:  # otherwise `on_output` raised before
            self._future.set_result(output)
            self._wake()

    def fail(self, error: Exception) -> None:
        """Takes the error that ended the request."""
        if not self.done:
            self._future.set_exception(error)
            self._wake()

    def _call(self, on_output: Callable[[RequestOutput], None], output: RequestOutput) -> None:
        try:
            on_output(output)
        except Exception as error:  # the user's code: it ends its own request, and nobody else's
            self.fail(error)
            self._serving.abort(self.request_id)

    def _wake(self) -> None:
        self._arrived.set()
        if self._loop is not None:
            self._serving.wake_later(self._loop, self)

    def wake_now(self) -> None:
        """Wakes the coroutine that iterates; called on its event loop."""
        if self._loop_arrived is not None:
            self._loop_arrived.set()


def _wake_all(handles: list[RequestHandle]) -> None:
    for handle in handles:
        handle.wake_now()


class ServingThread:
    """Steps a core for as long as it has work, and runs operations between steps.

    The thread starts with the first operation and sleeps while there is nothing to do.
    """

    def __init__(self, core: ServingCore) -> None:
        self._core = core
        self._inbox: deque[Callable[[], None]] = deque()
        self._wanted = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None
        self._sleepers: dict[asyncio.AbstractEventLoop, list[RequestHandle]] = {}
        self.num_tokens = 0
        """Tokens computed since the start."""

    def submit(self, operation: Callable[[], None]) -> None:
        """Has the thread run `operation` before its next step; it must not raise.

        Raises:
            RuntimeError: after `close`.
        """
        with self._wanted:
            if self._closing:
                raise RuntimeError("this LLM was shut down; make a new one")
            self._inbox.append(operation)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="camshaft-serving", daemon=True)
                self._thread.start()
            self._wanted.notify()

    def abort(self, request_id: str) -> None:
        """Ends a request before the next step; harmless for an unknown one and after `close`."""
        with self._wanted:
            if not self._closing:
                self._inbox.append(lambda: self._abort_now(request_id))
                self._wanted.notify()

    def close(self) -> None:
        """Aborts what is under way, ends the thread and waits for it."""
        with self._wanted:
            self._closing = True
            self._wanted.notify()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def wake_later(self, loop: asyncio.AbstractEventLoop, handle: RequestHandle) -> None:
        """Wakes a handle's coroutine after this step; for the serving thread."""
        self._sleepers.setdefault(loop, []).append(handle)

    def _run(self) -> None:
        while True:
            with self._wanted:
                while not (self._inbox or self._closing or self._core.has_work):
                    self._wanted.wait()
                operations = list(self._inbox)
                self._inbox.clear()
                closing = self._closing
            self._work(operations, closing)
            self._wake_sleepers()
            if closing:
                return

    def _work(self, operations: list[Callable[[], None]], closing: bool) -> None:
        try:
            for operation in operations:
                operation()
            if closing:
                self._core.fail_all(RuntimeError("the LLM was shut down before this request ended"))
            else:
                self.num_tokens += self._core.step()
        except Exception as error:  # a bug of ours: nobody may wait for ever, and nothing more can be trusted
            logger.exception("the serving loop failed")
            with self._wanted:
                self._closing = True
            failure = RuntimeError(f"the serving loop failed: {type(error).__name__}: {error}; this LLM is shut down")
            failure.__cause__ = error
            self._core.fail_all(failure)

    def _abort_now(self, request_id: str) -> None:
        self._core.abort(request_id)

    def _wake_sleepers(self) -> None:
        sleepers, self._sleepers = self._sleepers, {}
        for loop, handles in sleepers.items():
            try:
                loop.call_soon_threadsafe(_wake_all, handles)
            except RuntimeError:  # the event loop was closed: nobody listens to these any more
                for handle in handles:
                    self._core.abort(handle.request_id)
