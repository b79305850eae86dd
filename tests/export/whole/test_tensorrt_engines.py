"""TensorRT exports without a GPU: their networks, run in PyTorch through docs/examples/run_engine.py; their files."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import greedy_tokens
from torch import Tensor

import camshaft

pytest.importorskip("tensorrt_rtx")

from camshaft.export.tensorrt.header import EngineHeader
from camshaft.export.tensorrt.library import find_library
from camshaft.export.whole import export, tensorrt_engines
from tensorrt_interpreter import run_network

ROOT = Path(__file__).resolve().parents[3]
EXAMPLE = ROOT / "docs" / "examples" / "run_engine.py"
NUM_TOKENS = 6


def load(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


run_engine = load("run_engine", EXAMPLE)


class NetworkProgram:
    """Stands for run_engine.Program: the network instead of the engine, PyTorch instead of the GPU."""

    def __init__(self, piece: Any) -> None:
        self.library = find_library()
        self.kept = tensorrt_engines.emit_network(self.library, piece, baked=False)
        weights = piece.program.placeholders("weight")
        self.weights = {spec.key: piece.program.weights[spec.key].load() for _, spec in weights}
        self.num_rows = piece.program.input_of(
            next(n for n in piece.program.graph.nodes if n.name == "token_ids")
        ).shape[1]

    def run(self, model: Any, feeds: dict[str, np.ndarray]) -> np.ndarray:
        given = {name: torch.from_numpy(array.copy()) for name, array in feeds.items()}
        inputs = {**self.weights, **model.caches, **given}
        made = run_network(self.library.trt, self.kept[1].network, inputs)
        model.caches = {name: made[name.replace("_cache.", "_cache_out.")] for name in model.caches}
        logits: Tensor = made["logits"]
        return logits.numpy()


@pytest.mark.parametrize(
    "name, cache", [("gemma2", "linear"), ("gpt_oss", "paged"), ("bloom", "linear"), ("bloom", "paged")]
)
def test_example_through_the_networks(
    name: str, cache: str, family: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Soft cap, windows, sinks, experts, ALiBi; a prompt of three chunks beside one of a part of one, and an idle place."""
    pieces: list[Any] = []
    monkeypatch.setattr(tensorrt_engines, "build_engine", lambda library, piece, baked: pieces.append(piece) or Built())
    monkeypatch.setattr(EngineHeader, "parse", classmethod(lambda cls, data: cls((1, 6, 1, 120), 0, 8)))
    model = family(name)
    camshaft.export_model(
        model, tmp_path / "m", format="tensorrt", cache=cache, dtype="float32", batch_size=3, max_seq_len=48, block_size=4,
        prefill_tokens=8, progress=False,
    )  # fmt: skip
    document = run_engine.read_export(tmp_path / "m", check=True)
    stand_in = object.__new__(run_engine.Model)
    stand_in.export = document
    caches = [tensor for tensor in document["programs"][0]["inputs"] if "_cache." in tensor["name"]]
    stand_in.caches = {tensor["name"]: torch.zeros(tensor["shape"]) for tensor in caches}
    stand_in.prefill, stand_in.decode = (NetworkProgram(piece) for piece in pieces)
    stand_in.batch = run_engine.Batch(document["cache"], document["max_seq_len"], document["batch_size"])
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, 128, (count,), generator=generator).tolist() for count in (21, 4)]
    tokens = run_engine.generate(stand_in, prompts, NUM_TOKENS, set())
    assert tokens == [greedy_tokens(model, prompt, NUM_TOKENS) for prompt in prompts]


class Built:
    """An engine that was not built."""

    data = b"no bytes"


@pytest.fixture(scope="module")
def exports(family: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Real engines: linear with weights beside them, paged with weights baked in."""
    path = tmp_path_factory.mktemp("engines")
    for cache, baked in (("linear", False), ("paged", True)):
        camshaft.export_model(
            family("llama"), path / cache, format="tensorrt", cache=cache, batch_size=2, max_seq_len=32, prefill_tokens=16,
            baked_weights=baked, dtype="float16", progress=False,
        )  # fmt: skip
    return {cache: path / cache for cache in ("linear", "paged")}


def test_files_and_headers(exports: dict[str, Path]) -> None:
    for cache, path in exports.items():
        document = json.loads((path / "export.json").read_text())
        assert [program["name"] for program in document["programs"]] == ["prefill", "decode"]
        assert [program["num_tokens"] for program in document["programs"]] == [16, 1]
        assert document["dtype"] == "float16" and document["tensorrt"]["package"] == "tensorrt_rtx"
        for program in document["programs"]:
            header = EngineHeader.parse((path / program["file"]).read_bytes())
            assert header.version_text == document["tensorrt"]["version"]
            assert all(isinstance(size, int) for tensor in program["inputs"] for size in tensor["shape"])
        assert ("weights.safetensors" in document["files"]) == (cache == "linear")
        for name, facts in document["files"].items():
            assert run_engine.sha256(path / name) == facts["sha256"]
    linear, paged = (json.loads((path / "export.json").read_text()) for path in exports.values())
    assert linear["weights"] == {"baked": False, "file": "weights.safetensors"}
    assert paged["weights"] == {"baked": True, "file": None}
    assert paged["cache"]["num_blocks"] == 2 * 2 + 1
    shapes = {tensor["name"]: tensor["shape"] for tensor in linear["programs"][1]["inputs"]}
    assert shapes["token_ids"] == [2, 1] and shapes["k_cache.0"] == [2, 2, 32, 16]


def test_safetensors_reader_agrees(exports: dict[str, Path]) -> None:
    from safetensors.torch import load_file

    read = run_engine.read_safetensors(exports["linear"] / "weights.safetensors")
    for name, tensor in load_file(exports["linear"] / "weights.safetensors").items():
        assert bytes(read[name]) == tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_network_inputs_and_outputs(family: Callable[[str], Any], exports: dict[str, Path]) -> None:
    """The network of the decode program names what export.json names, and the weights of the safetensors file."""
    pieces: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensorrt_engines, "build_engine", lambda library, piece, baked: pieces.append(piece) or Built())
        patch.setattr(EngineHeader, "parse", classmethod(lambda cls, data: cls((1, 6, 1, 120), 0, 8)))
        target = exports["linear"].parent / "again"
        request = export.ExportRequest(
            format="tensorrt", batch_size=2, max_seq_len=32, prefill_tokens=16, dtype="float16"
        )
        export.export_decoder(family("llama"), target, request)
    _, builder, _ = tensorrt_engines.emit_network(find_library(), pieces[1], baked=False)
    network = builder.network
    names = [network.get_input(index).name for index in range(network.num_inputs)]
    program = json.loads((exports["linear"] / "export.json").read_text())["programs"][1]
    wanted = [tensor["name"] for tensor in program["inputs"]]
    assert names[: len(wanted)] == wanted
    assert set(names[len(wanted) :]) == set(run_engine.read_safetensors(exports["linear"] / "weights.safetensors"))
    outputs = [network.get_output(index).name for index in range(network.num_outputs)]
    assert outputs == [tensor["name"] for tensor in program["outputs"]]
    kinds = [network.get_layer(index).type.name for index in range(network.num_layers)]
    assert kinds.count("KV_CACHE_UPDATE") == 4 and kinds.count("ATTENTION_OUTPUT") == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_example_as_a_program(exports: dict[str, Path], tmp_path: Path) -> None:
    def run(*arguments: object) -> tuple[int, str]:
        command = [sys.executable, str(EXAMPLE), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.returncode, (done.stdout + done.stderr).strip()

    assert run(exports["linear"], "--check") == (0, '{"ok": true, "files": 3}')
    code, text = run(exports["linear"], "--ids", "5,6", "--max-tokens", "4")
    assert code == 1 and ("no CUDA GPU here" in text or "libcudart" in text) and "Traceback" not in text
    assert "no export.json" in run(tmp_path, "--ids", "5")[1]
    assert "0 to 127" in run(exports["linear"], "--ids", "500")[1]
    assert "there is room for 32" in run(exports["linear"], "--ids", "5", "--max-tokens", "40")[1]
    assert "batch of 2" in run(exports["linear"], *["--ids", "5"] * 3)[1]
    (exports["linear"] / "decode.engine").write_bytes(b"short")
    assert "missing or cut short" in run(exports["linear"], "--ids", "5")[1]


def test_no_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="format 'tensorrt' is not possible here: .* is not installed"):
        camshaft.export_model("demo", tmp_path / "m", format="tensorrt", progress=False)
