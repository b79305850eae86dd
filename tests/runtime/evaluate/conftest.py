"""What the tests of evaluation share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import camshaft
from camshaft import LLM

from .tiny import LIMITS, make_model


@pytest.fixture(scope="package")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """(directory of a random model with a tokenizer, the model in Transformers)."""
    path = tmp_path_factory.mktemp("evaluate") / "tiny"
    return path, make_model(path)


@pytest.fixture(scope="package")
def tiny_llm(tiny: tuple[Path, Any]) -> Iterator[LLM]:
    """An LLM of that model."""
    with LLM(camshaft.compile(tiny[0], **LIMITS), kv_cache_bytes=1 << 20) as llm:
        yield llm
