"""Artifacts: written whole or not at all, and every kind of damage has its own clear error."""

from __future__ import annotations

import builtins
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from camshaft.export.artifact import is_artifact
from camshaft.export.engine import Engine
from families import random_model, tiny_config

import camshaft
from camshaft import SamplingParams

LIMITS = {"max_seq_len": 64, "max_batch_tokens": 32, "max_sequences": 4, "block_size": 8, "device": "cpu"}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return camshaft.compile(random_model(tiny_config("llama")), target="onnxruntime", **LIMITS)


@pytest.fixture
def saved(engine: Engine, tmp_path: Path) -> Path:
    return engine.save(tmp_path / "engine")


def _tokens(engine: Engine) -> list[int]:
    with camshaft.LLM(engine) as llm:
        return llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))[0].token_ids


def test_round_trip(engine: Engine, saved: Path) -> None:
    loaded = camshaft.load(saved)
    assert loaded.manifest.build == engine.manifest.build
    assert loaded.weights_bytes == engine.weights_bytes
    assert _tokens(loaded) == _tokens(engine)
    files = {str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()}
    assert files == {"manifest.json", *loaded.manifest.files}
    assert not any(path.suffix in (".pkl", ".pt", ".bin") for path in saved.rglob("*"))


def test_a_loaded_engine_can_be_saved_again(saved: Path, tmp_path: Path) -> None:
    again = camshaft.load(saved).save(tmp_path / "again")
    first, second = (json.loads((path / "manifest.json").read_text())["files"] for path in (saved, again))
    assert first == second


@pytest.mark.parametrize("name", ["plan.json", "weights-00001.safetensors", "engine"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damaged_file(saved: Path, name: str, damage: str) -> None:
    file = next((saved / "engines").iterdir()) if name == "engine" else saved / name
    if damage == "remove":
        file.unlink()
        expected = "is missing"
    elif damage == "truncate":
        file.write_bytes(file.read_bytes()[:-7])
        expected = "bytes instead of"
    else:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        expected = "sha256"
    with pytest.raises(ValueError, match=f"{file.name}.*{expected}.*(Copy|build)"):
        camshaft.load(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format_version": 1}'])
def test_damaged_manifest(saved: Path, text: str) -> None:
    (saved / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match="manifest.json.*(not whole JSON|damaged)"):
        camshaft.load(saved)


def test_manifest_that_hides_a_file(saved: Path) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    del manifest["files"]["plan.json"]
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="does not list plan.json"):
        camshaft.load(saved)


def test_future_format(saved: Path) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["format_version"] = 99
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="format 99.*reads up to 1.*upgrade camshaft"):
        camshaft.load(saved)


def _edit(saved: Path, engine_target: str | None = None, **changes: Any) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    for file in manifest["engines"] if engine_target else ():
        file["target"] = engine_target
    for key, change in changes.items():
        manifest[key] = {**manifest[key], **change}
    (saved / "manifest.json").write_text(json.dumps(manifest))


def test_other_hardware_and_versions_name_themselves_and_the_fix(saved: Path) -> None:
    _edit(saved, "inductor", build={"target": "inductor"}, hardware={"capability": "AVX1024"})
    with pytest.raises(ValueError, match="capability AVX1024.*rebuild=True"):
        camshaft.load(saved)
    _edit(saved, hardware=_hardware(), versions={"torch": "1.0"})
    with pytest.raises(ValueError, match="built with torch 1.0, here is .*rebuild=True"):
        camshaft.load(saved)


def _hardware() -> dict[str, str]:
    from camshaft.export.manifest import hardware_of

    return hardware_of(torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_engine_for_a_gpu_on_a_machine_without(saved: Path) -> None:
    _edit(saved, build={"device": "cuda"}, hardware={"device": "cuda", "name": "NVIDIA H200"})
    with pytest.raises(ValueError, match="built for NVIDIA H200.*no CUDA device"):
        camshaft.load(saved)


def test_rebuild_lowers_again_from_the_graphs(engine: Engine, saved: Path) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    for name in [name for name in manifest["files"] if name.startswith("engines/")]:
        del manifest["files"][name]
    manifest["engines"] = []
    (saved / "manifest.json").write_text(json.dumps(manifest))
    shutil.rmtree(saved / "engines")
    assert _tokens(camshaft.load(saved, rebuild=True)) == _tokens(engine)


def test_a_rebuild_without_one_of_two_targets_keeps_every_engine_of_the_other(
    engine: Engine, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    first = manifest["engines"][0]
    _edit(saved, build={"target": "auto"})  # as auto leaves it: one engine of another target, which is not here
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["engines"] = [{**first, "target": "torch_tensorrt", "tokens": 4}, *manifest["engines"][1:]]
    (saved / "manifest.json").write_text(json.dumps(manifest))
    loaded = camshaft.load(saved, rebuild=True)
    assert loaded.config.target == "onnxruntime"
    assert {file.segment for file in loaded.manifest.engines} == {file.segment for file in engine.manifest.engines}
    assert _tokens(loaded) == _tokens(engine)


def test_a_build_cache_entry_that_lost_files_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMSHAFT_CACHE", str(tmp_path))
    options = {"target": "onnxruntime", "device": "cpu", "max_seq_len": 64, "max_batch_tokens": 16, "max_sequences": 4}
    model = random_model(tiny_config("llama"))
    first = camshaft.compile(model, **options)
    for lost in (first.manifest.engine_files[0], None):
        if lost is not None:
            (first.engine_dir / lost).unlink()
        else:
            (first.engine_dir.parent / "manifest.json").unlink()
        again = camshaft.compile(model, **options)
        assert "cached" not in again.manifest.timings
        assert all((again.engine_dir / name).is_file() for name in again.manifest.engine_files)
    assert "cached" in camshaft.compile(model, **options).manifest.timings


def test_an_llm_that_ends_frees_the_cache_and_another_takes_it(engine: Engine) -> None:
    expected = _tokens(engine)
    assert engine.prepare().executor.caches == []
    assert _tokens(engine) == expected


def test_not_an_engine(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no engine directory"):
        camshaft.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="has no manifest.json"):
        camshaft.load(tmp_path)


def test_existing_paths_are_kept(engine: Engine, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="overwrite=True"):
        engine.save(saved)
    engine.save(saved, overwrite=True)
    camshaft.load(saved)
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="not an engine"):
        engine.save(other, overwrite=True)
    assert (other / "mine.txt").read_text() == "keep"


def test_max_sequences_may_shrink(saved: Path) -> None:
    assert camshaft.load(saved, max_sequences=2).max_sequences == 2
    with pytest.raises(ValueError, match="max_sequences is 5; allowed: 1 to 4"):
        camshaft.load(saved, max_sequences=5)


def test_full_disk_leaves_nothing(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.open

    def full(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "w" in mode and str(file).endswith(".safetensors"):
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        return real(file, mode, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", full)
    with pytest.raises(OSError, match="No space left"):
        engine.save(tmp_path / "engine")
    assert list(tmp_path.iterdir()) == []


def test_killed_writer_leaves_no_engine_and_is_cleaned_up(engine: Engine, tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from camshaft.export.artifact import atomic_directory
        with atomic_directory(Path(sys.argv[1]), overwrite=False) as work:
            (work / "half").write_text("half")
            print("ready", flush=True)
            time.sleep(60)
    """)
    target = tmp_path / "engine"
    process = subprocess.Popen([sys.executable, "-c", script, str(target)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not target.exists()
    engine.save(target)
    assert is_artifact(target)
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_serving_needs_neither_the_compiler_nor_transformers(saved: Path) -> None:
    script = textwrap.dedent("""
        import sys, time
        import camshaft
        with camshaft.LLM(sys.argv[1]) as llm:
            out = llm.generate([[5, 6, 7]], camshaft.SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
        assert len(out[0].token_ids) == 4
        loaded = [name for name in sys.modules if name.split(".")[0] in ("transformers", "onnx", "onnxscript")]
        loaded += [name for name in sys.modules if name.startswith(("camshaft.passes", "camshaft.models"))]
        assert not loaded, loaded[:5]
    """)
    subprocess.run([sys.executable, "-c", script, str(saved)], check=True, timeout=120)


def test_import_is_quick_and_light() -> None:
    script = "import sys, time; t = time.perf_counter(); import camshaft; print(time.perf_counter() - t, 'torch' in sys.modules)"
    times = []
    for _ in range(3):
        seconds, torch_loaded = subprocess.check_output([sys.executable, "-c", script], text=True).split()
        assert torch_loaded == "False"
        times.append(float(seconds))
    assert min(times) < 0.5


def test_equal_builds_come_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMSHAFT_CACHE", str(tmp_path / "cache"))
    first = camshaft.compile(random_model(tiny_config("gpt2"), seed=1), target="eager", **LIMITS)
    start = time.perf_counter()
    second = camshaft.compile(random_model(tiny_config("gpt2"), seed=2), target="eager", **LIMITS)
    assert time.perf_counter() - start < 5
    assert "cached" in second.manifest.timings
    assert "cached" not in first.manifest.timings
    fresh = camshaft.compile(random_model(tiny_config("gpt2"), seed=2), target="eager", cache=False, **LIMITS)
    assert _tokens(second) == _tokens(fresh) != _tokens(first)
    other = camshaft.compile(random_model(tiny_config("gpt2"), seed=2), target="eager", **{**LIMITS, "block_size": 16})
    assert "cached" not in other.manifest.timings
