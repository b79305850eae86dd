"""What an export refuses, before it does any work and after; nothing is left behind."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from camshaft.export.whole import ExportRequest
from camshaft.export.whole.request import check_request, make_config
from torch import nn

import camshaft


class Source:
    """As much of a ModelSource as the limits need."""

    name = "small"
    max_positions = 256


def config(**given: Any) -> Any:
    request = ExportRequest(**given)
    check_request(request)
    return make_config(request, Source())  # type: ignore[arg-type]


def test_defaults() -> None:
    onnx = config()
    assert (onnx.dtype, onnx.batch_size, onnx.max_seq_len, onnx.num_tokens) == ("float32", None, 256, {"model": None})
    assert (onnx.block_size, onnx.num_blocks) == (None, None)
    trt = config(format="tensorrt", cache="paged", batch_size=3)
    assert (trt.dtype, trt.batch_size, trt.num_tokens) == ("bfloat16", 3, {"prefill": 128, "decode": 1})
    assert (trt.block_size, trt.num_blocks) == (16, 3 * 16 + 1)  # and the scratch block
    assert config(cache="paged").num_blocks is None
    assert config(format="tensorrt", prefill_tokens=100).max_seq_len == 200  # whole chunks of a linear cache
    assert config(format="tensorrt", cache="paged", prefill_tokens=100).max_seq_len == 256
    assert config(dtype=torch.float16).dtype == "float16"


@pytest.mark.parametrize(
    "given, message",
    [
        ({"format": "tflite"}, "format is 'tflite'; allowed: onnx, tensorrt"),
        ({"cache": "ring"}, "cache is 'ring'; allowed: linear, paged"),
        ({"logits": "none"}, "logits is 'none'; allowed: last, all"),
        ({"dtype": "int8"}, "dtype is int8; allowed: float32, bfloat16, float16"),
        ({"batch_size": 0}, "batch_size is 0; allowed: 1 or more"),
        ({"max_seq_len": 300}, "max_seq_len is 300, but small knows 256 positions"),
        ({"num_blocks": 8}, "num_blocks is for paged caches"),
        ({"baked_weights": True}, "baked_weights is for format='tensorrt'"),
        ({"prefill_tokens": 16}, "prefill_tokens is for format='tensorrt'"),
        ({"format": "tensorrt", "max_seq_len": 200}, "must be a multiple of prefill_tokens, such as 128"),
        ({"format": "tensorrt", "max_seq_len": 20, "prefill_tokens": 32}, "max_seq_len is 20 and prefill_tokens 32"),
    ],
)
def test_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**given)


def test_taken_paths(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("mine")
    for name in ("file", "folder"):
        with pytest.raises(ValueError, match=f"{name} exists; give a path that does not"):
            camshaft.export_model("demo", tmp_path / name, progress=False)
    assert (tmp_path / "folder" / "file").read_text() == "mine"


def test_no_decoder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Linear is no Transformers causal LM"):
        camshaft.export_model(nn.Linear(2, 2), tmp_path / "m", progress=False)
    with pytest.raises(ValueError, match="neither a directory here nor|there is no directory"):
        camshaft.export_model(str(tmp_path / "absent"), tmp_path / "m", progress=False)


def test_full_disk_leaves_nothing(
    family: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnx")
    from camshaft.export.whole import onnx_model

    def full(path: Path, *args: Any) -> None:
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(onnx_model, "write_weights", full)
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        with pytest.raises(OSError, match="No space left"):
            camshaft.export_model(family("llama"), tmp_path / name, max_seq_len=40, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"] and not any((tmp_path / "empty").iterdir())


def test_onnx_missing_or_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx = pytest.importorskip("onnx")
    monkeypatch.setattr(onnx.defs, "onnx_opset_version", lambda: 23)
    with pytest.raises(ValueError, match="knows opset 23, and the export is written in 24; pip install"):
        camshaft.export_model("demo", tmp_path / "m", progress=False)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ValueError, match="needs the package onnx"):
        camshaft.export_model("demo", tmp_path / "m", progress=False)
    assert not (tmp_path / "m").exists()
