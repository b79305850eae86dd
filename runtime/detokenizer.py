"""Tokens to text while they arrive: whole characters only, and stop strings wherever token borders fall.

    token ids --TextStream--> text --StopMatcher--> text that is safe to show
               holds back the            holds back what may be the
               bytes of half a           beginning of a stop string
               character

Whatever is held back comes out at the end: the pieces joined are exactly what decoding all tokens at once gives.
Most decoders are strings of bytes (byte-level BPE) or of pieces with single bytes between (SentencePiece with byte
fallback); these are streamed from a table, at about a microsecond per token. Any other goes through a short window of
tokens that is decoded twice.
"""

from __future__ import annotations

import codecs
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from .tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
_WINDOW = 6
"""Tokens of context with which the general stream decodes new ones."""


class TextStream(ABC):
    """Text of one sequence of tokens, delivered in pieces."""

    @abstractmethod
    def push(self, token_id: int) -> str:
        """Text that has become certain with this token, perhaps ""."""

    @abstractmethod
    def flush(self) -> str:
        """The text still held back; the stream ends with it."""


class StreamFactory:
    """Makes the streams of one tokenizer, which share its table of tokens.

    Args:
        tokenizer: the tokenizer.
        skip_special_tokens: leave special tokens out, as in `Tokenizer.decode`.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._kind, self._strips = _decoder_kind(tokenizer)
        self._bytes = _ByteTable(self)
        self._pieces = _PieceTable(self)

    def make(self) -> TextStream:
        """A stream for a new sequence."""
        if self._kind == "byte_level":
            return _ByteLevelStream(self._bytes)
        if self._kind == "byte_fallback":
            return _ByteFallbackStream(self._pieces, self._strips)
        return _WindowStream(self._tokenizer, self._skip_special_tokens, self._skipped)

    def token_text(self, token_id: int) -> str:
        """The vocabulary's spelling, "" for tokens that leave no text."""
        if token_id in self._skipped:
            return ""
        return self._tokenizer.id_to_token(token_id) or ""


def _decoder_kind(tokenizer: Tokenizer) -> tuple[str, bool]:
    """("byte_level" | "byte_fallback" | "other", whether one leading space is stripped)."""
    decoder = tokenizer.backend.decoder
    if decoder is None:
        return "other", False
    spec: dict[str, Any] = json.loads(decoder.__getstate__())
    parts = spec["decoders"] if spec["type"] == "Sequence" else [spec]
    types = [part["type"] for part in parts]
    if types == ["ByteLevel"]:
        return "byte_level", False
    marker = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    if types[:3] == ["Replace", "ByteFallback", "Fuse"] and parts[0] == marker and parts[3:] in ([], [strip]):
        return "byte_fallback", len(parts) == 4
    return "other", False


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE writes for the 256 bytes: most for themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {**{chr(b): b for b in printable}, **{chr(0x100 + n): b for n, b in enumerate(others)}}


class _ByteTable(dict[int, bytes]):
    """Token id -> bytes of a byte-level token, filled on demand."""

    def __init__(self, factory: StreamFactory) -> None:
        super().__init__()
        self._factory = factory
        self._alphabet = _byte_alphabet()

    def __missing__(self, token_id: int) -> bytes:
        text = self._factory.token_text(token_id)
        try:
            value = bytes(self._alphabet[char] for char in text)
        except KeyError:  # an added token, whose text stands for itself
            value = text.encode()
        self[token_id] = value
        return value


class _PieceTable(dict[int, "str | int"]):
    """Token id -> text of a SentencePiece token, or the byte that it stands for."""

    def __init__(self, factory: StreamFactory) -> None:
        super().__init__()
        self._factory = factory

    def __missing__(self, token_id: int) -> str | int:
        text = self._factory.token_text(token_id).replace("▁", " ")
        byte = _byte_value(text)
        value = text if byte is None else byte
        self[token_id] = value
        return value


def _byte_value(token: str) -> int | None:
    """0xAB of "<0xAB>", None for any other token."""
    if len(token) != 6 or not token.startswith("<0x") or not token.endswith(">"):
        return None
    digits = token[3:5]
    return int(digits, 16) if all(c in "0123456789abcdefABCDEF" for c in digits) else None


class _ByteLevelStream(TextStream):
    """The bytes of all tokens in a row, decoded as UTF-8."""

    def __init__(self, table: _ByteTable) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._table[token_id])

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _ByteFallbackStream(TextStream):
    """Pieces of text with runs of single bytes between.

    A run that is not UTF-8 as a whole becomes one U+FFFD per byte, so a run is held back until it ends.
    """

    def __init__(self, table: _PieceTable, strips: bool) -> None:
        self._table = table
        self._run = bytearray()
        self._strips = strips

    def push(self, token_id: int) -> str:
        piece = self._table[token_id]
        if isinstance(piece, int):
            self._run.append(piece)
            return ""
        return self._emit(self._end_run() + piece) if piece else ""

    def flush(self) -> str:
        return self._emit(self._end_run())

    def _end_run(self) -> str:
        if not self._run:
            return ""
        run, self._run = bytes(self._run), bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return REPLACEMENT * len(run)

    def _emit(self, text: str) -> str:
        if self._strips and text:
            self._strips = False
            return text.removeprefix(" ")
        return text


class _WindowStream(TextStream):
    """Any decoder: the new tokens are decoded together with a few before them, and the difference is the new text.

    text of ids:   | emitted ............ |
                        | context ....... | new |       decode(context + new) - decode(context)
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, skipped: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._skipped = skipped
        self._ids: list[int] = []
        self._window = 0
        self._read = 0
        self._context = ""
        self._emitted: list[str] = []

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        self._ids.append(token_id)
        if _byte_value(self._tokenizer.id_to_token(token_id) or "") is not None:
            return ""
        text = self._decode(self._ids[self._window :])
        if len(text) <= len(self._context) or text.endswith(REPLACEMENT):
            return ""
        new = text[len(self._context) :]
        self._read = len(self._ids)
        self._window = max(self._window, self._read - _WINDOW)
        self._context = self._decode(self._ids[self._window :])
        self._emitted.append(new)
        return new

    def flush(self) -> str:
        emitted, text = "".join(self._emitted), self._decode(self._ids)
        return text[len(emitted) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special_tokens)


class StopMatcher:
    """Finds the first of some stop strings in text that comes in pieces.

    Text is released as soon as it cannot be part of a stop string any more. The result does not depend on how the text
    is cut into pieces: the stop string that is complete first wins, among those ending together the longest.
    """

    def __init__(self, stops: Sequence[str], *, include: bool) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._longest = max((len(s) for s in stops), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """(text to release, the stop string that was found or None); after a find nothing more may be pushed."""
        if not self._stops:
            return text, None
        buffer = self._held + text
        found: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = buffer.find(stop)
            if start >= 0:
                candidate = (start + len(stop), start, stop)
                found = candidate if found is None else min(found, candidate)
        if found is not None:
            self._held = ""
            end, start, stop = found
            return buffer[: end if self._include else start], stop
        keep = self._partial(buffer)
        self._held = buffer[len(buffer) - keep :]
        return buffer[: len(buffer) - keep], None

    def flush(self) -> str:
        """The text held back, which turned out to be no stop string."""
        held, self._held = self._held, ""
        return held

    def _partial(self, buffer: str) -> int:
        """Length of the longest end of `buffer` that begins a stop string."""
        for length in range(min(self._longest - 1, len(buffer)), 0, -1):
            tail = buffer[len(buffer) - length :]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0


class Detokenizer:
    """Text of one request's output, as it grows.

    Args:
        stream: text of the tokens.
        stops: stop strings.
        include_stop: whether the text keeps the stop string.
        min_tokens: tokens that come before stop strings are looked for.

    Attributes:
        stop: the stop string found, None until then.
    """

    def __init__(
        self, stream: TextStream, stops: Sequence[str] = (), *, include_stop: bool = False, min_tokens: int = 0
    ) -> None:
        self.stop: str | None = None
        self._stream = stream
        self._stops = tuple(stops)
        self._matcher = StopMatcher(stops, include=include_stop)
        self._num_unchecked = min_tokens
        self._parts: list[str] = []

    @property
    def text(self) -> str:
        """All text released so far."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    @text.setter
    def text(self, text: str) -> None:
        """Puts a text in place of all pushes, for outputs that are decoded only at their end."""
        self._parts = [text]

    def push(self, token_ids: Sequence[int]) -> tuple[str, int]:
        """(new text, number of tokens taken); fewer are taken than given only if `stop` was found in their midst."""
        if not self._stops:
            push = self._stream.push
            return self._keep("".join([push(token_id) for token_id in token_ids])), len(token_ids)
        released: list[str] = []
        taken = 0
        for token_id in token_ids:
            taken += 1
            text = self._stream.push(token_id)
            if self._num_unchecked > 0:
                self._num_unchecked -= 1
            elif text:
                text, self.stop = self._matcher.push(text)
            released.append(text)
            if self.stop is not None:
                break
        return self._keep("".join(released)), taken

    def flush(self) -> str:
        """The text held back at the end of the output; it may complete a stop string, which is then cut."""
        if self.stop is not None:
            return ""
        tail = self._stream.flush()
        if self._num_unchecked > 0:
            return self._keep(tail)
        text, self.stop = self._matcher.push(tail)
        return self._keep(text if self.stop is not None else text + self._matcher.flush())

    def _keep(self, text: str) -> str:
        if text:
            self._parts.append(text)
        return text
