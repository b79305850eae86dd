"""The bundled demo model: a small Llama-shaped language model with its drafts, held-out text and prompts.

Nothing here needs torch: the functions only say where the files are. MODEL_CARD.md tells how the model was made.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_DATA = Path(__file__).resolve().parent / "data"


def path() -> Path:
    """Folder of the model: config, bf16 weights and tokenizer, as ``from_pretrained`` takes it."""
    return _DATA / "camshaft-demo"


def draft_path() -> Path:
    """Folder of the draft model for speculative decoding; same tokenizer, about a sixth of the parameters."""
    return _DATA / "camshaft-demo-draft"


def heads_path() -> Path:
    """Folder of Medusa heads for the model: four, with one lm_head."""
    return _DATA / "camshaft-demo-heads"


def eagle_path() -> Path:
    """Folder of an EAGLE-3 layer for the model."""
    return _DATA / "camshaft-demo-eagle"


def exit_path() -> Path:
    """Folder of a trained early exit of the model."""
    return _DATA / "camshaft-demo-exit"


def heldout_path() -> Path:
    """UTF-8 text the models were not trained on; documents are separated by a form feed character."""
    return _DATA / "heldout.txt"


def calibration_path() -> Path:
    """UTF-8 text the models were trained on, to calibrate quantization with; documents are separated by form feeds."""
    return _DATA / "calibration.txt"


def prompts() -> list[dict[str, Any]]:
    """Short prompts that suit the model: ``{"text": str}`` or ``{"chat": [{"role": str, "content": str}, ...]}``."""
    result: list[dict[str, Any]] = json.loads((_DATA / "prompts.json").read_text(encoding="utf-8"))
    return result
