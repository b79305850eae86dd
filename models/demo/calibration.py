"""Chooses the shipped calibration text: pieces of training documents, none of whose long lines is in the held-out text.

::

    python -m camshaft.models.demo.calibration --documents .corpus/documents.jsonl.xz --out models/demo/data/calibration.txt

Calibration looks at what the model was trained on, so that the held-out text stays what nothing was fitted to. Pieces are short
and of many packages, because a statistic gains more from another document than from the next page of the same one.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
from collections import Counter
from pathlib import Path

from . import heldout_path
from .heldout import SHIPPED, long_lines
from .tokenizer import read_jsonl

logger = logging.getLogger(__name__)


def excerpt(text: str, length: int) -> str:
    """The beginning of a document, cut behind its last paragraph within `length` characters."""
    if len(text) <= length:
        return text
    end = text.rfind("\n\n", 0, length)
    return text[: end if end > 0 else length] + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=Path, default=Path(".corpus/documents.jsonl.xz"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data" / "calibration.txt")
    parser.add_argument("--size", type=int, default=240_000, help="characters to ship")
    parser.add_argument("--piece", type=int, default=2_500, help="characters of a document")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    forbidden = set(long_lines(heldout_path().read_text(encoding="utf-8")))
    rows = [row for row in read_jsonl(args.documents) if row["split"] == "train" and row["source"] in SHIPPED]
    random.Random(1).shuffle(rows)
    most = max(2, args.size // args.piece // 10)
    taken: Counter[str] = Counter()
    pieces: list[str] = []
    total = 0
    for row in rows:
        text = excerpt(row["text"].replace("\f", ""), args.piece)
        if taken[row["source"]] >= most or forbidden.intersection(long_lines(text)):
            continue
        if total + len(text) <= args.size:
            total += len(text)
            taken[row["source"]] += 1
            pieces.append(text)
    args.out.write_text("\f".join(pieces), encoding="utf-8")
    logger.info("%d pieces, %s", len(pieces), json.dumps(taken))


if __name__ == "__main__":
    main()
