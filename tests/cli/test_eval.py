"""`camshaft eval` on a tiny random model: the table, the document, the page, and what is refused before anything is built."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from camshaft.passes.quantization.recipe import Recipe
from camshaft.runtime.bench.charts import Bubble, bubble_chart
from camshaft.runtime.evaluate.comparison import parse_variants
from camshaft.runtime.evaluate.report import report_html, result_table
from runtime.evaluate.tiny import make_model

from camshaft.cli.app import run

TEXT = (
    "The quick brown fox jumps over the lazy dog.\fPack my box with five dozen liquor jugs!\fGrüße aus München, naïve café. "
    * 2
)
ITEMS = [
    {"context": "The quick brown", "choices": [" fox", " dog"], "answer": 0},
    {"context": "Pack my box with", "choices": [" six", " five"], "answer": 1},
]
BUILD = (
    "--target", "eager", "--device", "cpu", "--max-seq-len", "64", "--max-batch-tokens", "48", "--max-sequences", "4",
)  # fmt: skip
SPEED = ("--batch", "3", "--input-len", "8", "--output-len", "4", "--repeat", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("eval") / "tiny"
    make_model(path)
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(text, task)"""
    folder = tmp_path_factory.mktemp("files")
    text, task = folder / "text.txt", folder / "animals.jsonl"
    text.write_text(TEXT, encoding="utf-8")
    task.write_text("\n".join(map(json.dumps, ITEMS)), encoding="utf-8")
    return text, task


@pytest.fixture(scope="module")
def evaluated(
    model: str, files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """(folder of the written files, the document)."""
    folder = tmp_path_factory.mktemp("out")
    text, task = files
    arguments = ("--text", str(text), "--tasks", str(task), "--context", "24", "--group", "32", *BUILD, *SPEED)
    outputs = ("-o", str(folder / "r.html"), "-o", str(folder / "r.json"), "--engines", str(folder / "engines"))
    assert run(["eval", model, "--recipes", "int8,int4+kv_fp8", *arguments, *outputs]) == 0
    return folder, json.loads((folder / "r.json").read_text())


def test_document(evaluated: tuple[Path, dict[str, Any]]) -> None:
    folder, document = evaluated
    plain, int8, int4 = document["results"]
    assert [entry["recipe"] for entry in document["results"]] == ["none", "int8", "int4+kv_fp8"]
    assert document["kind"] == "camshaft-eval" and document["text"]["context"] == 24
    assert "divergence" not in plain and plain["text"]["num_tokens"] == document["text"]["num_tokens"] > 50
    assert int4["divergence"]["kl_mean"] > int8["divergence"]["kl_mean"] > 0
    assert 0 < int4["divergence"]["top1_agreement"] < 1
    ratio = int8["text"]["perplexity"] / plain["text"]["perplexity"]
    assert int8["divergence"]["perplexity_ratio"] == pytest.approx(ratio, rel=1e-6)
    assert plain["weights_bytes"] > int8["weights_bytes"] > int4["weights_bytes"]
    assert all(entry["artifact_bytes"] > entry["weights_bytes"] for entry in document["results"])
    assert int4["options"] == {"kv_cache_dtype": "fp8", "quantize": "int4", "group": 32, "calibration": False}
    assert int4["kv_cache_dtype"] == "fp8" and int4["kv_bytes_per_token"] == plain["kv_bytes_per_token"] / 4
    assert plain["tasks"][0]["name"] == "animals" and set(plain["tasks"][0]["metrics"]) >= {"acc", "acc_norm_stderr"}
    assert int8["speed"]["batch"] == 3 and int8["speed"]["batch_tok_s"] > 0 and int8["speed"]["batch_1_tok_s"] > 0
    assert sorted(path.name for path in (folder / "engines").iterdir()) == ["int4+kv_fp8", "int8", "none"]


def test_page(evaluated: tuple[Path, dict[str, Any]]) -> None:
    folder, document = evaluated
    page = (folder / "r.html").read_text(encoding="utf-8")
    assert page == report_html(document)
    for chart in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        circles = ElementTree.fromstring(chart).iter("{http://www.w3.org/2000/svg}circle")
        assert all(
            0 <= float(circle.attrib["cx"]) <= 560 and 0 <= float(circle.attrib["cy"]) <= 300 for circle in circles
        )
    assert page.count("<svg") == 1 and page.count("<circle") == 3 and "quantized: " in page
    columns, rows = result_table(document)
    assert columns == [
        "recipe", "perplexity", "increase", "KL mean", "KL median", "KL p99", "top-1", "animals acc", "animals acc_norm",
        "weights MB", "engine MB", "tok/s at 1", "tok/s at 3",
    ]  # fmt: skip
    assert rows[0][2] == "-" and "±" in rows[1][2] and rows[0][-1].endswith("(1.00x)") and rows[0][7].count("±") == 1
    assert "±" not in str(result_table(document, brief=True))


def test_an_engine_alone(
    evaluated: tuple[Path, dict[str, Any]], files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, document = evaluated
    engine = str(folder / "engines" / "int8")
    assert (
        run(["eval", engine, "--text", str(files[0]), "--context", "24", "--no-speed", "--no-artifact", "--json"]) == 0
    )
    found = json.loads(capsys.readouterr().out)["results"][0]
    assert found["text"]["perplexity"] == pytest.approx(document["results"][1]["text"]["perplexity"], rel=1e-6)
    assert found["artifact_bytes"] is None and "speed" not in found and "divergence" not in found
    assert run(["eval", engine, "--text", str(files[0]), "--recipes", "int8"]) == 1
    assert "built already, so --recipes cannot be changed" in capsys.readouterr().err


def test_what_is_refused_before_a_build(
    model: str, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, empty, task = str(files[0]), tmp_path / "empty.txt", tmp_path / "task.jsonl"
    empty.write_text(" \f\n")
    task.write_text(json.dumps(ITEMS[0]) + "\n" + json.dumps({"question": "?"}))
    for arguments, message in (
        (["--text", text, "--recipes", "int3"], "recipe 'int3' is unknown; known: none, fp8"),
        (["--text", text, "--recipes", "int8,int8"], "each may be given once"),
        (["--text", text, "--recipes", "int8+kv_int2"], "recipe 'int8+kv_int2' ends in +kv_int2; allowed"),
        (["--text", text, "--recipes", "int4_awq"], "recipe int4_awq needs calibration data"),
        (["--text", text, "--recipes", "missing.json"], "recipe file missing.json cannot be read"),
        (["--text", str(empty)], "the text is empty"),
        (["--text", str(tmp_path / "none.txt")], "--text"),
        (["--text", text, "--max-tokens", "100"], "max_tokens is 100 and context 512"),
        (["--tasks", str(task)], "line 2: the item has fields question"),
        (["--text", text, "-o", "report.pdf"], "report.pdf ends in .pdf; allowed: .html or .json"),
        (["--text", text, "-o", str(tmp_path / "no" / "r.json")], "is no directory"),
        ([], "what shall be scored?"),
    ):
        assert run(["eval", model, *arguments]) == 1, arguments
        assert message in capsys.readouterr().err.replace("\n", " "), arguments


def test_a_recipe_that_fails_leaves_the_others(
    model: str, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("-o", str(tmp_path / "r.json"), "-o", str(tmp_path / "r.html"))
    arguments = ("--text", str(files[0]), "--context", "24", "--no-speed", "--no-artifact", *BUILD, *out)
    assert run(["eval", model, "--recipes", "none,int4", *arguments]) == 1  # groups of 128 do not divide 64
    document = json.loads((tmp_path / "r.json").read_text())
    assert [entry["recipe"] for entry in document["results"]] == ["none"]
    assert document["failed"][0]["recipe"] == "int4" and "ValueError" in document["failed"][0]["error"]
    assert "int4 failed: " in (tmp_path / "r.html").read_text()
    assert "failed: int4" in capsys.readouterr().out


def test_a_text_shorter_than_the_context(
    model: str, files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--recipes", "none", "--context", "62", "--no-speed", "--no-artifact", *BUILD)
    short = files[0].with_name("short.txt")
    short.write_text("The quick brown fox.")
    assert run(["eval", model, "--text", str(short), *arguments]) == 1
    assert "and context is 62; allowed: more tokens than the context" in capsys.readouterr().err.replace("\n", " ")


def test_variants(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps(Recipe.named("int4").with_group(32).to_json()))
    plain, int4, own, fp8 = parse_variants(["int4_gptq", "none", str(path), "fp8+kv_fp8"], group=64, calibration="text")
    assert (plain.name, plain.options) == ("none", {})
    assert int4.options == {"quantize": "int4_gptq", "group": 64, "calibration": "text"}
    assert own.options["quantize"] == Recipe.named("int4").with_group(32) and own.options["group"] == 64
    assert fp8.options == {"kv_cache_dtype": "fp8", "quantize": "fp8", "calibration": "text"}  # for the cache
    assert parse_variants(["none+kv_fp8"])[1].options == {"kv_cache_dtype": "fp8"}
    assert parse_variants(["int4_awq"], has_calibration=True)[1].options == {"quantize": "int4_awq"}


def test_bubbles_of_one_point_and_below_zero() -> None:
    for bubbles in ([Bubble("a", 0.0, 0.0)], [Bubble("a<b", 3.0, -1.5, 2.0), Bubble("c", 9.0, 4.0, 8.0, "fast")]):
        chart, legend = bubble_chart("t", bubbles, x_label="x", y_label="y").split("</svg>")
        drawn = ElementTree.fromstring(chart + "</svg>")
        assert all(html.escape(bubble.name) in legend for bubble in bubbles)
        circles = list(drawn.iter("{http://www.w3.org/2000/svg}circle"))
        assert len(circles) == len(bubbles)
        assert all(34 <= float(circle.attrib["cy"]) <= 254 for circle in circles)
