"""Collects the demo model's text from Debian packages: download, unpack, convert, clean, deduplicate.

Run by a developer on a Debian machine with network (after ``apt-get update``), lxml installed::

    python -m camshaft.models.demo.corpus --scratch .corpus/scratch --out .corpus/documents.jsonl.xz

Each line of the output is ``{"source", "title", "kind", "repeat", "split", "text"}``; ``split`` is "heldout" for about
0.5 % of the documents, chosen by the hash of their text. ``<out>.sources.json`` lists packages, versions and licences.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import lzma
import multiprocessing
import re
import subprocess
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

from .converters import convert
from .sources import PAGES_TO_SKIP, SOURCES, Source

logger = logging.getLogger(__name__)

HELDOUT_PER_MILLE = 6
_ASCII = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2013": "-",
        "\u2014": "-",
        "\u2010": "-",
        "\u2011": "-",
        "\u2212": "-",
        "\u2026": "...",
        "\u00a0": " ",
        "\u2009": " ",
        "\u202f": " ",
        "\u200b": "",
        "\ufeff": "",
        "\u00ad": "",
        "\u00b6": "",
        "\u2022": "-",
        "\ufb01": "fi",
        "\ufb02": "fl",
        "\u2190": "<-",
        "\u2192": "->",
        "\u00bb": ">",
        "\u00ab": "<",
        "\u2062": "",
        "\ufffd": "",
        "\u00b7": "-",
        "\u00d7": "x",
    }
)
_GARBAGE_LINE = re.compile(
    r"(?i)^(#* ?)?(copyright|\(c\) |created using|built with|last (updated|modified)|show source|edit on|previous( topic)?$|"
    r"next( topic)?$|prev$|up$|home$|table of contents|contents:?$|index$|permalink|on this page|this page|quick search|"
    r"back to top|all rights reserved|see also:?$|\[?source\]?$|source code:? |navigation|go to the first|"
    r"\[ ?(prev|next|<|>)|download .*(jupyter|python source|zip)|-?\*- coding|vim:|click here|for (a )?deprecated)"
)


def clean(text: str, *, prose: bool) -> str:
    """Normalises a document: NFC, ASCII punctuation, no control characters, no garbage lines, single empty lines."""
    text = unicodedata.normalize("NFC", text).translate(_ASCII)
    text = "".join(c for c in text if c == "\n" or c.isprintable())
    lines: list[str] = []
    for line in text.split("\n"):
        line = line.rstrip()
        if line and (_GARBAGE_LINE.match(line.strip()) or re.search(r"\S{120,}", line)):
            continue
        if prose and line and not line.startswith("    ") and len(line) > 40 and _letters(line) < 0.45:
            continue
        if line or (lines and lines[-1]):
            lines.append(line)
    return "\n".join(lines).strip("\n") + "\n"


def _letters(text: str) -> float:
    return sum(c.isascii() and (c.isalpha() or c == " ") for c in text) / max(len(text), 1)


def is_readable(text: str, *, prose: bool) -> bool:
    """Whether a cleaned document is worth training on: long enough, mostly ASCII letters, not one long table."""
    if len(text) < 250:
        return False
    if sum(not c.isascii() for c in text) > 0.015 * len(text):
        return False
    letters = _letters(text)
    if not prose:
        return letters > 0.6
    lines = [line for line in text.split("\n") if line]
    long_lines = sum(len(line) for line in lines if len(line) > 60 and not line.startswith("    "))
    return letters > 0.68 and long_lines > 0.25 * len(text)


def _convert_one(job: tuple[Path, Source, Path]) -> list[tuple[str, str]]:
    path, source, mandoc = job
    prose = source.kind not in ("py", "docstrings")
    out = []
    for title, text in convert(path, source.kind, mandoc=mandoc):
        if source.kind == "wordnet":
            out.append((title, clean(text, prose=False)))
            continue
        text = clean(text, prose=prose)
        if is_readable(text, prose=prose) and len(text) < 600_000:
            out.append((title, text))
    return out


def _order(path: Path) -> str:
    return hashlib.sha256(path.name.encode()).hexdigest()


def collect(source: Source, tree: Path, mandoc: Path, pool: Any) -> list[tuple[str, str]]:
    """All (title, text) documents of one source, up to its cap, unique lines that repeat across pages removed."""
    root = tree / source.package
    include, exclude, skip = (re.compile(p) for p in (source.include, source.exclude, f"(?i){PAGES_TO_SKIP}"))
    paths = [p for p in root.rglob("*") if p.is_file() and not p.is_symlink()]
    chosen = []
    for path in paths:
        inner = str(path)[len(str(root)) :]
        if include.search(inner) and not exclude.search(inner) and not skip.search(inner):
            chosen.append(path)
    chosen.sort(key=_order)
    documents: list[tuple[str, str]] = []
    taken = 0
    for found in pool.imap(_convert_one, [(p, source, mandoc) for p in chosen], chunksize=8):
        if taken < source.cap_mb * 1e6:
            documents.extend(found)
            taken += sum(len(text) for _, text in found)
    if source.kind == "wordnet":
        return documents
    return _drop_boilerplate(documents)


def _drop_boilerplate(documents: list[tuple[str, str]]) -> list[tuple[str, str]]:
    counts: Counter[str] = Counter()
    for _, text in documents:
        counts.update({line for line in text.split("\n") if len(line) > 15})
    limit = max(12, 0.2 * len(documents))
    common = {line for line, count in counts.items() if count > limit}
    out = []
    for title, text in documents:
        kept = "\n".join(line for line in text.split("\n") if line not in common)
        out.append((title, re.sub(r"\n{3,}", "\n\n", kept).strip("\n") + "\n"))
    return out


class Deduplicator:
    """Drops documents seen before and paragraphs (120 characters and more) seen twice before."""

    def __init__(self) -> None:
        self._documents: set[bytes] = set()
        self._paragraphs: Counter[bytes] = Counter()

    def __call__(self, text: str) -> str:
        """The text without repeated paragraphs; "" for a repeated document."""
        key = hashlib.blake2b(re.sub(r"\W+", "", text).encode(), digest_size=16).digest()
        if key in self._documents:
            return ""
        self._documents.add(key)
        kept = []
        for paragraph in text.split("\n\n"):
            if len(paragraph) >= 120:
                digest = hashlib.blake2b(paragraph.encode(), digest_size=12).digest()
                self._paragraphs[digest] += 1
                if self._paragraphs[digest] > 2:
                    continue
            kept.append(paragraph)
        result = "\n\n".join(kept)
        return result if len(result) >= 250 else ""


def is_heldout(text: str) -> bool:
    """Split by document: true for ``HELDOUT_PER_MILLE`` of the texts, by their hash."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 1000 < HELDOUT_PER_MILLE


def unpack(scratch: Path) -> dict[str, str]:
    """Downloads and unpacks the packages that are missing under ``scratch``; returns package -> version."""
    debs, tree = scratch / "debs", scratch / "tree"
    debs.mkdir(parents=True, exist_ok=True)
    versions = {}
    for package in sorted({source.package for source in SOURCES} | {"mandoc"}):
        if not list(debs.glob(f"{package}_*.deb")):
            subprocess.run(["apt-get", "download", "-qq", package], cwd=debs, check=True)
        deb = next(debs.glob(f"{package}_*.deb"))
        versions[package] = deb.name.split("_")[1].replace("%3a", ":")
        if not (tree / package).exists():
            subprocess.run(["dpkg", "-x", deb, tree / package], check=True)
    return versions


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, default=Path(".corpus/scratch"))
    parser.add_argument("--out", type=Path, default=Path(".corpus/documents.jsonl.xz"))
    parser.add_argument("--only", help="a single package, for a try")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    versions = unpack(args.scratch)
    mandoc = (args.scratch / "tree/mandoc/usr/bin/mandoc").resolve()
    deduplicate = Deduplicator()
    table: list[dict[str, Any]] = []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with multiprocessing.Pool(2) as pool, lzma.open(args.out, "wt", preset=1, encoding="utf-8") as out:
        for source in SOURCES:
            if args.only and source.package != args.only:
                continue
            characters = documents = 0
            for title, text in collect(source, args.scratch / "tree", mandoc, pool):
                text = text if source.kind == "wordnet" else deduplicate(text)
                if not text:
                    continue
                split = "train" if source.kind in ("wordnet", "foldoc") or not is_heldout(text) else "heldout"
                row = {
                    "source": source.package,
                    "title": title,
                    "kind": source.kind,
                    "repeat": source.repeat,
                    "split": split,
                    "text": text,
                }
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
                characters += len(text)
                documents += 1
            table.append(
                {
                    "package": source.package,
                    "kind": source.kind,
                    "version": versions[source.package],
                    "licence": source.licence,
                    "documents": documents,
                    "characters": characters,
                    "repeat": source.repeat,
                }
            )
            logger.info("%-28s %-10s %6d documents %7.2f MB", source.package, source.kind, documents, characters / 1e6)
    total = sum(row["characters"] for row in table)
    logger.info("total %.1f MB", total / 1e6)
    args.out.with_name(args.out.name + ".sources.json").write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
