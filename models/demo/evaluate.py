"""Held-out perplexity of the demo model or its draft through Transformers.

::

    python -m camshaft.models.demo.evaluate [--model model|draft|FOLDER] [--text FILE] [--context 1024] [--max-tokens N]

The text's documents (separated by form feeds) are joined with ``<|endoftext|>`` and scored in windows of ``--context``
tokens without overlap, the way training measured it.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from . import draft_path, heldout_path, path


def perplexity(folder: Path, text: str, *, context: int = 1024, max_tokens: int | None = None) -> dict[str, float]:
    """Scores ``text`` with the model in ``folder`` (float32, CPU).

    Returns tokens, nats_per_token, perplexity and bits_per_byte. ``max_tokens`` keeps only the first tokens. Raises
    ValueError for a text of fewer than two tokens.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids: list[int] = []
    for document in text.split("\f"):
        if document.strip():
            ids += [*tokenizer(document, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    ids = ids[:max_tokens]
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} tokens, perplexity needs at least 2: give a longer text")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, context):
            window = torch.tensor([ids[start : start + context + 1]])
            logits = model(window[:, :-1]).logits[0].float()
            total += float(torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum"))
            count += window.shape[1] - 1
    scored_bytes = len(str(tokenizer.decode(ids, skip_special_tokens=True)).encode())
    return {
        "tokens": count,
        "nats_per_token": total / count,
        "perplexity": math.exp(total / count),
        "bits_per_byte": total / math.log(2) / scored_bytes,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="model", help="'model', 'draft' or a folder")
    parser.add_argument("--text", type=Path, default=heldout_path())
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--max-tokens", type=int)
    args = parser.parse_args()
    folder = {"model": path(), "draft": draft_path()}.get(args.model, Path(args.model))
    text = args.text.read_text(encoding="utf-8")
    print(json.dumps(perplexity(folder, text, context=args.context, max_tokens=args.max_tokens), indent=1))


if __name__ == "__main__":
    main()
