"""Chooses the shipped held-out text: held-out documents whose lines do not also occur in the training documents.

::

    python -m camshaft.models.demo.heldout --documents .corpus/documents.jsonl.xz --out models/demo/data/heldout.txt

The split is by document, and packages repeat each other (a manual page and its HTML version, pages of the same table of
options), so a document counts as clean only when at most ``MAX_SEEN`` of its long lines' characters were trained on.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import re
from collections import Counter
from pathlib import Path

from .tokenizer import read_jsonl

logger = logging.getLogger(__name__)

MAX_SEEN = 0.02
"""Largest share of a document's long-line characters that may occur in the training text."""
MIN_LINE = 50
"""Characters (letters and digits alone) from which a line counts as long."""
_SHIPPED_NAMES = (
    "python3.11-doc libpython3.11-stdlib debian-handbook debian-policy developers-reference debian-reference-en "
    "harden-doc installation-guide-amd64 postgresql-doc-15 sqlite3-doc python-django-doc python-sqlalchemy-doc "
    "apache2-doc perl-doc libreoffice-help-en-us nodejs-doc python-scipy-doc python-pandas-doc "
    "python-requests-doc systemd coreutils linux-doc-6.1 vim-runtime python-sklearn-doc cmake-doc rust-doc "
    "python3-django"
)
SHIPPED = tuple(_SHIPPED_NAMES.split())
"""Packages whose text may be shipped (licences in MODEL_CARD.md)."""


def long_lines(text: str) -> list[str]:
    """The letters and digits of each long line."""
    bare = (re.sub(r"\W+", "", line) for line in text.split("\n"))
    return [line for line in bare if len(line) >= MIN_LINE]


def _keys(text: str) -> list[tuple[int, int]]:
    return [(hash(line), len(line)) for line in long_lines(text)]


def seen_share(text: str, trained: set[int]) -> float:
    """Share of the long lines' characters of ``text`` whose lines are in ``trained`` (hashes); 0 for no long line."""
    keys = _keys(text)
    return sum(size for key, size in keys if key in trained) / max(sum(size for _, size in keys), 1)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=Path, default=Path(".corpus/documents.jsonl.xz"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data" / "heldout.txt")
    parser.add_argument("--all-clean", type=Path, help="also write every clean held-out document here")
    parser.add_argument("--size", type=int, default=170_000, help="characters to ship")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    trained: set[int] = set()
    heldout = []
    for row in read_jsonl(args.documents):
        if row["split"] == "heldout":
            heldout.append(row)
        elif row["kind"] != "wordnet":
            trained.update(key for key, _ in _keys(row["text"]))
    shares = [seen_share(row["text"], trained) for row in heldout]
    clean = [row for row, share in zip(heldout, shares) if share <= MAX_SEEN and _keys(row["text"])]
    logger.info("%d of %d held-out documents are clean", len(clean), len(heldout))
    if args.all_clean:
        args.all_clean.write_text("\f".join(row["text"].replace("\f", "") for row in clean), encoding="utf-8")
    random.Random(0).shuffle(clean)
    taken: Counter[str] = Counter()
    documents: list[str] = []
    for row in clean:
        text = row["text"].replace("\f", "")
        if len(text) > 16_000:
            text = text[: text.rfind("\n\n", 0, 16_000)] + "\n"
        if row["source"] not in SHIPPED or taken[row["source"]] >= 5 or "\\begin" in text:
            continue
        if sum(map(len, documents)) + len(text) <= args.size:
            documents.append(text)
            taken[row["source"]] += 1
    args.out.write_text("\f".join(documents), encoding="utf-8")
    logger.info("%d documents, %s", len(documents), json.dumps(taken))


if __name__ == "__main__":
    main()
