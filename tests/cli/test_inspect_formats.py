"""`camshaft inspect --weights` names the format of every quantized layer."""

from __future__ import annotations

import json

import pytest
from families import random_model, tiny_config

import camshaft
from camshaft.cli.app import run


@pytest.mark.parametrize(("recipe", "expected"), [("int8_weight_only", "int8/none"), ("int4", "int4:g32/none")])
def test_formats_of_layers(tmp_path, capsys, recipe, expected) -> None:
    from camshaft.passes.quantization.recipe import Recipe

    given = Recipe.named(recipe)
    engine = camshaft.compile(
        random_model(tiny_config("llama")), target="eager", device="cpu", cache=False, max_seq_len=64, max_batch_tokens=64,
        quantize=given.with_group(32) if recipe == "int4" else given,
    )  # fmt: skip
    engine.save(tmp_path / "engine")
    assert run(["inspect", str(tmp_path / "engine"), "--weights", "--json"]) == 0
    rows = {row["name"]: row["format"] for row in json.loads(capsys.readouterr().out)["weights"]}
    quantized = {name: text for name, text in rows.items() if text is not None}
    assert set(quantized.values()) == {expected} and len(quantized) == 4 * 2
    assert rows["lm_head.weight" if "lm_head.weight" in rows else "model.embed_tokens.weight"] is None
