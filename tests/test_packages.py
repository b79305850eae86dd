"""pyproject.toml names every package: one that it lacks imports from a checkout and is missing from the wheel."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_package_is_named():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    found = set()
    for package, folder in setuptools["package-dir"].items():
        for file in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join((package, *file.parent.relative_to(ROOT / folder).parts)))
    assert found == set(setuptools["packages"])
