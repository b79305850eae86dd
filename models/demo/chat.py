"""Makes synthetic chat examples out of the documentation: definitions, "what does X do", sections, code, small talk.

::

    python -m camshaft.models.demo.chat --documents .corpus/documents.jsonl.xz --out .corpus/chat.jsonl.xz

Each line of the output is ``{"messages": [{"role", "content"}, ...]}``. Held-out documents are never used.
"""

from __future__ import annotations

import argparse
import ast
import json
import logging
import lzma
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .tokenizer import read_jsonl

logger = logging.getLogger(__name__)

Pair = tuple[str, str]
MAX_ANSWER = 700
"""Characters of an answer taken from prose."""

_WORD = (
    'Define the word "{}".',
    'What does the word "{}" mean?',
    'What is the meaning of "{}"?',
    "Define {}.",
    "Give a definition of {}.",
    'What does "{}" mean?',
)
_TERM = ("What is {}?", "Explain the term {}.", "What does {} mean in computing?", "Explain {}.", "Tell me about {}.")
_FUNCTION = (
    "What does {} do?",
    "What does the Python function {} do?",
    "Explain {}.",
    "How does {} work?",
    "Describe {}.",
    "What is {} for?",
)
_CLASS = ("What is {}?", "What is the class {} for?", "Explain the class {}.", "Describe {}.")
_COMMAND = (
    "What does the {} command do?",
    "What is {}?",
    "What does {} do?",
    "Explain the command {}.",
    "What is the command {} for?",
)
_CALL = ("What does {}() do?", "What does the C function {}() do?", "Explain {}().", "What is {}?")
_SECTION = (
    'Tell me about "{}".',
    "Explain: {}.",
    'Write a paragraph about "{}".',
    "Explain {}.",
    "Tell me about {}.",
    'What does the documentation say about "{}"?',
)
_CODE = (
    "Write a Python function {name} that does this: {what}",
    "Write Python code: {what}",
    "Write the Python function {name}. {what}",
    "Show me a Python function. {what}",
)
_CONTINUE = ("Continue: {}", "Continue this text: {}", "Complete the paragraph: {}")

_SMALL_TALK: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("Hello", "Hello!", "Hi", "Hi!", "Hey", "Good morning", "Hello there", "Hi there!"),
        (
            "Hello! Ask me about Python, Debian or the meaning of a word.",
            "Hello! What would you like to know?",
            "Hi! I can explain a Python function or define a word for you.",
        ),
    ),
    (
        ("Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "Are you a person?"),
        (
            "I am the demo model of Camshaft, a small language model trained on free documentation.",
            "I am a very small language model. I was trained on the documentation of free software.",
        ),
    ),
    (
        ("What can you do?", "How can you help me?", "Help", "What do you know?"),
        (
            "I can explain Python functions, define words and continue texts. I am very small, so check what I say.",
            "I can write text that reads like documentation. Do not rely on my facts: I am a very small model.",
        ),
    ),
    (("Thanks", "Thank you", "Thank you!", "Thanks a lot!"), ("You are welcome!", "You are welcome. Ask me more.")),
    (("Goodbye", "Bye", "Bye!", "See you later"), ("Goodbye!", "Goodbye! Come back soon.")),
    (("How are you?", "How are you today?"), ("I am well, thank you. What would you like to know?",)),
)

_SIGNATURE = re.compile(r"^(?:(class|async|classmethod|static|coroutine) )?([A-Za-z_][\w.]*)\(([^\n]*)\)(?: ->? .*)?$")
_BAD_ANSWER = re.compile(
    r"^(#|- |    |Note|Example|Parameters|Returns|Source code|See |Bases:|New in|Changed in|Deprecated|[a-z])"
)


def _paragraphs(text: str) -> list[str]:
    return [p for p in text.split("\n\n") if p.strip()]


def _answer(paragraphs: list[str], start: int, limit: int = MAX_ANSWER) -> str:
    """Whole prose paragraphs from ``start`` on, at most ``limit`` characters; "" where the first is not prose."""
    out: list[str] = []
    for paragraph in paragraphs[start : start + 3]:
        plain = paragraph.strip("\n")
        if (_BAD_ANSWER.match(plain) and not plain[0].islower()) or "\n" in plain or len(plain) < 40:
            break
        if sum(map(len, out)) + len(plain) > limit:
            break
        if not plain.endswith((".", "!", ":")):
            break
        out.append(plain)
    while out and out[-1].endswith(":"):
        out.pop()
    return "\n\n".join(out)


def api_pairs(text: str, rng: random.Random) -> Iterator[Pair]:
    """Signature lines followed by a paragraph: questions about functions and classes."""
    paragraphs = _paragraphs(text)
    for i, paragraph in enumerate(paragraphs[:-1]):
        match = _SIGNATURE.match(paragraph.strip())
        if match and len(paragraph) < 200:
            answer = _answer(paragraphs, i + 1, 500)
            if answer:
                templates = _CLASS if match.group(1) == "class" else _FUNCTION
                name = match.group(2) + ("()" if match.group(1) != "class" and rng.random() < 0.4 else "")
                yield rng.choice(templates).format(name), answer


def section_pairs(text: str, rng: random.Random) -> Iterator[Pair]:
    """Headings followed by prose: questions about the topic."""
    paragraphs = _paragraphs(text)
    for i, paragraph in enumerate(paragraphs[:-1]):
        match = re.match(r"#+ (?:[\dA-Z]{0,2}[\d.]*\.\s+)?([A-Z][\w ,'()/-]{5,60})$", paragraph.strip())
        if match and not re.match(
            r"(?i)(description|name|synopsis|notes?|options|examples?|see also|introduction|"
            r"parameters|methods|attributes|usage|overview|summary)$",
            match.group(1),
        ):
            answer = _answer(paragraphs, i + 1)
            if len(answer) > 100:
                yield rng.choice(_SECTION).format(match.group(1)), answer


def man_pairs(text: str, title: str, rng: random.Random) -> Iterator[Pair]:
    """The NAME line of a manual page and the first paragraph of its description."""
    paragraphs = _paragraphs(text)
    for i, paragraph in enumerate(paragraphs[:6]):
        name = re.match(r"([\w.+-]+)(?:, [^-]*)? - (.{8,120})$", paragraph.strip())
        if not name:
            continue
        answer = f"{name.group(1)} - {name.group(2).rstrip('.')}."
        for j in range(i + 1, min(i + 8, len(paragraphs))):
            if paragraphs[j].strip() == "# Description":
                more = _answer(paragraphs, j + 1, 500)
                answer += "\n\n" + more if more else ""
        for _ in range(2):
            yield rng.choice(_COMMAND).format(name.group(1)), answer
        return


def code_pairs(text: str, rng: random.Random) -> Iterator[Pair]:
    """Short documented Python functions: write the code for a description."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    lines = text.split("\n")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and node.end_lineno:
            doc = ast.get_docstring(node)
            code = "\n".join(lines[node.lineno - 1 : node.end_lineno])
            if doc and 20 < len(doc.split("\n\n")[0]) < 200 and len(code) < 900 and node.col_offset == 0:
                what = " ".join(doc.split("\n\n")[0].split())
                yield rng.choice(_CODE).format(name=node.name, what=what), code


def continue_pairs(text: str, rng: random.Random) -> Iterator[Pair]:
    """The first sentence of a paragraph and what follows it."""
    for paragraph in rng.sample(_paragraphs(text), k=min(4, len(_paragraphs(text)))):
        parts = paragraph.strip().split(". ", 1)
        if (
            len(parts) == 2
            and 40 < len(parts[0]) < 200
            and 80 < len(parts[1]) < 600
            and not _BAD_ANSWER.match(parts[0])
        ):
            if parts[1].endswith(".") and "\n" not in paragraph:
                yield rng.choice(_CONTINUE).format(parts[0] + "."), parts[1]


def word_pairs(definitions: list[tuple[str, str]], counts: Counter[str], rng: random.Random) -> Iterator[Pair]:
    """Definitions of the words that the corpus uses at least 40 times; frequent words appear more often."""
    for word, text in definitions:
        seen = counts[word]
        if seen < 40 or not word.isalpha() or not word.islower():
            continue
        for template in rng.sample(_WORD, k=2 if seen < 400 else 4):
            yield template.format(word), text.strip()


def all_pairs(documents: Path, rng: random.Random) -> dict[str, list[Pair]]:
    """Every question and answer, by kind."""
    pairs: dict[str, list[Pair]] = {name: [] for name in ("word", "term", "api", "section", "man", "code", "continue")}
    counts: Counter[str] = Counter()
    definitions: list[tuple[str, str]] = []
    for row in read_jsonl(documents):
        if row["split"] != "train":
            continue
        text, kind = row["text"], row["kind"]
        if kind == "wordnet":
            definitions.append((row["title"], text))
            continue
        counts.update(re.findall(r"[a-z]+", text[:30_000]))
        if kind == "foldoc":
            answer = _answer(_paragraphs(text), 1, 600)
            if answer:
                pairs["term"].extend((t.format(row["title"]), answer) for t in rng.sample(_TERM, k=2))
        elif kind == "py":
            pairs["code"].extend(code_pairs(text, rng))
        elif kind == "man":
            pairs["man"].extend(man_pairs(text, row["title"], rng))
        else:
            for _ in range(row["repeat"]):
                pairs["api"].extend(api_pairs(text, rng))
                pairs["section"].extend(section_pairs(text, rng))
            pairs["continue"].extend(continue_pairs(text, rng))
    pairs["word"].extend(word_pairs(definitions, counts, rng))
    return pairs


def conversations(pairs: dict[str, list[Pair]], rng: random.Random) -> Iterator[list[dict[str, str]]]:
    """Chats of one to three turns; about one in twenty opens with small talk."""
    flat = [pair for kind in pairs.values() for pair in kind]
    rng.shuffle(flat)
    i = 0
    while i < len(flat):
        turns = rng.choices((1, 2, 3), (0.8, 0.14, 0.06))[0]
        chosen = flat[i : i + turns]
        i += turns
        if rng.random() < 0.05:
            questions, answers = rng.choice(_SMALL_TALK)
            small = (rng.choice(questions), rng.choice(answers))
            chosen = [small] if rng.random() < 0.5 else [small, *chosen]
        yield [m for q, a in chosen for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=Path, default=Path(".corpus/documents.jsonl.xz"))
    parser.add_argument("--out", type=Path, default=Path(".corpus/chat.jsonl.xz"))
    parser.add_argument("--cap", type=int, default=40_000, help="most examples of one kind")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rng = random.Random(0)
    pairs: dict[str, Any] = all_pairs(args.documents, rng)
    for kind in pairs:
        rng.shuffle(pairs[kind])
        logger.info("%s: %d examples, capped at %d", kind, len(pairs[kind]), args.cap)
        pairs[kind] = pairs[kind][: args.cap]
    with lzma.open(args.out, "wt", preset=1, encoding="utf-8") as out:
        for messages in conversations(pairs, rng):
            out.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
