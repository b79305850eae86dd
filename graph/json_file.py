"""JSON files that hold one object, such as a checkpoint's config.json. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json_object(file: Path, *, fix: str) -> dict[str, Any]:
    """The fields of the JSON object in a file of UTF-8.

    fix: what the user is to do where there is no such object; it ends the error's message.
    Raises ValueError for a file that is missing, that is not JSON, or that holds something else than an object.
    """
    if not file.is_file():
        raise ValueError(f"{file.parent} has no {file.name}; {fix}")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON ({error}); {fix}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{file} holds a {type(fields).__name__}; allowed: a JSON object; {fix}")
    return fields
