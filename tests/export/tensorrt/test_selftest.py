"""The self-test of TensorRT: it builds and checks an engine here, and says what is wrong where something is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")

from camshaft.export.targets.base import LoweringError
from camshaft.export.tensorrt import selftest
from camshaft.export.tensorrt.library import find_library
from camshaft.export.tensorrt.network import emit_segment
from tensorrt_interpreter import run_network

CPU = torch.device("cpu")


def test_an_engine_is_built_and_its_header_checked() -> None:
    library, made = find_library(), selftest.self_test(CPU)
    assert made.ok and not made.ran, made.detail
    assert (made.flavour, made.version) == (library.flavour, library.version)
    assert made.engine_bytes and made.engine_bytes > 1000 and made.build_s and 0 < made.build_s < 60
    assert {"8.0", "8.9", "12.0"} <= set(made.capabilities)
    assert made.max_error is None and made.ms is None and "needs a GPU" in made.detail


def test_the_network_computes_what_pytorch_does() -> None:
    library, segment = find_library(), selftest.self_test_segment()
    x, scale, shift, weight, bias = selftest.self_test_tensors(CPU)
    _maker, builder = emit_segment(library, segment, {})
    names = ("x0", "w0", "w1", "w2", "w3")
    made = run_network(library.trt, builder.network, dict(zip(names, (x, scale, shift, weight, bias))))["y0"]
    expected = F.linear(F.layer_norm(x, [64], scale, shift), weight, bias)
    assert float((made - expected).abs().max()) < selftest.TOLERANCE
    assert float(expected.abs().max()) > 1  # an engine that writes nothing would fail


def test_failures_are_told_and_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> object:
        raise LoweringError("TensorRT cannot build the network: no reason given")

    with monkeypatch.context() as patch:
        patch.setattr(selftest, "build_segment", broken)
        made = selftest.self_test(CPU)
        assert not made.ok and made.version and "cannot build the network" in made.detail
    with monkeypatch.context() as patch:
        patch.setattr(selftest, "find_library", broken)
        made = selftest.self_test(CPU)
        assert not made.ok and made.flavour is None


@pytest.mark.parametrize(("error", "ok"), [(1e-6, True), (0.5, False)])
def test_the_run_decides_on_a_gpu(monkeypatch: pytest.MonkeyPatch, error: float, ok: bool) -> None:
    monkeypatch.setattr(selftest, "_run", lambda data, device: (error, 0.02))
    made = selftest.self_test(torch.device("cuda"))
    assert made.ok is ok and made.ran and made.max_error == error and made.ms == 0.02
    assert "largest difference from PyTorch" in made.detail


def test_an_engine_that_does_not_run_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(data: bytes, device: torch.device) -> tuple[float, float]:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(selftest, "_run", fails)
    made = selftest.self_test(torch.device("cuda"))
    assert not made.ok and not made.ran and made.engine_bytes and "it does not run: CUDA error" in made.detail
