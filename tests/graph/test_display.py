"""Drawings and tables of programs: well-formed, folded, escaped."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch
from camshaft.graph.display import PassTable, node_table_html, pass_table_text, program_boxes, program_html, program_svg
from camshaft.graph.drawing import MAX_BOXES, Box, Fold, draw, find_folds
from camshaft.graph.program import PassRecord, Program
from camshaft.passes.manager import PassManager
from camshaft.passes.pipeline import decoder_passes
from families import random_model, tiny_config

import camshaft

SVG = "{http://www.w3.org/2000/svg}"
NUM_LAYERS = 4


@pytest.fixture(scope="module")
def captured() -> Program:
    config = tiny_config("gemma3")  # alternating windows: layers repeat in pairs
    config.num_hidden_layers = NUM_LAYERS
    config.layer_types = ["sliding_attention", "full_attention"] * (NUM_LAYERS // 2)
    return camshaft.trace(random_model(config))


@pytest.fixture(scope="module")
def compiled(captured: Program) -> Program:
    return PassManager(decoder_passes(block_size=16)).run(captured)


def chain(*titles: str) -> list[Box]:
    return [Box(title, "", "other", (i - 1,) if i else ()) for i, title in enumerate(titles)]


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def frames(svg: str) -> list[str]:
    return [text for text in texts(svg) if text.startswith("×")]


def test_folds_equal_layers() -> None:
    assert find_folds(chain("in", *["a", "b", "c"] * 5, "out")) == [Fold(1, 3, 5)]


def test_folds_two_different_stacks() -> None:
    boxes = chain("in", *["a", "b"] * 4, "turn", *["c", "d", "e"] * 3, "out")
    assert find_folds(boxes) == [Fold(1, 2, 4), Fold(10, 3, 3)]


def test_first_copy_may_read_something_else() -> None:
    # a residual: each copy adds what the copy before it gave, the first one the input
    boxes = [Box("in", "", "input")]
    for _ in range(4):
        begin = len(boxes) - 1
        boxes += [Box("linear", "", "linear", (begin,)), Box("add", "", "other", (begin, begin + 1))]
    assert find_folds(boxes) == [Fold(1, 2, 4)]


def test_differing_edges_do_not_fold() -> None:
    boxes = chain("in", *["a", "b"] * 3)
    boxes[4] = replace(boxes[4], inputs=(0,))
    boxes[6] = replace(boxes[6], inputs=(1,))
    assert find_folds(boxes) == []


def test_no_fold_in_a_short_graph() -> None:
    assert find_folds(chain("a", "b", "a", "b")) == []
    assert find_folds([]) == []


def test_boxes_do_not_overlap() -> None:
    boxes = [Box("in", "", "input"), *(Box(f"wide box {i}", "detail", "linear", (0,)) for i in range(6))]
    boxes.append(Box("join", "", "other", tuple(range(7))))
    root = ElementTree.fromstring(draw(boxes))
    rects = [group.find(f"{SVG}rect") for group in root.iter(f"{SVG}g")]
    spans = [(r.get("y"), float(r.get("x", 0)), float(r.get("width", 0))) for r in rects if r is not None]
    for row in {y for y, _, _ in spans}:
        xs = sorted((x, width) for y, x, width in spans if y == row)
        assert all(x + width < following for (x, width), (following, _) in zip(xs, xs[1:]))


def test_too_many_boxes_give_a_note() -> None:
    svg = draw(chain(*[f"n{i}" for i in range(MAX_BOXES + 1)]))
    assert texts(svg) == [f"{MAX_BOXES + 1} boxes are too many to draw (limit {MAX_BOXES})"]
    assert texts(draw([])) == ["nothing to draw"]


def test_captured_program(captured: Program) -> None:
    svg = program_svg(captured)
    assert "embedding" in texts(svg) and "linear q_proj" in texts(svg)
    assert [t for t in texts(svg) if t.startswith("attention")] == [
        "attention window 16",
        "attention",
    ]  # the pair that repeats
    assert frames(svg) == [f"× {NUM_LAYERS // 2}"]


def test_compiled_program(compiled: Program) -> None:
    svg = program_svg(compiled)
    shown = texts(svg)
    assert {"paged_attention", "paged_attention window 16", "linear q_proj+k_proj+v_proj"} <= set(shown)
    assert {"token_ids", "positions", "sample_rows", "output"} <= set(shown)
    assert frames(svg) == [f"× {NUM_LAYERS // 2}"]
    assert not any("k_cache" in text or "seq_lens" in text for text in shown)


def test_boxes_are_in_topological_order(compiled: Program) -> None:
    boxes = program_boxes(compiled)
    assert all(j < i for i, box in enumerate(boxes) for j in box.inputs)


def test_program_html(compiled: Program) -> None:
    page = program_html(compiled)
    assert compiled._repr_html_() == page
    assert f"{NUM_LAYERS} layers (full, window 16), blocks of 16" in page
    assert f"{len(compiled.history)} passes" in page and "<svg" in page
    assert page.count("<tr>") > len(compiled.graph.nodes)
    assert "model.layers.0.self_attn.q_proj.weight+k_proj+v_proj" in node_table_html(compiled)


def test_names_are_escaped(captured: Program) -> None:
    name = '<script>alert("x")</script> & more'
    program = replace(captured.clone(), name=name)
    assert "<script" not in program_html(program)
    assert ElementTree.fromstring(program_svg(program)).findtext(f"{SVG}title") == name
    box = Box("<b>", "a & b", "other", (), "</title><script>")
    assert texts(draw([box])) == ["<b>", "a & b"]


def test_program_without_passes_or_weights() -> None:
    class Add(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    from camshaft.graph.capture import capture

    program = capture(Add(), (torch.zeros(2),), weights={}, kind="module", name="add")
    assert "passes" not in program_html(program)
    assert texts(program_svg(program)) == ["x", "f32[2]", "add", "f32[2]", "output"]


RECORDS = (
    PassRecord(name="a", stage="fuse", num_matches=3, seconds=0.0125, nodes_before=10, nodes_after=8, fingerprint="0"),
    PassRecord(
        name="<b>",
        stage="cache",
        num_matches=0,
        seconds=0.5,
        nodes_before=8,
        nodes_after=8,
        fingerprint="0",
        max_error=0.0,
    ),
)


def test_pass_table_text() -> None:
    assert pass_table_text(RECORDS[:1]).splitlines() == [
        "#  pass  stage  matches   nodes    ms",
        "1  a     fuse         3  10 → 8  12.5",
    ]
    last = str(PassTable(RECORDS)).splitlines()[-1]
    assert last == "2  <b>   cache        0   8 → 8  500.0   0.00e+00"
    assert pass_table_text(()) == "#  pass  stage  matches  nodes  ms"


def test_pass_table_is_a_sequence() -> None:
    table = PassTable(RECORDS)
    assert len(table) == 2 and table[0] is RECORDS[0] and list(table[1:]) == [RECORDS[1]]
    assert "&lt;b&gt;" in table._repr_html_() and "<b>" not in table._repr_html_()
