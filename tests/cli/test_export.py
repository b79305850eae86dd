"""camshaft export: writes, prints, --json, errors in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from camshaft.cli.app import run

pytest.importorskip("onnx")

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with a random Llama of one layer."""
    from families import random_model
    from transformers import LlamaConfig

    path = tmp_path_factory.mktemp("model") / "tiny"
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    random_model(config).save_pretrained(path)
    return str(path)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs a command line in this process: (exit code, stdout, stderr)."""

    def call(*arguments: Any) -> tuple[int, str, str]:
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_writes_and_says_what(cli: Cli, model: str, tmp_path: Path) -> None:
    code, out, err = cli("export", model, "-o", tmp_path / "m", "--cache", "paged", "--block-size", "8")
    assert code == 0, err
    for text in (
        "token_ids",
        "[num_blocks, 8, 2, 8]",
        "-> logits",
        "paged cache of 1 layers, float32, 64 tokens",
        "run_onnx.py",
    ):
        assert text in out
    assert {path.name for path in (tmp_path / "m").iterdir()} == {"model.onnx", "model.onnx.data", "export.json"}
    code, out, err = cli("export", model, "-o", tmp_path / "m")
    assert code == 1 and out == "" and err.startswith("error: ") and "exists" in err and err.count("\n") == 1


def test_json_and_notes(cli: Cli, model: str, tmp_path: Path) -> None:
    code, out, _ = cli("export", model, "-o", tmp_path / "m", "--dtype", "bfloat16", "--logits", "all", "--json")
    document = json.loads(out)
    assert code == 0 and document["model"]["eos_token_ids"] == [1] and "no bfloat16 kernels" in document["notes"][0]
    assert document["programs"][0]["outputs"][0] == {
        "name": "logits",
        "dtype": "float32",
        "shape": ["batch", "num_tokens", 64],
    }


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--format", "tflite"], "format is 'tflite'; allowed: onnx, tensorrt"),
        (["--cache", "ring"], "cache is 'ring'; allowed: linear, paged"),
        (["--dtype", "fp8"], "dtype is fp8; allowed: float32"),
        (["--max-seq-len", "65"], "knows 64 positions"),
        (["--baked-weights"], "baked_weights is for format='tensorrt'"),
    ],
)
def test_errors(cli: Cli, model: str, tmp_path: Path, arguments: list[str], message: str) -> None:
    code, out, err = cli("export", model, "-o", tmp_path / "m", *arguments)
    assert code == 1 and out == "" and message in err and err.count("\n") == 1
    assert not any(tmp_path.iterdir())
