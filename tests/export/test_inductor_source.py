"""The archive of a segment that Inductor compiled: plain files, opened again with equal results, refused when damaged."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from camshaft.export.kernels import errors
from camshaft.export.targets import inductor, inductor_source
from camshaft.export.targets.base import LoweringError
from camshaft.export.targets.inductor import InductorTarget
from torch import Tensor, nn

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(InductorTarget().unavailable(CPU) is not None, reason="Inductor needs a C++ compiler")


class Scaled(nn.Module):
    """A linear layer whose weights are inputs, and a table that the graph itself holds."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
        return (F.silu(F.linear(x, weight, bias)) * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]),)


@pytest.fixture(scope="module")
def archive() -> tuple[nn.Module, bytes, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    module, weights = Scaled(), (torch.randn(8, 8), torch.randn(8))
    rows = {0: torch.export.Dim("B", max=64)}
    exported = torch.export.export(module, (torch.randn(3, 8), *weights), dynamic_shapes=(rows, None, None))
    return module, inductor_source.compile_archive(exported), weights


def test_an_opened_archive_computes_what_the_module_computes(archive, tmp_path: Path) -> None:
    module, data, weights = archive
    (tmp_path / "segment").write_bytes(data)
    call = inductor_source.open_archive(tmp_path / "segment", CPU)
    for size in (2, 3, 17):
        x = torch.randn(size, 8)
        torch.testing.assert_close(call([x, *weights])[0], module(x, *weights)[0], rtol=1e-5, atol=1e-6)


def test_imports_that_the_wrapper_does_not_use_are_left_out(archive) -> None:
    with zipfile.ZipFile(io.BytesIO(archive[1])) as files:
        wrapper = files.read("segment.py")
    assert b"memory_planning" not in wrapper and b"import extern_kernels" not in wrapper
    source = (
        "from math import inf\nfrom a.b import (\n    c as d,\n    e,\n)\nfrom f import g as h\nimport i\n\nx = h(e)\n"
    )
    left = "\nfrom a.b import (\n    c as d,\n    e,\n)\nfrom f import g as h\nimport i\n\nx = h(e)\n"
    assert inductor_source.with_fewer_imports(source) == left


@pytest.mark.parametrize(("kernel", "stays"), [("mm", False), ("bmm", False), ("convolution", True)])
def test_torchs_products_need_no_import(kernel: str, stays: bool) -> None:
    line = "from torch._inductor.select_algorithm import extern_kernels\n"
    call = f"extern_kernels.{kernel}(a, b, out=c)\n"
    made = inductor_source.with_fewer_imports(line + call)
    assert made == (line if stays else "extern_kernels = torch\n") + call


def test_the_archive_holds_no_pickle(archive) -> None:
    with zipfile.ZipFile(io.BytesIO(archive[1])) as files:
        names = files.namelist()
        assert "segment.py" in names
        assert not [name for name in names if files.read(name).startswith(b"\x80")]  # a pickle's first byte
        assert b"pickle" not in files.read("segment.py")


def test_kernels_are_restored_once_with_the_caches_path(tmp_path: Path) -> None:
    file = tmp_path / "archive"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("triton/ABC/kernel.cubin", b"\x7fELF")
        archive.writestr("triton/ABC/group.json", b'{"path": "' + inductor_source._DIRECTORY + b'/ABC/kernel.cubin"}')
    cache = tmp_path / "cache"
    for _ in range(2):
        with zipfile.ZipFile(file) as archive:
            inductor_source._restore_kernels(archive, archive.namelist(), cache)
    assert [path.name for path in cache.iterdir()] == ["ABC"]
    assert (cache / "ABC" / "kernel.cubin").read_bytes() == b"\x7fELF"
    assert str(cache / "ABC" / "kernel.cubin") in (cache / "ABC" / "group.json").read_text()


@pytest.mark.parametrize("name", ["triton/../evil", "triton/a/b/c"])
def test_names_that_leave_the_cache_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="unexpected name"):
        inductor_source._restore_kernels(zipfile.ZipFile(io.BytesIO(), "w"), [name], tmp_path / "cache")


def test_a_damaged_archive_is_refused_by_name(archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "damaged.pt2"
    file.write_bytes(archive[1][: len(archive[1]) // 2])
    with pytest.raises(ValueError, match="not a whole archive"):
        inductor_source.open_archive(file, CPU)
    segment = None
    with pytest.raises(LoweringError, match=r"damaged\.pt2 cannot be opened .* build the engine again"):
        InductorTarget().load(segment, file, torch.device("cuda"))  # type: ignore[arg-type]


def test_the_operators_that_an_archive_calls(archive, tmp_path: Path) -> None:
    file = tmp_path / "segment"
    file.write_bytes(archive[1])
    assert inductor_source.calls(file, "def call(") and not inductor_source.calls(file, "camshaft.invariant_")
    file.write_bytes(b"no archive")
    with pytest.raises(ValueError, match="not a whole archive"):
        inductor_source.calls(file, "x")


class KernelError(Exception):
    """As Triton's: no RuntimeError; the message begins with a place in the source."""

    def __str__(self) -> str:
        return "at 3:8:\n    x = tl.load(p)\n        ^\nout of resource: shared memory"


def test_a_kernel_that_does_not_compile_is_a_lowering_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise KernelError

    monkeypatch.setattr(errors, "kernel_errors", lambda: (KernelError,))
    monkeypatch.setattr(inductor, "_open_source", fail)
    with pytest.raises(LoweringError, match=r"\(at 3:8: out of resource: shared memory\); build the engine again"):
        InductorTarget().load(None, Path("a.pt2"), torch.device("cuda"))  # type: ignore[arg-type]


def test_tritons_errors_are_known_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_spec(name: str) -> None:
        return None

    errors.kernel_errors.cache_clear()
    monkeypatch.setattr(errors.importlib.util, "find_spec", find_spec)
    try:
        assert errors.kernel_errors() == ()
    finally:
        errors.kernel_errors.cache_clear()
    monkeypatch.undo()
    triton = pytest.importorskip("triton.runtime.errors", reason="Triton is not installed")
    assert issubclass(triton.OutOfResources, errors.kernel_errors())


def test_inputs_are_passed_aligned_and_contiguous() -> None:
    base = torch.arange(64.0)
    whole, shifted, turned = base, base[1:9], base.view(8, 8).t()
    assert inductor_source.aligned(whole) is whole
    for tensor in (shifted, turned):
        copy = inductor_source.aligned(tensor)
        assert copy.is_contiguous() and copy.data_ptr() % inductor_source.ALIGNMENT == 0
        assert torch.equal(copy, tensor)
