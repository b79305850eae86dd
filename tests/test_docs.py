"""The documents' Python code runs, and their links and file names are right."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def python_code(page: Path) -> str:
    """All Python blocks of a page, one after the other; imports from __future__ come first."""
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    code = "\n".join(block.replace("from __future__ import annotations\n", "") for block in blocks)
    return "from __future__ import annotations\n" + code if blocks else ""


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if python_code(page)], ids=lambda page: page.stem)
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "page_" + page.stem.replace("-", "_").lower()
    file = tmp_path / f"{name}.py"  # a real file: a pass's fingerprint reads its source
    file.write_text(python_code(page), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    for test in [value for key, value in vars(module).items() if key.startswith("test_")]:
        test()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_named_files_exist(page: Path) -> None:
    folders = "camshaft|graph|models|passes|export|runtime|tests|notebooks|docs"
    for name in re.findall(rf"`((?:{folders})/[\w./-]+)`", page.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), name
