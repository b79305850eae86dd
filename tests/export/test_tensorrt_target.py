"""target="tensorrt" without a GPU: real engines are built, saved, looked at, cached; what cannot be is refused by name."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from camshaft.export import artifact
from camshaft.export.engine import Engine
from camshaft.export.manifest import Manifest
from camshaft.export.targets import tensorrt as target_module
from camshaft.export.targets.base import LoweringError, get_target
from families import random_model, tiny_config
from typer.testing import CliRunner

import camshaft

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

from camshaft.export.tensorrt.header import EngineHeader
from camshaft.export.tensorrt.library import find_library
from camshaft.export.tensorrt.runtime import check_header

LIMITS = {"max_seq_len": 64, "max_batch_tokens": 8, "max_sequences": 4, "buckets": [1, 4]}


def build(family: str = "llama", **options: Any) -> Engine:
    return camshaft.compile(random_model(tiny_config(family)), target="tensorrt", **{**LIMITS, **options})


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAMSHAFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def whole() -> Engine:
    """An engine of one bucket, built once."""
    return build(buckets=[])


def test_engines_are_built_saved_and_listed_without_a_gpu(tmp_path: Path) -> None:
    engine = build()
    assert (engine.config.device, engine.config.dtype, engine.config.buckets) == ("cuda", "bfloat16", (1, 4, 8))
    library = find_library()
    assert engine.manifest.versions[library.flavour] == library.version
    lowered = [segment for segment in engine.plan.segments.values() if not segment.eager]
    assert len(engine.manifest.engines) == 3 * len(lowered) == 12
    for file in engine.manifest.engines:
        data = (engine.engine_dir / file.file).read_bytes()
        assert EngineHeader.parse(data).version_text in library.version
        assert sum(file.details["layers"].values()) > 0 and file.details["seconds"] > 0
    engine.save(tmp_path / "engine")
    manifest = Manifest.from_json((tmp_path / "engine" / "manifest.json").read_text(), tmp_path)
    assert manifest.engines == engine.manifest.engines and manifest.build == engine.config
    shown = CliRunner().invoke(_app(), ["inspect", str(tmp_path / "engine"), "--engines", "--json"])
    assert shown.exit_code == 0, shown.output
    first = json.loads(shown.stdout)["segments"][0]["engines"][0]
    assert first["target"] == "tensorrt" and first["tokens"] == 1 and first["bytes"] > 1000
    assert first["inputs"]["x0"] == "int64[1, 1]" and first["layers"]
    assert first["capability_mask"] & 0x3E == 0x3E and first["version"] in library.version
    shown = CliRunner().invoke(_app(), ["inspect", str(tmp_path / "engine"), "--layers", first["file"]])
    assert shown.exit_code != 0 and "torch sees no CUDA device here to run it on" in str(shown.exception) + shown.output
    with pytest.raises(ValueError, match="torch sees no CUDA device"):
        camshaft.load(tmp_path / "engine")
    with pytest.raises(ValueError, match="torch sees no CUDA device here; save it and load it where one is"):
        engine.prepare()


def _app() -> Any:
    from camshaft.cli.app import app

    return app


def test_equal_layers_of_another_model_are_found_in_the_cache() -> None:
    first = build(max_batch_tokens=7, max_sequences=3, buckets=[])
    assert not any(file.details.get("cached") for file in first.manifest.engines)
    second = build(max_batch_tokens=7, max_sequences=3, buckets=[], max_seq_len=60)
    assert all(file.details.get("cached") for file in second.manifest.engines)
    for one, two in zip(first.manifest.engines, second.manifest.engines):
        assert (first.engine_dir / one.file).read_bytes() == (second.engine_dir / two.file).read_bytes()


def test_capabilities_decide_the_mask() -> None:
    engine = build(capabilities=["8.9", "12.0"], buckets=[])
    data = (engine.engine_dir / engine.manifest.engines[0].file).read_bytes()
    header = EngineHeader.parse(data)
    assert header.capabilities == ("8.9", "12.0")
    library = find_library()
    check_header(header, library, (8, 9), "engine")
    with pytest.raises(
        LoweringError, match=r"built for compute capabilities 8\.9, 12\.0, this GPU has 9\.0; load it with"
    ):
        check_header(header, library, (9, 0), "engine")
    with pytest.raises(LoweringError, match=r"cannot build for compute capability '9\.9'"):
        build(capabilities=["9.9"], buckets=[])
    with pytest.raises(ValueError, match="capabilities are for target tensorrt"):
        camshaft.compile(random_model(tiny_config("llama")), target="eager", capabilities=["8.9"])


def test_a_portable_engine_fits_gpus_without_a_bit_of_their_own(whole: Engine) -> None:
    data = (whole.engine_dir / whole.manifest.engines[0].file).read_bytes()
    check_header(EngineHeader.parse(data), find_library(), (9, 0), "engine")
    older = bytearray(data)
    older[24:28] = bytes((1, 4, 0, 76))
    with pytest.raises(
        LoweringError, match=r"built with tensorrt_rtx 1\.4\.0\.76, here is 1\.6\.1\.120; load it with rebuild"
    ):
        check_header(EngineHeader.parse(bytes(older)), find_library(), (9, 0), "engine")
    with pytest.raises(LoweringError, match="damaged"):
        EngineHeader.parse(data[:-100])
    wrong = struct.pack("<I", 7) + data[4:]
    with pytest.raises(LoweringError, match="not a TensorRT engine"):
        EngineHeader.parse(wrong)


def test_operators_without_layers_run_in_pytorch_and_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    glu = torch.ops.camshaft.glu.default
    real = get_target("tensorrt").supports
    monkeypatch.setattr(
        target_module.TensorRtTarget, "supports", lambda self, node: node.target is not glu and real(node)
    )
    engine = build(buckets=[], max_seq_len=59)
    assert engine.manifest.report == ("camshaft.glu runs in PyTorch (no lowering)",)
    eager = [segment.operators for segment in engine.plan.segments.values() if segment.eager]
    assert ["camshaft.glu.default"] in eager
    assert engine.manifest.engines


def test_a_missing_library_is_named_with_its_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(flavour: str | None = None) -> Any:
        raise LoweringError("tensorrt or tensorrt_rtx is not installed; pip install 'camshaft[tensorrt]'")

    monkeypatch.setattr("camshaft.export.tensorrt.library.find_library", missing)
    with pytest.raises(ValueError, match=r"target tensorrt cannot run on cuda: .*pip install 'camshaft\[tensorrt\]'"):
        build()


def test_the_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match="TensorRT engines run on CUDA; give device='cuda'"):
        build(device="cpu")


def test_an_artifact_of_another_version_says_what_to_do(whole: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    artifact.check_fit(whole.manifest)
    monkeypatch.setattr(target_module.TensorRtTarget, "versions", lambda self: {"tensorrt_rtx": "1.5.0.1"})
    message = r"built with tensorrt_rtx 1\.6\.1\.120, here is 1\.5\.0\.1: build it again .* rebuild=True"
    with pytest.raises(ValueError, match=message):
        artifact.check_fit(whole.manifest)


def test_headers_are_read_before_anything_is_loaded(
    whole: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole.save(tmp_path / "engine")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    camshaft.load(tmp_path / "engine")
    file = tmp_path / "engine" / "engines" / whole.manifest.engines[-1].file
    data = file.read_bytes()
    file.write_bytes(data[:24] + bytes((1, 5, 0, 1)) + data[28:])  # of the same size, so that only sha256 would tell
    with pytest.raises(ValueError, match=r"does not fit: .*built with tensorrt_rtx 1\.5\.0\.1, here is .*rebuild=True"):
        camshaft.load(tmp_path / "engine", verify=False)
    file.write_bytes(data[:-1])
    with pytest.raises(ValueError, match="damaged"):
        camshaft.load(tmp_path / "engine", verify=False)


def test_modules_have_fixed_sizes() -> None:
    module = torch.nn.Linear(4, 4)
    with pytest.raises(ValueError, match="TensorRT engines run on CUDA"):
        camshaft.compile(module, (torch.zeros(2, 4),), target="tensorrt")


def test_the_target_is_listed() -> None:
    assert get_target("tensorrt").fixed_sizes


def test_torch_tensorrt_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    module, example = torch.nn.Linear(4, 4), (torch.zeros(2, 4),)
    with pytest.raises(ValueError, match="Torch-TensorRT runs on CUDA"):
        camshaft.compile(module, example, target="torch_tensorrt")
    target, cuda = get_target("torch_tensorrt"), torch.device("cuda")
    assert "torch_tensorrt is not installed; install torch-tensorrt" in (target.unavailable(cuda) or "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert "compiles on a GPU" in (target.unavailable(cuda) or "")


def test_torch_tensorrt_takes_no_decoders() -> None:
    with pytest.raises(ValueError, match="compiles modules with example_inputs; for a decoder use target='tensorrt'"):
        camshaft.compile(random_model(tiny_config("llama")), target="torch_tensorrt", device="cpu")


def test_experts_in_an_engine_can_be_captured_and_in_pytorch_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "prepare", lambda self: None)
    engine = build("mixtral", buckets=[])
    assert engine.uncaptured is None and engine.graph_bytes() > 0
    assert engine.manifest.report == ()
    in_pytorch = Engine(
        dataclasses.replace(engine.manifest, engines=()), engine.plan, engine.weights, engine.engine_dir, None
    )
    assert in_pytorch.uncaptured == "camshaft.moe.default decides on the host what it launches"
    assert in_pytorch.capture() is None and in_pytorch.graph_bytes() == 0
