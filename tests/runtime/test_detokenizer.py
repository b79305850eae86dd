"""Text that streams equals text decoded at once, for every kind of tokenizer; stop strings at any token border."""

import random

import pytest
from camshaft.runtime.detokenizer import REPLACEMENT, Detokenizer, StopMatcher, StreamFactory
from camshaft.runtime.tokenizer import Tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from .small_tokenizers import KINDS, TEXT

TOKENIZERS = {name: Tokenizer(make()) for name, make in KINDS.items()}
FACTORIES = {
    (name, skip): StreamFactory(tokenizer, skip_special_tokens=skip)
    for name, tokenizer in TOKENIZERS.items()
    for skip in (True, False)
}
EXPECTED_KINDS = {"byte_level": "byte_level", "word_piece": "other"}


def stream(name, ids, skip=True):
    text_stream = FACTORIES[name, skip].make()
    return [text_stream.push(i) for i in ids] + [text_stream.flush()]


@pytest.mark.parametrize("name", KINDS)
def test_kinds_are_recognised(name):
    assert FACTORIES[name, True]._kind == EXPECTED_KINDS.get(name, "byte_fallback")


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_ids_stream_to_their_text(name, skip, data):
    """Random ids, ids beyond the vocabulary and broken UTF-8 included."""
    size = TOKENIZERS[name].vocab_size
    ids = data.draw(st.lists(st.integers(0, size + 2), max_size=30))
    assert "".join(stream(name, ids, skip)) == TOKENIZERS[name].decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback", "byte_fallback_unstripped"])
@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_unicode_never_comes_in_halves(name, text):
    ids = TOKENIZERS[name].encode(text)
    pieces = stream(name, ids)
    assert "".join(pieces) == TOKENIZERS[name].decode(ids)
    if REPLACEMENT not in text:
        assert all(REPLACEMENT not in piece for piece in pieces)


@pytest.mark.parametrize("name", ["byte_fallback", "byte_level"])
def test_the_general_stream_agrees_on_real_text(name):
    tokenizer = TOKENIZERS[name]
    factory = StreamFactory(tokenizer, skip_special_tokens=True)
    factory._kind = "other"
    for text in [*TEXT, "🙂🙂 a🙂b  c"]:
        ids = tokenizer.encode(text)
        text_stream = factory.make()
        pieces = [text_stream.push(i) for i in ids]
        assert all(REPLACEMENT not in piece for piece in pieces)
        assert sum(map(bool, pieces)) > len(text) / 8
        assert "".join(pieces) + text_stream.flush() == tokenizer.decode(ids)


def test_text_comes_early():
    pieces = stream("byte_level", TOKENIZERS["byte_level"].encode("ab 🙂c"))
    assert [p for p in pieces if p] == ["a", "b", " ", "🙂", "c"]
    pieces = stream("byte_fallback", TOKENIZERS["byte_fallback"].encode("the 🙂fox"))
    assert [p for p in pieces if p] == ["th", "e", " ", "🙂f", "ox"]


def first_stop(text, stops, include):
    """The rule, one character at a time."""
    for end in range(len(text) + 1):
        hits = [s for s in stops if text[:end].endswith(s)]
        if hits:
            stop = max(hits, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("abc", max_size=20),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 20), max_size=6),
    include=st.booleans(),
)
def test_stop_strings_do_not_depend_on_the_pieces(text, stops, cuts, include):
    matcher = StopMatcher(stops, include=include)
    borders = sorted({0, len(text), *(c for c in cuts if c <= len(text))})
    released, found = "", None
    for start, end in zip(borders, borders[1:]):
        new, found = matcher.push(text[start:end])
        released += new
        assert found or released == text[: len(released)]
        if found:
            break
    if not found:
        released += matcher.flush()
    assert (released, found) == first_stop(text, stops, include)


def test_held_text_is_no_longer_than_it_must_be():
    matcher = StopMatcher(["END", "\n\n"], include=False)
    assert matcher.push("xE") == ("x", None)
    assert matcher.push("Nx") == ("ENx", None)
    assert matcher.push("\n") == ("", None)
    assert matcher.push("E\n") == ("\nE", None)
    assert matcher.push("\nEND") == ("", "\n\n")


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
def test_detokenizer_cuts_at_stop_strings(name):
    tokenizer, factory = TOKENIZERS[name], FACTORIES[name, True]
    ids = tokenizer.encode("the quick 🙂 fox the end")
    detokenizer = Detokenizer(factory.make(), ["🙂 f"])
    taken = 0
    for token_id in ids:
        taken += detokenizer.push([token_id])[1]
        if detokenizer.stop:
            break
    assert (detokenizer.text, detokenizer.stop) == ("the quick ", "🙂 f") and taken < len(ids)
    at_once = Detokenizer(factory.make(), ["🙂 f"], include_stop=True)
    assert at_once.push(ids) == ("the quick 🙂 f", taken)
    late = Detokenizer(factory.make(), ["the"], min_tokens=5)
    assert late.push(ids)[1] < len(ids) and late.text == "the quick 🙂 fox "
    never = Detokenizer(factory.make(), ["fox the end!"])
    never.push(ids)
    never.flush()
    assert never.text == "the quick 🙂 fox the end" and never.stop is None


def test_stop_string_that_only_the_last_flush_completes():
    tokenizer, factory = TOKENIZERS["byte_fallback"], FACTORIES["byte_fallback", True]
    ids = tokenizer.encode("fox 🙂")
    detokenizer = Detokenizer(factory.make(), ["🙂"])
    detokenizer.push(ids)
    detokenizer.flush()
    assert (detokenizer.text, detokenizer.stop) == ("fox ", "🙂")


def test_random_bytes_in_random_pushes():
    rng = random.Random(0)
    for name in ("byte_level", "byte_fallback"):
        tokenizer = TOKENIZERS[name]
        for _ in range(50):
            ids = [rng.randrange(tokenizer.vocab_size) for _ in range(40)]
            detokenizer = Detokenizer(FACTORIES[name, True].make())
            position = 0
            while position < len(ids):
                step = rng.randint(1, 5)
                detokenizer.push(ids[position : position + step])
                position += step
            detokenizer.flush()
            assert detokenizer.text == tokenizer.decode(ids)
