"""Finding TensorRT: which package is taken, what is said where there is none, and where its messages go."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from camshaft.export.targets.base import LoweringError
from camshaft.export.tensorrt import library as module
from camshaft.export.tensorrt.library import FLAVOURS, Library, find_library


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Packages that seem to be installed: name -> module, or the error that its import raises."""
    packages: dict[str, Any] = {}

    def load(name: str) -> Any:
        if isinstance(packages[name], Exception):
            raise packages[name]
        return packages[name]

    monkeypatch.delenv("CAMSHAFT_TENSORRT", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found(packages.get(name)))
    monkeypatch.setattr(importlib, "import_module", load)
    monkeypatch.setattr(module, "_log_of", lambda name: SimpleNamespace(listeners=[]))
    return packages


def found(package: Any) -> Any:
    """What find_spec says of a package, or of a folder that is none."""
    return None if package is None else SimpleNamespace(origin=None if package == "a folder" else "__init__.py")


def fake(version: str, **names: Any) -> SimpleNamespace:
    """A package with a few names in it."""
    flags = SimpleNamespace(**({"STRONGLY_TYPED": 0} if names.pop("strongly_typed", True) else {}))
    return SimpleNamespace(__version__=version, NetworkDefinitionCreationFlag=flags, INetworkDefinition=object, **names)


def test_full_tensorrt_is_preferred(installed: dict[str, Any]) -> None:
    installed.update(tensorrt=fake("10.13.0"), tensorrt_rtx=fake("1.6.1.120"))
    assert (find_library().flavour, find_library().version) == ("tensorrt", "10.13.0")
    assert find_library("tensorrt_rtx").version == "1.6.1.120"


def test_torch_tensorrts_alias_is_not_full_tensorrt(installed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    rtx = fake("1.4.0.76")
    installed.update(tensorrt=rtx, tensorrt_rtx=rtx)
    alias = ModuleType("tensorrt")
    alias.__package__ = "tensorrt_rtx"
    monkeypatch.setitem(sys.modules, "tensorrt", alias)
    assert (find_library().flavour, find_library().version) == ("tensorrt_rtx", "1.4.0.76")
    with pytest.raises(LoweringError, match="tensorrt is not installed"):
        find_library("tensorrt")


def test_a_folder_of_that_name_is_no_package(installed: dict[str, Any]) -> None:
    installed.update(tensorrt="a folder", tensorrt_rtx=fake("1.6.1.120"))
    assert find_library().flavour == "tensorrt_rtx"


def test_the_environment_chooses(installed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    installed.update(tensorrt=fake("10.13.0"), tensorrt_rtx=fake("1.6.1.120"))
    monkeypatch.setenv("CAMSHAFT_TENSORRT", "tensorrt_rtx")
    assert find_library().flavour == "tensorrt_rtx"
    monkeypatch.setenv("CAMSHAFT_TENSORRT", "trt")
    with pytest.raises(LoweringError, match="'trt' is unknown; allowed: tensorrt, tensorrt_rtx"):
        find_library()


@pytest.mark.parametrize("wanted", [None, *FLAVOURS])
def test_nothing_installed(installed: dict[str, Any], wanted: str | None) -> None:
    with pytest.raises(LoweringError, match=r"not installed; pip install 'camshaft\[tensorrt\]'"):
        find_library(wanted)


@pytest.mark.parametrize(
    "error", [OSError("libtensorrt_rtx.so.1: cannot open shared object file"), ImportError("libnvinfer.so.10")]
)
def test_a_missing_shared_library_is_named(installed: dict[str, Any], error: Exception) -> None:
    installed["tensorrt_rtx"] = error
    with pytest.raises(LoweringError, match=r"cannot be loaded \(lib.*\.so.*pip install"):
        find_library()


def test_features_are_detected_by_name() -> None:
    rtx = Library(fake("1.6", ComputeCapability=0, IRuntimeCache=0), "tensorrt_rtx", "1.6", None)
    full = Library(fake("11.0", strongly_typed=False), "tensorrt", "11.0", None)
    assert rtx.needs_strongly_typed_flag and rtx.has_compute_capabilities and rtx.has_runtime_cache
    assert not (full.needs_strongly_typed_flag or full.has_compute_capabilities or full.has_runtime_cache)
    assert not full.has_kernel_specialization and not full.has_method("add_attention_v2")
    with pytest.raises(LoweringError, match="builds for the GPU of this machine only"):
        full.compute_capability("8.9")


def test_capabilities_by_name() -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    library = find_library("tensorrt_rtx")
    assert library.compute_capability("12.0").name == "SM120" and library.compute_capability("8.9").name == "SM89"
    with pytest.raises(LoweringError, match="'9.0'; allowed: 7.5, 8.0, 8.6, 8.9, 12.0, 12.1"):
        library.compute_capability("9.0")


def test_messages_are_collected_or_logged(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    library = find_library("tensorrt_rtx")
    severity = library.trt.ILogger.Severity
    with caplog.at_level(logging.INFO, "camshaft.export.tensorrt.library"):
        with library.messages() as outer, library.messages() as inner:
            library.log.log(severity.ERROR, "broken")
            library.log.log(severity.ERROR, "Cuda Runtime (In catchCudaError at ...)")
            library.log.log(severity.WARNING, "careful")
        library.log.log(severity.ERROR, "alone")
    assert outer == inner == ["broken"]
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("WARNING", "careful"),
        ("ERROR", "alone"),
    ]


def test_nothing_else_imports_tensorrt() -> None:
    from pathlib import Path

    root = Path(module.__file__).resolve().parents[2]
    folders = [root / name for name in ("camshaft", "graph", "models", "passes", "export", "runtime")]
    files = [file for folder in folders for file in folder.rglob("*.py") if file.name != "library.py"]
    texts = [line.strip() for file in files for line in file.read_text().splitlines()]
    assert len(files) > 50
    assert not [line for line in texts if line.startswith(("import tensorrt", "from tensorrt"))]
