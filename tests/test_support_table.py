"""README's table of families is docs/support.json, which is what a trace of the families says."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from families import FAMILIES, MORE_FAMILIES

ROOT = Path(__file__).resolve().parent.parent
REGENERATE = "run python docs/make_support_table.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_support_table", ROOT / "docs" / "make_support_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_has_the_table(script: ModuleType) -> None:
    rows = json.loads(script.JSON.read_text())
    assert script.between_markers(script.README.read_text()) == script.table(rows), REGENERATE


def test_all_families_are_listed(script: ModuleType) -> None:
    rows = json.loads(script.JSON.read_text())
    assert [row["family"] for row in rows] == sorted({**FAMILIES, **MORE_FAMILIES}), REGENERATE
    assert {row["family"] for row in rows if row["check"] == "long"} == set(FAMILIES), REGENERATE


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "mpt"])
def test_rows_are_what_a_trace_says(script: ModuleType, name: str) -> None:
    recorded = next(row for row in json.loads(script.JSON.read_text()) if row["family"] == name)
    assert script.describe(name) == recorded, REGENERATE
