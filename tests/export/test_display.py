"""The notebook view of an engine, and the drawing of its plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from camshaft.export.display import engine_html, plan_boxes, plan_svg
from families import random_model, tiny_config

import camshaft

NUM_LAYERS = 4


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> camshaft.Engine:
    config = tiny_config("llama")
    config.num_hidden_layers = NUM_LAYERS
    built: camshaft.Engine = camshaft.compile(random_model(config), target="onnxruntime", device="cpu", max_seq_len=128)
    return built


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_plan_folds_the_layers(engine: camshaft.Engine) -> None:
    shown = texts(plan_svg(engine.plan))
    assert f"× {NUM_LAYERS - 1}" in shown
    assert shown.count("attention") == 2  # one of the repeated layers, and the last
    assert {"token_ids", "positions", "sample_rows", "output"} <= set(shown)


def test_plan_boxes_are_in_order(engine: camshaft.Engine) -> None:
    boxes = plan_boxes(engine.plan)
    assert all(j < i for i, box in enumerate(boxes) for j in box.inputs)
    assert len(boxes) == len(engine.plan.steps) + len(engine.plan.inputs) + 1


def test_engine_html(engine: camshaft.Engine) -> None:
    page = engine_html(engine)
    assert engine._repr_html_() == page
    for text in ("LlamaForCausalLM", "onnxruntime on cpu, float32", "128 tokens a sequence", "fuse_projections"):
        assert text in page
    for segment in engine.plan.segments.values():
        assert segment.id in page
    assert page.count("KiB</td>") == len(engine.manifest.engines)


def test_engine_html_of_a_saved_engine(engine: camshaft.Engine, tmp_path: Path) -> None:
    loaded = camshaft.load(engine.save(tmp_path / "engine"))
    assert "fuse_projections" in loaded._repr_html_()
    assert loaded._execution is None  # looking loads nothing


def test_names_are_escaped(engine: camshaft.Engine) -> None:
    model = replace(engine.manifest.model, name="<script>", architecture="A & B")
    manifest = replace(engine.manifest, model=model, report=("<i>line</i>",))
    other = camshaft.Engine(manifest, engine.plan, engine.weights, engine.engine_dir, None)
    page = engine_html(other)
    assert "<script>" not in page and "A &amp; B" in page and "&lt;i&gt;line&lt;/i&gt;" in page


def test_passes_print_as_a_table(engine: camshaft.Engine) -> None:
    lines = str(engine.passes).splitlines()
    assert len(lines) == len(engine.passes) + 1 and lines[0].split()[:3] == ["#", "pass", "stage"]
    assert "<table" in engine.passes._repr_html_()
