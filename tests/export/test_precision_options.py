"""Options of precision: what is refused, where they are kept, and manifests from before they existed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from camshaft.export.build import _check_fp8
from camshaft.export.manifest import BuildConfig, Manifest
from camshaft.passes.quantization.recipe import Recipe
from families import random_model, tiny_config

import camshaft
from camshaft.cli.common import precision_text

CONFIG = BuildConfig(
    target="eager", device="cpu", dtype="float32", max_seq_len=32, max_batch_tokens=16, max_sequences=2, block_size=16
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int3"}, "quantize is 'int3'; allowed: 'fp8', .*'int4_awq', .* a Recipe, or None"),
        ({"kv_cache_dtype": "fp16"}, "kv_cache_dtype is 'fp16'; allowed: 'auto', 'fp8'"),
        ({"batch_invariant": True}, "batch_invariant is on and the device is cpu; its kernels run on CUDA only"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        camshaft.compile("demo", target="eager", device="cpu", **options)


def test_fp8_is_refused_on_gpus_without_it() -> None:
    fp8 = Recipe.named("fp8")
    with pytest.raises(
        ValueError, match=r"quantize='fp8' and kv_cache_dtype='fp8' on NVIDIA A100 of .* 8\.0; .* 8\.9 or newer"
    ):
        _check_fp8(fp8, "fp8", "NVIDIA A100", (8, 0))
    with pytest.raises(ValueError, match=r"^kv_cache_dtype='fp8' on NVIDIA A10 "):
        _check_fp8(Recipe.named("int8"), "fp8", "NVIDIA A10", (8, 6))
    for capability in ((8, 9), (9, 0), (10, 0)):
        _check_fp8(fp8, "fp8", "a GPU", capability)
    _check_fp8(Recipe.named("int4"), "auto", "NVIDIA A100", (8, 0))


def test_one_line_says_all() -> None:
    assert precision_text(CONFIG) == "float32"
    full = dataclasses.replace(CONFIG, dtype="bfloat16", quantize="fp8", kv_cache_dtype="fp8", batch_invariant=True)
    assert precision_text(full) == "bfloat16, fp8 linear layers, fp8 KV cache, batch-invariant"


def test_an_older_manifest_has_none_of_them(tmp_path: Path) -> None:
    engine = camshaft.compile(random_model(tiny_config("llama")), target="eager", device="cpu", max_seq_len=64)
    data = json.loads(engine.manifest.to_json())
    for key in ("quantize", "kv_cache_dtype", "batch_invariant"):
        del data["build"][key]
    build = Manifest.from_json(json.dumps(data), tmp_path / "manifest.json").build
    assert (build.quantize, build.kv_cache_dtype, build.batch_invariant) == (None, "auto", False)
