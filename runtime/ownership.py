"""One engine, one LLM: an engine has one KV cache, and a second LLM's blocks would overwrite the first one's."""

from __future__ import annotations

import gc
import threading

from .batch import Engine

_CLAIM = "serving_claim"
"""The engine's attribute that holds the claim; a wrapper around an engine has to pass it on in both directions."""
_lock = threading.RLock()  # the garbage collector may call `release` inside `_take`


class EngineClaim:
    """Says that an engine is in use, until `release`.

    Raises:
        ValueError: the engine is in use already.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        if not self._take():
            gc.collect()  # an LLM that nobody refers to any more may be waiting for the garbage collector
            if not self._take():
                raise ValueError(
                    "the engine serves another LLM, whose KV cache this one would overwrite; shut that one down first "
                    "(llm.shutdown(), or `with LLM(...)`), or load the engine a second time"
                )

    @property
    def held(self) -> bool:
        """Whether the engine is still in use by whoever made this claim."""
        return getattr(self._engine, _CLAIM, None) is self

    def release(self) -> None:
        """Lets others use the engine; harmless when called again, whoever uses it by then."""
        with _lock:
            if self.held:
                setattr(self._engine, _CLAIM, None)

    def _take(self) -> bool:
        with _lock:
            if getattr(self._engine, _CLAIM, None) is None:
                setattr(self._engine, _CLAIM, self)
        return self.held
